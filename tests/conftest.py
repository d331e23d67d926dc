"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.threads import COMPUTE_ENVIRONMENT
from tests.media import make_media
from tests.ray_cluster import ray_cluster
from tests.stores import data_dir, embedded_redis, publisher, redis_params

# Before any test imports torch: see COMPUTE_ENVIRONMENT.
os.environ.update(COMPUTE_ENVIRONMENT)

__all__ = ["data_dir", "embedded_redis", "publisher", "ray_cluster", "redis_params"]


@pytest.fixture(scope="session")
def media(pytestconfig: pytest.Config) -> Path:
    """The folder with the project's own media; made once and kept in pytest's cache."""
    assert pytestconfig.cache is not None
    return make_media(pytestconfig.cache.mkdir("media"))


@pytest.fixture(scope="session")
def speech(media: Path) -> Path:
    """40 s of English sentences with pauses, 16 kHz mono WAV; `speech.with_suffix('.txt')` holds the words."""
    return media / "demo.wav"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread: on a machine that does other things, small products wait for a second one more than they
    gain by it."""
    import torch  # noqa: PLC0415 - most tests need none of it

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
