"""Streams over HTTP: Server-Sent Events and captions to download, by a real gateway, a real store and real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from actors.fan_out import FanOut
from actors.gateway import Gateway
from actors.listener import listen
from actors.outlets import EventStream
from actors.publisher import Publisher
from actors.settings import Settings
from actors.store import RedisParams, Store
from actors.stream_writer import StreamWriter
from pipeline.models.weights import ModelParams
from tests.event_source import ServerEvent, events_of, open_events
from tests.stores import STARTED_AT, collect, error, final, health, kill_server, partial, translation
from tests.test_api import Client
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Service:
    """A gateway that serves HTTP, and who writes into its store."""

    url: str
    gateway: Gateway
    store: Store
    publisher: Publisher

    @property
    def client(self) -> Client:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return Client(host, int(port))


@pytest.fixture(scope="module")
def service_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data_dir = tmp_path_factory.mktemp("store")
    model = ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))), encoder_threads=1, decoder_threads=1)
    settings = Settings(runtime="local", model=model, redis=RedisParams(data_dir=data_dir))
    return settings.model_copy(update={"service": settings.service.model_copy(update={"port": 0})})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(service_settings: Settings) -> AsyncIterator[Service]:
    gateway = Gateway(service_settings)
    info = await gateway.start(serves_http=True)
    assert info.http_url is not None
    async with Store(service_settings.redis) as store, Publisher(store) as publisher:
        yield Service(info.http_url, gateway, store, publisher)
    await gateway.aclose()
    kill_server(service_settings.redis.data_dir)


async def write_finals(writer: StreamWriter, first: int, last: int) -> None:
    stream_id = writer.keys.stream_id
    for sequence in range(first, last + 1):
        await writer.publish(partial(stream_id, sequence, 1))
        await writer.publish(final(stream_id, sequence, f"line {sequence}"))
        await writer.publish(translation(stream_id, sequence, "de", f"Zeile {sequence} für alle"))
    await writer.flush()


async def write_end(writer: StreamWriter) -> None:
    await writer.publish(health(writer.keys.stream_id, "ended"))
    await writer.close()


def finals_of(events: list[ServerEvent]) -> list[int]:
    return [event.data["sequence"] for event in events if event.name == "transcripts"]


async def test_a_client_that_comes_back_with_any_id_gets_the_rest_once(service: Service) -> None:
    writer = await service.publisher.open_stream("again", STARTED_AT, target_languages=["de"])
    await write_finals(writer, 1, 2)
    await write_end(writer)
    whole = await events_of(service.url, "/v1/streams/again/events")
    assert [event.data for event in whole[:-1]] == [
        followed.record.model_dump(mode="json", exclude_none=True) for followed in await collect(service.store, "again")
    ]
    assert (whole[-1].name, whole[-1].data["reason"], whole[-1].event_id) == ("end", "ended", whole[-2].event_id)
    for index, event in enumerate(whole[:-1]):
        path = "/v1/streams/again/events"
        assert await events_of(service.url, path, event.event_id) == whole[index + 1 :]
        assert await events_of(service.url, f"{path}?after={event.event_id}") == whole[index + 1 :]
        # The header is newer than the address of the page that it comes back to.
        assert await events_of(service.url, f"{path}?after={whole[0].event_id}", event.event_id) == whole[index + 1 :]


async def test_a_live_stream_is_followed_to_its_end(service: Service) -> None:
    writer = await service.publisher.open_stream("live", STARTED_AT, target_languages=["de"])
    async with open_events(service.url, "/v1/streams/live/events?kinds=partials,transcripts") as source:
        assert source.status == 200
        assert source.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert source.headers["cache-control"] == "no-store"
        arriving = aiter(source)
        async with asyncio.timeout(PATIENCE_S):
            for sequence in (1, 2, 3):
                await write_finals(writer, sequence, sequence)
                assert [(await anext(arriving)).name for _ in range(2)] == ["partials", "transcripts"]
            await write_end(writer)
            last = await anext(arriving)
            assert (last.name, last.event_id) == ("end", "partials=1-3,transcripts=3-1")
            with pytest.raises(StopAsyncIteration):
                await anext(arriving)


async def test_what_cannot_be_read_is_a_problem(service: Service) -> None:
    await service.publisher.open_stream("there", STARTED_AT, target_languages=["de"])
    for path, status, says in (
        ("nobody/events", 404, "nobody"),
        ("nobody/captions.vtt", 404, "nobody"),
        ("there/events?after=x", 422, "not a position"),
        ("there/events?kinds=words", 422, "words"),
        ("%20/events", 422, "stream id"),
        (f"there/events?after={'9' * 5_000}", 422, "after"),
        ("there/captions.doc", 422, "extension"),
        ("there/captions.vtt?language=fr", 422, "de"),
        ("there/captions.vtt?language=*", 422, "language tag"),
    ):
        answer = await service.client.call("GET", f"/v1/streams/{path}")
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), path
        assert says in answer.data["detail"], path
    refused = await service.client.call("GET", "/v1/streams/there/events", headers={"Last-Event-ID": "health=1"})
    assert refused.status == 422
    assert service.gateway.fan_out.num_readers == 0


async def test_a_client_that_disappears_takes_its_reader_along_and_no_other(service: Service) -> None:
    writer = await service.publisher.open_stream("left", STARTED_AT)
    fan_out = service.gateway.fan_out
    async with open_events(service.url, "/v1/streams/left/events") as staying:
        for _ in range(5):
            async with open_events(service.url, "/v1/streams/left/events"):
                pass
        async with asyncio.timeout(PATIENCE_S):
            # Nobody but the server is told that a client has gone.
            while fan_out.num_readers > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert fan_out.num_feeds == 1
            await write_finals(writer, 1, 1)
            assert (await anext(aiter(staying))).name == "partials"
    async with asyncio.timeout(PATIENCE_S):
        while fan_out.num_feeds:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_client_that_does_not_read_is_closed_with_where_to_go_on(service: Service) -> None:
    writer = await service.publisher.open_stream("slow", STARTED_AT)
    path = "/v1/streams/slow/events?kinds=transcripts"
    text = "many words " * 2_000
    last = 300
    async with open_events(service.url, path) as slow, open_events(service.url, path) as quick:
        arriving = aiter(quick)
        async with asyncio.timeout(PATIENCE_S):
            for sequence in range(1, last + 1):
                await writer.publish(final("slow", sequence, text))
                assert (await anext(arriving)).data["sequence"] == sequence
            await write_end(writer)
            assert (await anext(arriving)).name == "end"
            seen = [event async for event in slow]
    assert (seen[-1].name, seen[-1].data["reason"]) == ("closed", "slow")
    assert seen[-1].event_id == seen[-1].data["after"] == f"transcripts={len(seen) - 1}-1"
    rest = await events_of(service.url, path, seen[-1].event_id)
    assert finals_of(seen) + finals_of(rest) == list(range(1, last + 1))
    assert "surtitle_slow_readers 1.0" in (await service.client.call("GET", "/metrics")).body


async def test_a_client_that_never_reads_again_is_disconnected() -> None:
    with listen("127.0.0.1", 0, untaken_timeout_ms=500) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        await asyncio.to_thread(client.connect, listener.getsockname())
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(listener)
        with connection, pytest.raises(TimeoutError):
            async with asyncio.timeout(PATIENCE_S) as patience:
                await loop.sock_sendall(connection, bytes(1 << 25))
        assert not patience.expired()


async def test_silence_is_filled_with_comments(service: Service) -> None:
    await service.publisher.open_stream("quiet", STARTED_AT)
    async with FanOut(service.store) as fan_out:
        response = EventStream(await fan_out.join("quiet"), "quiet", heartbeat_s=0.01)
        chunks = [await anext(response.body_iterator) for _ in range(3)]
        await response.body_iterator.aclose()
        fan_out.leave(response.reader)
    assert chunks == ["retry: 1000\n\n", ": still here\n\n", ": still here\n\n"]


async def test_a_service_that_stops_says_where_to_go_on(service: Service, service_settings: Settings) -> None:
    writer = await service.publisher.open_stream("stopping", STARTED_AT)
    await write_finals(writer, 1, 1)
    gateway = Gateway(service_settings)
    info = await gateway.start(serves_http=True)
    assert info.http_url is not None
    async with open_events(info.http_url, "/v1/streams/stopping/events?kinds=transcripts") as source:
        arriving = aiter(source)
        assert (await anext(arriving)).name == "transcripts"
        async with asyncio.timeout(PATIENCE_S):
            await gateway.aclose()
            closed = await anext(arriving)
    assert (closed.name, closed.data["reason"], closed.event_id) == ("closed", "stopping", "transcripts=1-1")


async def test_captions_are_downloaded_while_live_and_after_the_end(service: Service) -> None:
    writer = await service.publisher.open_stream("hall", STARTED_AT, target_languages=["de", "fr"])
    await write_finals(writer, 1, 1)
    await writer.publish(health("hall", "gap", 1_950).model_copy(update={"end_ms": 2_000, "message": "packets lost"}))
    await writer.publish(error("hall", 2, "transcribe"))
    await write_finals(writer, 3, 3)

    async def get(name: str, media_type: str) -> str:
        answer = await service.client.call("GET", f"/v1/streams/hall/captions.{name}")
        assert (answer.status, answer.headers["content-type"]) == (200, media_type)
        assert 'inline; filename="hall.' in answer.headers["content-disposition"]
        return answer.body

    async def get_all() -> list[str]:
        return [
            await get("vtt", "text/vtt; charset=utf-8"),
            await get("srt", "application/x-subrip; charset=utf-8"),
            await get("txt", "text/plain; charset=utf-8"),
            await get("json", "application/json"),
            await get("vtt?language=de", "text/vtt; charset=utf-8"),
            await get("txt?language=fr", "text/plain; charset=utf-8"),
        ]

    live = await get_all()
    assert live[0] == (
        "WEBVTT\n\n1\n00:00:01.000 --> 00:00:01.900\nline 1\n\n"
        "NOTE gap 00:00:01.950 to 00:00:02.000 packets lost\n\n"
        "2\n00:00:03.000 --> 00:00:03.900\nline 3\n"
    )
    assert live[1].startswith("1\n00:00:01,000 --> 00:00:01,900\nline 1\n")
    assert live[2] == "[00:01.000] line 1\n[00:03.000] line 3\n"
    captions = json.loads(live[3])
    assert [record["text"] for record in captions["captions"]] == ["line 1", "line 3"]
    assert [gap["message"] for gap in captions["gaps"]] == ["packets lost"]
    assert "Zeile 3 für alle" in live[4]
    assert "NOTE gap" in live[4]
    assert live[5] == ""
    await write_end(writer)
    assert await get_all() == live
