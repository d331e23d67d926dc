"""A source that senders feed: one connection after the other pushes sound and frames into one stream.

A stream outlives the connection it began with. The newest connection is the one that counts: it takes over, the media
clock goes on, and the time between is declared as a gap, unless the new sender begins where the old one broke off.
Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

from ingest.source import AudioBlock, SourceGap, SourceInfo, SourceItem, VideoFrame
from pipeline.errors import MediaError, SenderReplaced
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples

MAX_WAITING_FRAMES = 4
"""Frames that wait to be seen; a newer one takes the place of the oldest."""

_GAP_WEIGHT_SAMPLES = ms_to_samples(20)


class LiveSource:
    """Sound and frames as senders bring them.

    Args:
        info: what is sent; blocks have `info.num_channels` channels.
        reconnect_timeout_s: how long nobody may be connected before the stream ends.
        max_waiting_ms: sound that waits to be heard; above, `Connection.put` waits.
        min_gap_ms: time without a sender, above which it is declared as a gap.
        max_gap_ms: a gap over this fails the stream, as it does in a file.
        clock: tells seconds; only its differences count.
    """

    def __init__(
        self,
        info: SourceInfo,
        *,
        reconnect_timeout_s: float = 30.0,
        max_waiting_ms: int = 2_000,
        min_gap_ms: int = 200,
        max_gap_ms: int = 600_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self._reconnect_timeout_s = reconnect_timeout_s
        self._max_waiting_samples = ms_to_samples(max_waiting_ms)
        self._min_gap_samples, self._max_gap_samples = ms_to_samples(min_gap_ms), ms_to_samples(max_gap_ms)
        self._clock = clock
        self._items: deque[SourceItem] = deque()
        self._num_waiting_samples = self._num_waiting_frames = 0
        self._position = 0
        self._connection: Connection | None = None
        self._heard_until: float | None = None  # on the clock: when the last sound that was put came in
        self._has_ended = self._is_over = False
        self._failure: str | None = None
        self._has_news, self._has_room = asyncio.Event(), asyncio.Event()

    @property
    def num_nonfinite(self) -> int | None:
        """None until the source has been heard to its end; then 0: what is sent is int16."""
        return 0 if self._is_over and self._failure is None else None

    @property
    def position(self) -> int:
        """Samples that were put, gaps with them: where on the source's clock the next block begins."""
        return self._position

    @property
    def is_closed(self) -> bool:
        """Whether no connection can put anything any more."""
        return self._has_ended or self._is_over

    def connect(self, *, goes_on: bool = False) -> Connection:
        """Return a connection, which takes over from the one before it.

        With `goes_on` it begins where that one broke off; otherwise the time since its last sound becomes a gap.

        Raises:
            SenderReplaced: if the stream has ended.
        """
        if self.is_closed:
            raise SenderReplaced("the stream has ended: start a new one")
        if self._connection is not None:
            self._connection.replaced.set()
        self._connection = Connection(self, declares_gap=not goes_on and self._heard_until is not None)
        self._has_room.set()
        self._has_news.set()
        return self._connection

    def end(self) -> None:
        """End the stream when what was put has been heard. Idempotent."""
        self._has_ended = True
        if self._connection is not None:
            self._connection.replaced.set()
        self._has_news.set()
        self._has_room.set()

    def fail(self, message: str) -> None:
        """End the stream as failed, when what was put has been heard; `message` is one sentence."""
        self._failure = self._failure or message
        self.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take nothing more; whoever waits to put something gets an error."""
        self.end()
        self._is_over = True
        self._items.clear()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SourceItem:
        """Return the next item once it is there.

        Raises:
            StopAsyncIteration: the stream was ended, or nobody has been connected for too long.
            MediaError: it was failed.
        """
        while not self._items:
            if self._has_ended:
                self._is_over = True
                if self._failure is not None:
                    raise MediaError(self._failure)
                raise StopAsyncIteration
            self._has_news.clear()
            is_away = self._connection is None
            try:
                async with asyncio.timeout(self._reconnect_timeout_s if is_away else None):
                    await self._has_news.wait()
            except TimeoutError:
                self.end()
        item = self._items.popleft()
        if isinstance(item, VideoFrame):
            self._num_waiting_frames -= 1
        else:
            self._num_waiting_samples -= _weight(item)
        self._has_room.set()
        return item

    def _disconnect(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._has_news.set()

    async def _put(self, connection: Connection, item: SourceItem) -> None:
        if connection.declares_gap and self._heard_until is not None:
            connection.declares_gap = False
            elapsed = round((self._clock() - self._heard_until) * SAMPLE_RATE_HZ)
            self._add_gap(elapsed - (_num_samples(item) if isinstance(item, AudioBlock) else 0))
        while self._num_waiting_samples > self._max_waiting_samples:
            self._check(connection)
            self._has_room.clear()
            await self._has_room.wait()
        self._check(connection)
        if isinstance(item, VideoFrame):
            self._add_frame(item)
        else:
            self._items.append(item)
            self._num_waiting_samples += _weight(item)
            self._position += _num_samples(item)
            self._heard_until = self._clock()
        self._has_news.set()

    def _check(self, connection: Connection) -> None:
        if self.is_closed:
            raise SenderReplaced("the stream has ended: start a new one")
        if self._connection is not connection:
            raise SenderReplaced("a newer connection sends this stream now")

    def _add_gap(self, num_samples: int) -> None:
        if num_samples < self._min_gap_samples:
            return
        if num_samples > self._max_gap_samples:
            self.fail(f"nobody sent for {num_samples / SAMPLE_RATE_HZ:.0f} s: start a new stream after so long")
            return
        gap = SourceGap(num_samples, "the sender was away")
        self._items.append(gap)
        self._num_waiting_samples += _weight(gap)
        self._position += num_samples

    def _add_frame(self, frame: VideoFrame) -> None:
        if self._num_waiting_frames >= MAX_WAITING_FRAMES:
            oldest = next(item for item in self._items if isinstance(item, VideoFrame))
            self._items.remove(oldest)
            self._num_waiting_frames -= 1
        self._items.append(frame)
        self._num_waiting_frames += 1


class Connection:
    """One sender's way into a `LiveSource`.

    Args:
        source: where it leads.
        declares_gap: whether the time since the last sound becomes a gap before the first item of this one.
    """

    def __init__(self, source: LiveSource, *, declares_gap: bool) -> None:
        self._source = source
        self.declares_gap = declares_gap
        self.replaced = asyncio.Event()
        """Set when nothing can be put any more: a newer one took over, or the stream has ended."""

    async def put(self, item: SourceItem) -> None:
        """Hand over what follows what was put before; wait while too much sound waits to be heard. One at a time.

        Raises:
            SenderReplaced: if a newer connection took over, or the stream has ended.
            ValueError: if a block is not int16[info.num_channels, n] with n of at least 1, or a gap is empty.
        """
        if isinstance(item, AudioBlock):
            num_channels, num_samples = item.samples.shape
            if item.samples.dtype != np.int16 or num_channels != self._source.info.num_channels or not num_samples:
                raise ValueError(f"a block of {item.samples.dtype}{list(item.samples.shape)} does not belong here")
        if isinstance(item, SourceGap) and item.num_samples < 1:
            raise ValueError(f"a gap of {item.num_samples} samples")
        await self._source._put(self, item)

    def disconnect(self) -> None:
        """Leave; the stream waits for another connection. Idempotent."""
        self.replaced.set()
        self._source._disconnect(self)


def _num_samples(item: AudioBlock | SourceGap) -> int:
    return item.num_samples if isinstance(item, SourceGap) else item.samples.shape[1]


def _weight(item: AudioBlock | SourceGap) -> int:
    """Return what an item that waits counts: a gap takes no room, but there must not be any number of them."""
    return _GAP_WEIGHT_SAMPLES if isinstance(item, SourceGap) else item.samples.shape[1]
