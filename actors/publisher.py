"""The publisher: claims streams in the store and hands out their writers. One for each process."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from redis.exceptions import RedisError

from actors.entries import MediaClock, iso_ms
from actors.owned_stream import Claim, Resume, last_sequence_of
from actors.store import INDEX_KEY, LIVE_KEY, Store, StreamKeys
from actors.store_scripts import CLAIM, INDEX, LAST_IDS
from actors.stream_writer import UNREACHABLE, PublishCounters, StreamWriter
from pipeline.errors import StoreError

__all__ = ["PublishCounters", "Publisher", "Resume", "StreamWriter"]

_NUM_LIVE_CHECKED = 16


def utc_now() -> datetime:
    """Return the wall clock's time, UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One claim to be made."""

    keys: StreamKeys
    token: str
    started_at: datetime
    tier: str | None
    target_languages: tuple[str, ...]
    is_takeover_allowed: bool


class Publisher:
    """Claims streams and writes their records (DESIGN: exactly once, in order, fenced). An async context manager.

    `now` tells the wall clock's time; it stamps records and decides what retention takes away.
    """

    def __init__(self, store: Store, *, owner: str | None = None, now: Callable[[], datetime] = utc_now) -> None:
        self._store = store
        self._now = now
        self._owner = owner or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._client = store.client()
        self._claim_script = self._client.register_script(CLAIM)
        self._last_ids_script = self._client.register_script(LAST_IDS)
        self._index_script = self._client.register_script(INDEX)
        self._writers: list[StreamWriter] = []
        self._counters_of_gone = PublishCounters()
        self._reviving = asyncio.Lock()

    @property
    def counters(self) -> PublishCounters:
        """What happened to the records of all streams, since the start."""
        total = self._counters_of_gone
        for writer in self._writers:
            total += writer.counters
        return total

    @property
    def num_buffered(self) -> int:
        """How many records of all streams wait for the store."""
        return sum(writer.num_buffered for writer in self._writers)

    @property
    def outage_s(self) -> float:
        """The longest time for which a stream has been waiting for the store to take writes; 0.0 while it does."""
        return max((writer.outage_s for writer in self._writers), default=0.0)

    async def open_stream(
        self,
        stream_id: str,
        started_at: datetime,
        *,
        tier: str | None = None,
        target_languages: Sequence[str] = (),
        is_takeover_allowed: bool = True,
    ) -> StreamWriter:
        """Claim stream `stream_id` and return its writer; whoever owned it before is refused from now on.

        `started_at` (aware) is when the first sample that this owner hears is heard: media time 0 of a new stream, the
        resume point's `covered_ms` of an old one (`StreamWriter.add_anchor` says it better where that is not so).

        Raises:
            ConfigError: if the id or a language is not usable.
            StoreError: if the store does not answer, or another owner's lease runs and may not be taken over.
            ValueError: if `started_at` has no time zone.
        """
        if started_at.tzinfo is None:
            raise ValueError(f"started_at {started_at.isoformat()} has no time zone: give an aware datetime")
        wanted = _Wanted(
            keys=StreamKeys(stream_id),
            token=secrets.token_hex(16),
            started_at=started_at,
            tier=tier,
            target_languages=tuple(target_languages),
            is_takeover_allowed=is_takeover_allowed,
        )
        self._forget_closed()
        try:
            try:
                claim = await self._claim(wanted)
            except UNREACHABLE:
                await self._revive_store()
                claim = await self._claim(wanted)  # its token makes it the same claim if the first one got through
        except (RedisError, OSError) as exc:
            raise StoreError(f"Redis at {self._store.address}: stream {stream_id} cannot be claimed: {exc}") from exc
        writer = StreamWriter(claim, self._client, self._store.params, revive_store=self._revive_store, now=self._now)
        self._writers.append(writer)
        writer.start()
        return writer

    async def aclose(self) -> None:
        """Stop all writers; streams that were not closed keep their lease until it runs out. Idempotent."""
        for writer in self._writers:
            await writer.abandon()
        self._forget_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _forget_closed(self) -> None:
        for writer in [writer for writer in self._writers if writer.is_closed]:
            self._writers.remove(writer)
            self._counters_of_gone += writer.counters

    async def _revive_store(self) -> None:
        async with self._reviving:  # one starter at a time is enough
            await self._store.ensure_running()

    async def _claim(self, wanted: _Wanted) -> Claim:
        keys = wanted.keys
        state = {
            "owner": self._owner,
            "tier": wanted.tier or "",
            "started_at": iso_ms(wanted.started_at),
            "anchors": json.dumps([[0, iso_ms(wanted.started_at)]]),
            "target_languages": json.dumps(wanted.target_languages),
        }
        fields = [text for pair in state.items() for text in pair]
        args: list[Any] = [wanted.token, self._store.params.lease_ms, int(wanted.is_takeover_allowed), *fields]
        outcome, epoch, owner = await self._claim_script(keys=[keys.state], args=args)
        if outcome == "live":
            raise StoreError(
                f"stream {keys.stream_id} is live, owned by {owner}: end it first, take it over or use another id"
            )
        names = keys.names(wanted.target_languages)
        last_ids = await self._last_ids_script(keys=[keys.key(name) for name in names])
        stored = {str(name): str(value) for name, value in (await self._client.hgetall(keys.state)).items()}
        await self._list_stream(keys, epoch, wanted.started_at)
        resume = _resume_of(int(epoch), stored, dict(zip(names, last_ids, strict=True)))
        media_clock = MediaClock([(ms, datetime.fromisoformat(utc)) for ms, utc in json.loads(stored["anchors"])])
        if resume.is_resumed:
            media_clock.add(resume.covered_ms, wanted.started_at)
        return Claim(keys, wanted.token, self._owner, wanted.tier, wanted.target_languages, resume, media_clock)

    async def _list_stream(self, keys: StreamKeys, epoch: str, started_at: datetime) -> None:
        """Add the stream to the index and the live set, and drop live ids whose stream is gone altogether.

        Apart from the claim, because these keys are in other cluster slots; the lease's renewal says "live" again.
        """
        params = self._store.params
        await self._index_script(
            keys=[INDEX_KEY], args=[keys.stream_id, epoch, iso_ms(started_at), params.index_maxlen]
        )
        await self._client.sadd(LIVE_KEY, keys.stream_id)
        sample: list[Any] = await self._client.srandmember(LIVE_KEY, _NUM_LIVE_CHECKED)  # type: ignore[assignment]
        async with self._client.pipeline(transaction=False) as pipeline:
            for stream_id in sample:
                pipeline.exists(StreamKeys(stream_id).state)
            are_there = await pipeline.execute()
        if gone := [stream_id for stream_id, is_there in zip(sample, are_there, strict=True) if not is_there]:
            await self._client.srem(LIVE_KEY, *gone)


def _resume_of(epoch: int, state: Mapping[str, str], last_ids: Mapping[str, str]) -> Resume:
    return Resume(
        epoch=epoch,
        started_at=datetime.fromisoformat(state["started_at"]),
        covered_ms=int(state.get("covered_ms", 0)),
        next_sequence=last_sequence_of(last_ids) + 1,
        next_utterance=int(state.get("last_utterance", 0)) + 1,
        last_ids=last_ids,
    )
