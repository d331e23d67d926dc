"""The fan-out hub: one reader of Redis for each stream that somebody watches, and any number of readers in memory.

A reader that joins reads pages of what is kept, at its own pace, until it meets what the stream's feed remembers; from
there on the feed hands it every entry. Ids grow in every key, so an entry that comes twice is known by its id. Writers
and feeds wait for no reader: what one does not take in time is bounded (`actors/backlog.py`), then that one is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Literal, NamedTuple, Self

import redis.asyncio as redis

from actors.backlog import Backlog, FeedEntry, Limits, Waiting, entry_of
from actors.entries import parse_id
from actors.follow import ALL_KINDS, KeptReader, Position, checked_kinds, follow, newest_position
from actors.store import KeyKind, Store, StreamKeys
from pipeline.errors import CapacityExceeded, ServiceError, SurtitleError

logger = logging.getLogger(__name__)

_MAX_READERS = 4_096
_MAX_FEEDS = 256
_MAX_PAGE_READS = 8
_BATCH_BYTES = 1 << 18
_BATCH_EVENTS = 64
_NUM_PUSHED_AT_ONCE = 64
_PUSH_PAUSE_S = 0.01
_LAST_WORDS_S = 0.3
_LEAVE_TIMEOUT_S = 2.0
_RECENT_SHARE = 4
"""A feed remembers a quarter of what may wait for a reader: who joins has room for what comes next."""


class End(NamedTuple):
    """Why a reader gets nothing more. It may go on from its position unless the stream has ended."""

    reason: Literal["ended", "slow", "stopping", "failed"]
    message: str


class Event(NamedTuple):
    """One entry for one reader."""

    kind: KeyKind
    data: str  # the record as JSON, one line
    position: str  # join behind it to see all that comes after this


_SLOW = End("slow", "more waits than is kept for a reader: go on from here")
_STOPPING = End("stopping", "the service is stopping: go on from here when it is back")
_ENDED = End("ended", "the stream is over")


class FanOut:
    """All readers of all streams of one process. An async context manager; its methods belong to one event loop."""

    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._feeds: dict[str, _Feed] = {}
        self._readers: set[Reader] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_slow = 0
        """How many readers were closed because too much waited for them."""
        self._has_left = asyncio.Event()
        self._is_closing = False
        # A feed blocks its connection; pages must not wait behind feeds.
        self._blocking_client = store.client(max_connections=_MAX_FEEDS)
        self._page_client = store.client()
        self._page_reads = asyncio.Semaphore(_MAX_PAGE_READS)
        self._reviving = asyncio.Lock()

    @property
    def num_readers(self) -> int:
        """How many readers there are."""
        return len(self._readers)

    @property
    def num_feeds(self) -> int:
        """How many streams are read from Redis."""
        return len(self._feeds)

    def kept(self, stream_id: str, kinds: Collection[str]) -> KeptReader:
        """Return a reader of what is kept of a stream now.

        Raises:
            ConfigError: if the id or a kind is not usable.
        """
        return KeptReader(self._page_client, stream_id, kinds)

    async def join(self, stream_id: str, kinds: Collection[str] = ALL_KINDS, after: str = "") -> Reader:
        """Return a reader of what is kept behind the position `after` (empty: of all), then of what comes.

        Whoever joins must `leave`.

        Raises:
            ConfigError: if the id, a kind or the position is not usable.
            StreamNotFound: if there is no such stream.
            CapacityExceeded: if there are as many readers, or watched streams, as allowed.
            ServiceError: if the service is stopping.
            StoreError: if the store refuses or does not answer.
        """
        StreamKeys(stream_id)
        wanted, start = checked_kinds(kinds), Position.parse(after)
        if self._is_closing:
            raise ServiceError("the service is stopping")
        if len(self._readers) >= _MAX_READERS:
            raise CapacityExceeded(f"{_MAX_READERS} readers are served, and no more are: try again later")
        feed = self._feed_of(stream_id)
        kept = KeptReader(self._page_client, stream_id, wanted, after=start)
        reader = Reader(
            self, feed, wanted, start, backlog=Backlog(self._limits), kept=kept, page_reads=self._page_reads
        )
        self._readers.add(reader)
        feed.readers.add(reader)
        try:
            await feed.begin()
        except BaseException:
            self.leave(reader)
            raise
        return reader

    def leave(self, reader: Reader) -> None:
        """Forget `reader`. The last one of a stream stops its feed. Idempotent."""
        self._readers.discard(reader)
        feed = reader.feed
        feed.drop(reader)
        if not feed.readers:
            self.forget(feed)
            if feed.task is not None:
                feed.task.cancel()
        self._has_left.set()

    def forget(self, feed: _Feed) -> None:
        """Let whoever joins next have a new feed."""
        if self._feeds.get(feed.stream_id) is feed:
            del self._feeds[feed.stream_id]

    async def aclose(self) -> None:
        """Close all readers, wait a little for them to leave, and stop all feeds. Idempotent."""
        self._is_closing = True
        if self._tasks:  # streams that end together with the service have said so in Redis
            await asyncio.wait(set(self._tasks), timeout=_LAST_WORDS_S)
        for reader in self._readers:
            reader.close(_STOPPING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                while self._readers:
                    self._has_left.clear()
                    await self._has_left.wait()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _feed_of(self, stream_id: str) -> _Feed:
        feed = self._feeds.get(stream_id)
        if feed is None:
            if len(self._feeds) >= _MAX_FEEDS:
                raise CapacityExceeded(f"{_MAX_FEEDS} streams are watched, and no more can be: try again later")
            feed = self._feeds[stream_id] = _Feed(self, stream_id, self._limits)
            feed.task = asyncio.create_task(feed.run(self._blocking_client, self._revive), name=f"feed-{stream_id}")
            self._tasks.add(feed.task)
            feed.task.add_done_callback(self._tasks.discard)
        return feed

    async def _revive(self) -> None:
        async with self._reviving:  # one starter at a time is enough
            await self._store.ensure_running()


class Reader:
    """What one client gets of one stream: each entry once, each key in its order."""

    def __init__(
        self,
        hub: FanOut,
        feed: _Feed,
        kinds: frozenset[KeyKind],
        start: Position,
        *,
        backlog: Backlog,
        kept: KeptReader,
        page_reads: asyncio.Semaphore,
    ) -> None:
        self.feed = feed
        self._hub = hub
        self._kinds = kinds
        self._kept = kept
        self._page_reads = page_reads
        self._page: deque[FeedEntry] = deque()
        self._backlog = backlog
        self._wake = asyncio.Event()
        self._is_attached = False
        self._end: End | None = None
        self._handed_on = {name: last for name, last in start.last_ids.items() if name.partition(":")[0] in kinds}
        self._seen = {name: parse_id(last) for name, last in self._handed_on.items()}
        self._passed: dict[str, tuple[int, int]] = {}

    @property
    def end(self) -> End | None:
        """Why nothing comes any more; None while something may."""
        return None if len(self._backlog) else self._end

    @property
    def position(self) -> str:
        """Behind what was read: join with it to go on."""
        return str(Position(self._handed_on))

    @property
    def num_waiting(self) -> int:
        """How many events wait to be read."""
        return len(self._backlog)

    async def read(self, patience_s: float) -> list[Event]:
        """Return the next events; none when nothing came for `patience_s` or nothing comes any more (`end`).

        Raises:
            StoreError: if what is kept cannot be read. It may be tried again.
        """
        if not self._is_attached and (events := await self._catch_up()):
            return events
        if not len(self._backlog) and self._end is None:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._wake.wait()
        return [self._hand_on(waiting) for waiting in self._backlog.take(_BATCH_BYTES)]

    def leave(self) -> None:
        """Stop reading. Idempotent."""
        self._hub.leave(self)

    def has_passed(self, floor: Mapping[str, tuple[int, int]]) -> bool:
        """Whether everything up to `floor` was read, or is no longer kept."""
        return all(
            max(self._seen.get(name, (0, 0)), self._passed.get(name, (0, 0))) >= order
            for name, order in floor.items()
            if name.partition(":")[0] in self._kinds
        )

    def offer(self, entry: FeedEntry) -> None:
        """Let `entry` wait to be read, if it is asked for and new. Without room for it the reader is closed."""
        if self._end is not None or entry.kind not in self._kinds or entry.order <= self._seen.get(entry.name, (0, 0)):
            return
        self._seen[entry.name] = entry.order
        if not self._backlog.push(entry):
            self._backlog.clear()
            self.close(_SLOW)
            self._hub.num_slow += 1
        self._wake.set()

    def close(self, end: End) -> None:
        """Let nothing more come; what waits can still be read."""
        self._end = self._end or end
        self._wake.set()

    async def _catch_up(self) -> list[Event]:
        """Return what is next of what is kept; none once the feed takes over, or at the end."""
        while self._end is None:
            if self._page:
                entries = [self._page.popleft() for _ in range(min(_BATCH_EVENTS, len(self._page)))]
                return [self._hand_on(Waiting(entry, None)) for entry in entries]
            self._is_attached = self.feed.attach(self)
            if self._is_attached:
                return []
            floor = dict(self.feed.floor)
            async with self._page_reads:
                page = await self._kept.read()
            self._page = deque(entry_of(followed) for followed in page)
            self._seen |= {entry.name: entry.order for entry in self._page}
            if not page:
                # The feed had read this before: what was not found now is no longer kept.
                self._passed = floor
        return []

    def _hand_on(self, waiting: Waiting) -> Event:
        entry = waiting.entry
        if waiting.partial_id is not None:
            self._handed_on[KeyKind.PARTIALS] = waiting.partial_id
        self._handed_on[entry.name] = entry.entry_id
        return Event(entry.kind, entry.data, self.position)


class _Feed:
    """The one reader of a stream in Redis, its last entries, and who gets them."""

    def __init__(self, hub: FanOut, stream_id: str, limits: Limits) -> None:
        self.stream_id = stream_id
        self.floor: dict[str, tuple[int, int]] = {}
        self.readers: set[Reader] = set()
        self.task: asyncio.Task[None] | None = None
        self._is_begun = asyncio.Event()
        self._failure: SurtitleError | None = None
        self._attached: set[Reader] = set()
        self._hub = hub
        self._limits = limits
        self._recent: deque[FeedEntry] = deque()
        self._recent_bytes = 0
        self._end: End | None = None

    async def begin(self) -> None:
        """Wait until the stream is being read. Raises what `run` met."""
        await self._is_begun.wait()
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure

    async def run(self, client: redis.Redis, revive: Callable[[], Awaitable[None]]) -> None:
        """Hand on what comes, until the stream is over. Whatever fails ends the readers of this stream only."""
        try:
            start = await newest_position(client, self.stream_id)
            self.floor = {name: parse_id(last) for name, last in start.last_ids.items()}
            self._is_begun.set()
            followed_entries = follow(client, self.stream_id, after=start, revive_store=revive)
            async with aclosing(followed_entries):
                num_pushed = 0
                async for followed in followed_entries:
                    self._push(entry_of(followed))
                    num_pushed += 1
                    if num_pushed % _NUM_PUSHED_AT_ONCE == 0:
                        # A page comes without a pause; readers that take at once must not be taken for slow.
                        await asyncio.sleep(_PUSH_PAUSE_S)
            self._finish(_ENDED)
        except SurtitleError as exc:
            self._failure = exc
            self._finish(End("failed", str(exc)))
        except Exception as exc:
            logger.exception("the feed of stream %s failed", self.stream_id)
            self._failure = ServiceError(f"internal error: {type(exc).__name__}")
            self._finish(End("failed", str(self._failure)))

    def attach(self, reader: Reader) -> bool:
        """Hand on everything to `reader` from now on, if what it has read reaches up to what is remembered."""
        if not reader.has_passed(self.floor):
            return False
        self._attached.add(reader)
        for entry in self._recent:
            reader.offer(entry)
        if self._end is not None:
            reader.close(self._end)
        return True

    def drop(self, reader: Reader) -> None:
        """Hand on nothing more to `reader`."""
        self.readers.discard(reader)
        self._attached.discard(reader)

    def _push(self, entry: FeedEntry) -> None:
        self._recent.append(entry)
        self._recent_bytes += entry.num_bytes
        while (
            len(self._recent) > self._limits.max_events // _RECENT_SHARE
            or self._recent_bytes > self._limits.max_bytes // _RECENT_SHARE
        ):
            gone = self._recent.popleft()
            self._recent_bytes -= gone.num_bytes
            self.floor[gone.name] = gone.order
        for reader in self._attached:
            reader.offer(entry)

    def _finish(self, end: End) -> None:
        self._end = end
        self._hub.forget(self)
        self._is_begun.set()
        for reader in self._attached:
            reader.close(end)
