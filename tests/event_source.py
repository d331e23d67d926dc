"""A client of Server-Sent Events over a real socket, with a small receive buffer: what it does not read, waits."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

RECEIVE_BYTES = 4_096


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event as a browser would see it."""

    name: str
    data: Any
    event_id: str


@dataclass(slots=True)
class EventSource:
    """An open response. Iterate it, or leave it unread."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    comments: list[str] = field(default_factory=list)

    async def body(self) -> str:
        """The rest of a body that ends."""
        if "content-length" in self.headers:
            return (await self.reader.readexactly(int(self.headers["content-length"]))).decode()
        return "".join([line async for line in self._lines()])

    async def __aiter__(self) -> AsyncIterator[ServerEvent]:
        fields: dict[str, str] = {}
        async for line in self._lines():
            name, _, value = line.rstrip("\n").partition(": ")
            if not line.strip():
                if "data" in fields:
                    yield ServerEvent(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id", ""))
                fields = {}
            elif not name:
                self.comments.append(value)
            else:
                fields[name] = value

    async def _lines(self) -> AsyncIterator[str]:
        rest = b""
        async for chunk in self._chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield f"{line.decode()}\n"

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readline(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)


@asynccontextmanager
async def open_events(url: str, path: str, last_event_id: str | None = None) -> AsyncIterator[EventSource]:
    """GET `path` from the server at `url`; the connection is cut when the context ends."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=RECEIVE_BYTES)
    try:
        header = "" if last_event_id is None else f"Last-Event-ID: {last_event_id}\r\n"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{header}\r\n".encode())
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        yield EventSource(status, headers, reader)
    finally:
        writer.transport.abort()


async def events_of(url: str, path: str, last_event_id: str | None = None) -> list[ServerEvent]:
    """All events of a response that ends."""
    async with open_events(url, path, last_event_id) as source:
        assert source.status == 200, await source.body()
        return [event async for event in source]
