"""The whole service on Ray against the sample-driven oracle: the same records, field by field."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from actors.follow import follow
from actors.spec import StreamSpec
from actors.store import Store
from pipeline.local import LocalModels, caption_samples
from pipeline.records import BaseRecord
from pipeline.timebase import SAMPLE_RATE_HZ
from tests.media import read_pcm, write_pcm
from tests.models import base_encoder, base_engine
from tests.ray_cluster import RayCluster
from tests.stores import comparable, kill_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def store(ray_cluster: RayCluster):
    async with Store(ray_cluster.settings.redis) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first sentences of the demo speech, 16 kHz: nothing is resampled on its way."""
    return write_pcm(tmp_path_factory.mktemp("clip") / "clip.wav", read_pcm(speech)[: 10 * SAMPLE_RATE_HZ])


@pytest.fixture(scope="module")
def oracle(clip: Path, ray_cluster: RayCluster) -> list[BaseRecord]:
    params = spec_of(clip, "oracle").stream_params(ray_cluster.settings.stream_params())
    return caption_samples(np.atleast_2d(read_pcm(clip)), params, LocalModels(base_encoder(), base_engine()))


def spec_of(clip: Path, stream_id: str) -> StreamSpec:
    return StreamSpec(
        source=str(clip),
        stream_id=stream_id,
        pace="fast",
        scheduling="by_sample",
        translate_to=("en",),
        summary_minutes=0.1,
    )


async def caption(cluster: RayCluster, store: Store, clip: Path, stream_id: str) -> list[BaseRecord]:
    await cluster.gateway.start_stream(spec_of(clip, stream_id))
    client = store.client()
    try:
        return [entry.record async for entry in follow(client, stream_id)]
    finally:
        await client.aclose()


async def test_ray_publishes_what_the_oracle_says(ray_cluster: RayCluster, store: Store, clip: Path, oracle):
    records = await caption(ray_cluster, store, clip, "parity")
    assert {record.kind for record in oracle} == {"health", "partial", "final", "translation", "summary"}
    for kind in ("final", "partial", "translation", "summary", "health"):
        assert comparable(records, kind) == comparable(oracle, kind)


async def test_streams_that_run_together_on_ray_equal_each_alone(
    ray_cluster: RayCluster, store: Store, clip: Path, oracle
):
    together = await asyncio.gather(*(caption(ray_cluster, store, clip, f"together-{n}") for n in range(3)))
    for records in together:
        for kind in ("final", "partial", "translation"):
            assert comparable(records, kind) == comparable(oracle, kind)


async def test_records_are_the_same_when_the_store_is_killed_midway(
    ray_cluster: RayCluster, store: Store, clip: Path, oracle
):
    await ray_cluster.gateway.start_stream(spec_of(clip, "killed"))
    client = store.client()
    records: list[BaseRecord] = []
    killed_pid: int | None = None
    async for entry in follow(client, "killed", revive_store=store.ensure_running):
        records.append(entry.record)
        if killed_pid is None and entry.record.kind == "partial":
            killed_pid = await asyncio.to_thread(kill_server, ray_cluster.settings.redis.data_dir)
    await client.aclose()
    assert killed_pid is not None
    for kind in ("final", "partial", "translation", "health"):
        assert comparable(records, kind) == comparable(oracle, kind)
