"""Real stores for tests: embedded servers of their own, records to write, a proxy that loses replies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from actors.follow import Followed, follow
from actors.publisher import Publisher
from actors.redis_server import EmbeddedRedis
from actors.store import RedisParams, Store
from pipeline.records import (
    BaseRecord,
    ErrorRecord,
    FinalRecord,
    HealthRecord,
    PartialRecord,
    SceneRecord,
    SummaryRecord,
    TranslationRecord,
)

STARTED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data directory with a path short enough for a socket; a server left in it is killed at the end."""
    path = Path(tempfile.mkdtemp(prefix="surtitle-"))
    yield path
    kill_server(path)
    shutil.rmtree(path)


@pytest.fixture
def redis_params(data_dir: Path) -> RedisParams:
    """Parameters of an embedded store of this test alone."""
    return RedisParams(data_dir=data_dir)


@pytest.fixture
async def embedded_redis(redis_params: RedisParams) -> AsyncIterator[Store]:
    """An open store on an embedded server of this test alone."""
    async with Store(redis_params) as store:
        yield store


@pytest.fixture
async def publisher(embedded_redis: Store) -> AsyncIterator[Publisher]:
    """A publisher on `embedded_redis`."""
    async with Publisher(embedded_redis) as opened:
        yield opened


def comparable(records: list[BaseRecord], kind: str) -> list[dict[str, Any]]:
    """The records of one kind without what the publisher stamps and without the stream's name."""
    return [
        record.model_dump(exclude={"emitted_at", "utc_start", "stream"}) for record in records if record.kind == kind
    ]


def kill_server(data_dir: Path) -> int | None:
    """kill -9 the embedded server of `data_dir`, wait until it is gone and return its process id, if there was one."""
    server = EmbeddedRedis(data_dir)
    pid = server.pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        while server.pid == pid:
            pass
    return pid


def final(stream: str, sequence: int, text: str = "some words", **changes: Any) -> FinalRecord:
    """A final that covers second `sequence` of the media."""
    values: dict[str, Any] = {"close_reason": "pause", "average_logprob": -0.25, "sequence": sequence}
    return FinalRecord(**(_speech(stream, sequence, text) | values | changes))


def partial(stream: str, utterance: int, revision: int, text: str = "some", **changes: Any) -> PartialRecord:
    """A partial of an utterance."""
    values: dict[str, Any] = {"revision": revision, "stable_chars": 0}
    return PartialRecord(**(_speech(stream, utterance, text) | values | changes))


def translation(stream: str, sequence: int, language: str = "en", text: str = "some words") -> TranslationRecord:
    """The translation of a final."""
    return TranslationRecord(**_speech(stream, sequence, text), sequence=sequence, target_language=language)


def error(stream: str, sequence: int, task: str) -> ErrorRecord:
    """What stands in the place of a record that failed."""
    return ErrorRecord(
        stream=stream,
        start_ms=sequence * 1_000,
        end_ms=sequence * 1_000 + 900,
        utterance=sequence,
        sequence=sequence,
        task=task,
        message="the model refused",
    )


def summary(stream: str, covers_to: int) -> SummaryRecord:
    """A rolling summary of all finals up to `covers_to`."""
    return SummaryRecord(
        stream=stream,
        start_ms=0,
        end_ms=covers_to * 1_000,
        text="in short",
        scope="rolling",
        covers_from=1,
        covers_to=covers_to,
        language="en",
        tier="edge",
    )


def scene(stream: str, at_ms: int, text: str = "a desk") -> SceneRecord:
    """What was to be seen at a moment."""
    return SceneRecord(
        stream=stream, start_ms=at_ms, end_ms=at_ms, text=text, tier="phi4", reason="changed", changed_share=0.25
    )


def health(stream: str, event: Any, at_ms: int = 0) -> HealthRecord:
    """Something that happened to the stream."""
    return HealthRecord(stream=stream, start_ms=at_ms, end_ms=at_ms, event=event)


async def collect(store: Store, stream_id: str, **options: Any) -> list[Followed]:
    """Everything that `follow` yields until the stream ends."""
    return [followed async for followed in follow(store.client(), stream_id, **options)]


def _speech(stream: str, number: int, text: str) -> dict[str, Any]:
    return {
        "stream": stream,
        "start_ms": number * 1_000,
        "end_ms": number * 1_000 + 900,
        "utterance": number,
        "revision": 1,
        "channel": 0,
        "text": text,
        "language": "en",
        "language_source": "given",
        "tier": "edge",
    }


class ReplyDropper:
    """Sits between a client and a server's socket; at each `drop_next` it swallows one answer and hangs up.

    The server has done what it was told by then; the client cannot know. An async context manager.
    """

    def __init__(self, server_path: Path, own_path: Path) -> None:
        self.url = f"unix://{own_path}"
        self.num_dropped = 0
        self._server_path = server_path
        self._own_path = own_path
        self._is_armed = False
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    def drop_next(self) -> None:
        """Swallow the next answer."""
        self._is_armed = True

    async def __aenter__(self) -> ReplyDropper:
        self._server = await asyncio.start_unix_server(self._serve, self._own_path)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._server_path)
        requests = asyncio.create_task(_pass_on(reader, upstream_writer))
        try:
            while data := await upstream_reader.read(65_536):
                if self._is_armed:
                    self._is_armed = False
                    self.num_dropped += 1
                    break
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the client hung up
        except asyncio.CancelledError:
            pass  # the test is over; asyncio's stream server complains about handlers that end cancelled
        finally:
            requests.cancel()
            await asyncio.gather(requests, return_exceptions=True)
            for side in (writer, upstream_writer):
                side.close()
                with contextlib.suppress(OSError):
                    await side.wait_closed()
            self._connections.discard(connection)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()  # the client hung up: so does its connection to the server
