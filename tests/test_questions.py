"""Questions and summaries on request, over real stages with a tiny Phi-4-multimodal; what is refused at the door."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from pydantic import ValidationError

from actors import questions as questions_module
from actors.dispatch import DispatchParams
from actors.door import check_stream
from actors.local_stages import LocalStages
from actors.metrics import Metrics
from actors.questions import Answer, AskSpec, Questions, SummariseSpec
from actors.stages import StagesInfo
from ingest.processes import DecoderProcesses
from ingest.source import AudioParams
from pipeline.audio.encoder_window import EncoderParams
from pipeline.decode.embeddings_to_hypotheses import DecoderParams
from pipeline.errors import CapacityExceeded, ConfigError, MediaError, ServiceError, SourceNotFound, StageError
from pipeline.items import Failure, FailureKind, Frame, Job, Outcome, Task, TaskKind
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.stream_params import CaptionParams, StreamParams
from pipeline.text.transcripts_to_summaries import SummaryParams
from pipeline.vision.params import SceneParams, VisionParams
from tests.media import read_pcm, write_pcm

# The stages live on the event loop on which they were opened.
pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = StagesInfo("edge", "whisper-base", "float32", ("en", "de"), ("en",))


class KeptStages:
    """Stages that keep the jobs that they are given; `fails` is what becomes of them instead of an answer."""

    def __init__(self, stages: LocalStages) -> None:
        self._stages = stages
        self.info = stages.info
        self.jobs: list[Job] = []
        self.fails: FailureKind | None = None
        self.waits_for = asyncio.Event()
        self.waits_for.set()

    async def submit_job(self, job: Job) -> Outcome:
        self.jobs.append(job)
        await self.waits_for.wait()
        if self.fails is not None:
            return Failure(job.key, job.task, self.fails, "as it happens")
        return await self._stages.submit_job(job)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local_stages(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStages]:
    name = str(make_tiny(tmp_path_factory.mktemp("tiny-phi4")))
    stages = await LocalStages.open(
        ModelParams(name=name, encoder_threads=1, decoder_threads=1),
        EncoderParams(),
        DecoderParams(),
        DispatchParams(),
        Metrics(),
        vision=VisionParams(max_crops=2),
    )
    yield stages
    await stages.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def processes() -> AsyncIterator[DecoderProcesses]:
    async with DecoderProcesses() as opened:
        yield opened


@pytest.fixture
def stages(local_stages: LocalStages) -> KeptStages:
    return KeptStages(local_stages)


@pytest.fixture
def asked(stages: KeptStages, processes: DecoderProcesses) -> Questions:
    return Questions(stages, AudioParams(), processes)


@pytest.fixture(scope="module")
def clip(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of speech."""
    return write_pcm(tmp_path_factory.mktemp("clip") / "clip.wav", read_pcm(speech)[:32_000])


@pytest.fixture(scope="module")
def video(media: Path) -> Path:
    return media / "demo.mp4"


async def test_sound_that_fits_no_slot_is_refused_before_it_is_encoded(
    stages: KeptStages, processes: DecoderProcesses, clip: Path
) -> None:
    for slot_tokens, is_refused in ((13, True), (26, False)):
        asked = Questions(stages, AudioParams(), processes, slot_tokens=slot_tokens)
        if is_refused:
            with pytest.raises(MediaError, match=r"more than 1 seconds of sound: .* raise decoder\.slot_tokens"):
                await asked.summarise(SummariseSpec(source=str(clip)))
        else:
            await asked.summarise(SummariseSpec(source=str(clip)))
    assert len(stages.jobs) == 1


async def test_a_question_about_pictures_is_answered(asked: Questions, stages: KeptStages, video: Path) -> None:
    answer = await asked.answer(AskSpec(question="  What is it? ", pictures=(str(video), str(video))))
    assert (answer.tier, answer.language) == ("phi4", "en")
    [job] = stages.jobs
    assert job.key.stream_id.startswith("ask-")
    assert (job.key.kind, job.task, job.text, job.samples) == (
        TaskKind.ANSWER,
        Task(TaskKind.ANSWER),
        "What is it?",
        None,
    )
    first, second = job.frames
    assert np.array_equal(first.pixels, second.pixels)
    assert stages.info.eyes is not None
    assert first.pixels.shape[0] * first.pixels.shape[1] <= 2 * stages.info.eyes.crop_size**2
    assert await asked.answer(AskSpec(question="What is it?", pictures=(str(video), str(video)))) == answer
    assert stages.jobs[1].key != job.key


async def test_a_question_is_spoken_or_about_sound(asked: Questions, stages: KeptStages, clip: Path) -> None:
    await asked.answer(AskSpec(sound=str(clip)))
    await asked.answer(AskSpec(question="Who speaks?", sound=str(clip)))
    assert [job.text for job in stages.jobs] == ["", "Who speaks?"]
    for job in stages.jobs:
        assert job.samples is not None
        assert np.array_equal(job.samples, read_pcm(clip))


async def test_a_question_about_a_stream_is_about_what_it_shows(asked: Questions, stages: KeptStages) -> None:
    shown = Frame(99, np.full((56, 56, 3), 128, np.uint8))
    await asked.answer(AskSpec(question="What is it?", stream_id="hall"), shown)
    assert stages.jobs[0].frames == (shown,)
    with pytest.raises(MediaError, match="'hall' has shown nothing yet"):
        await asked.answer(AskSpec(question="What is it?", stream_id="hall"))


async def test_speech_and_text_are_summarised(asked: Questions, stages: KeptStages, clip: Path) -> None:
    assert isinstance(await asked.summarise(SummariseSpec(source=str(clip))), Answer)
    assert isinstance(await asked.summarise(SummariseSpec(text=" A long story. ")), Answer)
    spoken, written = stages.jobs
    assert (spoken.text, written.text, written.samples) == ("", "A long story.", None)
    assert spoken.samples is not None
    assert {job.task for job in stages.jobs} == {Task(TaskKind.SUMMARISE)}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (AskSpec(), "nothing is asked"),
        (AskSpec(question="  ", pictures=("a.png",)), "nothing is asked"),
        (AskSpec(question="Why?"), "about nothing"),
        (AskSpec(question="Why?", pictures=("a.png",) * 4, stream_id="s"), "at most 3 pictures"),
    ],
)
async def test_a_question_about_nothing_is_refused(asked: Questions, spec: AskSpec, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        await asked.answer(spec)


async def test_too_many_pictures_have_no_place() -> None:
    with pytest.raises(ValidationError):
        AskSpec(question="Why?", pictures=("a.png",) * 5)


@pytest.mark.parametrize("spec", [SummariseSpec(), SummariseSpec(source="a.wav", text="b"), SummariseSpec(text="  ")])
async def test_a_summary_of_nothing_or_of_two_things_is_refused(asked: Questions, spec: SummariseSpec) -> None:
    with pytest.raises(ConfigError):
        await asked.summarise(spec)


async def test_media_that_cannot_be_used_is_told(
    asked: Questions, speech: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceNotFound):
        await asked.answer(AskSpec(question="Why?", pictures=(str(tmp_path / "none.png"),)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(MediaError):
        await asked.answer(AskSpec(question="Why?", pictures=(str(tmp_path / "bad.png"),)))
    with pytest.raises(MediaError, match=r"demo\.wav shows no picture"):
        await asked.answer(AskSpec(question="Why?", pictures=(str(speech),)))
    monkeypatch.setattr(questions_module, "MAX_QUESTION_S", 5)
    with pytest.raises(MediaError, match=r"demo\.wav has more than 5 seconds of sound"):
        await asked.answer(AskSpec(sound=str(speech)))
    monkeypatch.setattr(questions_module, "MAX_SUMMARY_S", 5)
    with pytest.raises(MediaError, match=r"demo\.mp4 has more than 5 seconds of sound"):
        await asked.summarise(SummariseSpec(source=str(video)))


@pytest.mark.parametrize(("kind", "error"), [(FailureKind.UNAVAILABLE, ServiceError), (FailureKind.FAILED, StageError)])
async def test_no_answer_is_an_error(
    asked: Questions, stages: KeptStages, kind: FailureKind, error: type[Exception]
) -> None:
    stages.fails = kind
    with pytest.raises(error, match="as it happens"):
        await asked.summarise(SummariseSpec(text="a"))


async def test_requests_too_many_are_refused_and_leave_room_when_they_end(
    asked: Questions, stages: KeptStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions_module, "MAX_REQUESTS", 1)
    stages.waits_for.clear()
    first = asyncio.create_task(asked.summarise(SummariseSpec(text="a")))
    await asyncio.sleep(0)
    with pytest.raises(CapacityExceeded):
        await asked.summarise(SummariseSpec(text="b"))
    first.cancel()
    await asyncio.wait({first})
    stages.waits_for.set()
    await asked.summarise(SummariseSpec(text="c"))


# -- the door -------------------------------------------------------------------------------------


async def test_a_tier_that_cannot_refuses_questions_and_says_which_can(
    stages: KeptStages, processes: DecoderProcesses
) -> None:
    stages.info = EDGE
    asked = Questions(stages, AudioParams(), processes)
    with pytest.raises(ConfigError, match=r"tier edge \(whisper-base\) cannot answer.*phi4"):
        await asked.answer(AskSpec(question="Why?", pictures=("a.png",)))
    with pytest.raises(ConfigError, match="cannot summarise"):
        await asked.summarise(SummariseSpec(text="a"))
    assert not stages.jobs


async def test_streams_ask_only_for_what_the_models_can(local_stages: LocalStages) -> None:
    phi4 = local_stages.info
    scenes = StreamParams(scenes=SceneParams())
    generated = StreamParams(summary=SummaryParams(method="generated"))
    with pytest.raises(ConfigError, match=r"scenes .* tier edge \(whisper-base\) has no eyes"):
        check_stream(scenes, EDGE)
    with pytest.raises(ConfigError, match=r"cannot summarise: .* set summary.method to extractive"):
        check_stream(generated, EDGE)
    check_stream(StreamParams(summary=SummaryParams()), EDGE)
    check_stream(scenes, phi4)
    check_stream(generated, phi4)
    with pytest.raises(ConfigError, match="cannot describe"):
        check_stream(scenes, dataclasses.replace(phi4, tasks=frozenset({TaskKind.TRANSCRIBE})))


@pytest.mark.parametrize(("language", "target"), [("de", "en"), ("en", "de"), ("auto", "de"), ("auto", "en")])
async def test_pairs_with_english_are_translated(local_stages: LocalStages, language: str, target: str) -> None:
    check_stream(StreamParams(captions=CaptionParams(language=language, translate_to=(target,))), local_stages.info)


@pytest.mark.parametrize(("language", "target"), [("de", "fr"), ("fr", "de"), ("auto", "xx"), ("xx", "en")])
async def test_other_pairs_are_refused(local_stages: LocalStages, language: str, target: str) -> None:
    params = StreamParams(captions=CaptionParams(language=language, translate_to=(target,)))
    with pytest.raises(ConfigError, match=f"'{'xx' if 'xx' in {language, target} else target}'"):
        check_stream(params, local_stages.info)
