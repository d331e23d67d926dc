"""Following: every entry once, in order, across connections and servers that come and go."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.follow import Position, follow
from actors.publisher import Publisher
from actors.store import KeyKind, RedisParams, Store
from actors.stream_list import list_streams
from pipeline.errors import ConfigError, StoreError, StreamNotFound
from tests.stores import STARTED_AT, collect, final, health, kill_server, partial, translation


async def write_stream(publisher: Publisher, stream_id: str, num_finals: int = 3) -> None:
    writer = await publisher.open_stream(stream_id, STARTED_AT, target_languages=["en"])
    await writer.publish(health(stream_id, "started"))
    for sequence in range(1, num_finals + 1):
        await writer.publish(partial(stream_id, sequence, 1))
        await writer.publish(final(stream_id, sequence))
        await writer.publish(translation(stream_id, sequence))
    await writer.publish(health(stream_id, "ended"))
    await writer.close()


class Ticking:
    """A clock that goes on by a second each time it is read."""

    def __init__(self) -> None:
        self._now = datetime(2026, 3, 4, tzinfo=UTC)

    def __call__(self) -> datetime:
        self._now += timedelta(seconds=1)
        return self._now


async def test_all_entries_come_in_the_order_in_which_they_were_emitted(data_dir: Path) -> None:
    params = RedisParams(data_dir=data_dir, partials_maxlen=1_000)
    async with Store(params) as store, Publisher(store, now=Ticking()) as publisher:
        await write_stream(publisher, "s", num_finals=300)  # more than two pages of each key
        seen = await collect(store, "s")
    one = ["partials", "transcripts", "translations:en"]
    assert [followed.kind for followed in seen] == ["health", *(one * 300), "health"]
    assert [followed.entry_id for followed in seen if followed.kind == "transcripts"] == [
        f"{n}-1" for n in range(1, 301)
    ]


async def test_only_the_kinds_asked_for_are_given(embedded_redis: Store, publisher: Publisher) -> None:
    await write_stream(publisher, "s")
    seen = await collect(embedded_redis, "s", kinds=[KeyKind.TRANSLATIONS])
    assert [(followed.kind, followed.entry_id) for followed in seen] == [
        ("translations:en", f"{n}-1") for n in (1, 2, 3)
    ]


async def test_reading_resumes_behind_any_position_without_loss_or_repetition(
    embedded_redis: Store, publisher: Publisher
) -> None:
    await write_stream(publisher, "s", num_finals=2)
    whole = await collect(embedded_redis, "s")
    for index, followed in enumerate(whole):
        rest = await collect(embedded_redis, "s", after=followed.position)
        assert rest == whole[index + 1 :]


async def test_a_reader_that_starts_now_sees_only_what_comes(embedded_redis: Store, publisher: Publisher) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    await writer.publish(final("s", 1))
    await writer.flush()
    follower = follow(embedded_redis.client(), "s", from_start=False)
    following = asyncio.ensure_future(anext(follower))
    await asyncio.wait([following], timeout=0.3)
    assert not following.done()
    await writer.publish(final("s", 2))
    assert (await following).entry_id == "2-1"
    await follower.aclose()


async def test_translations_to_a_language_that_comes_later_are_found(
    embedded_redis: Store, publisher: Publisher
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    await writer.publish(final("s", 1))
    await writer.flush()
    following = asyncio.create_task(collect(embedded_redis, "s"))
    await writer.publish(translation("s", 1, "fr"))
    await writer.publish(health("s", "ended"))
    await writer.close()
    assert [followed.kind for followed in await following] == ["transcripts", "translations:fr", "health"]


async def test_a_killed_and_restarted_server_goes_unnoticed(
    embedded_redis: Store, publisher: Publisher, data_dir: Path
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    await writer.publish(final("s", 1))
    seen: list[str] = []
    async for followed in follow(embedded_redis.client(), "s", revive_store=embedded_redis.ensure_running):
        if followed.kind != "transcripts":
            continue
        seen.append(followed.entry_id)
        if len(seen) in (10, 20, 30):
            await asyncio.to_thread(kill_server, data_dir)
        if len(seen) < 40:
            await writer.publish(final("s", len(seen) + 1))
        else:
            await writer.publish(health("s", "ended"))
    assert seen == [f"{n}-1" for n in range(1, 41)]


async def test_a_reader_restarts_a_dead_server_that_nobody_writes_to(
    embedded_redis: Store, publisher: Publisher, data_dir: Path
) -> None:
    await write_stream(publisher, "s")
    await publisher.aclose()
    await asyncio.to_thread(kill_server, data_dir)
    seen = await collect(embedded_redis, "s", revive_store=embedded_redis.ensure_running)
    assert len(seen) == 11


async def test_a_store_that_stays_away_is_reported(data_dir: Path) -> None:
    store = Store(RedisParams(url=f"unix://{data_dir}/nowhere.sock"))
    with pytest.raises(StoreError, match=r"Redis has not answered for 0\.2 s"):
        await collect(store, "s", outage_limit_s=0.2)
    await store.aclose()


async def test_following_ends_at_the_last_end_of_a_stream_that_was_resumed(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        await writer.publish(final("s", 1))
        await writer.publish(health("s", "ended"))
        await writer.close()
        again = await publisher.open_stream("s", STARTED_AT)
        await again.publish(health("s", "resumed"))
        await again.publish(final("s", 2))
        await again.flush()
        following = asyncio.create_task(collect(embedded_redis, "s", kinds=["transcripts"]))
        await again.publish(final("s", 3))
        await again.publish(health("s", "failed"))
        await again.close("failed")
        assert [followed.entry_id for followed in await following] == ["1-1", "2-1", "3-1"]


async def test_an_end_whose_health_record_is_gone_is_known_from_the_state(
    embedded_redis: Store, publisher: Publisher
) -> None:
    await write_stream(publisher, "s")
    await embedded_redis.client().delete("surtitle:{s}:health")
    assert len(await collect(embedded_redis, "s", kinds=["transcripts"])) == 3


async def test_a_cancelled_reader_stops(embedded_redis: Store, publisher: Publisher) -> None:
    await publisher.open_stream("s", STARTED_AT)
    async with asyncio.timeout(10):
        for number in range(40):
            following = asyncio.create_task(collect(embedded_redis, "s"))
            for _ in range(number):
                await asyncio.sleep(0)  # a step of the loop, no time: reads are met at different points
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following


async def test_what_cannot_be_followed_is_refused(embedded_redis: Store, publisher: Publisher) -> None:
    with pytest.raises(StreamNotFound, match="no stream 'nobody'"):
        await collect(embedded_redis, "nobody")
    with pytest.raises(ConfigError, match="'words' is no kind"):
        await collect(embedded_redis, "s", kinds=["words"])
    with pytest.raises(ConfigError, match="stream id"):
        await collect(embedded_redis, "a b")
    await write_stream(publisher, "s")
    with pytest.raises(ConfigError, match="is not a position"):
        await collect(embedded_redis, "s", after="transcripts=x")


async def test_an_entry_of_another_schema_is_told_without_its_text(embedded_redis: Store, publisher: Publisher) -> None:
    await write_stream(publisher, "s")
    await embedded_redis.client().xadd("surtitle:{s}:transcripts", {"v": "99", "said": "private"}, id="4-1")
    with pytest.raises(StoreError, match=r"entry 4-1 of transcripts .* \(it says 99\)") as caught:
        await collect(embedded_redis, "s")
    assert "private" not in str(caught.value)


async def test_streams_are_listed_with_what_became_of_them(data_dir: Path) -> None:
    async with Store(RedisParams(data_dir=data_dir, lease_ms=300)) as store:
        client = store.client()
        assert await list_streams(client) == []
        async with Publisher(store) as publisher:
            await write_stream(publisher, "over")
            broken = await publisher.open_stream("broken", STARTED_AT, tier="edge")
            await broken.close("failed")
            lost = await publisher.open_stream("lost", STARTED_AT)
            await lost.abandon()
            await publisher.open_stream("on-air", STARTED_AT, tier="phi4", target_languages=["de"])
            async with asyncio.timeout(5):
                while (found := {summary.stream_id: summary for summary in await list_streams(client)})["lost"].state:
                    if found["lost"].state == "lost":
                        break
        assert list(found) == ["on-air", "lost", "broken", "over"]
        assert [summary.state for summary in found.values()] == ["live", "lost", "failed", "ended"]
        assert found["over"].num_finals == 3
        assert found["over"].covered_ms == 3_900
        assert found["over"].ended_at is not None
        assert found["on-air"].target_languages == ("de",)
        assert found["on-air"].tier == "phi4"
        assert found["on-air"].started_at == "2026-01-02T03:04:05.000Z"


names = st.sampled_from([*(kind.value for kind in KeyKind if kind is not KeyKind.TRANSLATIONS), "translations:en"])
entry_ids = st.tuples(st.integers(1, 2**53), st.integers(0, 2**53)).map(lambda pair: f"{pair[0]}-{pair[1]}")


@given(st.dictionaries(names, entry_ids))
@settings(max_examples=50, deadline=None)
def test_a_position_is_read_back_as_it_was_written(last_ids: dict[str, str]) -> None:
    assert Position.parse(str(Position(last_ids))).last_ids == last_ids


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_position_or_a_clear_error(text: str) -> None:
    try:
        position = Position.parse(text)
    except ConfigError as exc:
        assert "is not a position" in str(exc)
    else:
        assert Position.parse(str(position)) == position
