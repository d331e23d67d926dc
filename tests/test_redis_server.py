"""The embedded server: one for each data directory, shared, never left in a state that the next command cannot use."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from actors.redis_server import EmbeddedRedis
from pipeline.errors import StoreError
from tests.stores import kill_server

USER = """
import sys
from pathlib import Path
from actors.redis_server import EmbeddedRedis
with EmbeddedRedis(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""


@contextmanager
def user_process(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the server; yields it and the server's pid that it saw."""
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        if process.stdin is not None:
            process.stdin.close()


def connect(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


def test_it_listens_on_a_private_socket_only_and_keeps_what_it_acknowledged(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir, maxmemory_mb=64) as server, connect(server) as client:
        config = client.config_get("*")
        assert {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": str(64 * 1024 * 1024),
            "maxmemory-policy": "noeviction",
            "protected-mode": "yes",
        }.items() <= config.items()
        assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
        assert server.log_path.is_relative_to(data_dir)
        assert server.pid is not None
        assert os.getsid(server.pid) != os.getsid(0), "a terminal's SIGINT would reach the server"
        client.set("word", "kept")
    with EmbeddedRedis(data_dir) as server, connect(server) as client:
        assert client.get("word") == "kept"


def test_holds_share_one_server_and_the_last_one_out_stops_it(data_dir: Path) -> None:
    first, second = EmbeddedRedis(data_dir), EmbeddedRedis(data_dir)
    first.ensure_running()
    second.ensure_running()
    pid = first.pid
    assert pid is not None
    assert second.pid == pid
    first.close()
    assert second.is_running()
    second.close()
    assert second.pid is None
    assert not second.is_running()
    second.close()


def test_processes_that_start_at_once_get_one_server(data_dir: Path) -> None:
    with user_process(data_dir) as (_, a), user_process(data_dir) as (_, b), EmbeddedRedis(data_dir) as server:
        assert {a, b} == {server.pid}
    assert EmbeddedRedis(data_dir).pid is None


def test_a_race_of_starters_ends_with_one_server(data_dir: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", USER, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        pids = {racer.stdout.readline() for racer in racers if racer.stdout is not None}
        assert len(pids) == 1
    finally:
        for racer in racers:
            racer.communicate()
    assert EmbeddedRedis(data_dir).pid is None


def test_a_killed_user_leaves_a_server_that_the_next_command_finds_and_stops(data_dir: Path) -> None:
    with user_process(data_dir) as (process, pid):
        process.kill()
        process.wait()
    with EmbeddedRedis(data_dir) as server:
        assert server.pid == pid
    assert server.pid is None


def test_a_killed_server_is_started_again_with_all_that_it_acknowledged(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir) as server:
        with connect(server) as client:
            for number in range(200):
                client.rpush("numbers", number)
        killed_pid = kill_server(data_dir)
        assert not server.is_running()
        server.ensure_running()
        assert server.pid not in (killed_pid, None)
        with connect(server) as client:
            assert client.llen("numbers") == 200


def test_a_log_that_ends_in_the_middle_of_an_entry_is_read_up_to_there(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir) as server, connect(server) as client:
        for number in range(50):
            client.rpush("numbers", number)
    (log,) = (data_dir / "redis" / "appendonlydir").glob("*.incr.aof")
    os.truncate(log, log.stat().st_size - 9)
    with EmbeddedRedis(data_dir) as server, connect(server) as client:
        assert client.llen("numbers") == 49


def test_a_server_that_does_not_answer_is_reported_with_its_pid_in_under_five_seconds(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir, start_timeout_ms=1_000) as server:
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(StoreError, match=f"pid {pid}"):
                server.ensure_running()
            assert time.monotonic() - began < 5
        finally:
            os.kill(pid, signal.SIGCONT)
        server.ensure_running()
        assert server.pid == pid


def test_data_that_cannot_be_loaded_is_reported_with_the_end_of_the_log(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir):
        pass
    (manifest,) = (data_dir / "redis" / "appendonlydir").glob("*.manifest")
    manifest.write_text("not a manifest\n")
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"redis\.log ends: .*manifest"):
        EmbeddedRedis(data_dir).ensure_running()
    assert time.monotonic() - began < 5


def test_a_data_directory_that_cannot_be_written_is_named(data_dir: Path) -> None:
    blocked = data_dir / "file"
    blocked.write_text("not a directory")
    with pytest.raises(StoreError, match=str(blocked)):
        EmbeddedRedis(blocked).ensure_running()


def test_a_long_data_directory_gets_a_short_private_socket_that_others_find(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(data_dir))
    long_dir = data_dir / ("d" * 120)
    with EmbeddedRedis(long_dir) as server:
        assert server.socket_path.parent == data_dir / "surtitle"
        assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
        with EmbeddedRedis(long_dir) as other:
            assert other.pid == server.pid
        kill_server(long_dir)
        server.ensure_running()
        assert server.socket_path.parent == data_dir / "surtitle", "the address must outlive the server"


def test_a_runtime_directory_of_somebody_else_is_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_dir / "elsewhere").mkdir()
    (data_dir / "surtitle").symlink_to(data_dir / "elsewhere")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(data_dir))
    with pytest.raises(StoreError, match="not a directory of this user"):
        EmbeddedRedis(data_dir / ("d" * 120)).ensure_running()
