"""The reading side of the store: follow a stream, or read what is kept of it. Needs no publisher and changes nothing.

Every read names the last id seen of every key, so that a reader that loses its connection, or the whole server, goes on
where it was, and nothing is missed between two reads.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import redis.asyncio as redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from actors.entries import NO_ID
from actors.store import END_STATES, KeyKind, StreamKeys, cancellable, translations_name
from pipeline.errors import ConfigError, StoreError, StreamNotFound
from pipeline.records import SCHEMA_VERSION, Record, record_from_fields

ALL_KINDS = frozenset(KeyKind)
_POSITION_PART = re.compile(
    rf"(?P<name>(?P<kind>{'|'.join(KeyKind)})(:(?P<language>[A-Za-z0-9-]+))?)=(?P<id>[0-9]{{1,19}}-[0-9]{{1,19}})"
)
_PAGE_ENTRIES = 128
_BLOCK_MAX_MS = 2_000
_DEFAULT_SOCKET_TIMEOUT_S = 5.0
_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream has been read: the last id of each key, by key name. Its text is what clients resume with."""

    last_ids: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote: `transcripts=3-1,translations:en=2-1`; empty means from the start.

        Raises:
            ConfigError: if `text` is no position.
        """
        last_ids: dict[str, str] = {}
        for part in filter(None, text.split(",")):
            match = _POSITION_PART.fullmatch(part)
            if match is None or (match["kind"] == KeyKind.TRANSLATIONS) != bool(match["language"]):
                raise ConfigError(
                    f"{text[:120]!r} is not a position in a stream: give one that was printed, as 'transcripts=3-1'"
                )
            last_ids[match["name"]] = match["id"]
        return cls(last_ids)

    def __str__(self) -> str:
        return ",".join(f"{name}={last_ids}" for name, last_ids in sorted(self.last_ids.items()) if last_ids != NO_ID)


class Followed(NamedTuple):
    """One entry as read."""

    kind: str  # name of its key: a `KeyKind`, or `translations:LANG`
    entry_id: str
    record: Record
    position: str  # follow on from here to see all that comes after it


class _Read(NamedTuple):
    name: str
    entry_id: str
    fields: dict[str, str]


async def follow(
    client: redis.Redis,
    stream_id: str,
    kinds: Collection[str] = ALL_KINDS,
    *,
    after: Position | str | None = None,
    from_start: bool = True,
    until_ended: bool = True,
    revive_store: Callable[[], Awaitable[None]] | None = None,
    outage_limit_s: float | None = None,
) -> AsyncGenerator[Followed, None]:
    """Yield the entries of a stream, those that are there and those that come, each key in its order.

    Across keys the order is that of `emitted_at`. `after` resumes behind a position; without one, reading begins at the
    first entry kept, or with `from_start=False` behind the newest. With `until_ended` it finishes once the stream has
    ended (or failed) and every key is drained. Give `client` to one follower at a time: it blocks a connection.
    `revive_store` is called when the store does not answer (`Store.ensure_running`); reading then goes on, for as long
    as an outage does not last longer than `outage_limit_s`.

    Raises:
        ConfigError: if the id, a kind or the position is not usable.
        StreamNotFound: if there is no such stream.
        StoreError: if the store refuses, or stays away for longer than `outage_limit_s`.
    """
    follower = _Follower(client, StreamKeys(stream_id), checked_kinds(kinds), until_ended=until_ended)
    outage = _Outage(revive_store, outage_limit_s)
    start = Position.parse(after) if isinstance(after, str) else after
    is_begun = False
    while True:
        try:
            if not is_begun:
                await cancellable(follower.begin(start, from_start=from_start))
                is_begun = True
            page = await cancellable(follower.read())
        except (RedisConnectionError, RedisTimeoutError, OSError) as exc:
            await outage.wait(exc)
            continue
        except RedisError as exc:
            raise StoreError(f"Redis refuses to read stream {stream_id}: {exc}") from exc
        outage.end()
        for read in page:
            followed = follower.hand_on(read)
            if followed is not None:
                yield followed
        if follower.is_over:
            return


class KeptReader:
    """Reads what is kept of a stream now, a page at a time; it waits for nothing and blocks no connection.

    Raises:
        ConfigError: if the id or a kind is not usable.
    """

    def __init__(
        self,
        client: redis.Redis,
        stream_id: str,
        kinds: Collection[str] = ALL_KINDS,
        *,
        after: Position | None = None,
    ) -> None:
        self._follower = _Follower(client, StreamKeys(stream_id), checked_kinds(kinds), until_ended=False)
        self._after = after
        self._is_begun = False

    @property
    def languages(self) -> tuple[str, ...]:
        """The target languages of the stream, as of the last read."""
        return self._follower.languages

    async def read(self) -> list[Followed]:
        """Return what comes next, in order; empty when everything that is kept was read, as of now.

        Raises:
            StreamNotFound: if there is no such stream.
            StoreError: if the store refuses or does not answer.
        """
        with _told_as_store_error(self._follower.stream_id):
            if not self._is_begun:
                await cancellable(self._follower.begin(self._after, from_start=True))
                self._is_begun = True
            while page := await cancellable(self._follower.read_kept()):
                if found := list(filter(None, map(self._follower.hand_on, page))):
                    return found
        return []


async def newest_position(client: redis.Redis, stream_id: str) -> Position:
    """Return the position behind the newest entry of every key.

    Raises:
        ConfigError: if the id is not usable.
        StreamNotFound: if there is no such stream.
        StoreError: if the store refuses or does not answer.
    """
    follower = _Follower(client, StreamKeys(stream_id), ALL_KINDS, until_ended=False)
    with _told_as_store_error(stream_id):
        await cancellable(follower.begin(None, from_start=False))
    return follower.position


@contextmanager
def _told_as_store_error(stream_id: str) -> Iterator[None]:
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as exc:
        raise StoreError(f"Redis does not answer: {exc}") from exc
    except RedisError as exc:
        raise StoreError(f"Redis refuses to read stream {stream_id}: {exc}") from exc


def checked_kinds(kinds: Collection[str]) -> frozenset[KeyKind]:
    """Return `kinds` as what they are.

    Raises:
        ConfigError: if one is no kind of entry.
    """
    if unknown := sorted(set(kinds) - ALL_KINDS):
        raise ConfigError(f"{unknown[0]!r} is no kind of entry: choose from {', '.join(sorted(ALL_KINDS))}")
    return frozenset(KeyKind(kind) for kind in kinds)


def _record_of(stream_id: str, read: _Read) -> Record:
    try:
        return record_from_fields(read.fields)
    except ValueError as exc:  # pydantic's and json's; their texts quote transcripts
        version = read.fields.get("v", "?")
        raise StoreError(
            f"entry {read.entry_id} of {read.name} of stream {stream_id} is no record of schema {SCHEMA_VERSION} "
            f"(it says {version}): read it with the version of surtitle that wrote it"
        ) from exc


class _Outage:
    """Waits between tries while the store does not answer."""

    def __init__(self, revive_store: Callable[[], Awaitable[None]] | None, limit_s: float | None) -> None:
        self._revive_store = revive_store
        self._limit_s = limit_s
        self._began_s: float | None = None
        self._num_tries = 0

    def end(self) -> None:
        self._began_s = None
        self._num_tries = 0

    async def wait(self, cause: Exception) -> None:
        self._num_tries += 1
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        if self._limit_s is not None and now_s - self._began_s >= self._limit_s:
            raise StoreError(f"Redis has not answered for {self._limit_s:g} s: {cause}") from cause
        if self._revive_store is not None:
            try:
                await self._revive_store()
            except StoreError:
                if self._limit_s is None and self._num_tries > 1:
                    raise  # an embedded server that cannot be started does not come back by itself
        if self._num_tries > 1:
            backoff_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2 ** min(self._num_tries - 1, 10))
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is no secret


class _Follower:
    """The state of one reader."""

    def __init__(self, client: redis.Redis, keys: StreamKeys, kinds: frozenset[KeyKind], *, until_ended: bool) -> None:
        self.stream_id = keys.stream_id
        self.languages: tuple[str, ...] = ()
        self._kinds = kinds
        self._until_ended = until_ended
        self.is_over = False
        self._client = client
        self._keys = keys
        self._last_ids: dict[str, str] = {}
        self._has_seen_end = False
        timeout_s = client.connection_pool.connection_kwargs.get("socket_timeout") or _DEFAULT_SOCKET_TIMEOUT_S
        # A read that blocks for as long as the socket's patience ends in an error instead of an answer.
        self._block_ms = max(1, min(_BLOCK_MAX_MS, int(timeout_s * 1_000 / 2)))

    @property
    def position(self) -> Position:
        """What was read of the kinds that the reader asked for."""
        return Position({name: last for name, last in self._last_ids.items() if name.partition(":")[0] in self._kinds})

    async def begin(self, start: Position | None, *, from_start: bool) -> None:
        """Find the keys and where to read them from."""
        state = await self._read_state()
        if state is None:
            raise StreamNotFound(
                f"no stream {self._keys.stream_id!r} is in Redis; `surtitle streams` lists those that are"
            )
        self._has_seen_end = state in END_STATES  # then nothing is worth waiting for, until a health record says more
        if start is not None:
            self._last_ids.update(start.last_ids)
        elif not from_start:
            for name in self._names():
                self._last_ids[name] = await self._newest_id(name)

    async def read(self) -> list[_Read]:
        """Return what comes next, in order; empty when nothing came for a while. Sets `is_over` behind the end."""
        is_ending = self._until_ended and self._has_seen_end
        page = await self._read_page(block_ms=None if is_ending else self._block_ms)
        if any(_is_end(read) for read in page):  # what came under keys that are not known yet belongs before it
            known = self._names()
            await self._read_state()
            if self._names() != known:
                page = await self._read_page(block_ms=None)
        if page:
            return page
        # Nothing waits. The state hash knows languages that came later, and an end that was trimmed or read before.
        state = await self._read_state()
        if self._until_ended and (self._has_seen_end or state is None or state in END_STATES):
            page = await self._read_page(block_ms=None)
            self.is_over = not page
        return page

    async def read_kept(self) -> list[_Read]:
        """Return what comes next of what is there already, in order; empty behind the newest entry."""
        page = await self._read_page(block_ms=None)
        if page and not any(_is_end(read) for read in page):
            return page
        known = self._names()
        await self._read_state()
        return page if self._names() == known else await self._read_page(block_ms=None)

    def hand_on(self, read: _Read) -> Followed | None:
        """Take note that `read` is handed on and return it as the reader gets it; None if he did not ask for it."""
        self._last_ids[read.name] = read.entry_id
        if read.name == KeyKind.HEALTH:
            self._has_seen_end = _is_end(read)
        if read.name.partition(":")[0] not in self._kinds:
            return None
        return Followed(read.name, read.entry_id, _record_of(self.stream_id, read), str(self.position))

    async def _read_state(self) -> str | None:
        state, languages = await self._client.hmget(self._keys.state, ["state", "target_languages"])
        self.languages = tuple(json.loads(languages)) if languages else self.languages
        return None if state is None else str(state)

    async def _newest_id(self, name: str) -> str:
        if not await self._client.exists(self._keys.key(name)):
            return NO_ID
        info: Any = await self._client.xinfo_stream(self._keys.key(name))
        return str(info["last-generated-id"])

    def _names(self) -> list[str]:
        wanted = self._kinds | {KeyKind.HEALTH}  # it says when the stream is over
        names = {kind.value for kind in wanted if kind is not KeyKind.TRANSLATIONS}
        if KeyKind.TRANSLATIONS in wanted:
            names |= {translations_name(language) for language in self.languages}
            names |= {name for name in self._last_ids if name.startswith(KeyKind.TRANSLATIONS)}
        return sorted(names)

    async def _read_page(self, block_ms: int | None) -> list[_Read]:
        by_key = {self._keys.key(name): name for name in self._names()}
        reply: Any = await self._client.xread(
            {key: self._last_ids.get(name, NO_ID) for key, name in by_key.items()}, count=_PAGE_ENTRIES, block=block_ms
        )
        pages = reply.items() if isinstance(reply, dict) else reply or ()
        return merge({by_key[key]: [_Read(by_key[key], *entry) for entry in entries] for key, entries in pages})


def _is_end(read: _Read) -> bool:
    return read.name == KeyKind.HEALTH and read.fields.get("event") in END_STATES


def merge(pages: Mapping[str, list[_Read]]) -> list[_Read]:
    """Return the entries of one page of every key in the order of `emitted_at`, each key's own order kept.

    Behind a full page there may be more: what was emitted after the end of the earliest full page is left out, for a
    later read.
    """
    keyed: list[tuple[tuple[str, bool, str], _Read]] = []
    limits: list[str] = []
    for name, page in pages.items():
        latest = ""
        for read in page:
            latest = max(latest, read.fields.get("emitted_at", ""))  # a clock that was set back changes no order
            keyed.append(((latest, _is_end(read), name), read))
        if len(page) >= _PAGE_ENTRIES:
            limits.append(latest)
    keyed.sort(key=lambda item: item[0])
    limit = min(limits, default=None)
    return [read for (emitted_at, _, _), read in keyed if limit is None or emitted_at <= limit]
