from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from actors.bench.media import write_wav
from actors.bench.memory import (
    MemoryOptions,
    MemoryReport,
    MemorySample,
    measure_stream_memory,
    run_memory,
    select_moments,
)
from actors.bench.processes import Memory, measure_memory
from actors.settings import Settings
from pipeline.errors import ConfigError, MediaError, ServiceError
from pipeline.models.weights import ModelParams
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    tiny = str(save_tiny(tmp_path_factory.mktemp("tiny"), init_std=0.6))
    return Settings(runtime="local", model=ModelParams(name=tiny, encoder_threads=1, decoder_threads=1))


def samples(resident: list[int]) -> list[MemorySample]:
    """One sample at every second of the sound."""
    return [
        MemorySample(float(second), Memory(value, value // 2, {"python": value}))
        for second, value in enumerate(resident)
    ]


def report(early: int, late: int) -> MemoryReport:
    first, last = Memory(early, early, {"python": early}), Memory(late, late, {"python": late - 1, "redis": 1})
    return MemoryReport("local", "m", 60.0, 9.0, 10.0, 5.0, 3, 60, first, last, last, is_whole_service=True)


def test_memory_is_the_median_early_and_late_and_the_highest_of_all() -> None:
    resident = [*[9] * 10, 100, 900, 102, 101, 100, *[500] * 40, 300, 104, 1, 103, 105]
    options = MemoryOptions(Path("a.wav"), media_s=60, early_s=10, window_s=5)
    early, late, peak = select_moments(samples(resident), options)
    assert (early.resident_bytes, late.resident_bytes, peak.resident_bytes) == (101, 104, 900)


def test_a_stream_that_passed_between_two_samples_is_not_judged() -> None:
    options = MemoryOptions(Path("a.wav"), media_s=60, early_s=10, window_s=5)
    whole = samples([1] * 60)
    with pytest.raises(ServiceError, match="none of 2 samples fell into the early part"):
        select_moments([whole[0], whole[59]], options)
    with pytest.raises(ServiceError, match="none of 20 samples fell into the late part"):
        select_moments(whole[:20], options)


@pytest.mark.parametrize(("late", "is_flat"), [(900, True), (1_050, True), (1_051, False)])
def test_memory_is_flat_up_to_five_percent(late: int, is_flat: bool) -> None:
    assert report(1_000, late).is_flat is is_flat
    assert report(1_000, late).to_json()["is_flat"] is is_flat


def test_a_stream_without_an_early_and_a_late_part_is_refused(speech: Path) -> None:
    with pytest.raises(ConfigError, match="give at least 240 s"):
        run_memory(MemoryOptions(speech, media_s=239))


async def test_a_long_stream_is_measured_over_all_processes_of_the_service(settings: Settings, speech: Path) -> None:
    told: list[str] = []
    options = MemoryOptions(
        speech, settings, media_s=80.0, early_s=10.0, window_s=30.0, period_s=0.02, max_growth_percent=200.0
    )
    result = await measure_stream_memory(options, told.append)
    figures = json.loads(json.dumps(result.to_json()))
    assert figures["media_s"] == 80
    assert figures["num_finals"] >= 10
    assert figures["is_flat"]
    assert figures["counts_every_process"]
    assert figures["resident_mib_peak"] >= max(figures["resident_mib_early"], figures["resident_mib_end"]) > 0
    assert figures["private_mib_end"] < figures["resident_mib_end"]
    assert any("valkey" in name or "redis" in name for name in figures["private_mib_by_process"])
    # The process that decodes the media lasts longer than what is measured.
    assert all(figures["private_mib_by_process"]["python"][moment] > 0 for moment in ("early", "end"))
    assert any(text.endswith("s heard") for text in told)
    output = io.StringIO()
    Console(file=output, width=120).print(result)
    assert "resident memory grew by" in output.getvalue()


async def test_a_stream_without_speech_is_not_judged(settings: Settings, tmp_path: Path) -> None:
    write_wav(tmp_path / "silence.wav", np.zeros(16_000, np.int16))
    options = MemoryOptions(tmp_path / "silence.wav", settings, media_s=3, early_s=1, window_s=1, period_s=0.01)
    with pytest.raises(MediaError, match="nothing was said"):
        await measure_stream_memory(options)


async def test_memory_of_child_processes_is_counted_and_named() -> None:
    program = "import sys; held = b'x' * 30_000_000; print('ready', flush=True); sys.stdin.read()"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"ready\n"
    memory = measure_memory([child.pid])
    await child.communicate(b"")
    assert memory.resident_bytes >= memory.private_bytes >= 30_000_000
    assert sum(memory.private_bytes_by_name.values()) == memory.private_bytes
    assert measure_memory([child.pid]).resident_bytes == 0
