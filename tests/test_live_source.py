"""`LiveSource`: what is put comes out, newest connection first, holes declared, nothing without a bound."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from ingest.live_source import MAX_WAITING_FRAMES, LiveSource
from ingest.source import AudioBlock, SourceGap, SourceInfo, SourceItem, VideoFrame
from pipeline.errors import MediaError, SenderReplaced

INFO = SourceInfo(1, 48_000, 1, None, "live", "pcm")


class Clock:
    """Seconds, set by the test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def block(num_samples: int = 320, value: int = 1) -> AudioBlock:
    return AudioBlock(np.full((1, num_samples), value, np.int16))


def frame(start_sample: int) -> VideoFrame:
    return VideoFrame(start_sample, np.zeros((2, 2, 3), np.uint8))


async def rest_of(source: LiveSource) -> list[SourceItem]:
    return [item async for item in source]


def told(items: list[SourceItem]) -> list[tuple[str, int]]:
    """What came, in short: sound by its value, gaps by their length, frames by their time."""
    short: list[tuple[str, int]] = []
    for item in items:
        match item:
            case AudioBlock(samples):
                short.append(("sound", int(samples[0, 0])))
            case SourceGap(num_samples):
                short.append(("gap", num_samples))
            case VideoFrame(start_sample):
                short.append(("frame", start_sample))
    return short


async def test_what_is_put_comes_out_in_order_and_a_sender_that_ends_ends_it() -> None:
    source = LiveSource(INFO)
    connection = source.connect()
    await connection.put(block(value=1))
    await connection.put(frame(320))
    await connection.put(SourceGap(4_000, "lost"))
    await connection.put(block(value=2))
    source.end()
    assert source.num_nonfinite is None
    assert told(await rest_of(source)) == [("sound", 1), ("frame", 320), ("gap", 4_000), ("sound", 2)]
    assert source.position == 320 + 4_000 + 320
    assert source.num_nonfinite == 0
    with pytest.raises(SenderReplaced, match="has ended"):
        await connection.put(block())


async def test_the_newest_connection_takes_over_and_the_time_between_is_a_gap() -> None:
    clock = Clock()
    source = LiveSource(INFO, clock=clock)
    first = source.connect()
    await first.put(block(value=1))
    clock.now_s += 3.0
    second = source.connect()
    assert first.replaced.is_set()
    with pytest.raises(SenderReplaced, match="newer connection"):
        await first.put(block())
    clock.now_s += 1.02
    await second.put(block(value=2))
    first.disconnect()
    await second.put(block(value=3))
    source.end()
    assert told(await rest_of(source)) == [("sound", 1), ("gap", 64_000), ("sound", 2), ("sound", 3)]


async def test_a_sender_that_goes_on_leaves_no_gap_and_a_short_pause_is_none() -> None:
    clock = Clock()
    source = LiveSource(INFO, clock=clock)
    await source.connect().put(block(value=1))
    clock.now_s += 60.0
    await source.connect(goes_on=True).put(block(value=2))
    clock.now_s += 0.1
    await source.connect().put(block(value=3))
    source.end()
    assert told(await rest_of(source)) == [("sound", 1), ("sound", 2), ("sound", 3)]


async def test_a_sender_who_comes_back_too_late_fails_the_stream() -> None:
    clock = Clock()
    source = LiveSource(INFO, max_gap_ms=10_000, clock=clock)
    await source.connect().put(block(value=1))
    clock.now_s += 60.0
    with pytest.raises(SenderReplaced):
        await source.connect().put(block(value=2))
    assert told([await anext(source)]) == [("sound", 1)]
    with pytest.raises(MediaError, match="nobody sent for 60 s"):
        await anext(source)
    assert source.num_nonfinite is None


async def test_a_stream_that_nobody_sends_ends_by_itself() -> None:
    source = LiveSource(INFO, reconnect_timeout_s=0.01)
    assert await rest_of(source) == []
    with pytest.raises(SenderReplaced, match="has ended"):
        source.connect()
    left = LiveSource(INFO, reconnect_timeout_s=0.01)
    connection = left.connect()
    reading = asyncio.create_task(rest_of(left))
    await connection.put(block(value=7))
    connection.disconnect()
    assert told(await reading) == [("sound", 7)]


async def test_too_much_sound_waits_with_its_sender() -> None:
    source = LiveSource(INFO, max_waiting_ms=100)
    connection = source.connect()
    for _ in range(6):
        await connection.put(block())
    waiting = asyncio.create_task(connection.put(block(value=9)))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert told([await anext(source)]) == [("sound", 1)]
    await waiting
    held = asyncio.create_task(connection.put(block()))
    await asyncio.sleep(0)
    newer = source.connect()
    with pytest.raises(SenderReplaced, match="newer connection"):
        await held
    late = asyncio.create_task(newer.put(block()))
    await asyncio.sleep(0)
    async with source:
        pass
    with pytest.raises(SenderReplaced, match="has ended"):
        await late


async def test_of_many_frames_the_newest_are_kept() -> None:
    source = LiveSource(INFO)
    connection = source.connect()
    for index in range(MAX_WAITING_FRAMES + 3):
        await connection.put(frame(index))
        await connection.put(block(value=index))
    source.end()
    found = told(await rest_of(source))
    assert [index for kind, index in found if kind == "frame"] == list(range(3, MAX_WAITING_FRAMES + 3))
    assert [index for kind, index in found if kind == "sound"] == list(range(MAX_WAITING_FRAMES + 3))


@pytest.mark.parametrize(
    "item",
    [
        AudioBlock(np.zeros((2, 10), np.int16)),
        AudioBlock(np.zeros((1, 0), np.int16)),
        AudioBlock(np.zeros((1, 10), np.float32)),  # type: ignore[arg-type]
        SourceGap(0, "nothing"),
    ],
)
async def test_what_does_not_belong_there_is_refused(item: SourceItem) -> None:
    with pytest.raises(ValueError, match=r"block of|gap of"):
        await LiveSource(INFO).connect().put(item)
