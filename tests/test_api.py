"""The HTTP API, over a real socket and a real gateway with a tiny model."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.gateway import Gateway
from actors.settings import Settings
from actors.store import RedisParams
from pipeline.errors import ServiceError
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from tests.tiny_whisper import save_tiny


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str

    @property
    def data(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Client:
    """A client with a connection for each request, off the event loop on which the server runs."""

    host: str
    port: int

    async def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        return await asyncio.to_thread(self._call, method, path, body, headers or {})

    def _call(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read().decode())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    return ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))), encoder_threads=1, decoder_threads=1)


@pytest.fixture
def api_settings(model: ModelParams, redis_params: RedisParams) -> Settings:
    settings = Settings(runtime="local", model=model, redis=redis_params)
    return settings.model_copy(update={"service": settings.service.model_copy(update={"port": 0, "max_streams": 1})})


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Client]:
    gateway = Gateway(settings)
    info = await gateway.start(serves_http=True)
    assert info.http_url is not None
    host, _, port = info.http_url.removeprefix("http://").rpartition(":")
    try:
        yield Client(host, int(port))
    finally:
        await gateway.aclose()


@pytest.fixture
async def client(api_settings: Settings) -> AsyncIterator[Client]:
    async with serving(api_settings) as client:
        yield client


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    name = str(make_tiny(tmp_path_factory.mktemp("tiny-phi4")))
    return ModelParams(name=name, encoder_threads=1, decoder_threads=1)


async def test_questions_are_answered_and_media_summarised(
    api_settings: Settings, seeing_model: ModelParams, media: Path
) -> None:
    video = str(media / "demo.mp4")
    async with serving(api_settings.model_copy(update={"model": seeing_model})) as client:
        answer = await client.call("POST", "/v1/answers", {"question": "What is it?", "pictures": [video]})
        assert answer.status == 200, answer.body
        assert {name: type(value) for name, value in answer.data.items() if name != "guard"} == {
            "text": str, "language": str, "tier": str
        }  # fmt: skip
        assert answer.data["tier"] == "phi4"
        for body in ({"source": video}, {"text": "A long story."}):
            assert (await client.call("POST", "/v1/summaries", body)).status == 200
        await client.call("POST", "/v1/streams", {"source": video, "stream_id": "hall", "has_scenes": True})
        async with asyncio.timeout(30):
            # Another client's only way to tell.
            while 'surtitle_records_total{kind="scene"}' not in (await client.call("GET", "/metrics")).body:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        shown = await client.call("POST", "/v1/streams/hall/answers", {"question": "What is it?"})
        assert shown.status == 200, shown.body
        missing = await client.call("POST", "/v1/streams/nobody/answers", {"question": "What is it?"})
        assert (missing.status, missing.data["kind"]) == (404, "StreamNotFound")
        for path, body in (
            ("/v1/answers", {"question": "Why?"}),
            ("/v1/answers", {"question": "Why?", "pictures": ["no-such.png"]}),
            ("/v1/answers", {"question": "Why?", "pictures": [video] * 5}),
            ("/v1/summaries", {}),
            ("/v1/streams/hall/answers", {}),
            ("/v1/streams/%20/answers", {"question": "Why?"}),
        ):
            assert (await client.call("POST", path, body)).status == 422, (path, body)


async def test_a_tier_that_answers_no_questions_says_so(client: Client) -> None:
    refused = await client.call("POST", "/v1/answers", {"question": "Why?", "pictures": ["a.png"]})
    assert (refused.status, refused.data["kind"]) == (422, "ConfigError")
    assert "phi4" in refused.data["detail"]


async def test_a_stream_is_started_seen_and_ended(client: Client, speech: Path) -> None:
    created = await client.call("POST", "/v1/streams", {"source": str(speech), "stream_id": "hall"})
    assert (created.status, created.headers["location"]) == (201, "/v1/streams/hall")
    assert created.data["state"] == "live"
    assert [status["stream_id"] for status in (await client.call("GET", "/v1/streams")).data] == ["hall"]
    ended = await client.call("DELETE", "/v1/streams/hall")
    assert (ended.status, ended.data["state"]) == (200, "ended")
    assert (await client.call("GET", "/v1/streams/hall")).data["state"] == "ended"


async def test_a_stream_too_many_is_told_when_to_come_back(client: Client, speech: Path) -> None:
    await client.call("POST", "/v1/streams", {"source": str(speech)})
    refused = await client.call("POST", "/v1/streams", {"source": str(speech)})
    assert (refused.status, refused.headers["content-type"]) == (503, "application/problem+json")
    assert int(refused.headers["retry-after"]) > 0
    assert refused.data["kind"] == "CapacityExceeded"
    metrics = text_string_to_metric_families((await client.call("GET", "/metrics")).body)
    samples = {sample.name: sample.value for family in metrics for sample in family.samples}
    assert samples["surtitle_streams_live"] == 1
    assert samples["surtitle_streams_refused_total"] == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"source": "no-such-file.wav"}, "no-such-file.wav"),
        ({}, "source"),
        ({"source": "a.wav", "stream_id": "../../etc"}, "stream_id"),
        ({"source": "a.wav", "pace": "slow"}, "pace"),
        ({"source": "a.wav", "colour": "red"}, "colour"),
        ({"source": "a.wav", "summary_minutes": -1}, "summary_minutes"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said_as_a_problem(client: Client, body: Any, says: str) -> None:
    answer = await client.call("POST", "/v1/streams", body)
    assert (answer.status, answer.headers["content-type"]) == (422, "application/problem+json")
    assert says in answer.data["detail"]


async def test_refused_values_are_not_repeated(client: Client) -> None:
    answer = await client.call("POST", "/v1/streams", {"source": ["rtsp://user:secret@host/"]})
    assert answer.status == 422
    assert "secret" not in answer.body


async def test_what_is_not_there_is_a_problem_too(client: Client) -> None:
    for method, path in (("GET", "/v1/streams/nobody"), ("DELETE", "/v1/streams/nobody"), ("GET", "/nothing")):
        answer = await client.call(method, path)
        assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")


async def test_health_and_readiness(client: Client) -> None:
    assert (await client.call("GET", "/healthz")).status == 200
    assert (await client.call("GET", "/readyz")).status == 200


async def test_a_name_that_is_not_this_machines_is_refused(client: Client) -> None:
    assert (await client.call("GET", "/v1/streams", headers={"Host": "evil.example"})).status == 400


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_a_port_in_use_is_told_with_its_address(api_settings: Settings, taken_port: int) -> None:
    service = api_settings.service.model_copy(update={"port": taken_port})
    gateway = Gateway(api_settings.model_copy(update={"service": service}))
    async with asyncio.timeout(5):
        with pytest.raises(ServiceError, match=f"127.0.0.1:{taken_port}"):
            await gateway.start(serves_http=True)
