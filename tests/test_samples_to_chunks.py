from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.items import Chunk, Gap
from pipeline.timebase import CHUNK_SAMPLES


def noise(num_channels: int, num_samples: int, seed: int = 1) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-32_768, 32_768, (num_channels, num_samples), np.int16)


def joined(chunks: list[Chunk], channel: int) -> NDArray[np.int16]:
    return np.concatenate([chunk.samples for chunk in chunks if chunk.channel == channel])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4_000), max_size=12), st.integers(1, 3), st.integers(0, 3))
def test_chunks_hold_the_samples_however_they_were_split(sizes: list[int], num_channels: int, first_index: int) -> None:
    samples = noise(num_channels, sum(sizes))
    stage = SamplesToChunks(num_channels, first_index * CHUNK_SAMPLES)
    chunks: list[Chunk] = []
    start = 0
    for size in sizes:
        chunks += stage.push(samples[:, start : start + size])
        start += size
        assert stage.end_sample == first_index * CHUNK_SAMPLES + start
        assert len(chunks) == start // CHUNK_SAMPLES * num_channels, "a complete chunk was held back"
    chunks += stage.flush()

    num_chunks = -(-start // CHUNK_SAMPLES)
    order = [(first_index + index, channel) for index in range(num_chunks) for channel in range(num_channels)]
    assert [(chunk.index, chunk.channel) for chunk in chunks] == order
    assert all(chunk.samples.shape == (CHUNK_SAMPLES,) and chunk.samples.dtype == np.int16 for chunk in chunks)
    for channel in range(num_channels if chunks else 0):
        whole = joined(chunks, channel)
        assert np.array_equal(whole[:start], samples[channel])
        assert not whole[start:].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4_000)), max_size=12))
def test_gaps_keep_the_clock_and_are_counted_where_they_lie(runs: list[tuple[bool, int]]) -> None:
    stage = SamplesToChunks(2)
    items: list[Chunk | Gap] = []
    is_lost: list[bool] = []
    heard: list[NDArray[np.int16]] = [np.zeros((2, 0), np.int16)]
    gaps: list[Gap] = []
    for seed, (lost, size) in enumerate(runs):
        start = len(is_lost)
        is_lost += [lost] * size
        if lost:
            gaps.append(Gap(start, start + size, "test"))
            heard.append(np.zeros((2, size), np.int16))
            items += stage.push_gap(size, "test")
        else:
            heard.append(noise(2, size, seed))
            items += stage.push(heard[-1])
    items += stage.flush()

    chunks = [item for item in items if isinstance(item, Chunk)]
    assert [item for item in items if isinstance(item, Gap)] == gaps
    assert stage.end_sample == len(is_lost)
    for chunk in chunks:
        assert chunk.gap_samples == sum(is_lost[chunk.start_sample : chunk.end_sample])
    whole = np.concatenate(heard, axis=1)
    for channel in range(2 if chunks else 0):
        assert np.array_equal(joined(chunks, channel)[: len(is_lost)], whole[channel])


def test_a_gap_is_told_before_the_chunks_that_hold_it() -> None:
    stage = SamplesToChunks(1)
    assert stage.push(noise(1, 100)) == []
    items = stage.push_gap(2 * CHUNK_SAMPLES, "packets lost")
    assert items[0] == Gap(100, 100 + 2 * CHUNK_SAMPLES, "packets lost")
    assert [item.gap_samples for item in items[1:] if isinstance(item, Chunk)] == [CHUNK_SAMPLES - 100, CHUNK_SAMPLES]


def test_chunks_do_not_change_when_more_samples_come() -> None:
    stage = SamplesToChunks(1)
    samples = noise(1, 2 * CHUNK_SAMPLES)
    (first,) = stage.push(samples[:, :CHUNK_SAMPLES])
    samples[:, :CHUNK_SAMPLES] = 7
    stage.push(samples)
    assert np.array_equal(first.samples, noise(1, 2 * CHUNK_SAMPLES)[0, :CHUNK_SAMPLES])


def test_padding_is_neither_a_gap_nor_part_of_the_stream() -> None:
    stage = SamplesToChunks(1)
    stage.push(noise(1, CHUNK_SAMPLES + 10))
    (last,) = stage.flush()
    assert (last.index, last.gap_samples, stage.end_sample) == (1, 0, CHUNK_SAMPLES + 10)
    assert stage.flush() == []


@pytest.mark.parametrize(
    "samples",
    [np.zeros((1, 5), np.float32), np.zeros((2, 5), np.int16), np.zeros(5, np.int16)],
    ids=["float", "two channels", "one dimension"],
)
def test_other_arrays_are_refused(samples: NDArray[np.int16]) -> None:
    with pytest.raises(ValueError, match=r"expected int16\[1, num_samples\]"):
        SamplesToChunks(1).push(samples)


def test_misuse_is_refused() -> None:
    stage = SamplesToChunks(1)
    stage.flush()
    with pytest.raises(RuntimeError, match="after flush"):
        stage.push(noise(1, 1))
    with pytest.raises(RuntimeError, match="after flush"):
        stage.push_gap(1, "late")
    with pytest.raises(ValueError, match="at least 1"):
        SamplesToChunks(1).push_gap(0, "none")
    with pytest.raises(ValueError, match="at least 1"):
        SamplesToChunks(0)
    with pytest.raises(ValueError, match="multiple of 1280"):
        SamplesToChunks(1, start_sample=100)
