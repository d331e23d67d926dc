"""Samples of any length in, exact 80 ms chunks out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.items import Chunk, Gap
from pipeline.timebase import CHUNK_SAMPLES

_SILENT_CHUNK = np.zeros(CHUNK_SAMPLES, np.int16)
_SILENT_CHUNK.flags.writeable = False  # shared by all chunks that lie in a gap


class SamplesToChunks:
    """Cuts 16 kHz sound into chunks, all channels in lockstep.

    The chunks depend on the samples only, never on how they were split into pushes. At most one chunk a channel is
    held back.

    Args:
        num_channels: rows of every array that is pushed.
        start_sample: media time of the first sample to come; a whole number of chunks.

    Raises:
        ValueError: if there is no channel, or `start_sample` is not a chunk's first sample.
    """

    def __init__(self, num_channels: int, start_sample: int = 0) -> None:
        if num_channels < 1:
            raise ValueError(f"num_channels is {num_channels}, expected at least 1")
        if start_sample < 0 or start_sample % CHUNK_SAMPLES:
            raise ValueError(f"start_sample is {start_sample}, expected a multiple of {CHUNK_SAMPLES}")
        self._num_channels = num_channels
        self._next_index = start_sample // CHUNK_SAMPLES
        self._pending = np.zeros((num_channels, CHUNK_SAMPLES), np.int16)
        self._num_pending = 0
        self._num_pending_gap = 0
        self._end_sample = start_sample
        self._is_flushed = False

    @property
    def num_channels(self) -> int:
        """Rows of every array that is pushed."""
        return self._num_channels

    @property
    def end_sample(self) -> int:
        """Media time behind the last sample pushed, gaps included; the padding of `flush` does not count."""
        return self._end_sample

    def push(self, samples: NDArray[np.int16]) -> list[Chunk]:
        """Take int16[channels, n] (n may be 0) and return the chunks it completes, by index, then channel.

        Raises:
            ValueError: if dtype or shape are not that.
            RuntimeError: after `flush`.
        """
        if samples.dtype != np.int16 or samples.ndim != 2 or samples.shape[0] != self._num_channels:
            raise ValueError(
                f"got {samples.dtype}{list(samples.shape)}, expected int16[{self._num_channels}, num_samples]"
            )
        self._expect_not_flushed()
        num_samples = samples.shape[1]
        self._end_sample += num_samples
        chunks: list[Chunk] = []
        taken = 0
        while taken < num_samples:
            count = min(CHUNK_SAMPLES - self._num_pending, num_samples - taken)
            self._pending[:, self._num_pending : self._num_pending + count] = samples[:, taken : taken + count]
            taken += count
            chunks += self._advance(count)
        return chunks

    def push_gap(self, num_samples: int, reason: str) -> list[Chunk | Gap]:
        """Let the media clock go on by `num_samples` that were lost; zeros stand in for them.

        Returns the Gap, then the chunks that are complete.

        Raises:
            ValueError: if `num_samples` is below 1.
            RuntimeError: after `flush`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples of a gap is {num_samples}, expected at least 1")
        self._expect_not_flushed()
        start_sample = self._end_sample
        self._end_sample += num_samples
        items: list[Chunk | Gap] = [Gap(start_sample, self._end_sample, reason)]
        left = num_samples
        while left:
            count = min(CHUNK_SAMPLES - self._num_pending, left)
            self._pending[:, self._num_pending : self._num_pending + count] = 0
            self._num_pending_gap += count
            left -= count
            items += self._advance(count)
        return items

    def flush(self) -> list[Chunk]:
        """End the stream: return the last partial chunk, padded with zeros, or nothing. Padding is not a gap.

        `end_sample` tells where the sound really ended. A second call returns nothing.
        """
        self._is_flushed = True
        if not self._num_pending:
            return []
        self._pending[:, self._num_pending :] = 0
        return self._emit()

    def _expect_not_flushed(self) -> None:
        if self._is_flushed:
            raise RuntimeError("samples after flush: a stream has one end; make a new SamplesToChunks")

    def _advance(self, count: int) -> list[Chunk]:
        self._num_pending += count
        return self._emit() if self._num_pending == CHUNK_SAMPLES else []

    def _emit(self) -> list[Chunk]:
        index, gap_samples = self._next_index, self._num_pending_gap
        self._next_index += 1
        self._num_pending = self._num_pending_gap = 0
        if gap_samples == CHUNK_SAMPLES:
            return [Chunk(channel, index, _SILENT_CHUNK, gap_samples) for channel in range(self._num_channels)]
        return [Chunk(channel, index, row.copy(), gap_samples) for channel, row in enumerate(self._pending)]


def by_chunk_index(items: Iterable[Chunk | Gap]) -> Iterator[list[Chunk | Gap]]:
    """Group the chunks of all channels that cover the same 80 ms: snapshots are taken between groups."""
    group: list[Chunk | Gap] = []
    for item in items:
        if group and isinstance(item, Chunk) and isinstance(group[-1], Chunk) and item.index != group[-1].index:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
