"""A stream as its owner sees it: the fenced calls to the store, one script each. No buffer and no retries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import redis.asyncio as redis

from actors.entries import NO_ID, Entry, MediaClock, iso_ms
from actors.store import LIVE_KEY, KeyKind, RedisParams, StreamKeys
from actors.store_scripts import END, RENEW, TRIM, WRITE
from pipeline.errors import OwnershipLost

_TRIM_ENTRIES = 100


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a new owner goes on. For a new stream: everything from the beginning."""

    epoch: int
    started_at: datetime  # of the stream, by its first owner
    covered_ms: int  # media up to here is in finals
    next_sequence: int
    next_utterance: int
    last_ids: Mapping[str, str]  # key name -> id last generated, "0-0" for none

    @property
    def is_resumed(self) -> bool:
        """Whether the stream had an owner before."""
        return self.epoch > 1


@dataclass(frozen=True, slots=True)
class Claim:
    """What the publisher got from the store for one stream."""

    keys: StreamKeys
    token: str
    owner: str
    tier: str | None
    target_languages: tuple[str, ...]
    resume: Resume
    media_clock: MediaClock


class OwnedStream:
    """The calls that only the owner of a stream may make.

    Raises:
        OwnershipLost: from every call, with nothing changed, once a newer owner has the stream.
        redis.RedisError, OSError: from every call, when the store does not answer or refuses.
    """

    def __init__(self, claim: Claim, client: redis.Redis, params: RedisParams) -> None:
        self.keys: Final = claim.keys
        self.media_clock: Final = claim.media_clock
        self.target_languages: Final = list(claim.target_languages)
        self._claim = claim
        self._client = client
        self._params = params
        self._write_script = client.register_script(WRITE)
        self._renew_script = client.register_script(RENEW)
        self._trim_script = client.register_script(TRIM)
        self._end_script = client.register_script(END)

    async def write(self, batch: list[Entry]) -> list[str]:
        """Write `batch` in order; return the status of each entry (`store_scripts.WRITE`)."""
        args: list[Any] = [self._ttl_ms]
        for entry in batch:
            covers = "" if entry.covers_ms is None else entry.covers_ms
            args += (entry.entry_id, entry.previous_id, entry.maxlen, covers, len(entry.strings), *entry.strings)
        keys = [self.keys.state, *(self.keys.key(entry.name) for entry in batch)]
        statuses: list[str] = await self._write_script(keys=keys, args=[*self._identity, *args])
        if statuses == ["fenced"]:
            raise self._ownership_lost()
        return statuses

    async def renew(self) -> None:
        """Renew the lease and write what the state hash says of the stream."""
        state = {
            "owner": self._claim.owner,
            "tier": self._claim.tier or "",
            "started_at": iso_ms(self._claim.resume.started_at),
            "anchors": json.dumps([[media_ms, iso_ms(utc)] for media_ms, utc in self.media_clock.anchors]),
            "target_languages": json.dumps(self.target_languages),
        }
        fields = [text for pair in state.items() for text in pair]
        args: list[Any] = [*self._identity, self._params.lease_ms, *fields]
        if not await self._renew_script(keys=[self.keys.state], args=args):
            raise self._ownership_lost()
        await self._client.sadd(LIVE_KEY, self.keys.stream_id)

    async def trim(self, before: datetime) -> int:
        """Take entries emitted before `before` off the head of every key, at most 100 a key; return how many went."""
        args: list[Any] = [*self._identity, self._ttl_ms, iso_ms(before), _TRIM_ENTRIES]
        num_trimmed = int(await self._trim_script(keys=self._all_keys, args=args))
        if num_trimmed < 0:
            raise self._ownership_lost()
        return num_trimmed

    async def end(self, state: str, ended_at: datetime) -> None:
        """Mark the stream as `state`, end its lease; it leaves the live set and expires after the retention."""
        args: list[Any] = [*self._identity, self._ttl_ms, state, iso_ms(ended_at)]
        if not await self._end_script(keys=self._all_keys, args=args):
            raise self._ownership_lost()
        await self._client.srem(LIVE_KEY, self.keys.stream_id)

    @property
    def _identity(self) -> tuple[int, str]:
        return self._claim.resume.epoch, self._claim.token

    @property
    def _all_keys(self) -> list[str]:
        names = self.keys.names(tuple(self.target_languages))
        return [self.keys.state, *(self.keys.key(name) for name in names)]

    @property
    def _ttl_ms(self) -> int:
        # Longer than the retention by more than two sweeps: a living owner always renews it in time.
        return self._params.retention_ms + 2 * self._params.sweep_interval_ms + self._params.lease_ms

    def _ownership_lost(self) -> OwnershipLost:
        epoch = self._claim.resume.epoch
        return OwnershipLost(f"stream {self.keys.stream_id} has a newer owner than epoch {epoch}: stop writing it")


def last_sequence_of(last_ids: Mapping[str, str], name: str = KeyKind.TRANSCRIPTS) -> int:
    """Return the number that the last entry of key `name` has, 0 for none."""
    return int(last_ids.get(name, NO_ID).split("-")[0])
