"""The audio that a channel may still need: from the start of its open utterance, or a short history."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from pipeline.items import Chunk
from pipeline.timebase import CHUNK_SAMPLES


class AudioTail:
    """A bounded run of the newest chunks of one channel, addressed by media sample."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()

    def append(self, chunk: Chunk) -> None:
        """Add the chunk that follows the newest one.

        Raises:
            ValueError: if it does not follow.
        """
        if self._chunks and chunk.index != self._chunks[-1].index + 1:
            raise ValueError(f"chunk {chunk.index} does not follow chunk {self._chunks[-1].index}")
        self._chunks.append(chunk)

    def drop_before(self, sample: int) -> None:
        """Forget whole chunks that end at or before `sample`."""
        while self._chunks and self._chunks[0].end_sample <= sample:
            self._chunks.popleft()

    @property
    def start_sample(self) -> int:
        """The first sample held."""
        return self._chunks[0].start_sample if self._chunks else 0

    @property
    def end_sample(self) -> int:
        """One past the last sample held."""
        return self._chunks[-1].end_sample if self._chunks else 0

    def slice(self, start_sample: int, end_sample: int) -> NDArray[np.int16]:
        """Return a copy of the samples [start_sample, end_sample), int16.

        Raises:
            ValueError: if they are not all held.
        """
        if start_sample < self.start_sample or end_sample > self.end_sample or end_sample < start_sample:
            raise ValueError(
                f"samples {start_sample}..{end_sample} are not within {self.start_sample}..{self.end_sample}"
            )
        first = (start_sample - self.start_sample) // CHUNK_SAMPLES
        last = -(-(end_sample - self.start_sample) // CHUNK_SAMPLES)
        joined = np.concatenate([self._chunks[i].samples for i in range(first, last)] or [np.zeros(0, np.int16)])
        offset = self.start_sample + first * CHUNK_SAMPLES
        return joined[start_sample - offset : end_sample - offset].copy()
