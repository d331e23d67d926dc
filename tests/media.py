"""The project's own media, and readers and writers for tests. Needs flite, espeak-ng and sox."""

from __future__ import annotations

import importlib.util
import sys
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_media.py"


def make_media(folder: Path) -> Path:
    """Fill `folder` with scripts/make_media.py (nothing is made twice) and return it."""
    spec = importlib.util.spec_from_file_location("make_media", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name while it is executed
    spec.loader.exec_module(module)
    module.make_media(folder)
    return folder


def read_pcm(path: Path) -> NDArray[np.int16]:
    """Return the samples of a 16 kHz, 16 bit WAV file: int16[n] for mono, int16[channels, n] else."""
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getsampwidth()) == (16_000, 2), f"{path} is not 16 kHz, 16 bit"
        interleaved = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        num_channels = file.getnchannels()
    return interleaved.copy() if num_channels == 1 else np.ascontiguousarray(interleaved.reshape(-1, num_channels).T)


def write_pcm(path: Path, samples: NDArray[np.int16], *, rate_hz: int = 16_000) -> Path:
    """Write int16[n] or int16[channels, n] as a WAV file and return its path."""
    planes = np.atleast_2d(samples)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(planes.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(np.ascontiguousarray(planes.T).tobytes())
    return path
