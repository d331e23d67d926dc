"""The publisher: every record once, in order, by one owner, whatever happens to the connection or the server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from actors.entries import iso_ms
from actors.publisher import Publisher, StreamWriter
from actors.store import INDEX_KEY, LIVE_KEY, RedisParams, Store
from pipeline.errors import ConfigError, OwnershipLost, StoreError
from tests.stores import (
    STARTED_AT,
    ReplyDropper,
    error,
    final,
    health,
    kill_server,
    partial,
    scene,
    summary,
    translation,
)


async def entries(store: Store, writer: StreamWriter, name: str) -> list[tuple[str, dict[str, str]]]:
    """All entries of one key of the writer's stream."""
    found: Any = await store.client().xrange(writer.keys.key(name))
    return list(found)


async def ids(store: Store, writer: StreamWriter, name: str) -> list[str]:
    return [entry_id for entry_id, _ in await entries(store, writer, name)]


async def test_records_go_to_their_keys_with_ids_of_our_own(embedded_redis: Store, publisher: Publisher) -> None:
    writer = await publisher.open_stream("call-1", STARTED_AT, target_languages=["en"])
    for record in (
        health("call-1", "started"),
        partial("call-1", 1, 1),
        partial("call-1", 1, 2),
        final("call-1", 1),
        translation("call-1", 1),
        error("call-1", 2, "transcribe"),
        error("call-1", 2, "translate:en"),
        error("call-1", 0, "summarise"),
        summary("call-1", 2),
        summary("call-1", 2),
        scene("call-1", 100),
        error("call-1", 0, "describe"),
        scene("call-1", 300),
    ):
        await writer.publish(record)
    await writer.flush()
    assert await ids(embedded_redis, writer, "partials") == ["1-1", "1-2"]
    assert await ids(embedded_redis, writer, "transcripts") == ["1-1", "2-1"]
    assert await ids(embedded_redis, writer, "translations:en") == ["1-1", "2-1"]
    assert await ids(embedded_redis, writer, "summaries") == ["1-1", "2-1"]
    assert await ids(embedded_redis, writer, "scenes") == ["1-1", "2-1"]
    assert await ids(embedded_redis, writer, "health") == ["1-1", "2-1", "3-1"]
    assert [fields["kind"] for _, fields in await entries(embedded_redis, writer, "transcripts")] == ["final", "error"]
    assert writer.counters.published == 13
    assert writer.num_buffered == 0


async def test_a_new_owner_goes_on_numbering_scenes_after_the_last_one(
    embedded_redis: Store, publisher: Publisher
) -> None:
    for at_ms in (100, 200):
        writer = await publisher.open_stream("call-1", STARTED_AT)
        await writer.publish(scene("call-1", at_ms))
        await writer.flush()
    assert await ids(embedded_redis, writer, "scenes") == ["1-1", "2-1"]


async def test_records_are_stamped_with_wall_clock_and_with_utc_by_the_anchors(embedded_redis: Store) -> None:
    now = datetime(2026, 5, 6, 7, 8, 9, 123_456, tzinfo=UTC)
    async with Publisher(embedded_redis, now=lambda: now) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        await writer.publish(final("s", 1))
        writer.add_anchor(5_000, STARTED_AT + timedelta(hours=1))
        await writer.publish(final("s", 2))
        await writer.publish(final("s", 3, start_ms=6_000, end_ms=6_500))
        await writer.flush()
        stored = [fields for _, fields in await entries(embedded_redis, writer, "transcripts")]
        assert {fields["emitted_at"] for fields in stored} == {"2026-05-06T07:08:09.123Z"}
        assert [fields["utc_start"] for fields in stored] == [
            "2026-01-02T03:04:06.000Z",
            "2026-01-02T03:04:07.000Z",
            "2026-01-02T04:04:06.000Z",
        ]
        anchors = await embedded_redis.client().hget(writer.keys.state, "anchors")
        assert json.loads(str(anchors)) == [[0, iso_ms(STARTED_AT)], [5_000, iso_ms(STARTED_AT + timedelta(hours=1))]]


async def test_a_final_whose_reply_was_lost_is_there_once(embedded_redis: Store, data_dir: Path) -> None:
    server_path = Path(embedded_redis.address)
    async with (
        ReplyDropper(server_path, data_dir / "proxy.sock") as proxy,
        Store(RedisParams(url=proxy.url)) as store,
        Publisher(store) as publisher,
    ):
        writer = await publisher.open_stream("s", STARTED_AT)
        for sequence in range(1, 201):
            await writer.publish(final("s", sequence, text=f"text {sequence}"))
            await writer.publish(partial("s", sequence, 1))
            proxy.drop_next()
            await writer.flush()
        assert proxy.num_dropped == 200
        assert writer.counters.duplicates >= 2 * 190  # the lease's renewal may lose a reply too
        assert writer.counters.differing_duplicates == 0
        stored = await entries(embedded_redis, writer, "transcripts")
        assert [fields["text"] for _, fields in stored] == [f"text {n}" for n in range(1, 201)]
        assert [entry_id for entry_id, _ in stored] == [f"{n}-1" for n in range(1, 201)]
        assert len(await ids(embedded_redis, writer, "partials")) == 200


async def test_a_writer_stops_at_once_whatever_its_tasks_are_doing(publisher: Publisher) -> None:
    async with asyncio.timeout(10):
        for number in range(100):
            writer = await publisher.open_stream(f"s{number}", STARTED_AT)
            await writer.publish(final(f"s{number}", 1))
            for _ in range(number % 10):
                await asyncio.sleep(0)  # a step of the loop, no time: the calls are met at different points
            await writer.abandon()


async def test_a_killed_server_costs_no_record_and_doubles_none(
    embedded_redis: Store, publisher: Publisher, data_dir: Path
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    for sequence in range(1, 301):
        await writer.publish(partial("s", sequence, 1))
        await writer.publish(final("s", sequence))
        await writer.publish(translation("s", sequence))
        if sequence % 100 == 50:
            await asyncio.to_thread(kill_server, data_dir)
        elif sequence % 100 == 0:
            await writer.flush()
    expected = [f"{n}-1" for n in range(1, 301)]
    assert await ids(embedded_redis, writer, "transcripts") == expected
    assert await ids(embedded_redis, writer, "translations:en") == expected
    assert writer.counters.retries >= 3
    assert writer.counters.published == 900
    assert writer.counters.store_losses == 0
    assert writer.outage_s == 0.0


async def test_a_full_buffer_makes_publishers_wait_and_loses_nothing(data_dir: Path) -> None:
    params = RedisParams(data_dir=data_dir, max_pending_records=8, command_timeout_ms=400)
    async with Store(params) as store, Publisher(store) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        await writer.flush()
        pid = (await store.client().info("server"))["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            for sequence in range(1, 9):
                await writer.publish(final("s", sequence))
            waiting = asyncio.create_task(writer.publish(final("s", 9)))
            await asyncio.wait([waiting], timeout=0.6)
            assert not waiting.done()
            assert writer.num_buffered == 8
            assert publisher.outage_s > 0
            with pytest.raises(StoreError, match="8 records of stream s"):
                await writer.flush(timeout_s=0.01)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await waiting == "9-1"
        await writer.flush()
        assert await ids(store, writer, "transcripts") == [f"{n}-1" for n in range(1, 10)]


async def test_a_store_that_is_out_of_memory_is_waited_for(embedded_redis: Store, publisher: Publisher) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    await writer.publish(final("s", 1))
    await writer.flush()
    client = embedded_redis.client()
    await client.config_set("maxmemory", "1mb")
    await writer.publish(final("s", 2))
    with pytest.raises(StoreError, match="1 records"):
        await writer.flush(timeout_s=0.2)
    await client.config_set("maxmemory", "512mb")
    await writer.flush()
    assert await ids(embedded_redis, writer, "transcripts") == ["1-1", "2-1"]


async def test_a_writer_that_was_superseded_can_change_nothing(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis) as old_publisher, Publisher(embedded_redis) as new_publisher:
        old = await old_publisher.open_stream("s", STARTED_AT)
        await old.publish(final("s", 1))
        await old.flush()
        new = await new_publisher.open_stream("s", STARTED_AT + timedelta(minutes=1))
        with pytest.raises(OwnershipLost, match="newer owner than epoch 1"):  # its lease task may notice first
            await old.publish(final("s", 2, text="of a zombie"))
            await old.flush()
        with pytest.raises(OwnershipLost):
            await old.publish(final("s", 3))
        with pytest.raises(OwnershipLost):
            await old.close()
        assert old_publisher.counters.published == 1
        await new.publish(final("s", 2, text="of the owner"))
        await new.flush()
        stored = await entries(embedded_redis, new, "transcripts")
        assert [fields["text"] for _, fields in stored] == ["some words", "of the owner"]
        assert await embedded_redis.client().hget(new.keys.state, "state") == "live"
        assert await embedded_redis.client().smembers(LIVE_KEY) == {"s"}


async def test_of_two_owners_with_the_same_epoch_only_the_last_to_claim_may_write(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis) as first_publisher, Publisher(embedded_redis) as second_publisher:
        first = await first_publisher.open_stream("s", STARTED_AT)
        await first.flush()
        async with first._renewing:  # the lease's first renewal would bring the state back
            await embedded_redis.client().delete(first.keys.state)  # as if the server had lost its last second
            second = await second_publisher.open_stream("s", STARTED_AT)
        assert first.resume.epoch == second.resume.epoch == 1
        await second.publish(final("s", 1, text="of the owner"))
        await second.flush()
        with pytest.raises(OwnershipLost):
            await first.publish(final("s", 1, text="of a zombie"))
            await first.flush()
        stored = await entries(embedded_redis, second, "transcripts")
        assert [fields["text"] for _, fields in stored] == ["of the owner"]


async def test_many_publishers_of_one_stream_keep_the_order_in_which_they_came(data_dir: Path) -> None:
    async with Store(RedisParams(data_dir=data_dir, max_pending_records=4)) as store, Publisher(store) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        given = await asyncio.gather(*(writer.publish(final("s", n)) for n in range(1, 101)))
        await writer.flush()
        assert given == await ids(store, writer, "transcripts") == [f"{n}-1" for n in range(1, 101)]


async def test_the_owner_learns_of_a_takeover_from_its_lease_without_writing(data_dir: Path) -> None:
    params = RedisParams(data_dir=data_dir, lease_ms=300)
    async with Store(params) as store, Publisher(store) as publisher, Publisher(store) as other:
        writer = await publisher.open_stream("s", STARTED_AT)
        await other.open_stream("s", STARTED_AT)
        async with asyncio.timeout(5):
            with pytest.raises(OwnershipLost):
                while True:
                    await writer.flush()
                    await asyncio.wait([asyncio.create_task(store.client().ping())])


async def test_a_new_owner_goes_on_after_the_last_entries(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT, target_languages=["de"])
        assert writer.resume.epoch == 1
        assert not writer.resume.is_resumed
        assert (writer.resume.next_sequence, writer.resume.next_utterance, writer.resume.covered_ms) == (1, 1, 0)
        await writer.publish(health("s", "started"))
        await writer.publish(final("s", 1, utterance=2))
        await writer.publish(final("s", 2, utterance=1, end_ms=2_500))
        await writer.publish(error("s", 3, "transcribe"))
        await writer.publish(translation("s", 1, "de"))
        await writer.publish(partial("s", 4, 1))
        await writer.flush()
    async with Publisher(embedded_redis) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT + timedelta(minutes=1), target_languages=["de"])
        resume = writer.resume
        assert resume.is_resumed
        assert resume.started_at == STARTED_AT
        assert (resume.next_sequence, resume.next_utterance, resume.covered_ms) == (4, 4, 3_900)
        assert resume.last_ids["translations:de"] == "1-1"
        assert resume.last_ids["health"] == "1-1"
        await writer.publish(health("s", "resumed"))
        await writer.publish(partial("s", 4, 1))
        await writer.publish(final("s", 4))
        await writer.flush()
        assert await ids(embedded_redis, writer, "health") == ["1-1", "2-1"]
        assert await ids(embedded_redis, writer, "partials") == ["1-1", "2-1"]
        stored = await entries(embedded_redis, writer, "transcripts")
        assert stored[-1][0] == "4-1"
        assert stored[-1][1]["utc_start"] == iso_ms(STARTED_AT + timedelta(minutes=1, milliseconds=100))


async def test_what_is_there_already_stays_and_a_differing_text_is_counted(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        for sequence in (1, 2):
            await writer.publish(final("s", sequence))
        await writer.flush()
        again = await publisher.open_stream("s", STARTED_AT)
        await again.publish(final("s", 1))
        await again.publish(final("s", 2, text="something else"))
        await again.publish(final("s", 3))
        await again.flush()
        stored = await entries(embedded_redis, again, "transcripts")
        assert [fields["text"] for _, fields in stored] == ["some words"] * 3
        assert (again.counters.published, again.counters.duplicates, again.counters.differing_duplicates) == (3, 2, 1)


async def test_an_entry_that_was_trimmed_is_still_a_duplicate(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        await writer.publish(final("s", 1))
        await writer.flush()
        await embedded_redis.client().xtrim(writer.keys.key("transcripts"), maxlen=0, approximate=False)
        again = await publisher.open_stream("s", STARTED_AT)
        assert again.resume.next_sequence == 2
        await again.publish(final("s", 1))
        await again.flush()
        assert await ids(embedded_redis, again, "transcripts") == []
        assert again.counters.duplicates == 1


async def test_misuse_is_refused_before_it_can_leave_a_hole(publisher: Publisher) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    with pytest.raises(ValueError, match="leaves a hole: the next one is 1"):
        await writer.publish(final("s", 2))
    with pytest.raises(ValueError, match="record of stream 'other'"):
        await writer.publish(final("other", 1))
    with pytest.raises(ValueError, match="translate:LANG"):
        await writer.publish(error("s", 1, "translate"))
    await writer.publish(translation("s", 5))
    with pytest.raises(ValueError, match="4 comes after 5-1"):
        await writer.publish(translation("s", 4))
    with pytest.raises(ValueError, match="not as 'done'"):
        await writer.close("done")
    await writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        await writer.publish(final("s", 1))


async def test_ids_that_cannot_be_part_of_a_key_are_refused(publisher: Publisher) -> None:
    for stream_id in ("", "a b", "x" * 65, "a}b", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        with pytest.raises(ConfigError, match="stream id"):
            await publisher.open_stream(stream_id, STARTED_AT)
    with pytest.raises(ValueError, match="no time zone"):
        await publisher.open_stream("s", STARTED_AT.replace(tzinfo=None))
    with pytest.raises(ConfigError, match="language tag"):
        await publisher.open_stream("s", STARTED_AT, target_languages=["to English"])


async def test_a_live_stream_is_not_taken_over_by_somebody_who_does_not_want_to(embedded_redis: Store) -> None:
    async with Publisher(embedded_redis, owner="alice") as alice, Publisher(embedded_redis) as bob:
        writer = await alice.open_stream("s", STARTED_AT)
        with pytest.raises(StoreError, match="stream s is live, owned by alice"):
            await bob.open_stream("s", STARTED_AT, is_takeover_allowed=False)
        await writer.close()
        taken = await bob.open_stream("s", STARTED_AT, is_takeover_allowed=False)
        assert taken.resume.epoch == 2


async def test_closing_takes_the_stream_out_of_the_live_set_and_lets_it_expire(
    embedded_redis: Store, publisher: Publisher
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    await writer.publish(final("s", 1))
    client = embedded_redis.client()
    assert await client.smembers(LIVE_KEY) == {"s"}
    await writer.close("failed")
    await writer.close("failed")
    state = await client.hgetall(writer.keys.state)
    assert state["state"] == "failed"
    assert "ended_at" in state
    assert "lease_until_ms" not in state
    assert await client.smembers(LIVE_KEY) == set()
    retention_ms = embedded_redis.params.retention_ms
    for key in (writer.keys.state, writer.keys.key("transcripts")):
        assert retention_ms < await client.pttl(key) < 2 * retention_ms
    assert publisher.counters.published == 1
    reopened = await publisher.open_stream("s", STARTED_AT)
    await reopened.flush()
    assert publisher.counters.published == 1, "what gone writers did must stay counted"
    assert [fields["epoch"] for _, fields in await client.xrange(INDEX_KEY)] == ["1", "2"]
    assert "ended_at" not in await client.hgetall(writer.keys.state)


async def test_retention_takes_entries_by_their_age_and_keys_of_dead_owners_expire(data_dir: Path) -> None:
    clock = [STARTED_AT]
    params = RedisParams(data_dir=data_dir, retention_hours=1)
    async with Store(params) as store, Publisher(store, now=lambda: clock[0]) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        for sequence in range(1, 251):
            await writer.publish(final("s", sequence))
        await writer.publish(health("s", "started"))
        await writer.flush()
        clock[0] += timedelta(minutes=40)
        for sequence in range(251, 254):
            await writer.publish(final("s", sequence))
        await writer.flush()
        assert await writer.apply_retention() == 0
        clock[0] += timedelta(minutes=30)
        assert await writer.apply_retention() == 251
        assert await ids(store, writer, "transcripts") == ["251-1", "252-1", "253-1"]
        assert await ids(store, writer, "health") == []
        clock[0] += timedelta(hours=2)
        assert await writer.apply_retention() == 3
        await writer.publish(final("s", 254))
        await writer.flush()
        assert await ids(store, writer, "transcripts") == ["254-1"]
        for name in ("transcripts", "health"):
            assert await store.client().pttl(writer.keys.key(name)) > params.retention_ms
        assert writer.counters.trimmed == 254


async def test_partials_are_trimmed_by_number(data_dir: Path) -> None:
    async with Store(RedisParams(data_dir=data_dir, partials_maxlen=100)) as store, Publisher(store) as publisher:
        writer = await publisher.open_stream("s", STARTED_AT)
        for revision in range(1, 1_001):
            await writer.publish(partial("s", 1, revision))
        await writer.flush()
        kept = await ids(store, writer, "partials")
        assert 100 <= len(kept) <= 200
        assert kept[-1] == "1-1000"


async def test_acknowledged_entries_that_the_store_lost_are_told(embedded_redis: Store, publisher: Publisher) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    for sequence in (1, 2, 3):
        await writer.publish(final("s", sequence))
    await writer.flush()
    client = embedded_redis.client()
    await client.delete(writer.keys.key("transcripts"), writer.keys.state)
    await writer.publish(final("s", 4))
    await writer.flush()
    assert await ids(embedded_redis, writer, "transcripts") == ["4-1"]
    assert writer.counters.store_losses == 1
    ((_, told),) = await entries(embedded_redis, writer, "health")
    assert told["message"] == "Redis lost acknowledged entries: transcripts up to 3-1"


async def test_a_store_that_does_not_take_scripts_or_writes_is_named_without_its_password(data_dir: Path) -> None:
    with pytest.raises(StoreError, match=r"unix|nowhere\.sock") as caught:
        await Store(RedisParams(url=f"unix://user:secret@{data_dir}/nowhere.sock")).open()
    assert "secret" not in str(caught.value)
    async with Store(RedisParams(data_dir=data_dir)) as store:
        client = store.client()
        await client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreError, match="maxmemory"):
            await Store(RedisParams(url=f"unix://{store.address}")).open()
    with pytest.raises(ValueError, match="expected redis://") as refused:
        RedisParams(url="http://user:secret@host")
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(RedisParams(url="redis://user:secret@host"))


async def test_a_server_that_never_answers_is_reported_in_under_five_seconds() -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    began = asyncio.get_running_loop().time()
    with pytest.raises(StoreError, match=f"redis://127.0.0.1:{port} did not answer within 500 ms"):
        await Store(RedisParams(url=f"redis://u:secret@127.0.0.1:{port}", connect_timeout_ms=500)).open()
    assert asyncio.get_running_loop().time() - began < 5
    server.close()
    await server.wait_closed()
