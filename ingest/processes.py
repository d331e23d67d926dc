"""The processes that decode media: forked from one that has everything imported (`ingest.zygote`), watched from here.

A process that is forked has the memory layout of its siblings. So that hostile media cannot find out by trial what
crashes and what does not, no process is forked any more from a zygote one of whose copies ended unasked: the next
source gets a new zygote, with a layout of its own, as if it had been started afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio import Future, StreamReader, StreamWriter
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

import ingest
from ingest.wire import ZYGOTE_MESSAGE
from pipeline.errors import MediaError

_ROOT = str(Path(ingest.__file__).parent.parent)
_READ_BYTES = 1 << 12
_EXIT_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 5.0


class DecoderProcess:
    """One process, and the socket on which it is asked and answers. Made by `DecoderProcesses.open`."""

    def __init__(self, zygote: _Zygote, pid: int, exit_code: Future[int]) -> None:
        self.pid = pid
        self._zygote = zygote
        self._exit_code = exit_code
        self._reader: StreamReader | None = None
        self._writer: StreamWriter | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return not self._exit_code.done()

    async def ask(self, connection: socket.socket, request: bytes) -> None:
        """Send the one request over `connection`, which belongs to this object from now on."""
        self._reader, self._writer = await asyncio.open_connection(sock=connection)
        # one that died before it read this does not answer, which is told where the answer is read
        with contextlib.suppress(ConnectionError):
            self._writer.write(request)
            self._writer.write_eof()

    async def read(self, num_bytes: int) -> bytes:
        """Return what it has written, `num_bytes` at most; empty at the end."""
        if self._reader is None:
            raise RuntimeError("nothing was asked of this process")
        with contextlib.suppress(ConnectionError):
            return await self._reader.read(num_bytes)
        return b""

    async def wait(self) -> int:
        """Return its exit code once it has closed its socket; negative: ended by that signal."""
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                return await asyncio.shield(self._exit_code)
        except TimeoutError:  # it closed the socket and lives on: nothing good
            self._zygote.kill(self.pid)
            return await asyncio.shield(self._exit_code)

    async def aclose(self) -> None:
        """End it, whatever it is doing. Idempotent."""
        if self.is_running:
            self._zygote.kill(self.pid)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        await asyncio.shield(self._exit_code)


class DecoderProcesses:
    """Starts decoding processes; an async context manager that belongs to one event loop.

    Entering it does not wait: the first process waits until everything is imported.
    """

    def __init__(self) -> None:
        self._zygotes: set[_Zygote] = set()
        self._current: asyncio.Task[_Zygote] | None = None

    async def __aenter__(self) -> Self:
        self._current = asyncio.create_task(self._start(), name="decoder-zygote")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes."""
        current, self._current = self._current, None
        if current is not None:
            await asyncio.wait({current})
        for zygote in list(self._zygotes):
            await zygote.aclose()
        self._zygotes.clear()

    async def open(self, request: bytes) -> DecoderProcess:
        """Start a process for `request` (`ingest.worker`).

        Raises:
            MediaError: if no process can be started.
        """
        for _ in range(2):  # a zygote may have gone since it was used last
            ours, theirs = socket.socketpair()
            try:
                zygote = await self._usable()
                process = await zygote.fork(theirs)
                await process.ask(ours, request)
            except ConnectionError:
                ours.close()
                continue
            except OSError as error:
                ours.close()
                raise MediaError(f"no process can be started to decode the media: {error.strerror}") from error
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            return process
        raise MediaError("no process can be started to decode the media: they end at once; see the system's log")

    async def _usable(self) -> _Zygote:
        if self._current is None:
            raise RuntimeError("use `async with`")
        if self._current.done() and not _is_usable(self._current):
            self._current = asyncio.create_task(self._start(), name="decoder-zygote")
        return await asyncio.shield(self._current)

    async def _start(self) -> _Zygote:
        for gone in [zygote for zygote in self._zygotes if zygote.is_over]:
            self._zygotes.remove(gone)
            await gone.aclose()
        zygote = await _Zygote.start()
        self._zygotes.add(zygote)
        return zygote


def _is_usable(starting: asyncio.Task[_Zygote]) -> bool:
    """Whether a start that is done went well, and what it started still serves."""
    return not starting.cancelled() and starting.exception() is None and starting.result().is_usable


class _Zygote:
    """One zygote as its parent sees it."""

    def __init__(self, process: Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._asked: deque[Future[DecoderProcess]] = deque()  # forks, in the order in which they were asked for
        self._exit_codes: dict[int, Future[int]] = {}
        self._killed: set[int] = set()
        self._is_trusted = True
        self._watching = asyncio.create_task(self._watch(), name="decoder-zygote-watch")

    @classmethod
    async def start(cls) -> _Zygote:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # nothing of this process's environment, where credentials may be, is handed on
        environment = {"PYTHONPATH": _ROOT, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "ingest.zygote"),
                stdin=theirs.fileno(),
                stdout=DEVNULL,
                stderr=DEVNULL,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for the service, which ends streams with their finals
            )
        return cls(process, ours)

    @property
    def is_usable(self) -> bool:
        """Whether sources may be given copies of it."""
        return self._is_trusted and not self._watching.done()

    @property
    def is_over(self) -> bool:
        """Whether it has no copies and will have none."""
        return not self.is_usable and not self._exit_codes

    async def fork(self, connection: socket.socket) -> DecoderProcess:
        """Make a copy that serves what comes over `connection`.

        Raises:
            ConnectionError: if the zygote is gone.
            OSError: if it cannot fork.
        """
        forked: Future[DecoderProcess] = asyncio.get_running_loop().create_future()
        try:
            socket.send_fds(self._control, [ZYGOTE_MESSAGE.pack(b"F", 0, 0)], [connection.fileno()])
        except ConnectionError:
            self._is_trusted = False  # who asks again, perhaps before the end was noticed here, gets another one
            raise
        self._asked.append(forked)
        return await forked

    def kill(self, pid: int) -> None:
        """End copy `pid` at once, if it still lives."""
        self._killed.add(pid)
        with contextlib.suppress(OSError):  # a zygote that is gone has taken its copies along
            self._control.send(ZYGOTE_MESSAGE.pack(b"K", pid, 0))

    async def aclose(self) -> None:
        """End it and its copies."""
        with contextlib.suppress(OSError):  # it may be gone already
            self._control.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._watching
        self._control.close()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        pending = b""
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._control, _READ_BYTES):
                pending += data
                end = len(pending) - len(pending) % ZYGOTE_MESSAGE.size
                for kind, pid, number in ZYGOTE_MESSAGE.iter_unpack(pending[:end]):
                    self._take(kind, pid, number)
                pending = pending[end:]
        for forked in self._asked:
            if not forked.done():
                forked.set_exception(ConnectionError("the process that decoders are forked from has ended"))
        for exit_code in self._exit_codes.values():
            exit_code.set_result(-signal.SIGKILL)
        self._exit_codes.clear()

    def _take(self, kind: bytes, pid: int, number: int) -> None:
        if kind == b"F":
            forked = self._asked.popleft()
            if pid == 0:
                if not forked.done():
                    forked.set_exception(OSError(number, os.strerror(number)))
                return
            exit_code = self._exit_codes[pid] = asyncio.get_running_loop().create_future()
            if not forked.done():  # else nobody waits any more: its socket is closed, so it ends by itself
                forked.set_result(DecoderProcess(self, pid, exit_code))
            return
        self._exit_codes.pop(pid).set_result(number)
        if number != 0 and pid not in self._killed:
            self._is_trusted = False
        self._killed.discard(pid)
