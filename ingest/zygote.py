"""The process that decoding processes are forked from: `python -m ingest.zygote`, started by `ingest.processes`.

Importing FFmpeg and numpy costs a quarter of a second and twenty megabytes, so it is done once, here, and every source
gets a copy of this process. It never sees media, nor what a source is called: each copy is handed a socket of its own
and reads there what to play. What it hands on to the next copy is therefore what it was when it started.

The socket that it was started with (its standard input) takes and gives messages of nine bytes:

| kind | to this process                    | from this process                                            |
|------|------------------------------------|--------------------------------------------------------------|
| `F`  | fork; the copy's socket comes along | (pid, 0): forked; (0, errno): it was not possible              |
| `K`  | (pid, 0): kill this copy             |                                                              |
| `X`  |                                    | (pid, code): this copy has ended; negative: by that signal     |

When the other end is closed it ends its copies, then itself. If it dies otherwise, they die with it (`ingest.confine`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket

from ingest.wire import ZYGOTE_MESSAGE
from ingest.worker import prepare, serve


def main() -> None:
    """Fork and reap until the parent has left."""
    prepare()
    gc.collect()
    gc.freeze()  # the collector of a copy does not write to, and so does not copy, the pages that all of them share
    with contextlib.suppress(ConnectionError):
        _Zygote(socket.socket(fileno=0)).run()
    os._exit(0)


class _Zygote:
    """The loop of this process. Single-threaded, so that a fork copies all there is."""

    def __init__(self, parent: socket.socket) -> None:
        self._parent = parent
        self._pid = os.getpid()
        self._pids: set[int] = set()
        self._signalled, self._on_signal = socket.socketpair()
        self._signalled.setblocking(False)
        self._on_signal.setblocking(False)
        signal.set_wakeup_fd(self._on_signal.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # only with a handler does it wake the loop

    def run(self) -> None:
        """Return when the other end is closed and every copy has ended.

        Raises:
            ConnectionError: if it was closed in the middle.
        """
        while True:
            readable, _, _ = select.select([self._parent, self._signalled], [], [])
            if self._signalled in readable:
                self._signalled.recv(4_096)
                self._reap()
            if self._parent in readable and not self._obey():
                break
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        self._reap(options=0)

    def _obey(self) -> bool:
        """Take one message; False at the end."""
        data, descriptors, _, _ = socket.recv_fds(self._parent, ZYGOTE_MESSAGE.size, 1)
        if not data:
            return False
        kind, pid, _ = ZYGOTE_MESSAGE.unpack(data)
        if kind == b"F":
            self._fork(descriptors[0])
        elif kind == b"K" and pid in self._pids:  # not reaped yet, so nobody else can have this pid
            os.kill(pid, signal.SIGKILL)
        return True

    def _fork(self, descriptor: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            os.close(descriptor)
            self._parent.sendall(ZYGOTE_MESSAGE.pack(b"F", 0, error.errno or 0))
            return
        if pid == 0:
            self._become_worker(descriptor)
        os.close(descriptor)
        self._pids.add(pid)
        self._parent.sendall(ZYGOTE_MESSAGE.pack(b"F", pid, 0))

    def _become_worker(self, descriptor: int) -> None:
        """Never return: nothing of the loop may run in a copy."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for ours in (self._parent, self._signalled, self._on_signal):
                ours.close()
            serve(socket.socket(fileno=descriptor), self._pid)
            code = 0
        finally:
            os._exit(code)

    def _reap(self, options: int = os.WNOHANG) -> None:
        while self._pids:
            pid, status = os.waitpid(-1, options)
            if pid == 0:
                return
            self._pids.discard(pid)
            self._parent.sendall(ZYGOTE_MESSAGE.pack(b"X", pid, os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
