"""The service as a process: what stops it, what keeps it from starting."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.follow import follow
from actors.service import open_runtime, run_service
from actors.settings import Settings
from actors.store import RedisParams, Store
from pipeline.errors import ServiceError, StoreError, WeightsHashError
from pipeline.models import weights
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.records import ErrorRecord, FinalRecord, SceneRecord
from tests.tiny_whisper import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny-phi4"))


@contextmanager
def service(data_dir: Path, model: Path, port: int, runtime: str = "local") -> Iterator[subprocess.Popen[str]]:
    """`surtitle serve` in a process of its own."""
    values = {"runtime": runtime, "redis__data_dir": data_dir, "model__name": model, "service__port": port}
    environment = os.environ | {f"SURTITLE_{name.upper()}": str(value) for name, value in values.items()}
    command = [sys.executable, "-c", "from actors.cli import main; main()", "serve"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if "ready at" in line:
            return
    pytest.fail(f"the service ended with status {process.wait()}")


def request(port: int, method: str, path: str, body: object = None, timeout_s: float = 30) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


async def test_a_signal_flushes_every_stream_and_ends_well(
    data_dir: Path, redis_params: RedisParams, model: Path, speech: Path, free_port: int
) -> None:
    with service(data_dir, model, free_port) as process:
        await asyncio.to_thread(wait_until_ready, process)
        status, _ = request(free_port, "POST", "/v1/streams", {"source": str(speech), "stream_id": "hall"})
        assert status == 201
        async with asyncio.timeout(30):
            # A partial is submitted once an utterance is open; the process has no other way to tell.
            while b'surtitle_snapshots_total{kind="partial"}' not in request(free_port, "GET", "/metrics")[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    async with Store(redis_params) as store:
        records = [item.record async for item in follow(store.client(), "hall")]
    finals = [record for record in records if isinstance(record, FinalRecord)]
    assert finals[-1].close_reason == "end"
    assert (records[-1].kind, getattr(records[-1], "event", "")) == ("health", "ended")


def kill_replicas(process: subprocess.Popen[str], deployment: str) -> int:
    """kill -9 the replicas of `deployment` below a service on Ray; return how many there were."""
    replicas = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if f":{deployment}" in (title := " ".join(child.cmdline())) and title.startswith("ray::ServeReplica"):
                replicas.append(child)
    for replica in replicas:
        replica.kill()
    return len(replicas)


async def test_scenes_and_answers_on_ray_and_eyes_that_are_killed_under_a_question(
    data_dir: Path, redis_params: RedisParams, seeing_model: Path, media: Path, free_port: int
) -> None:
    video = str(media / "demo.mp4")
    question = {"question": "What is it?", "pictures": [video] * 4}

    async def post(path: str, body: object) -> tuple[int, dict[str, Any]]:
        status, answer = await asyncio.to_thread(request, free_port, "POST", path, body, 120)
        return status, json.loads(answer)

    with service(data_dir, seeing_model, free_port, "ray") as process:
        await asyncio.to_thread(wait_until_ready, process)
        status, expected = await post("/v1/answers", question)
        assert (status, expected["tier"]) == (200, "phi4"), expected
        asked = [asyncio.create_task(post("/v1/answers", question)) for _ in range(4)]
        await asyncio.wait(asked, timeout=0.2)
        assert await asyncio.to_thread(kill_replicas, process, "VisionEncoder") == 1
        assert [await answer for answer in asked] == [(200, expected)] * 4
        spec = {"source": video, "stream_id": "hall", "pace": "fast", "scheduling": "by_sample", "has_scenes": True}
        assert (await post("/v1/streams", spec))[0] == 201
        async with Store(redis_params) as store, asyncio.timeout(120):
            records = [item.record async for item in follow(store.client(), "hall")]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
        assert process.stderr is not None
        # Ray's handler would say so, and abort the process in the middle of a long stop
        assert "SIGTERM received" not in process.stderr.read()
    assert len([record for record in records if isinstance(record, SceneRecord)]) >= 4
    assert not [record for record in records if isinstance(record, ErrorRecord)]
    assert (records[-1].kind, getattr(records[-1], "event", "")) == ("health", "ended")


def test_a_signal_while_it_starts_ends_it_too(data_dir: Path, model: Path, free_port: int) -> None:
    with service(data_dir, model, free_port) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it tells what it is doing
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.fixture
def settings(redis_params: RedisParams) -> Settings:
    """Settings with Ray, which none of these tests gets as far as starting."""
    return Settings(redis=redis_params)


async def test_a_port_in_use_is_told_before_anything_starts(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = settings.service.model_copy(update={"port": port})
        started = time.monotonic()
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port}"):
            await run_service(settings.model_copy(update={"service": service}))
        assert time.monotonic() - started < 5


async def test_a_store_that_does_not_answer_is_told_before_anything_starts(settings: Settings, free_port: int) -> None:
    redis = settings.redis.model_copy(update={"url": f"redis://127.0.0.1:{free_port}/0"})
    started = time.monotonic()
    with pytest.raises(StoreError, match=f"127.0.0.1:{free_port}"):
        async with open_runtime(settings.model_copy(update={"redis": redis})):
            pytest.fail("it started")
    assert time.monotonic() - started < 5


async def test_wrong_weights_are_told_before_anything_starts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = weights.locate_model("whisper-base")
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(b"not the weights")
    wrong = weights.ModelFiles(
        name=files.name,
        layout=files.layout,
        directory=files.directory,
        weights=(damaged,),
        config=files.config,
        tokenizer=files.tokenizer,
        generation_config=None,
        pins={damaged: next(iter(files.pins.values()))},
    )
    monkeypatch.setattr("actors.service.locate_model", lambda _name, _revision: wrong)
    with pytest.raises(WeightsHashError, match=r"damaged\.bin"):
        async with open_runtime(settings.model_copy(update={"model": ModelParams()})):
            pytest.fail("it started")
