"""All streams that the store knows, as `surtitle streams` lists them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis
from redis.exceptions import RedisError

from actors.store import INDEX_KEY, LIVE_KEY, KeyKind, StreamKeys
from pipeline.errors import StoreError


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """One stream as `surtitle streams` shows it."""

    stream_id: str
    state: str  # "live", "ended", "failed", or "lost": its owner stopped renewing without an end
    started_at: str
    ended_at: str | None
    tier: str
    owner: str
    epoch: int
    target_languages: tuple[str, ...]
    covered_ms: int
    num_finals: int  # kept now
    last_final_at: str | None


async def list_streams(client: redis.Redis, *, max_streams: int = 1_000) -> list[StreamSummary]:
    """Return the streams that the store knows, newest claim first.

    Raises:
        StoreError: if the store does not answer or refuses.
    """
    try:
        index: Any = await client.xrevrange(INDEX_KEY, count=10 * max_streams)
        live: Any = await client.smembers(LIVE_KEY)
        stream_ids = list(dict.fromkeys([*(fields["stream"] for _, fields in index), *sorted(live)]))[:max_streams]
        seconds, microseconds = await client.time()
        now_ms = seconds * 1_000 + microseconds // 1_000
        summaries = [await _summary(client, StreamKeys(stream_id), now_ms) for stream_id in stream_ids]
    except (RedisError, OSError) as exc:
        raise StoreError(f"Redis cannot list its streams: {exc}") from exc
    return [summary for summary in summaries if summary is not None]


async def _summary(client: redis.Redis, keys: StreamKeys, now_ms: int) -> StreamSummary | None:
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.hgetall(keys.state)
        pipeline.xlen(keys.key(KeyKind.TRANSCRIPTS))
        stored, num_finals = await pipeline.execute()
    if not stored:
        return None
    state = stored.get("state", "live")
    if state == "live" and int(stored.get("lease_until_ms", 0)) < now_ms:
        state = "lost"
    return StreamSummary(
        stream_id=keys.stream_id,
        state=state,
        started_at=stored.get("started_at", ""),
        ended_at=stored.get("ended_at"),
        tier=stored.get("tier", ""),
        owner=stored.get("owner", ""),
        epoch=int(stored.get("epoch", 0)),
        target_languages=tuple(json.loads(stored.get("target_languages", "[]"))),
        covered_ms=int(stored.get("covered_ms", 0)),
        num_finals=num_finals,
        last_final_at=stored.get("last_final_at"),
    )
