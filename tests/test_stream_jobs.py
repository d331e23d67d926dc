"""Jobs inside a stream: summaries and scenes beside captions, answered whenever, published before the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.audio.samples_to_chunks import by_chunk_index
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.runner import Context
from pipeline.errors import ConfigError
from pipeline.items import (
    TRANSCRIBE,
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Frame,
    FrameSet,
    Hypothesis,
    Job,
    JobKey,
    Outcome,
    Pictures,
    Snapshot,
    Task,
    TaskKind,
)
from pipeline.local import LocalModels, caption_samples, serve_jobs
from pipeline.records import BaseRecord, ErrorRecord, FinalRecord, HealthRecord, SceneRecord, SummaryRecord
from pipeline.stream import Stream
from pipeline.stream_jobs import StreamJobs
from pipeline.stream_params import StreamParams
from pipeline.text.transcripts_to_summaries import SummaryParams
from pipeline.timebase import SAMPLE_RATE_HZ
from pipeline.vision.params import SceneParams
from tests.media import read_pcm

BOTH = StreamParams(summary=SummaryParams(every_minutes=0.1), scenes=SceneParams())


@pytest.fixture(scope="module")
def sound(speech) -> NDArray[np.int16]:
    return read_pcm(speech)


def view(second: float, shade: int) -> Frame:
    return Frame(round(second * SAMPLE_RATE_HZ), np.full((60, 80, 3), shade, np.uint8))


def changing_views(seconds: int) -> list[Frame]:
    """Frames twice a second; what they show changes every four seconds."""
    return [view(half / 2, 40 + 160 * (half // 8 % 2)) for half in range(2 * seconds)]


def answer(item: Snapshot | Job, text: str = "one two") -> Hypothesis:
    task = item.task if isinstance(item, Job) else TRANSCRIBE
    return Hypothesis(item.key, task, text, (), (), "und", -0.25, 0.01, 1)


def lost(item: Snapshot | Job) -> Failure:
    return Failure(item.key, None, FailureKind.FAILED, "it was refused")


def play(
    stream: Stream,
    samples: NDArray[np.int16],
    frames: list[Frame],
    decode: Callable[[Snapshot | Job], Outcome] = answer,
    *,
    chance: random.Random | None = None,
) -> tuple[list[Job], list[BaseRecord]]:
    """Play to the end. Snapshots are answered at once, and jobs too unless `chance` says when, in whichever order."""
    jobs: list[Job] = []
    waiting: list[Job] = []
    unseen = list(frames)

    def serve() -> None:
        while (snapshots := stream.due_snapshots()) or (taken := stream.take_jobs()):
            for snapshot in snapshots:
                stream.accept(decode(snapshot))
            taken = stream.take_jobs() if snapshots else taken
            jobs.extend(taken)
            waiting.extend(taken)
            while waiting and (chance is None or chance.random() < 0.02):
                stream.accept(decode(waiting.pop(0 if chance is None else chance.randrange(len(waiting)))))

    for group in by_chunk_index(stream.chunker.push(np.atleast_2d(samples))):
        for chunk in group:
            stream.push(chunk)
        while unseen and unseen[0].start_sample < group[-1].end_sample:
            stream.push_frame(unseen.pop(0))
        serve()
        while waiting and chance is not None and chance.random() < 0.02:
            stream.accept(decode(waiting.pop(0)))
    stream.finish()
    serve()
    while waiting:
        assert not stream.has_ended
        stream.accept(decode(waiting.pop(0)))
        serve()
    assert stream.has_ended
    return jobs, stream.take_records()


def captions_of(records: list[BaseRecord]) -> list[BaseRecord]:
    return [record for record in records if not isinstance(record, SummaryRecord | SceneRecord | ErrorRecord)]


def test_a_stream_without_summaries_and_scenes_has_no_jobs_and_ignores_frames(sound):
    stream = Stream("s", StreamParams(), tier="phi4")
    jobs, records = play(stream, sound, changing_views(20))
    assert jobs == []
    assert captions_of(records) == records


def test_captions_are_the_same_with_and_without_jobs(sound):
    _, alone = play(Stream("s", StreamParams(), tier="phi4"), sound, [])
    _, records = play(Stream("s", BOTH, tier="phi4"), sound, changing_views(20))
    assert captions_of(records) == alone
    assert {record.scope for record in records if isinstance(record, SummaryRecord)} == {"rolling", "closing"}
    assert len([record for record in records if isinstance(record, SceneRecord)]) >= 4


def test_the_edge_tier_makes_summaries_without_jobs(sound):
    params = StreamParams(summary=SummaryParams(every_minutes=0.1))
    jobs, records = play(Stream("s", params), sound, [])
    assert jobs == []
    assert isinstance(records[-2], SummaryRecord)
    assert (records[-2].scope, records[-2].tier) == ("closing", "edge")


def test_generated_summaries_are_refused_on_a_tier_that_cannot_write():
    params = StreamParams(summary=SummaryParams(method="generated"))
    with pytest.raises(ConfigError, match="extractive or auto"):
        Stream("s", params)


def test_a_rolling_summary_of_two_channels_says_who_speaks(media):
    both = read_pcm(media / "two_voices.wav")
    jobs, _ = play(Stream("s", BOTH, num_channels=2, tier="phi4"), both, [])
    lines = [line for job in jobs for line in job.text.splitlines()]
    assert {"Speaker 1: one two", "Speaker 2: one two"} <= set(lines)


def test_the_end_comes_behind_the_record_of_the_last_job(sound):
    """The closing summary is asked for when the last final is out, and the end waits for scene and summary."""
    stream = Stream("s", BOTH, tier="phi4")
    stream.push_frame(view(0, 40))
    (scene,) = stream.take_jobs()
    for group in by_chunk_index(stream.chunker.push(np.atleast_2d(sound[: 3 * SAMPLE_RATE_HZ]))):
        for chunk in group:
            stream.push(chunk)
    stream.fail("the connection was lost")
    (final,) = stream.due_snapshots()
    assert stream.take_jobs() == []
    stream.accept(answer(final))
    (summary,) = stream.take_jobs()
    assert (summary.task, summary.text) == (Task(TaskKind.SUMMARISE), "one two")
    stream.push_frame(view(9, 200))
    stream.take_records()
    stream.accept(answer(summary, "They counted."))
    assert [type(record) for record in stream.take_records()] == [SummaryRecord]
    assert not stream.has_ended
    stream.accept(answer(scene, "A wall."))
    seen, ended = stream.take_records()
    assert isinstance(seen, SceneRecord)
    assert isinstance(ended, HealthRecord)
    assert (ended.event, ended.message) == ("failed", "the connection was lost")
    assert (stream.take_jobs(), stream.has_ended) == ([], True)


def test_a_keyframe_that_waits_at_the_end_is_still_looked_at():
    stream = Stream("s", BOTH, tier="phi4")
    stream.push_frame(view(0, 40))
    (first,) = stream.take_jobs()
    stream.push_frame(view(5, 200))
    stream.finish()
    assert not stream.has_ended
    stream.accept(answer(first, "A dark wall."))
    (second,) = stream.take_jobs()
    stream.accept(answer(second, "A bright wall."))
    assert stream.has_ended
    assert [record.text for record in stream.take_records() if isinstance(record, SceneRecord)] == [
        "A dark wall.",
        "A bright wall.",
    ]


def test_jobs_that_fail_hold_nothing_up(sound):
    _, records = play(
        Stream("s", BOTH, tier="phi4"),
        sound,
        changing_views(20),
        lambda item: lost(item) if isinstance(item, Job) else answer(item),
    )
    errors = [record for record in records if isinstance(record, ErrorRecord)]
    assert {(error.task, error.utterance, error.sequence) for error in errors} == {
        ("summarise", 0, 0),
        ("describe", 0, 0),
    }
    assert any(isinstance(record, FinalRecord) for record in records)
    assert isinstance(records[-1], HealthRecord)


def test_outcomes_that_nobody_waits_for_change_nothing():
    stream = Stream("s", BOTH, tier="phi4")
    stream.push_frame(view(0, 40))
    (job,) = stream.take_jobs()
    stream.take_records()
    for kind, number in ((TaskKind.DESCRIBE, 2), (TaskKind.SUMMARISE, 1), (TaskKind.ANSWER, 1)):
        stream.accept(Failure(JobKey("s", kind, number), None, FailureKind.FAILED, "whose?"))
    assert stream.take_records() == []
    stream.accept(answer(job))
    stream.accept(answer(job))
    assert len(stream.take_records()) == 1


@given(seed=st.integers(0, 1_000_000), failing=st.integers(0, 3))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_late_jobs_are_answered_captions_stay_and_the_end_comes_last(sound, seed, failing):
    def decode(item: Snapshot | Job) -> Outcome:
        return lost(item) if isinstance(item, Job) and item.key.number % 4 < failing else answer(item)

    part = sound[: 16 * SAMPLE_RATE_HZ]
    _, alone = play(Stream("s", StreamParams(), tier="phi4"), part, [])
    stream = Stream("s", BOTH, tier="phi4")
    jobs, records = play(stream, part, changing_views(16), decode, chance=random.Random(seed))
    assert captions_of(records) == alone
    assert len({job.key for job in jobs}) == len(jobs)
    rolling = [r for r in records if isinstance(r, SummaryRecord) and r.scope == "rolling"]
    assert [r.covers_from for r in rolling] == [1, *(r.covers_to + 1 for r in rolling)][: len(rolling)]


def test_frames_and_finals_behind_the_end_of_the_jobs():
    jobs = StreamJobs(BOTH, "s", "phi4")
    assert not jobs.is_done
    assert jobs.finish() == []
    assert jobs.is_done
    jobs.push_frame(view(0, 40))
    assert jobs.take_jobs() == []
    assert jobs.finish() == []


# -- the oracle -----------------------------------------------------------------------------------


@dataclass
class EchoStages:
    """An encoder, eyes and an engine that say what they were asked: only `pipeline.local` is under test."""

    log: list[str] = field(default_factory=list)
    _due: list[tuple[DecodeRequest, Context]] = field(default_factory=list)
    is_blind: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self._due)

    def submit(self, request: DecodeRequest, context: Context) -> None:
        self._due.append((request, context))

    def step(self) -> list[Outcome]:
        request, context = self._due.pop(0)
        (task,) = request.tasks
        has = [name for name in ("sound", "pictures") if getattr(context, name) is not None]
        if isinstance(request.key, JobKey):
            self.log.append(f"{task.kind} {request.key.number} of {'+'.join(has) or 'text'}")
        elif request.is_final:
            self.log.append("final")
        return [Hypothesis(request.key, task, "one two", (), (), "und", -0.2, 0.0, 1)]

    def encode(self, items: list[Snapshot] | list[FrameSet]) -> list[Embeddings | Pictures | Failure]:
        return [
            (Pictures(item.key, ()) if not self.is_blind else Failure(item.key, None, FailureKind.FAILED, "too dark"))
            if isinstance(item, FrameSet)
            else Embeddings(item.key, np.zeros((1, 1), np.float32), len(item.samples))
            for item in items
        ]

    @property
    def models(self) -> LocalModels:
        return LocalModels(self, cast(DecodeEngine, self), "phi4", self)  # type: ignore[arg-type]


def test_the_oracle_answers_jobs_before_more_is_heard(sound):
    stages = EchoStages()
    records = caption_samples(np.atleast_2d(sound), BOTH, stages.models, frames=changing_views(50))
    assert isinstance(records[-1], HealthRecord)
    scenes = [record for record in records if isinstance(record, SceneRecord)]
    assert len(scenes) == sum(entry.startswith("describe") for entry in stages.log)
    assert all(entry.endswith("of pictures") for entry in stages.log if entry.startswith("describe"))
    assert stages.log[-1].startswith("summarise")
    first = stages.log.index("summarise 1 of text")
    rolling = next(record for record in records if isinstance(record, SummaryRecord))
    assert stages.log[:first].count("final") == rolling.covers_to, "asked for right behind the final that made it due"
    # Scenes are published where they were seen: behind what ended before, before what ended later.
    last_heard_ms = 0
    for record in records[:-1]:
        if isinstance(record, SceneRecord) and record.start_ms < len(sound) // 16:
            assert last_heard_ms <= record.start_ms + 80
        elif isinstance(record, FinalRecord):
            last_heard_ms = max(last_heard_ms, record.end_ms)
    assert scenes[-1].start_ms > len(sound) // 16, "what was seen behind the sound is looked at too"


def test_the_oracle_serves_jobs_of_every_kind_and_each_fails_alone():
    stages = EchoStages()
    question = Task(TaskKind.ANSWER)
    spoken = Job(JobKey("q", TaskKind.ANSWER, 1), question, samples=np.zeros(16_000, np.int16), frames=(view(0, 9),))
    typed = Job(JobKey("q", TaskKind.ANSWER, 2), question, text="What is it?")
    assert [outcome.key.revision for outcome in serve_jobs([spoken, typed], stages.models)] == [1, 2]
    assert stages.log == ["answer 1 of sound+pictures", "answer 2 of text"]

    stages.is_blind = True
    failed, answered = serve_jobs([spoken, typed], stages.models)
    assert failed == Failure(spoken.key, question, FailureKind.FAILED, "too dark")
    assert isinstance(answered, Hypothesis)
    (failed,) = serve_jobs([spoken], replace(stages.models, eyes=None))
    assert isinstance(failed, Failure)
    assert "cannot see" in failed.message
