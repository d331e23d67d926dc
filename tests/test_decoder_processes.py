"""Decoding processes and the zygotes they are copies of: what they share, and what a crash of one changes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from ingest.container import ContainerSource, Pace
from ingest.processes import DecoderProcesses
from ingest.source import AudioBlock, AudioParams
from pipeline.errors import MediaError


@pytest_asyncio.fixture
async def processes() -> AsyncIterator[DecoderProcesses]:
    async with DecoderProcesses() as opened:
        yield opened


def zygote_of(source: ContainerSource) -> int:
    assert source.worker_pid is not None
    return psutil.Process(source.worker_pid).ppid()


def descriptors_of(source: ContainerSource) -> list[str]:
    return [str(link.readlink()) for link in Path(f"/proc/{source.worker_pid}/fd").iterdir()]


async def num_samples_of(source: ContainerSource) -> int:
    return sum([item.samples.shape[1] async for item in source if isinstance(item, AudioBlock)])


def test_a_source_costs_no_start_of_an_interpreter(speech: Path) -> None:
    async def play_some() -> None:
        async with DecoderProcesses() as processes:
            cpu_s = []
            for _ in range(3):
                async with ContainerSource(speech, pace=Pace.FAST, processes=processes) as source:
                    zygote = psutil.Process(zygote_of(source))
                    await anext(source)
                times = zygote.cpu_times()  # its own, and those of the copies that have ended
                cpu_s.append(times.user + times.system + times.children_user + times.children_system)
            assert cpu_s[2] - cpu_s[0] < cpu_s[0], "two copies cost more than the zygote and its first copy"

    asyncio.run(play_some())


async def test_sources_share_a_zygote_and_nothing_else(processes: DecoderProcesses, speech: Path) -> None:
    async with (
        ContainerSource(speech, processes=processes) as one,
        ContainerSource(speech, pace=Pace.FAST, processes=processes) as other,
    ):
        assert zygote_of(one) == zygote_of(other) != os.getpid()
        assert one.worker_pid != other.worker_pid
        for descriptors in (descriptors_of(one), descriptors_of(other)):
            sockets = [link for link in descriptors if link.startswith("socket:")]
            assert len(sockets) == 1, "its own connection and no other"
            assert sum(link.endswith(speech.name) for link in descriptors) == 1
        alone = await num_samples_of(other)
        assert alone == round((other.info.duration_s or 0) * 16_000)
        await anext(one)


async def test_a_source_that_was_left_does_not_cost_the_zygote_its_trust(
    processes: DecoderProcesses, speech: Path
) -> None:
    zygotes = set()
    for _ in range(3):
        async with ContainerSource(speech, processes=processes) as source:
            await anext(source)
            zygotes.add(zygote_of(source))
    assert len(zygotes) == 1


async def test_after_a_crash_others_play_on_and_the_next_source_has_another_zygote(
    processes: DecoderProcesses, speech: Path
) -> None:
    async with (
        ContainerSource(speech, pace=Pace.FAST, processes=processes) as crashing,
        ContainerSource(speech, pace=Pace.FAST, processes=processes) as other,
    ):
        first = zygote_of(other)
        assert crashing.worker_pid is not None
        os.kill(crashing.worker_pid, signal.SIGSEGV)
        with pytest.raises(MediaError, match="killed by signal 11"):
            await num_samples_of(crashing)
        async with ContainerSource(speech, pace=Pace.FAST, processes=processes) as later:
            assert zygote_of(later) != first
            assert await num_samples_of(later) == await num_samples_of(other)
    async with ContainerSource(speech, pace=Pace.FAST, processes=processes) as last:
        assert zygote_of(last) != first
        os.kill(zygote_of(last), signal.SIGKILL)  # makes room for a third, which takes leave of those before it
        with pytest.raises(MediaError, match="killed by signal 9"):
            await num_samples_of(last)
    async with ContainerSource(speech, processes=processes) as source:
        await anext(source)
    assert not psutil.pid_exists(first)


async def test_a_zygote_that_was_killed_is_replaced(processes: DecoderProcesses, speech: Path) -> None:
    async with ContainerSource(speech, processes=processes) as source:
        zygote = zygote_of(source)
    os.kill(zygote, signal.SIGKILL)
    async with ContainerSource(speech, pace=Pace.FAST, processes=processes) as source:
        assert zygote_of(source) != zygote
        assert await num_samples_of(source)


async def test_sources_that_open_at_once_get_what_is_theirs(
    processes: DecoderProcesses, speech: Path, media: Path
) -> None:
    paths = [speech, media / "two_voices.wav", media / "german.wav"] * 3

    async def play(path: Path) -> tuple[float | None, int]:
        async with ContainerSource(path, pace=Pace.FAST, processes=processes) as source:
            return source.info.duration_s, await num_samples_of(source)

    played = await asyncio.gather(*(play(path) for path in paths))
    assert played[:3] == played[3:6] == played[6:]
    assert all(round((duration_s or 0) * 16_000) == num_samples for duration_s, num_samples in played)


async def test_closing_ends_every_process(speech: Path) -> None:
    async with DecoderProcesses() as processes:
        source = await ContainerSource(speech, processes=processes).__aenter__()
        pids = [source.worker_pid, zygote_of(source)]
    with pytest.raises(MediaError, match="ended in the middle"):
        await num_samples_of(source)
    await source.__aexit__(None, None, None)
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)


async def test_a_request_that_is_nonsense_ends_its_own_process_only(processes: DecoderProcesses, speech: Path) -> None:
    process = await processes.open(b"{")
    assert await process.read(100) == b""
    assert await process.wait() == 1
    await process.aclose()
    request = {"location": str(speech), "params": AudioParams().model_dump(mode="json")}
    process = await processes.open(json.dumps(request).encode())
    assert (await process.read(1))[:1] == b"I"
    await process.aclose()
    await process.aclose()


async def test_processes_are_asked_for_inside_the_context_only() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await DecoderProcesses().open(b"{}")
