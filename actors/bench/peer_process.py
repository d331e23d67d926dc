"""The other system's command, from its start to the end of its last child."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import psutil

from actors.threads import COMPUTE_ENVIRONMENT
from pipeline.errors import ConfigError, ServiceError

_MAX_LINES_KEPT = 12
_MAX_LINE_BYTES = 1 << 16
_TERMINATE_S = 5.0
_POLL_S = 0.1
_PORTS = {"ws": 80, "wss": 443}


class PeerProcess:
    """A running command: its process, and the last lines that it wrote."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._lines: deque[str] = deque(maxlen=_MAX_LINES_KEPT)

    @property
    def pid(self) -> int:
        """The process whose tree is the system."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.returncode is None

    def describe_end(self) -> str:
        """Return how the command ended, if it has, and what it wrote last."""
        status = self._process.returncode
        if status is None:
            what = "the command still runs"
        else:
            what = f"the command was killed by signal {-status}" if status < 0 else f"the command exited with {status}"
        said = " | ".join(self._lines)
        return f"{what}; its last lines: {said}" if said else f"{what} and wrote nothing"

    async def wait(self) -> None:
        """Return when the command has ended."""
        await self._process.wait()

    async def drain(self) -> None:
        """Take all that the command writes, so that it never waits for a reader, until it closes its output."""
        if self._process.stdout is None:
            return
        rest = b""
        while piece := await self._process.stdout.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
            rest = rest[-_MAX_LINE_BYTES:]
            self._lines.extend(filter(None, (line.decode(errors="replace").strip() for line in lines)))
        if rest.strip():
            self._lines.append(rest.decode(errors="replace").strip())


def split_command(command: str) -> list[str]:
    """Return the words of a command line quoted as for a shell. No shell runs it.

    Raises:
        ConfigError: if a quote is open, or there is no word.
    """
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise ConfigError(f"--cmd cannot be split into words: {exc}") from exc
    if not words:
        raise ConfigError("--cmd is empty: give the command that starts the other system")
    return words


def find_address(url: str) -> tuple[str, int]:
    """Return host and port of a WebSocket URL.

    Raises:
        ConfigError: if it is none.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError as exc:
        raise ConfigError(f"--url is not a URL: {exc}") from exc
    if parts.scheme not in _PORTS or not host or port is None:
        raise ConfigError("--url must be the address of a WebSocket, as ws://127.0.0.1:8000/asr")
    return host, port


@contextlib.asynccontextmanager
async def open_peer(command: list[str], url: str, start_timeout_s: float) -> AsyncIterator[PeerProcess]:
    """Start `command`, wait until the address of `url` accepts connections, and end it with all its children.

    The command gets a session of its own, so that Ctrl-C is not for it and its whole group can be ended. What surtitle
    says to its own threads (`COMPUTE_ENVIRONMENT`) is not in its environment.

    Raises:
        ConfigError: if `url` is not the address of a WebSocket.
        ServiceError: if somebody listens there already, or the command cannot be started, ends, or is not in time.
    """
    host, port = find_address(url)
    if await _accepts(host, port):
        raise ServiceError(f"something listens on {host}:{port} already: end it, or it would be measured instead")
    environment = {name: value for name, value in os.environ.items() if name not in COMPUTE_ENVIRONMENT}
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True, env=environment
        )
    except OSError as exc:
        raise ServiceError(f"cannot start {command[0]}: {exc.strerror or exc}") from exc
    peer = PeerProcess(process)
    draining = asyncio.create_task(peer.drain(), name="peer-output")
    try:
        await _wait_until_ready(peer, draining, (host, port), start_timeout_s)
        yield peer
    finally:
        await _end(peer, draining)


async def _wait_until_ready(
    peer: PeerProcess, draining: asyncio.Task[None], address: tuple[str, int], timeout_s: float
) -> None:
    polling = asyncio.create_task(_poll(*address), name="peer-ready")
    ending = asyncio.create_task(peer.wait(), name="peer-end")
    try:
        await asyncio.wait({polling, ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if polling.done() and peer.is_running:
            return
        if not peer.is_running:
            await asyncio.wait({draining}, timeout=1.0)
            raise ServiceError(f"the peer did not start: {peer.describe_end()}")
        raise ServiceError(
            f"the peer does not accept connections on {address[0]}:{address[1]} after {timeout_s:.0f} s: "
            f"{peer.describe_end()}"
        )
    finally:
        for task in (polling, ending):
            task.cancel()
        await asyncio.gather(polling, ending, return_exceptions=True)


async def _poll(host: str, port: int) -> None:
    while not await _accepts(host, port):  # noqa: ASYNC110 - another program's port: nothing tells of it
        await asyncio.sleep(_POLL_S)


async def _accepts(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _end(peer: PeerProcess, draining: asyncio.Task[None]) -> None:
    """End the process, its children wherever they went, and its group; first politely, then for certain."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(peer.pid).children(recursive=True)
    _signal_group(peer.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TERMINATE_S):
            await peer.wait()
    _signal_group(peer.pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # compares the start time: never another process with this pid
    await peer.wait()
    # What left the family before it could be seen may hold the pipe open.
    await asyncio.wait({draining}, timeout=1.0)
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
