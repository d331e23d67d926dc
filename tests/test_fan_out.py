"""The fan-out hub: one reader of Redis, and every client gets every entry once, whenever it joins."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.backlog import Backlog, FeedEntry, Limits
from actors.fan_out import Event, FanOut, Reader
from actors.follow import ALL_KINDS
from actors.publisher import Publisher
from actors.store import KeyKind, Store
from actors.stream_writer import StreamWriter
from pipeline.errors import ConfigError, ServiceError, StoreError, StreamNotFound
from tests.stores import STARTED_AT, collect, final, health, kill_server, partial, translation

PATIENCE_S = 20.0
SMALL = Limits(max_events=16, max_bytes=1 << 20)


@pytest.fixture
async def hub(embedded_redis: Store) -> AsyncIterator[FanOut]:
    async with FanOut(embedded_redis) as opened:
        yield opened


async def write_finals(writer: StreamWriter, first: int, last: int) -> None:
    stream_id = writer.keys.stream_id
    for sequence in range(first, last + 1):
        await writer.publish(partial(stream_id, sequence, 1))
        await writer.publish(final(stream_id, sequence))
        await writer.publish(translation(stream_id, sequence))
    await writer.flush()


async def write_end(writer: StreamWriter) -> None:
    await writer.publish(health(writer.keys.stream_id, "ended"))
    await writer.close()


async def rest_of(reader: Reader) -> list[Event]:
    """Everything up to the reader's end, which must come. The reader has left then."""
    events: list[Event] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while reader.end is None:
                events += await reader.read(PATIENCE_S)
    finally:
        reader.leave()
    return events


async def read_all(hub: FanOut, stream_id: str, kinds: frozenset[str] | None = None, after: str = "") -> list[Event]:
    return await rest_of(await hub.join(stream_id, kinds or ALL_KINDS, after))


async def num_blocked(store: Store) -> int:
    """How many connections to Redis wait for entries."""
    return sum("b" in connection["flags"] for connection in await store.client().client_list())


def sequences(events: list[Event]) -> list[int]:
    return [
        int(event.position.split("transcripts=")[1].split("-")[0]) for event in events if event.kind == "transcripts"
    ]


def by_key(events: list[Event]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for event in events:
        found[event.kind].append(event.data)
    return found


async def test_a_stream_that_is_over_is_read_as_a_follower_reads_it_from_every_position(
    embedded_redis: Store, publisher: Publisher, hub: FanOut
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    await write_finals(writer, 1, 3)
    await write_end(writer)
    followed = [
        (one.record.model_dump_json(exclude_none=True), one.position) for one in await collect(embedded_redis, "s")
    ]
    whole = await read_all(hub, "s")
    assert [(event.data, event.position) for event in whole] == followed
    for index, event in enumerate(whole):
        assert await read_all(hub, "s", after=event.position) == whole[index + 1 :]


async def test_readers_that_join_a_live_stream_at_any_time_and_position_get_the_rest_once(
    publisher: Publisher, hub: FanOut
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    await write_finals(writer, 1, 4)
    first = await hub.join("s")
    seen = await first.read(PATIENCE_S)
    while len(seen) < 12:
        seen += await first.read(PATIENCE_S)
    positions = ["", *(event.position for event in seen)]
    reading = [asyncio.create_task(read_all(hub, "s", after=position)) for position in positions]
    for sequence in range(5, 90):
        await write_finals(writer, sequence, sequence)
        if sequence % 10 == 0:
            reading.append(asyncio.create_task(read_all(hub, "s", after=positions[sequence % len(positions)])))
    await write_end(writer)
    whole = seen + await rest_of(first)
    assert sequences(whole) == list(range(1, 90))
    starts = [*range(len(positions)), *(sequence % len(positions) for sequence in range(10, 90, 10))]
    for start, rest in zip(starts, await asyncio.gather(*reading), strict=True):
        assert by_key(rest) == by_key(whole[start:])


async def test_two_readers_share_one_connection_which_goes_with_the_last(
    embedded_redis: Store, publisher: Publisher, hub: FanOut
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    readers = [await hub.join("s"), await hub.join("s")]
    await writer.publish(final("s", 1))
    for reader in readers:
        assert sequences(await reader.read(PATIENCE_S)) == [1]
    async with asyncio.timeout(PATIENCE_S):
        while await num_blocked(embedded_redis) != 1:
            pass
        assert hub.num_feeds == 1
        readers[0].leave()
        await writer.publish(final("s", 2))
        assert sequences(await readers[1].read(PATIENCE_S)) == [2]
        readers[1].leave()
        assert (hub.num_feeds, hub.num_readers) == (0, 0)
        while any(task.get_name() == "feed-s" for task in asyncio.all_tasks()):  # noqa: ASYNC110 - it is cancelled
            await asyncio.sleep(0)
        assert await num_blocked(embedded_redis) == 0


async def test_a_slow_reader_is_closed_and_goes_on_without_loss_and_harms_nobody(
    embedded_redis: Store, publisher: Publisher
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    async with FanOut(embedded_redis, SMALL) as hub:
        slow, quick = await hub.join("s"), await hub.join("s")
        await writer.publish(final("s", 1))
        seen = await slow.read(PATIENCE_S)
        reading = asyncio.create_task(rest_of(quick))
        for sequence in range(2, 40):
            await writer.publish(final("s", sequence))
            await writer.flush()
            assert slow.num_waiting <= SMALL.max_events
        await write_end(writer)
        assert sequences(await reading) == list(range(1, 40))
        assert slow.end is not None
        assert slow.end.reason == "slow"
        assert slow.position == seen[-1].position
        assert sequences(await rest_of(slow)) == []
        assert sequences(await read_all(hub, "s", after=slow.position)) == list(range(2, 40))


async def test_partials_are_given_up_before_a_slow_reader_is(embedded_redis: Store, publisher: Publisher) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    async with FanOut(embedded_redis, SMALL) as hub:
        slow, quick = await hub.join("s", {"partials", "transcripts"}), await hub.join("s")
        assert await slow.read(0.01) == []
        for revision in range(1, 60):
            await writer.publish(partial("s", 1, revision))
            await writer.publish(partial("s", 2, revision))
        await writer.publish(final("s", 1))
        await write_end(writer)
        assert len(await rest_of(quick)) == 120
        events = await rest_of(slow)
    # The newest partial of utterance 1 waits with its final and is of use until the queue is full again.
    assert len(events) <= SMALL.max_events
    assert '"utterance":2,"revision":59' in events[-2].data
    assert events[-1].kind == "transcripts"
    assert slow.position == "partials=1-118,transcripts=1-1"


async def test_only_the_kinds_asked_for_are_given(publisher: Publisher, hub: FanOut) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    live = await hub.join("s", {"translations"})
    await write_finals(writer, 1, 3)
    await write_end(writer)
    for events in (await rest_of(live), await read_all(hub, "s", frozenset({"translations"}))):
        assert [event.position for event in events] == [f"translations:en={n}-1" for n in (1, 2, 3)]


async def test_what_was_trimmed_keeps_nobody_from_going_on(
    embedded_redis: Store, publisher: Publisher, hub: FanOut
) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    await write_finals(writer, 1, 3)
    holding = await hub.join("s")
    await embedded_redis.client().xtrim("surtitle:{s}:partials", maxlen=0, approximate=False)
    late = await hub.join("s")
    assert sorted(by_key(await late.read(PATIENCE_S))) == ["transcripts", "translations"]
    await writer.publish(final("s", 4))
    await write_end(writer)
    assert [event.kind for event in await rest_of(late)] == ["transcripts", "health"]
    holding.leave()


async def test_a_killed_and_restarted_server_goes_unnoticed(publisher: Publisher, hub: FanOut, data_dir: Path) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    readers = [await hub.join("s") for _ in range(3)]
    reading = [asyncio.create_task(rest_of(reader)) for reader in readers]
    for sequence in range(1, 31):
        if sequence % 10 == 0:
            await asyncio.to_thread(kill_server, data_dir)
        await writer.publish(final("s", sequence))
    await write_end(writer)
    for events in await asyncio.gather(*reading):
        assert sequences(events) == list(range(1, 31))


async def test_readers_that_are_cut_off_at_any_point_touch_no_other(publisher: Publisher, hub: FanOut) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    await write_finals(writer, 1, 50)
    staying = asyncio.create_task(read_all(hub, "s"))
    for number in range(40):
        reader = await hub.join("s")
        reading = asyncio.create_task(reader.read(PATIENCE_S))
        for _ in range(number):
            await asyncio.sleep(0)  # a step of the loop, no time: reads are met at different points
        reading.cancel()
        await asyncio.wait({reading})
        reader.leave()
    await publisher.open_stream("other", STARTED_AT)
    joining = asyncio.create_task(hub.join("other"))
    await asyncio.sleep(0)
    joining.cancel()
    await asyncio.wait({joining})
    assert joining.cancelled()
    assert (hub.num_readers, hub.num_feeds) == (1, 1)
    await write_end(writer)
    assert sequences(await staying) == list(range(1, 51))
    assert hub.num_feeds == 0


async def test_an_entry_of_another_schema_ends_the_readers_of_its_stream_only(
    embedded_redis: Store, publisher: Publisher, hub: FanOut
) -> None:
    await publisher.open_stream("broken", STARTED_AT)
    whole = await publisher.open_stream("whole", STARTED_AT)
    watching = await hub.join("broken")
    reading = asyncio.create_task(read_all(hub, "whole"))
    await embedded_redis.client().xadd("surtitle:{broken}:transcripts", {"v": "99", "said": "private"}, id="1-1")
    assert await rest_of(watching) == []
    assert watching.end is not None
    assert watching.end.reason == "failed"
    assert "private" not in watching.end.message
    with pytest.raises(StoreError, match="entry 1-1"):
        await read_all(hub, "broken")
    await write_finals(whole, 1, 1)
    await write_end(whole)
    assert sequences(await reading) == [1]


async def test_a_hub_that_closes_tells_its_readers(embedded_redis: Store, publisher: Publisher) -> None:
    writer = await publisher.open_stream("s", STARTED_AT)
    hub = FanOut(embedded_redis)
    reader = await hub.join("s")
    reading = asyncio.create_task(rest_of(reader))
    await writer.publish(final("s", 1))
    await writer.flush()
    async with asyncio.timeout(PATIENCE_S):
        await hub.aclose()
        assert sequences(await reading) == [1]
    assert reader.end is not None
    assert reader.end.reason == "stopping"
    with pytest.raises(ServiceError, match="stopping"):
        await hub.join("s")


async def test_what_cannot_be_watched_is_refused_and_leaves_nothing(publisher: Publisher, hub: FanOut) -> None:
    await publisher.open_stream("s", STARTED_AT)
    with pytest.raises(StreamNotFound, match="no stream 'nobody'"):
        await hub.join("nobody")
    with pytest.raises(ConfigError, match="'words' is no kind"):
        await hub.join("s", {"words"})
    with pytest.raises(ConfigError, match="stream id"):
        await hub.join("a b")
    with pytest.raises(ConfigError, match="is not a position"):
        await hub.join("s", after="transcripts=x")
    assert (hub.num_readers, hub.num_feeds) == (0, 0)


LIMITS = Limits(max_events=6, max_bytes=100)
KINDS = st.sampled_from([KeyKind.PARTIALS, KeyKind.PARTIALS, KeyKind.TRANSCRIPTS, KeyKind.HEALTH])
PUSHES = st.tuples(KINDS, st.integers(1, 3), st.integers(1, 30))
STEPS = st.lists(st.one_of(PUSHES, PUSHES, PUSHES, st.integers(1, 120)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_a_backlog_gives_up_replaced_partials_only_and_keeps_the_order(
    steps: list[tuple[KeyKind, int, int] | int],
) -> None:
    backlog = Backlog(LIMITS)
    pushed: list[FeedEntry] = []
    taken: list[FeedEntry] = []
    has_room = True
    marks: list[str | None] = []
    for step in steps:
        if isinstance(step, int):
            batch = backlog.take(step)
            taken += [waiting.entry for waiting in batch]
            marks += [waiting.partial_id for waiting in batch]
            continue
        kind, utterance, num_bytes = step
        order = (1, len(pushed) + 1)
        is_final = kind is KeyKind.TRANSCRIPTS
        pushed.append(FeedEntry(kind, kind, f"1-{order[1]}", order, utterance, is_final, "", num_bytes))
        has_room = backlog.push(pushed[-1])
        if not has_room:
            break
        assert len(backlog) <= LIMITS.max_events
        assert backlog.num_bytes <= LIMITS.max_bytes or len(backlog) == 1
    batch = backlog.take(10**9)
    taken += [waiting.entry for waiting in batch]
    marks += [waiting.partial_id for waiting in batch]
    assert (len(backlog), backlog.num_bytes) == (0, 0)
    assert taken == sorted(taken, key=lambda entry: entry.order)
    kept = {entry.order for entry in taken}
    for entry in pushed:
        if entry.order not in kept:
            assert entry.kind is KeyKind.PARTIALS
            assert any(
                later.order > entry.order
                and later.utterance == entry.utterance
                and (later.kind is KeyKind.PARTIALS or later.is_final)
                for later in pushed
            )
    for entry, mark in zip(taken, marks, strict=True):
        partials = [other.entry_id for other in pushed if other.kind is KeyKind.PARTIALS and other.order <= entry.order]
        assert mark == (partials[-1] if partials else None)
    if not has_room:
        waiting = [waiting.entry for waiting in batch]
        assert len(waiting) > LIMITS.max_events or sum(entry.num_bytes for entry in waiting) > LIMITS.max_bytes
        partials_of = [entry.utterance for entry in waiting if entry.kind is KeyKind.PARTIALS]
        assert len(partials_of) == len(set(partials_of))


async def test_a_burst_is_no_reason_to_close_a_reader_that_reads(publisher: Publisher, hub: FanOut) -> None:
    writer = await publisher.open_stream("s", STARTED_AT, target_languages=["en"])
    reading = [asyncio.create_task(read_all(hub, "s")) for _ in range(5)]
    await write_finals(writer, 1, 200)
    await write_end(writer)
    for events in await asyncio.gather(*reading):
        assert sequences(events) == list(range(1, 201))
