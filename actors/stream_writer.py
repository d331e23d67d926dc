"""The writer of one stream: a bounded buffer in front of fenced, idempotent writes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

import redis.asyncio as redis
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from actors.entries import Entry, EntryMaker
from actors.owned_stream import Claim, OwnedStream
from actors.store import END_STATES, RedisParams, raise_if_cancelled
from pipeline.errors import OwnershipLost, StoreError
from pipeline.records import BaseRecord, HealthRecord

logger = logging.getLogger(__name__)

UNREACHABLE = (RedisConnectionError, RedisTimeoutError, OSError)
_REFUSED_FOR_NOW = (BusyLoadingError, ClusterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
_REFUSED_FOR_NOW_CODES = ("OOM", "READONLY", "LOADING", "BUSY", "MASTERDOWN", "MISCONF", "NOREPLICAS", "CLUSTERDOWN")
_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 1.0
_OUTAGE_LOG_INTERVAL_S = 10.0


@dataclass(slots=True)
class PublishCounters:
    """What happened to records, counted since the start."""

    published: int = 0  # entries that are in the store, duplicates included
    duplicates: int = 0  # entries that were there already
    differing_duplicates: int = 0  # of these, entries with another text or kind; the stored one stays
    retries: int = 0  # calls that failed and were made again
    fenced: int = 0  # records refused because a newer owner has the stream
    store_losses: int = 0  # entries found to follow acknowledged ones that the store no longer has
    trimmed: int = 0  # entries that retention took away

    def __add__(self, other: PublishCounters) -> PublishCounters:
        return PublishCounters(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class StreamWriter:
    """Writes the records of one stream; made by `Publisher.open_stream`.

    Every entry has an id of its own from the moment `publish` returns, and is written by a script that refuses it when
    it is there already or when a newer owner has the stream. So a call whose answer was lost is simply made again.
    The buffer empties in order; while the store is away it fills, and `publish` waits when it is full.
    """

    def __init__(
        self,
        claim: Claim,
        client: redis.Redis,
        params: RedisParams,
        *,
        revive_store: Callable[[], Awaitable[None]],
        now: Callable[[], datetime],
    ) -> None:
        self.keys: Final = claim.keys
        self.resume: Final = claim.resume
        self.counters = PublishCounters()
        self._owned = OwnedStream(claim, client, params)
        self._params = params
        self._revive_store = revive_store
        self._now = now
        self._maker = EntryMaker(claim.keys.stream_id, claim.resume.epoch, claim.resume.last_ids, params)
        self._pending: deque[Entry] = deque()
        self._turn = asyncio.Lock()  # keeps concurrent publishers in the order in which they came
        self._renewing = asyncio.Lock()
        self._has_work = asyncio.Event()
        self._has_space = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._failure: StoreError | None = None
        self._is_closed = False
        self._is_state_stale = claim.resume.is_resumed  # the anchors of a resumed stream are not written yet
        self._outage_began_s: float | None = None
        self._outage_logged_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start writing and renewing the lease. Called once, by the publisher."""
        stream_id = self.keys.stream_id
        self._tasks = [
            asyncio.create_task(self._guarded(self._write_pending), name=f"write-{stream_id}"),
            asyncio.create_task(self._guarded(self._keep_lease), name=f"lease-{stream_id}"),
        ]

    @property
    def is_closed(self) -> bool:
        """Whether the writer was closed or abandoned."""
        return self._is_closed

    @property
    def num_buffered(self) -> int:
        """How many records wait for the store."""
        return len(self._pending)

    @property
    def outage_s(self) -> float:
        """For how long the store has not taken a write that was tried; 0.0 while it does."""
        return 0.0 if self._outage_began_s is None else time.monotonic() - self._outage_began_s

    async def publish(self, record: BaseRecord) -> str:
        """Stamp `record`, give it its id and buffer it; return the id. Waits while the buffer is full.

        Raises:
            OwnershipLost: if a newer owner has taken the stream over. Nothing more can be written.
            StoreError: if the store refused this stream's writes for good.
            ValueError: if the record does not belong here (other stream, hole, wrong order; see `EntryMaker.make`).
            RuntimeError: if the writer is closed.
        """
        async with self._turn:
            self._raise_if_over()
            while len(self._pending) >= self._params.max_pending_records:
                self._has_space.clear()
                await self._has_space.wait()
                self._raise_if_over()
            entry = self._maker.make(record, self._now(), self._owned.media_clock.utc(record.start_ms))
            self._append(entry)
            return entry.entry_id

    def add_anchor(self, media_ms: int, utc: datetime) -> None:
        """Say that `media_ms` happened at `utc`: `utc_start` of records from there on is reckoned from it."""
        self._owned.media_clock.add(media_ms, utc)
        self._is_state_stale = True

    async def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until all that was published is in the store.

        Raises:
            StoreError: if that takes longer than `timeout_s`, or the store refuses for good (`OwnershipLost` too).
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            raise StoreError(
                f"{len(self._pending)} records of stream {self.keys.stream_id} are not in Redis after {timeout_s:g} s"
            ) from None
        if self._failure is not None:
            raise self._failure

    async def close(self, state: str = "ended", timeout_s: float = 10.0) -> None:
        """Flush, mark the stream as `state` ("ended" or "failed"), end the lease, stop. Idempotent.

        Raises:
            StoreError: if the buffer cannot be emptied or the end cannot be written within `timeout_s`.
            OwnershipLost: if a newer owner has the stream: it lives on there.
            ValueError: if `state` is neither.
        """
        if state not in END_STATES:
            raise ValueError(f"a stream closes as one of {END_STATES}, not as {state!r}")
        if self._is_closed:
            return
        self._is_closed = True
        deadline_s = time.monotonic() + timeout_s
        try:
            await self.flush(timeout_s)
            await self._stop_tasks()
            await self._end(state, deadline_s)
        finally:
            await self.abandon()

    async def abandon(self) -> None:
        """Stop at once without a word to the store: the lease runs out, another owner may resume. Idempotent."""
        self._is_closed = True
        await self._stop_tasks()
        self._has_space.set()  # who waits to publish learns that it is over

    async def _stop_tasks(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _append(self, entry: Entry) -> None:
        language = entry.name.partition(":")[2]
        if language and language not in self._owned.target_languages:  # readers find the key through the state hash
            self._owned.target_languages.append(language)
            self._is_state_stale = True
        self._pending.append(entry)
        self._is_idle.clear()
        self._has_work.set()

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise RuntimeError(f"the writer of stream {self.keys.stream_id} is closed")

    def _fail(self, failure: StoreError) -> None:
        if self._failure is None:
            self._failure = failure
            if isinstance(failure, OwnershipLost):
                self.counters.fenced += len(self._pending)
        self._pending.clear()
        for event in (self._has_work, self._has_space, self._is_idle):
            event.set()

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`; whatever ends it ends the writer, and the next `publish` or `flush` says so."""
        try:
            await work()
        except StoreError as exc:
            self._fail(exc)
        except Exception as exc:
            logger.exception("writing stream %s failed", self.keys.stream_id)
            self._fail(StoreError(f"Redis refuses writes of stream {self.keys.stream_id}: {exc}"))

    async def _write_pending(self) -> None:
        num_failures = 0
        while self._failure is None:
            raise_if_cancelled()
            await self._has_work.wait()
            batch = list(islice(self._pending, self._params.max_batch_records))
            if not batch:
                self._has_work.clear()
                continue
            try:
                if self._is_state_stale:
                    await self._renew()
                statuses = await self._owned.write(batch)
            except (*UNREACHABLE, ResponseError) as exc:
                if not _is_worth_a_retry(exc):
                    raise
                num_failures += 1
                self.counters.retries += 1
                await self._wait_for_store(exc, num_failures)
                continue
            if num_failures:
                logger.warning("stream %s: Redis takes writes again after %.1f s", self.keys.stream_id, self.outage_s)
            num_failures = 0
            self._outage_began_s = None
            if self._failure is None:
                self._account(batch, statuses)

    def _account(self, batch: list[Entry], statuses: list[str]) -> None:
        lost: list[Entry] = []
        for entry, status in zip(batch, statuses, strict=True):
            self._pending.popleft()
            self.counters.published += 1
            self.counters.duplicates += status in ("duplicate", "differing")
            self.counters.differing_duplicates += status == "differing"
            if status == "written after loss":
                lost.append(entry)
        self._has_space.set()
        if lost:
            self._report_loss(lost)
        if not self._pending:
            self._has_work.clear()
            self._is_idle.set()

    def _report_loss(self, lost: list[Entry]) -> None:
        """Publish that the store came back without entries it had acknowledged (a power cut, a failover)."""
        self.counters.store_losses += len(lost)
        places = ", ".join(f"{entry.name} up to {entry.previous_id}" for entry in lost)
        logger.warning("stream %s: Redis lost acknowledged entries: %s", self.keys.stream_id, places)
        end_ms = max(entry.end_ms for entry in lost)
        record = HealthRecord(
            stream=self.keys.stream_id,
            start_ms=end_ms,
            end_ms=end_ms,
            event="error",
            message=f"Redis lost acknowledged entries: {places}",
        )
        self._append(self._maker.make(record, self._now(), self._owned.media_clock.utc(end_ms)))

    async def _wait_for_store(self, exc: Exception, num_failures: int) -> None:
        now_s = time.monotonic()
        if self._outage_began_s is None:
            self._outage_began_s = now_s
        if num_failures == 1 or now_s - self._outage_logged_s > _OUTAGE_LOG_INTERVAL_S:
            self._outage_logged_s = now_s
            logger.warning(
                "stream %s: Redis does not take writes (%s); %d records wait",
                self.keys.stream_id,
                type(exc).__name__,
                len(self._pending),
            )
        if isinstance(exc, UNREACHABLE):
            with contextlib.suppress(StoreError):  # said above; the next round tries again
                await self._revive_store()
        if num_failures > 1:
            backoff_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2 ** min(num_failures - 1, 10))
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is no secret

    async def _keep_lease(self) -> None:
        next_sweep_s = time.monotonic()
        while self._failure is None:
            with contextlib.suppress(*UNREACHABLE, RedisError):  # the write task says so, and tries for both
                await self._renew()
                if time.monotonic() >= next_sweep_s:
                    await self.apply_retention()
                    next_sweep_s = time.monotonic() + self._params.sweep_interval_ms / 1_000
            raise_if_cancelled()
            await asyncio.sleep(min(self._params.lease_ms / 3, self._params.sweep_interval_ms) / 1_000)

    async def _renew(self) -> None:
        async with self._renewing:  # one at a time: of two on their way, the older one could be done last
            self._is_state_stale = False  # before the call: what changes during it is written by the next one
            try:
                await self._owned.renew()
            except BaseException:
                self._is_state_stale = True
                raise

    async def apply_retention(self) -> int:
        """Take entries older than the retention off the head of every key; return how many went.

        Looks at 100 entries a key and call, again until no key has more to give. Raises OwnershipLost and redis errors.
        """
        before = self._now() - timedelta(milliseconds=self._params.retention_ms)
        total = 0
        while num_trimmed := await self._owned.trim(before):
            total += num_trimmed
            self.counters.trimmed += num_trimmed
        return total

    async def _end(self, state: str, deadline_s: float) -> None:
        num_failures = 0
        while True:
            try:
                await self._owned.end(state, self._now())
            except (*UNREACHABLE, ResponseError) as exc:
                if not _is_worth_a_retry(exc) or time.monotonic() >= deadline_s:
                    raise StoreError(f"the end of stream {self.keys.stream_id} could not be written: {exc}") from exc
                num_failures += 1
                self.counters.retries += 1
                await self._wait_for_store(exc, num_failures)
            else:
                return


def _is_worth_a_retry(exc: BaseException) -> bool:
    if isinstance(exc, (*UNREACHABLE, *_REFUSED_FOR_NOW)):
        return True
    return isinstance(exc, ResponseError) and str(exc).startswith(_REFUSED_FOR_NOW_CODES)
