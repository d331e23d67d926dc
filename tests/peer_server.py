"""Another system for the tests: a WebSocket server that speaks WhisperLiveKit's protocol from a script of answers.

    python tests/peer_server.py PORT SCRIPT.json

| key | what |
|---|---|
| answers | list of [samples heard, message]: each is sent once so much sound has come |
| num_done | so many streams are told at their end that all is said; later ones never |
| num_taken | so many streams are taken; later ones are hung up on at once |
| notified_port | where to tell, when this listens, the process ids of it and of a child in another session |
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

MANY = 1_000
CONFIG = {"type": "config", "useAudioWorklet": True, "mode": "full"}


async def answer(connection: ServerConnection, answers: list[tuple[int, Any]], *, is_done: bool) -> None:
    """Hear one stream."""
    await connection.send(json.dumps(CONFIG))
    waiting = list(answers)
    num_samples = 0
    async for message in connection:
        num_samples += len(message) // 2
        while waiting and num_samples >= waiting[0][0]:
            await connection.send(json.dumps(waiting.pop(0)[1]))
        if not message:
            if is_done:
                await connection.send(json.dumps({"type": "ready_to_stop"}))
            await connection.wait_closed()
            return


def notify(port: int) -> None:
    """Start a child and tell who is here."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    with socket.create_connection(("127.0.0.1", port)) as told:
        told.sendall(json.dumps([os.getpid(), child.pid]).encode())


async def main(port: int, script: dict[str, Any]) -> None:
    """Serve until the process is ended."""
    num_streams = 0

    async def hear(connection: ServerConnection) -> None:
        nonlocal num_streams
        num_streams += 1
        if num_streams <= script.get("num_taken", MANY):
            await answer(connection, script["answers"], is_done=num_streams <= script.get("num_done", MANY))

    async with serve(hear, "127.0.0.1", port):
        if "notified_port" in script:
            await asyncio.to_thread(notify, script["notified_port"])
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())))
