"""A client of another system: plays sound in real time over a WebSocket and notes what it is shown, and when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

import numpy as np
import websockets.asyncio.client as websockets
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, WebSocketException

from actors.bench.peer_measure import View
from actors.bench.peer_protocols import Done, PeerProtocol
from pipeline.errors import ServiceError
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples

PIECE_MS = 100
_OPEN_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 16 * 2**20

End = Literal["done", "behind", "closed"]


@dataclass(frozen=True, slots=True)
class Playback:
    """What one client saw. Wall times are of one monotonic clock, in milliseconds.

    `end` is "done" if the other side said so, "behind" if it had not when time was up, "closed" if it hung up.
    """

    views: tuple[View, ...]
    start_ms: float
    end: End
    end_ms: float


async def play(url: str, protocol: PeerProtocol, samples: NDArray[np.int16], deadline_s: float) -> Playback:
    """Play int16[n], 16 kHz, in pieces of 100 ms, each sent when its last sample would have been spoken.

    Reads until the peer is done, or until `deadline_s` after the start.

    Pieces are due on a schedule that starts with the connection, so delays do not add up. A peer that does not read
    holds the sound back, and gets it late.

    Raises:
        ServiceError: if the connection cannot be opened, or a message is an error or not of `protocol`.
    """
    try:
        # Compression would cost the peer time; a ping unanswered by a busy peer would end a stream that still works.
        connection = await websockets.connect(
            url,
            compression=None,
            ping_interval=None,
            open_timeout=_OPEN_TIMEOUT_S,
            max_size=_MAX_MESSAGE_BYTES,
        )
    except (OSError, WebSocketException, TimeoutError) as exc:
        raise ServiceError(f"cannot open a stream at the peer: {type(exc).__name__}: {exc}") from exc
    async with connection:
        start_s = asyncio.get_running_loop().time()
        sending = asyncio.create_task(_send(connection, samples, protocol.end_of_sound, start_s), name="peer-sender")
        views: list[View] = []
        try:
            async with asyncio.timeout_at(start_s + deadline_s):
                end: End = await _receive(connection, protocol, views)
        except TimeoutError:
            end = "behind"
        finally:
            end_s = asyncio.get_running_loop().time()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    return Playback(tuple(views), 1_000 * start_s, end, 1_000 * end_s)


async def _send(
    connection: websockets.ClientConnection, samples: NDArray[np.int16], end_of_sound: bytes | str, start_s: float
) -> None:
    loop, step = asyncio.get_running_loop(), ms_to_samples(PIECE_MS)
    sound = samples.astype("<i2", copy=False)
    for first in range(0, len(sound), step):
        piece = sound[first : first + step]
        wait_s = start_s + (first + len(piece)) / SAMPLE_RATE_HZ - loop.time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        await connection.send(piece.tobytes())
    await connection.send(end_of_sound)


async def _receive(connection: websockets.ClientConnection, protocol: PeerProtocol, views: list[View]) -> End:
    """Note every change of what is shown until the other side is done or hangs up."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            message = await connection.recv()
            at_ms = 1_000 * loop.time()
            told = protocol.read(message)
            if isinstance(told, Done):
                return "done"
            if told is None:
                continue
            last = views[-1] if views else None
            if last is None or (last.committed, last.tail) != (told.committed, told.tail):
                views.append(View(told.committed, told.tail, at_ms))
    except ConnectionClosed:
        return "closed"
