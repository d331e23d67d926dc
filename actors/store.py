"""Where records are kept: addresses, key names, connections and the start-up check (docs/records.md).

A store is a Redis or Valkey server: the embedded one of a data directory (`actors/redis_server.py`), or any by URL.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import redis.asyncio as redis
from pydantic import ConfigDict, Field, field_validator
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from actors.redis_server import EmbeddedRedis
from actors.store_scripts import CANARY
from pipeline.errors import ConfigError, StoreError
from pipeline.params import Params

logger = logging.getLogger(__name__)

T = TypeVar("T")

LIVE_KEY = "surtitle:live"
"""Set: ids of the streams that are live now."""
INDEX_KEY = "surtitle:streams"
"""Stream: one entry (`stream`, `epoch`, `started_at`) a claim, newest last."""
CANARY_KEY = "surtitle:canary"

END_STATES = ("ended", "failed")
"""What the state hash says of a stream that is over; also the events of its last health record."""

_CANCEL_AGAIN_S = 0.02
_STREAM_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_SCHEMES = ("redis", "rediss", "unix")


def default_data_dir() -> Path:
    """Return the user's data directory: $XDG_DATA_HOME/surtitle, or ~/.local/share/surtitle."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "surtitle"


class RedisParams(Params):
    """Which store to use, what to keep for how long, and how patient to be with it."""

    # A URL may hold a password: validation errors must not print what they refuse.
    model_config = ConfigDict(hide_input_in_errors=True)

    url: str | None = Field(
        default=None,
        repr=False,
        description="redis://, rediss:// or unix:// address; none: the embedded server of data_dir",
    )
    data_dir: Path = Field(default_factory=default_data_dir, description="where the embedded server keeps its data")
    maxmemory_mb: int = Field(default=512, ge=16, le=1_048_576, description="memory bound of the embedded server")
    retention_hours: float = Field(default=24.0, gt=0, le=8_760, description="how long records are kept")
    partials_maxlen: int = Field(default=256, ge=1, le=1_000_000, description="partials kept of a stream, about")
    health_maxlen: int = Field(default=10_000, ge=1, le=1_000_000, description="health records kept of a stream, about")
    index_maxlen: int = Field(default=10_000, ge=1, le=1_000_000, description="streams kept in the index, about")
    connect_timeout_ms: int = Field(
        default=4_000, ge=100, le=60_000, description="bound of connecting and start-up check"
    )
    command_timeout_ms: int = Field(default=5_000, ge=100, le=60_000, description="bound of one answer")
    max_connections: int = Field(default=32, ge=1, le=10_000, description="connections of one process")
    max_pending_records: int = Field(
        default=4_096, ge=1, le=1_000_000, description="records a stream buffers while the store does not take them"
    )
    max_batch_records: int = Field(default=64, ge=1, le=256, description="records written in one call")
    lease_ms: int = Field(default=15_000, ge=300, le=600_000, description="how long an owner counts as alive unrenewed")
    sweep_interval_ms: int = Field(default=60_000, ge=50, le=3_600_000, description="how often retention is applied")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            is_usable = parts.scheme in _SCHEMES and bool(parts.path if parts.scheme == "unix" else parts.hostname)
            _ = parts.port
        except ValueError:
            is_usable = False
        if not is_usable:
            raise ValueError("expected redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH")
        return url

    @property
    def retention_ms(self) -> int:
        """`retention_hours` in milliseconds."""
        return round(self.retention_hours * 3_600_000)


class KeyKind(StrEnum):
    """What a stream's key holds; the last part of its name."""

    HEALTH = "health"
    PARTIALS = "partials"
    TRANSCRIPTS = "transcripts"
    TRANSLATIONS = "translations"  # one key for each target language
    AMENDS = "amends"
    SUMMARIES = "summaries"
    SCENES = "scenes"


@dataclass(frozen=True, slots=True)
class StreamKeys:
    """Names of the keys of one stream. The braces are a literal hash tag: one cluster slot holds them all.

    Raises:
        ConfigError: if `stream_id` is not 1 to 64 of A-Z a-z 0-9 . _ -
    """

    stream_id: str

    def __post_init__(self) -> None:
        if not _STREAM_ID.fullmatch(self.stream_id):
            raise ConfigError(f"stream id {self.stream_id[:80]!r} is not usable: give 1 to 64 of A-Z a-z 0-9 . _ -")

    @property
    def state(self) -> str:
        """The state hash."""
        return f"surtitle:{{{self.stream_id}}}:state"

    def key(self, name: str) -> str:
        """Return the key of `name`: a `KeyKind`, or `translations:LANG`."""
        return f"surtitle:{{{self.stream_id}}}:{name}"

    def translations(self, language: str) -> str:
        """Return the key of the translations to `language`."""
        return self.key(translations_name(language))

    def names(self, target_languages: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of all keys with entries: the fixed ones, and one for each target language."""
        fixed = tuple(kind.value for kind in KeyKind if kind is not KeyKind.TRANSLATIONS)
        return (*fixed, *(translations_name(language) for language in target_languages))


def translations_name(language: str) -> str:
    """Return the key name of the translations to `language`.

    Raises:
        ConfigError: if `language` does not look like a language tag.
    """
    if not _LANGUAGE.fullmatch(language):
        raise ConfigError(f"{language[:40]!r} is not a language tag such as 'en' or 'pt-BR'")
    return f"{KeyKind.TRANSLATIONS}:{language}"


class Store:
    """Connections to the store, and the hold on the embedded server where that is used. An async context manager.

    Connections never retry by themselves: their users know what may be said twice.
    """

    def __init__(self, params: RedisParams) -> None:
        self.params = params
        self._embedded = (
            EmbeddedRedis(
                params.data_dir,
                maxmemory_mb=params.maxmemory_mb,
                start_timeout_ms=min(4_000, params.connect_timeout_ms),
            )
            if params.url is None
            else None
        )
        self._clients: list[redis.Redis] = []

    @property
    def is_embedded(self) -> bool:
        """Whether the store is the embedded server of the data directory."""
        return self._embedded is not None

    @property
    def address(self) -> str:
        """Where the store is, without credentials: for people and logs."""
        if self._embedded is not None:
            return str(self._embedded.socket_path)
        return public_address(self.params.url or "")

    @property
    def url(self) -> str:
        """The address for redis-py, credentials included: never log it."""
        return self._embedded.url if self._embedded is not None else self.params.url or ""

    async def open(self) -> None:
        """Start or join the embedded server, then check that the store answers and takes writes.

        Raises:
            StoreError: within 5 s at default timeouts, with the address, if it does not.
        """
        try:
            await self.ensure_running()
            await self._check()
        except BaseException:
            await self.aclose()
            raise

    async def ensure_running(self) -> None:
        """Start the embedded server if it is dead; nothing for a store by URL. Raises StoreError."""
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.ensure_running)

    def client(self, *, max_connections: int | None = None) -> redis.Redis:
        """Return a new client (strings decoded, bounded pool, no retries), closed together with the store.

        Give readers that block (XREAD BLOCK) a client of their own, and `max_connections` for as many as may block.
        """
        pool = redis.BlockingConnectionPool.from_url(
            self.url,
            max_connections=max_connections or self.params.max_connections,
            timeout=self.params.command_timeout_ms / 1_000,
            socket_connect_timeout=self.params.connect_timeout_ms / 1_000,
            socket_timeout=self.params.command_timeout_ms / 1_000,
            decode_responses=True,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
        )
        client = redis.Redis.from_pool(pool)
        self._clients.append(client)
        return client

    async def aclose(self) -> None:
        """Close all clients and give the embedded server back (the last user shuts it down). Idempotent."""
        clients, self._clients = self._clients, []
        for client in clients:
            await client.aclose()
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.close)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _check(self) -> None:
        client = self.client()
        try:
            async with asyncio.timeout(self.params.connect_timeout_ms / 1_000):
                await client.ping()
                await client.eval(CANARY, 1, CANARY_KEY, "written at start-up to see that writes are taken")
                memory = await client.info("memory")
        except TimeoutError as exc:
            raise StoreError(
                f"Redis at {self.address} did not answer within {self.params.connect_timeout_ms} ms; "
                "check redis.url and the network"
            ) from exc
        except (RedisError, OSError, ValueError) as exc:
            # The text of a server's refusal or a refused connection names no credentials; a ValueError quotes the URL.
            said = "the address is not usable" if isinstance(exc, ValueError) else str(exc)
            raise StoreError(f"Redis at {self.address} cannot be used: {said}; check redis.url or start it") from exc
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if policy.startswith("allkeys") and memory.get("maxmemory"):
            logger.warning("Redis at %s evicts (%s): transcripts may vanish; set noeviction", self.address, policy)


def public_address(url: str) -> str:
    """Return `url` without user, password and query."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path}"


def raise_if_cancelled() -> None:
    """Raise CancelledError if the running task was asked to cancel.

    For tasks that loop around redis-py: it sends through asyncio.wait_for, which in Python 3.11 swallows a cancellation
    that meets a send just finished (gh-86296); such a loop would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def cancellable(call: Coroutine[Any, Any, T]) -> T:
    """Await `call`, a use of redis-py, so that a cancellation always gets through (see `raise_if_cancelled`)."""
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        while not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=_CANCEL_AGAIN_S)
        if not task.cancelled():
            task.exception()  # nobody waits for it any more
        raise
    return task.result()
