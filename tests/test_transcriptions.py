"""Transcriptions as clients of the OpenAI API ask for them: the `openai` SDK against the service, with Whisper base."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from actors.follow import follow
from actors.gateway import Gateway
from actors.service_params import ServiceParams
from actors.settings import Settings
from actors.spec import StreamSpec, StreamStatus
from actors.store import KeyKind, RedisParams, Store
from actors.transcript_formats import Transcript
from actors.uploads import Uploads
from pipeline.errors import RequestRefused, UploadTooLarge
from pipeline.models.weights import ModelParams
from pipeline.records import FinalRecord
from pipeline.text.language_names import language_name
from tests.media import read_pcm, write_pcm
from tests.stores import final, kill_server
from tests.tiny_whisper import save_tiny

T = TypeVar("T")

SAID = "Good morning, and welcome to the factory. Before we start, please put on your safety glasses."
MODEL = "whisper-base"


@dataclass(frozen=True, slots=True)
class Service:
    """A gateway with its HTTP door, on an event loop of its own."""

    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    url: str
    uploads: Path
    redis: RedisParams
    client: openai.OpenAI

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def newest(self) -> StreamStatus:
        return max(self.do(self.gateway.list_streams()), key=lambda status: status.started_at)

    def kept_files(self) -> list[Path]:
        """Descriptors of files of this process that are in the uploads, which have no name there."""
        kept = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()).startswith(str(self.uploads)):
                    kept.append(descriptor)
        return kept

    def post(self, body: bytes, content_type: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/audio/transcriptions", body, {"Content-Type": content_type})
            response = connection.getresponse()
            return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    data_dir = Path(tempfile.mkdtemp(prefix="surtitle-"))
    redis = RedisParams(data_dir=data_dir)
    params = ServiceParams(port=0, max_streams=1, max_upload_mb=6)
    gateway = Gateway(Settings(runtime="local", redis=redis, service=params))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        info = asyncio.run_coroutine_threadsafe(gateway.start(serves_http=True), loop).result(60)
        assert info.http_url is not None
        with openai.OpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield Service(gateway, loop, info.http_url, data_dir / "uploads", redis, client)
    finally:
        asyncio.run_coroutine_threadsafe(gateway.aclose(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        kill_server(data_dir)
        shutil.rmtree(data_dir)


@pytest.fixture(scope="module")
def clip(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two sentences and the pause behind them."""
    return write_pcm(tmp_path_factory.mktemp("clip") / "clip.wav", read_pcm(speech)[: int(6.5 * 16_000)])


@pytest.fixture(scope="module")
def long_speech(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes, which take the models a while."""
    return write_pcm(tmp_path_factory.mktemp("long") / "long.wav", np.tile(read_pcm(speech), 3))


@pytest.fixture(scope="module")
def silence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pcm(tmp_path_factory.mktemp("silence") / "silence.wav", np.zeros(2 * 16_000, np.int16))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_a_file_becomes_its_text_and_its_records_stay_in_redis(service: Service, clip: Path) -> None:
    answer = service.client.audio.transcriptions.create(file=clip, model="whisper-1", language="en")
    assert words_of(answer.text) == words_of(SAID)
    assert answer.usage is not None
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == 6.5
    status = service.newest()
    assert status.stream_id.startswith("transcription-")
    assert (status.state, status.has_heard_all) == ("ended", True)

    async def finals() -> list[str]:
        async with Store(service.redis) as store:
            followed = follow(store.client(), status.stream_id, [KeyKind.TRANSCRIPTS])
            return [item.record.text async for item in followed if isinstance(item.record, FinalRecord)]

    assert " ".join(filter(None, service.do(finals()))) == answer.text
    assert service.kept_files() == []


def test_texts_and_caption_files(service: Service, clip: Path) -> None:
    create = service.client.audio.transcriptions.create
    text = create(file=clip, model=MODEL, response_format="text")
    assert words_of(text) == words_of(SAID)
    srt = create(file=clip, model=MODEL, response_format="srt")
    assert srt.startswith("1\n00:00:0")
    assert re.search(r"\d\d,\d\d\d --> 00:00:0\d,\d\d\d\nGood", srt)
    vtt = create(file=clip, model=MODEL, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n1\n00:00:0")


def test_segments_and_words_with_their_times(service: Service, clip: Path) -> None:
    answer = service.client.audio.transcriptions.create(
        file=clip, model=MODEL, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert (answer.language, answer.duration) == ("english", 6.5)
    assert answer.segments is not None
    assert answer.words is not None
    assert "".join(segment.text for segment in answer.segments) == answer.text
    assert words_of(" ".join(word.word for word in answer.words)) == words_of(SAID)
    times = [time for word in answer.words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] < 1
    assert 4 < times[-1] <= 6.5
    assert all(0 <= segment.start < segment.end <= 6.5 for segment in answer.segments)


def test_segments_alone_unless_words_are_asked_for(service: Service, silence: Path) -> None:
    create = service.client.audio.transcriptions.create
    answer = create(file=silence, model=MODEL, response_format="verbose_json")
    assert (answer.text, answer.segments, answer.words, answer.language) == ("", [], None, "und")
    answer = create(
        file=silence, model=MODEL, response_format="verbose_json", timestamp_granularities=["word"], language="de"
    )
    assert (answer.segments, answer.words, answer.language) == (None, [], "german")


def test_silence_has_no_text(service: Service, silence: Path) -> None:
    create = service.client.audio.transcriptions.create
    assert create(file=silence, model=MODEL).text == ""
    assert create(file=silence, model=MODEL, response_format="vtt") == "WEBVTT\n"
    events = list(create(file=silence, model=MODEL, stream=True))
    assert [event.type for event in events] == ["transcript.text.done"]


def test_deltas_add_up_to_the_text(service: Service, clip: Path) -> None:
    deltas, done = [], []
    for event in service.client.audio.transcriptions.create(file=clip, model=MODEL, stream=True, language="en"):
        if event.type == "transcript.text.delta":
            deltas.append(event.delta)
        else:
            assert event.type == "transcript.text.done"
            done.append(event.text)
    assert len(deltas) >= 2
    assert done == ["".join(deltas)]
    assert words_of(done[0]) == words_of(SAID)


def test_a_model_that_is_not_loaded_is_told_with_the_one_that_is(service: Service, silence: Path) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        service.client.audio.transcriptions.create(file=silence, model="gpt-4o-transcribe")
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "model", "model_not_found", "invalid_request_error"
    )  # fmt: skip
    assert MODEL in caught.value.message
    problem = caught.value.response.json()
    assert caught.value.response.headers["content-type"] == "application/problem+json"
    assert (problem["status"], problem["kind"], problem["detail"]) == (
        404, "ModelNotLoaded", problem["error"]["message"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parameter", "given"),
    [
        ("temperature", {"temperature": 0.5}),
        ("prompt", {"prompt": "Surtitle, Valkey"}),
        ("language", {"language": "xx"}),
        ("language", {"language": "English please"}),
        ("response_format", {"response_format": "diarized_json"}),
        ("response_format", {"response_format": "srt", "stream": True}),
        ("timestamp_granularities[]", {"timestamp_granularities": ["word"]}),
        ("timestamp_granularities[]", {"response_format": "verbose_json", "timestamp_granularities": ["letter"]}),
        ("include[]", {"include": ["logprobs"]}),
        ("stream", {"extra_body": {"stream": "perhaps"}}),
        ("colour", {"extra_body": {"colour": "red"}}),
    ],
)
def test_what_cannot_be_honoured_is_named(
    service: Service, silence: Path, parameter: str, given: dict[str, Any]
) -> None:
    create: Any = service.client.audio.transcriptions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(file=silence, model=MODEL, **given)
    assert (caught.value.param, caught.value.type) == (parameter, "invalid_request_error")
    assert caught.value.response.json()["kind"] == "RequestRefused"


def test_what_changes_nothing_is_accepted(service: Service, silence: Path) -> None:
    create: Any = service.client.audio.transcriptions.create
    assert (
        create(file=silence, model=MODEL, temperature=0, prompt="", chunking_strategy="auto", stream=False).text == ""
    )


def test_what_is_no_media_is_told_without_a_place_on_this_machine(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "talk.mp3"
    path.write_text("this is no sound " * 100)
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError, match="not a media file") as caught:
            service.client.audio.transcriptions.create(file=path, model=MODEL, stream=is_streamed)
        assert str(caught.value.body["message"]).startswith("not a media file")  # type: ignore[index]
    path.write_bytes(b"")
    with pytest.raises(openai.BadRequestError, match="empty"):
        service.client.audio.transcriptions.create(file=path, model=MODEL)
    assert service.kept_files() == []


def test_a_file_too_large_is_refused_with_the_limit(service: Service) -> None:
    with pytest.raises(openai.APIStatusError, match="6 MB") as caught:
        service.client.audio.transcriptions.create(file=("a.wav", bytes(7_000_000)), model=MODEL)
    assert caught.value.status_code == 413
    assert service.kept_files() == []


def test_one_too_many_is_told_when_to_come_back(service: Service, speech: Path, silence: Path) -> None:
    service.do(service.gateway.start_stream(StreamSpec(source=str(speech), stream_id="hall")))
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            service.client.audio.transcriptions.create(file=silence, model=MODEL)
    finally:
        service.do(service.gateway.stop_stream("hall"))
    assert (caught.value.status_code, caught.value.type) == (503, "server_error")
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_client_that_leaves_stops_its_stream(service: Service, long_speech: Path) -> None:
    events = service.client.audio.transcriptions.create(file=long_speech, model=MODEL, stream=True, language="en")
    assert next(iter(events)).type == "transcript.text.delta"
    status = service.newest()
    assert status.state == "live"
    (kept,) = service.kept_files()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert list(service.uploads.iterdir()) == []  # it has no name
    events.response.close()
    status = service.do(service.gateway.wait_stream(status.stream_id))
    assert (status.state, status.has_heard_all) == ("ended", False)
    # The stream has ended because the answer is being given up; the file goes in the same breath.
    service.do(_requests_over())
    assert service.kept_files() == []


def test_a_client_that_leaves_before_the_answer_stops_its_stream_too(service: Service, long_speech: Path) -> None:
    body, content_type = form({"model": MODEL, "language": "en"}, long_speech.read_bytes())
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=30)
    before = service.newest().stream_id
    connection.request("POST", "/v1/audio/transcriptions", body, {"Content-Type": content_type})
    while (status := service.newest()).stream_id == before or status.state == "opening":
        pass
    connection.close()
    status = service.do(service.gateway.wait_stream(status.stream_id))
    assert (status.state, status.has_heard_all) == ("ended", False)
    service.do(_requests_over())
    assert service.kept_files() == []


def test_a_client_that_leaves_while_it_sends_leaves_nothing(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    body, content_type = form({"model": MODEL}, bytes(100_000))
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=30)
    connection.request(
        "POST", "/v1/audio/transcriptions", body[:50_000], {"Content-Type": content_type, "Content-Length": len(body)}
    )
    while not service.kept_files():
        pass
    connection.close()
    service.do(_requests_over())
    assert service.kept_files() == []
    assert [record.name for record in caplog.records if record.name.startswith("actors")] == []


async def test_what_is_not_done_when_the_service_stops_is_refused(
    redis_params: RedisParams, long_speech: Path, tmp_path: Path
) -> None:
    model = ModelParams(name=str(save_tiny(tmp_path)), encoder_threads=1, decoder_threads=1)
    gateway = Gateway(Settings(runtime="local", model=model, redis=redis_params, service=ServiceParams(port=0)))
    try:
        info = await gateway.start(serves_http=True)
        async with openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0) as client:
            sent = client.audio.transcriptions.create(file=long_speech, model="whisper-1", language="en")
            asked = asyncio.create_task(sent)
            while not any(status.state == "live" for status in await gateway.list_streams()):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await gateway.drain()
            with pytest.raises(openai.InternalServerError, match="stopping") as caught:
                await asked
            assert caught.value.status_code == 503
    finally:
        await gateway.aclose()


def test_a_transcript_that_was_cut_off_is_an_error_not_an_answer(service: Service, long_speech: Path) -> None:
    events = service.client.audio.transcriptions.create(file=long_speech, model=MODEL, stream=True, language="en")
    with pytest.raises(openai.APIError, match="cut off"):
        for index, _ in enumerate(events):
            if not index:
                service.do(service.gateway.stop_stream(service.newest().stream_id))


async def _requests_over() -> None:
    """Return when the tasks in which requests are answered are done."""
    requests = [task for task in asyncio.all_tasks() if "RequestResponseCycle" in repr(task.get_coro())]
    if requests:
        await asyncio.wait(requests, timeout=30)


# -- forms ----------------------------------------------------------------------------------------


BOUNDARY = "b0undary"


def part(disposition: str, content: bytes) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return head.encode() + content + b"\r\n"


def form(fields: dict[str, str], content: bytes) -> tuple[bytes, str]:
    parts = [part(f'name="{name}"', value.encode()) for name, value in fields.items()]
    parts.append(part('name="file"; filename="a.wav"', content))
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"


END = f"--{BOUNDARY}--\r\n".encode()
FILE = part('name="file"; filename="a.wav"', b"RIFF")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "cut short"),
        (FILE, "cut short"),
        (FILE + END, "which model"),
        (part('name="model"', b"whisper-1") + END, "no file"),
        (part('name="file"', b"RIFF") + END, "no file"),
        (FILE + FILE + END, "one file"),
        (part('name="picture"; filename="a.png"', b"PNG") + END, "picture"),
        (part('name="model"', b"\xff\xfe") + FILE + END, "UTF-8"),
        (part('name="model"', b"a") + part('name="model"', b"b") + FILE + END, "more than once"),
        (part('name="prompt"', b"x" * 20_000) + FILE + END, "16384"),
        (part('name="x"', b"x") * 40 + FILE + END, "32 fields"),
        (b"no form at all", "no multipart"),
    ],
)
def test_a_form_that_is_not_right_is_refused(service: Service, body: bytes, says: str) -> None:
    status, problem = service.post(body, f"multipart/form-data; boundary={BOUNDARY}")
    assert (status, problem["kind"]) == (400, "RequestRefused")
    assert says in problem["error"]["message"]


def test_the_api_describes_the_form(service: Service) -> None:
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/openapi.json")
        described = json.loads(connection.getresponse().read())
    content = described["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    properties = content["multipart/form-data"]["schema"]["properties"]
    assert {"file", "model", "response_format", "timestamp_granularities[]", "stream"} <= set(properties)


def test_what_is_no_form_is_refused(service: Service) -> None:
    for content_type in ("application/json", "multipart/form-data", f"multipart/form-data; boundary={'b' * 999}"):
        status, problem = service.post(b"{}", content_type)
        assert (status, problem["kind"]) == (400, "RequestRefused")


async def chunks_of(body: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    edges = [0, *sorted(cut % len(body) for cut in cuts), len(body)]
    for start, end in pairwise(edges):
        yield body[start:end]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=200), value=st.text(max_size=20), cuts=st.lists(st.integers(0, 999)))
async def test_a_form_is_the_same_however_it_is_cut(
    tmp_path: Path, content: bytes, value: str, cuts: list[int]
) -> None:
    body, content_type = form({"language": value}, content)
    async with Uploads(tmp_path, 200, 1).receive(chunks_of(body, cuts), content_type) as upload:
        assert Path(upload.location).read_bytes() == content  # noqa: ASYNC240
        assert (upload.num_bytes, upload.fields) == (len(content), {"language": [value]})
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


async def test_a_file_one_byte_over_the_limit_is_refused_and_one_at_it_is_not(tmp_path: Path) -> None:
    for num_bytes in (1_000, 1_001):
        body, content_type = form({}, bytes(num_bytes))
        receiving = Uploads(tmp_path, 1_000, 1).receive(chunks_of(body, []), content_type)
        if num_bytes > 1_000:
            with pytest.raises(UploadTooLarge):
                await receiving.__aenter__()
        else:
            async with receiving as upload:
                assert upload.num_bytes == num_bytes


@pytest.mark.parametrize("limit", ["_SILENCE_TIMEOUT_S", "_ARRIVAL_TIMEOUT_S"])
async def test_a_form_that_does_not_go_on_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"actors.uploads.{limit}", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield FILE
        await asyncio.Event().wait()

    with pytest.raises(RequestRefused, match="nothing was sent"):
        await Uploads(tmp_path, 1_000, 1).receive(stalled(), f"multipart/form-data; boundary={BOUNDARY}").__aenter__()


# -- formats --------------------------------------------------------------------------------------


def test_texts_are_joined_as_their_languages_are_written() -> None:
    transcript = Transcript()
    for sequence, (text, language) in enumerate(
        [("你好。", "zh"), ("再见。", "zh"), ("", "en"), ("Bye.", "en")], start=1
    ):
        transcript.take(final("s", sequence, text, language=language))
    transcript.take(final("s", 9, "Now."))
    assert transcript.text == "你好。再见。Bye. Now."


def test_languages_have_the_names_that_whisper_gives_them() -> None:
    assert {language_name({"jw": "jv"}.get(code, code)) for code in LANGUAGES} == set(LANGUAGES.values())
    assert language_name("und") == "und"
