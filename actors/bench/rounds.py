"""One round of the live bench: N streams at once, each followed in Redis by a consumer of its own."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import redis.asyncio as redis

from actors.bench.latency import Latencies, Received, UtteranceTimes, find_error_records, measure
from actors.bench.media import Clip
from actors.bench.wer import WordErrors, count_errors
from actors.follow import follow
from actors.service import GatewayClient
from actors.spec import StreamSpec
from actors.store import KeyKind, Store, StreamKeys
from pipeline.errors import SurtitleError
from pipeline.records import FinalRecord, HealthRecord

LATE = "late"
"""`ended_as` of a stream that was not over in time and was told to end."""

_FOLLOWED = frozenset({KeyKind.PARTIALS, KeyKind.TRANSCRIPTS, KeyKind.HEALTH})


@dataclass(frozen=True, slots=True)
class Played:
    """What every stream plays, and what must come of it."""

    clip: Clip
    path: Path
    utterances: Mapping[int, UtteranceTimes]
    has_reference: bool


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a round waits, in seconds."""

    max_delay_s: float = 60.0  # from the end of a stream's sound to the end of the stream; then it is told to end
    max_stop_s: float = 120.0  # from there to its end; then the service is not fit for another round


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One stream as its consumer saw it."""

    stream_id: str
    latencies: Latencies
    words: WordErrors | None
    num_errors: int
    num_gaps: int
    ended_as: str  # "ended", "failed", "refused", LATE, or "lost": no end was read
    ended_late_ms: float | None
    failure: str = ""  # why it was refused
    received: Sequence[Received] = ()  # only where records are kept
    anchor_ms: float | None = None  # wall time of media sample 0; None: it never got so far


@dataclass(frozen=True, slots=True)
class Rounds:
    """Plays rounds through a gateway and its store."""

    gateway: GatewayClient
    store: Store
    played: Played
    patience: Patience
    keeps_records: bool = False

    async def play(self, num_streams: int, stagger_ms: float) -> tuple[list[StreamResult], bool]:
        """Play `num_streams` streams, each `stagger_ms` after the one before.

        Return what came of each, in order, and whether all of them are over.

        Raises:
            ServiceError, StoreError: if the service breaks. What happens to single streams is in their results.
        """
        run = secrets.token_hex(3)
        ids = [f"bench-{run}-{index + 1}" for index in range(num_streams)]
        try:
            async with asyncio.TaskGroup() as group:
                playing = [
                    group.create_task(self._play(stream_id, index * stagger_ms / 1_000))
                    for index, stream_id in enumerate(ids)
                ]
        except* Exception as failed:
            raise failed.exceptions[0] from failed
        results = [task.result() for task in playing]
        return results, await self._end([result.stream_id for result in results if result.ended_as == LATE])

    async def _play(self, stream_id: str, delay_s: float) -> StreamResult:
        await asyncio.sleep(delay_s)
        played = self.played
        spec = StreamSpec(source=str(played.path), stream_id=stream_id, channels="mix")
        try:
            await self.gateway.start_stream(spec)
        except SurtitleError as exc:
            return _judge(stream_id, [], None, played, ended_as="refused", failure=str(exc))
        client = self.store.client()
        received: list[Received] = []
        ended_as: str | None = None
        try:
            async with asyncio.timeout(played.clip.seconds + self.patience.max_delay_s):
                async for entry in follow(client, stream_id, _FOLLOWED):
                    received.append(Received(entry.record, time.time() * 1_000))
                await self.gateway.wait_stream(stream_id)
        except TimeoutError:
            ended_as = LATE
        result = _judge(stream_id, received, await _read_anchor_ms(client, stream_id), played, ended_as=ended_as)
        return replace(result, received=tuple(received)) if self.keeps_records else result

    async def _end(self, stream_ids: Sequence[str]) -> bool:
        """Tell streams to end, and return whether they have in time."""
        try:
            async with asyncio.timeout(self.patience.max_stop_s), asyncio.TaskGroup() as group:
                for stream_id in stream_ids:
                    group.create_task(self.gateway.stop_stream(stream_id))
        except TimeoutError:
            return False
        return True


async def _read_anchor_ms(client: redis.Redis, stream_id: str) -> float | None:
    """Return the wall time of media sample 0 by the stream's own anchors; None if it never got so far."""
    stored: Any = await client.hget(StreamKeys(stream_id).state, "anchors")
    anchors = json.loads(stored) if stored else []
    if not anchors:
        return None
    media_ms, utc = anchors[0]
    return datetime.fromisoformat(utc).timestamp() * 1_000 - float(media_ms)


def _judge(
    stream_id: str,
    received: list[Received],
    anchor_ms: float | None,
    played: Played,
    *,
    ended_as: str | None = None,
    failure: str = "",
) -> StreamResult:
    finals = [item.record for item in received if isinstance(item.record, FinalRecord)]
    text = " ".join(final.text for final in sorted(finals, key=lambda final: final.sequence) if final.text)
    health = [(item.record, item.at_ms) for item in received if isinstance(item.record, HealthRecord)]
    end = next(((record.event, at_ms) for record, at_ms in health if record.event in {"ended", "failed"}), None)
    clip = played.clip
    is_timed = anchor_ms is not None
    ended_late_ms = end[1] - anchor_ms - 1_000 * clip.seconds if end is not None and anchor_ms is not None else None
    return StreamResult(
        stream_id=stream_id,
        # Without an anchor nothing was heard: then no utterance has its final.
        latencies=measure(received if is_timed else [], anchor_ms or 0.0, played.utterances),
        words=count_errors(clip.text, text, clip.language) if played.has_reference else None,
        num_errors=len(find_error_records(received)),
        num_gaps=sum(record.event == "gap" for record, _ in health),
        ended_as=ended_as or (end[0] if end is not None else "lost"),
        ended_late_ms=ended_late_ms,
        failure=failure,
        anchor_ms=anchor_ms,
    )
