"""The gateway: admission, supervision, draining; in this process with a tiny model, and as an actor on Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from actors.follow import follow
from actors.gateway import Gateway
from actors.questions import AskSpec, SummariseSpec
from actors.session import Session
from actors.settings import Settings
from actors.spec import StreamSpec, make_stream_id
from actors.store import RedisParams, Store
from pipeline.errors import CapacityExceeded, ConfigError, MediaError, ServiceError, SourceNotFound, StreamNotFound
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.records import BaseRecord, FinalRecord, HealthRecord, SceneRecord
from tests.media import read_pcm, write_pcm
from tests.ray_cluster import RayCluster
from tests.test_container_source import FORMAT_FLOAT, riff
from tests.tiny_whisper import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    return ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))), encoder_threads=1, decoder_threads=1)


@pytest.fixture(scope="module")
def clip(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of speech."""
    return write_pcm(tmp_path_factory.mktemp("clip") / "clip.wav", read_pcm(speech)[: 6 * 16_000])


@pytest.fixture
def local_settings(model: ModelParams, redis_params: RedisParams) -> Settings:
    return Settings(runtime="local", model=model, redis=redis_params)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Gateway]:
    gateway = Gateway(settings)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.aclose()


async def records_of(store: Store, stream_id: str) -> list[BaseRecord]:
    return [item.record async for item in follow(store.client(), stream_id)]


def health_of(records: list[BaseRecord]) -> list[str]:
    return [record.event for record in records if isinstance(record, HealthRecord)]


async def test_a_stream_runs_to_its_end_and_is_remembered(local_settings: Settings, clip: Path) -> None:
    async with running(local_settings) as gateway, Store(local_settings.redis) as store:
        stream_id = await gateway.start_stream(StreamSpec(source=str(clip), pace="fast"))
        status = await gateway.wait_stream(stream_id)
        assert (status.state, status.message) == ("ended", "")
        assert status.ended_at is not None
        assert [known.stream_id for known in await gateway.list_streams()] == [stream_id]
        records = await records_of(store, stream_id)
        assert health_of(records)[0] == "started"
        assert health_of(records)[-1] == "ended"
        assert any(isinstance(record, FinalRecord) for record in records)


async def test_samples_that_are_no_numbers_are_counted(local_settings: Settings, clip: Path, tmp_path: Path) -> None:
    samples = (read_pcm(clip)[:32_000] / 32_768).astype("<f4")
    samples[[5, 700, 20_000]] = np.nan, np.inf, -np.inf
    path = riff(tmp_path / "nan.wav", tag=FORMAT_FLOAT, channels=1, rate_hz=16_000, bits=32, data=samples.tobytes())
    async with running(local_settings) as gateway:
        for source, expected in ((clip, b"0.0"), (path, b"3.0"), (path, b"6.0")):
            stream_id = await gateway.start_stream(StreamSpec(source=str(source), pace="fast"))
            assert (await gateway.wait_stream(stream_id)).state == "ended"
            assert b"\nsurtitle_nonfinite_samples_total " + expected in gateway.render_metrics()


async def test_a_stream_that_is_stopped_flushes_its_open_utterance(local_settings: Settings, speech: Path) -> None:
    async with running(local_settings) as gateway, Store(local_settings.redis) as store:
        stream_id = await gateway.start_stream(StreamSpec(source=str(speech), pace="realtime"))
        async with asyncio.timeout(30):
            # A partial is submitted once an utterance is open.
            while b'surtitle_snapshots_total{kind="partial"}' not in gateway.render_metrics():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        status = await gateway.stop_stream(stream_id)
        assert status.state == "ended"
        finals = [record for record in await records_of(store, stream_id) if isinstance(record, FinalRecord)]
        assert finals[-1].close_reason == "end"


async def test_more_streams_than_allowed_are_refused(local_settings: Settings, speech: Path) -> None:
    settings = local_settings.model_copy(
        update={"service": local_settings.service.model_copy(update={"max_streams": 1})}
    )
    async with running(settings) as gateway:
        spec = StreamSpec(source=str(speech), stream_id="one")
        await gateway.start_stream(spec)
        with pytest.raises(CapacityExceeded, match="max_streams is 1"):
            await gateway.start_stream(spec.model_copy(update={"stream_id": "two"}))
        with pytest.raises(ServiceError, match="live here already"):
            await gateway.start_stream(spec)
        await gateway.stop_stream("one")
        await gateway.start_stream(spec.model_copy(update={"stream_id": "two"}))


async def test_what_cannot_be_started_is_an_error_and_takes_no_place(local_settings: Settings, clip: Path) -> None:
    async with running(local_settings) as gateway:
        with pytest.raises(SourceNotFound):
            await gateway.start_stream(StreamSpec(source="no-such-file.wav"))
        with pytest.raises(ConfigError, match="'de'"):
            await gateway.start_stream(StreamSpec(source=str(clip), translate_to=("de",)))
        with pytest.raises(StreamNotFound):
            await gateway.stop_stream("nobody")
        assert await gateway.list_streams() == []


async def test_a_session_that_breaks_harms_no_other(
    local_settings: Settings, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.run

    async def run_or_break(session: Session) -> None:
        await run(session)
        if session.stream_id == "broken":
            raise ZeroDivisionError

    monkeypatch.setattr(Session, "run", run_or_break)
    async with running(local_settings) as gateway:
        spec = StreamSpec(source=str(clip), pace="fast")
        for stream_id in ("broken", "whole"):
            await gateway.start_stream(spec.model_copy(update={"stream_id": stream_id}))
        broken, whole = await asyncio.gather(gateway.wait_stream("broken"), gateway.wait_stream("whole"))
    assert (broken.state, broken.message) == ("failed", "internal error: ZeroDivisionError")
    assert whole.state == "ended"


async def test_draining_ends_every_stream_and_admits_no_more(local_settings: Settings, speech: Path) -> None:
    async with running(local_settings) as gateway:
        for stream_id in ("one", "two"):
            await gateway.start_stream(StreamSpec(source=str(speech), stream_id=stream_id))
        await gateway.drain()
        assert [status.state for status in await gateway.list_streams()] == ["ended", "ended"]
        with pytest.raises(ServiceError, match="stopping"):
            await gateway.start_stream(StreamSpec(source=str(speech)))


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    name = str(make_tiny(tmp_path_factory.mktemp("tiny-phi4")))
    return ModelParams(name=name, encoder_threads=1, decoder_threads=1)


async def test_a_video_is_looked_at_and_asked_about_while_it_plays(
    local_settings: Settings, seeing_model: ModelParams, media: Path, clip: Path
) -> None:
    settings = local_settings.model_copy(update={"model": seeing_model})
    async with running(settings) as gateway, Store(settings.redis) as store:
        info = (await gateway.info()).stages
        assert info.tier == "phi4"
        assert info.eyes is not None
        assert info.eyes.max_crops == settings.vision.max_crops
        spec = StreamSpec(source=str(media / "demo.mp4"), stream_id="hall", has_scenes=True)
        await gateway.start_stream(spec)
        async with asyncio.timeout(30):
            while b'surtitle_jobs_total{kind="describe",outcome="answered"}' not in gateway.render_metrics():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        answer = await gateway.answer(AskSpec(question="What is it?", stream_id="hall"))
        assert answer.tier == "phi4"
        assert b'surtitle_jobs_total{kind="answer",outcome="answered"} 1.0' in gateway.render_metrics()
        assert (await gateway.stop_stream("hall")).state == "ended"
        scenes = [record for record in await records_of(store, "hall") if isinstance(record, SceneRecord)]
        assert (scenes[0].start_ms, scenes[0].reason) == (0, "first")
        with pytest.raises(StreamNotFound, match="'hall' is live"):
            await gateway.answer(AskSpec(question="What is it?", stream_id="hall"))
        # Without scenes nobody looks at it.
        await gateway.start_stream(spec.model_copy(update={"stream_id": "blind", "has_scenes": None}))
        with pytest.raises(MediaError, match="'blind' has shown nothing"):
            await gateway.answer(AskSpec(question="What is it?", stream_id="blind"))
        await gateway.drain()
        with pytest.raises(ServiceError, match="stopping"):
            await gateway.summarise(SummariseSpec(source=str(clip)))


async def test_a_question_cut_off_by_the_gateways_end_is_no_fault_of_its_media(
    local_settings: Settings, seeing_model: ModelParams, speech: Path, tmp_path: Path
) -> None:
    long = write_pcm(tmp_path / "long.wav", np.tile(read_pcm(speech)[: 60 * 16_000], 5)[: 5 * 60 * 16_000])
    settings = local_settings.model_copy(update={"model": seeing_model})
    async with running(settings) as gateway:
        asking = asyncio.create_task(gateway.summarise(SummariseSpec(source=str(long))))
        await asyncio.sleep(0.05)
        await gateway.aclose()
        with pytest.raises(ServiceError, match="stopping"):
            await asking


async def test_scenes_that_are_configured_can_be_switched_off(
    local_settings: Settings, seeing_model: ModelParams, media: Path
) -> None:
    settings = Settings.model_validate(
        {**local_settings.model_dump(), "model": seeing_model, "scenes": {"sample_interval_ms": 1_000}}
    )
    async with running(settings) as gateway, Store(settings.redis) as store:
        for stream_id, has_scenes in (("seen", None), ("unseen", False)):
            spec = StreamSpec(
                source=str(media / "demo.mp4"), stream_id=stream_id, pace="fast", scheduling="by_sample",
                has_scenes=has_scenes, has_partials=False,
            )  # fmt: skip
            await gateway.start_stream(spec)
            assert (await gateway.wait_stream(stream_id)).state == "ended"
            kinds = {record.kind for record in await records_of(store, stream_id)}
            assert ("scene" in kinds) is (has_scenes is None)


async def test_scenes_and_questions_are_refused_where_the_tier_has_no_eyes(
    local_settings: Settings, media: Path, clip: Path
) -> None:
    async with running(local_settings) as gateway:
        with pytest.raises(ConfigError, match=r"tier edge .* has no eyes"):
            await gateway.start_stream(StreamSpec(source=str(media / "demo.mp4"), has_scenes=True))
        with pytest.raises(ConfigError, match=r"tier edge .* cannot answer"):
            await gateway.answer(AskSpec(sound=str(clip)))
        assert await gateway.list_streams() == []


async def test_the_gateway_actor_captions_on_ray_and_tells_the_same_errors(ray_cluster: RayCluster, clip: Path) -> None:
    gateway = ray_cluster.gateway
    stream_id = await gateway.start_stream(StreamSpec(source=str(clip), pace="fast", scheduling="by_sample"))
    assert (await gateway.wait_stream(stream_id)).state == "ended"
    async with Store(ray_cluster.settings.redis) as store:
        records = await records_of(store, stream_id)
    finals = [record for record in records if isinstance(record, FinalRecord)]
    assert any(record.text for record in finals)
    with pytest.raises(SourceNotFound, match="no-such-file"):
        await gateway.start_stream(StreamSpec(source="no-such-file.wav"))
    with pytest.raises(StreamNotFound):
        await gateway.get_stream("nobody")


def test_neither_the_gateway_nor_what_deploys_it_imports_torch() -> None:
    modules = "actors.gateway, actors.app, actors.service, actors.api, actors.serve_stages, actors.decoder"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("source", "start"),
    [
        ("/media/Board Meeting.mp4", "board-meeting-"),
        ("rtsp://user:secret@camera.example/Hall?key=secret", "hall-"),
        ("rtsp://user:secret@camera.example", "stream-"),
        ("Привет.wav", "stream-"),
    ],
)
def test_stream_ids_are_readable_and_hold_no_secrets(source: str, start: str) -> None:
    stream_id = make_stream_id(source)
    assert stream_id.startswith(start)
    assert "secret" not in stream_id
    assert make_stream_id(source) != stream_id
