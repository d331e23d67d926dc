"""Scenes: one look at a time, the newest keyframe next, a record of each that says something new."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.publisher import Publisher
from actors.store import KeyKind, Store
from pipeline.items import Failure, FailureKind, Frame, Hypothesis, Job, JobKey, Outcome, TaskKind
from pipeline.records import BaseRecord, ErrorRecord, SceneRecord
from pipeline.scenes import DESCRIBE, SceneTrack
from pipeline.timebase import ms_to_samples
from pipeline.vision.params import SceneParams
from tests.stores import STARTED_AT, collect, health

PARAMS = SceneParams(sample_interval_ms=500, min_interval_ms=1_000, max_interval_ms=10_000)


def frame(ms: int, step: int = 0) -> Frame:
    """Chequers of 16 pixels; those of an even and of an odd step differ everywhere."""
    squares = ((np.indices((64, 96)) // 16).sum(axis=0) + step) % 2
    return Frame(ms_to_samples(ms), np.repeat(squares[..., None] * 200, 3, axis=2).astype(np.uint8))


def described(job: Job, text: str, guard: str | None = None) -> Hypothesis:
    return Hypothesis(job.key, job.task, text, (), (), "en", -0.1, 0.0, 1, guard)


def failed(job: Job, kind: FailureKind, message: str = "no memory") -> Failure:
    return Failure(job.key, job.task, kind, message)


def track() -> SceneTrack:
    return SceneTrack(PARAMS, "cam", "phi4", crop_size=48)


def job_of(scenes: SceneTrack) -> Job:
    job = scenes.take_job()
    assert job is not None
    return job


def scene_of(records: list[BaseRecord]) -> SceneRecord:
    (record,) = records
    assert isinstance(record, SceneRecord)
    return record


def test_the_first_frame_is_described_and_published_where_it_was_seen() -> None:
    scenes = track()
    assert scenes.take_job() is None
    scenes.push(frame(1_234))
    job = job_of(scenes)
    assert (job.key, job.task) == (JobKey("cam", TaskKind.DESCRIBE, 1), DESCRIBE)
    assert np.array_equal(job.frames[0].pixels, frame(0).pixels)
    record = scene_of(scenes.accept(described(job, " A board of squares. ")))
    assert record == SceneRecord(
        stream="cam",
        start_ms=1_234,
        end_ms=1_234,
        text="A board of squares.",
        tier="phi4",
        reason="first",
        changed_share=1.0,
    )
    assert record.language == "en"


def test_one_is_in_flight_and_the_newest_that_waits_replaces_older_ones() -> None:
    scenes = track()
    scenes.push(frame(0))
    first = job_of(scenes)
    for step in (1, 2, 3):
        scenes.push(frame(1_000 * step, step))
        assert scenes.take_job() is None
    scenes.accept(described(first, "one"))
    second = job_of(scenes)
    assert second.key.number == 2
    assert second.frames[0].start_sample == ms_to_samples(3_000)
    assert scenes.num_dropped == 2
    assert scenes.take_job() is None


def test_what_nobody_looked_at_is_still_the_reason_for_what_comes_in_its_place() -> None:
    scenes = track()
    scenes.push(frame(0))
    scenes.push(frame(1_000, 1))
    assert scene_of(scenes.accept(described(job_of(scenes), "one"))).reason == "first"
    scenes.push(frame(2_000, 0))
    scenes.push(frame(12_000, 0))  # nothing new, but the last keyframe is old
    record = scene_of(scenes.accept(described(job_of(scenes), "one")))
    assert (record.start_ms, record.reason, record.changed_share) == (12_000, "changed", 1.0)


def test_a_description_that_says_what_the_last_one_said_is_published_only_if_something_changed() -> None:
    scenes = track()
    published = []
    for ms, step, text in [(0, 0, "one"), (10_000, 0, "one"), (11_000, 1, "one"), (21_000, 1, "two"), (31_000, 1, "")]:
        scenes.push(frame(ms, step))
        published.append([type(record).__name__ for record in scenes.accept(described(job_of(scenes), text))])
    assert published == [["SceneRecord"], [], ["SceneRecord"], ["SceneRecord"], []]


@pytest.mark.parametrize(("text", "num_records"), [("A man, a man", 1), (" ", 0)])
def test_of_a_description_that_a_guard_cut_the_rest_is_published_if_there_is_any(text: str, num_records: int) -> None:
    scenes = track()
    scenes.push(frame(0))
    records = scenes.accept(described(job_of(scenes), text, guard="loop"))
    assert [scene_of([record]).guard for record in records] == ["loop"] * num_records


@pytest.mark.parametrize("kind", [FailureKind.FAILED, FailureKind.UNAVAILABLE])
def test_what_fails_for_good_is_an_error_and_the_next_frame_is_looked_at(kind: FailureKind) -> None:
    scenes = track()
    scenes.push(frame(500))
    (record,) = scenes.accept(failed(job_of(scenes), kind))
    assert record == ErrorRecord(
        stream="cam", start_ms=500, end_ms=500, utterance=0, sequence=0, task="describe", message="no memory"
    )
    assert scenes.num_dropped == 0
    scenes.push(frame(1_500, 1))
    assert job_of(scenes).key.number == 2


@pytest.mark.parametrize("kind", [FailureKind.SUPERSEDED, FailureKind.EXPIRED])
def test_what_comes_too_late_is_counted_and_no_error(kind: FailureKind) -> None:
    scenes = track()
    scenes.push(frame(500))
    assert scenes.accept(failed(job_of(scenes), kind)) == []
    assert scenes.num_dropped == 1


def test_a_failure_of_all_tasks_ends_the_job_too() -> None:
    scenes = track()
    scenes.push(frame(0))
    job = job_of(scenes)
    (record,) = scenes.accept(Failure(job.key, None, FailureKind.FAILED, "gone"))
    assert isinstance(record, ErrorRecord)
    assert record.task == "describe"


def test_outcomes_of_other_jobs_and_second_ones_are_ignored() -> None:
    scenes = track()
    scenes.push(frame(0))
    job = job_of(scenes)
    others = [
        JobKey("other", TaskKind.DESCRIBE, 1),
        JobKey("cam", TaskKind.SUMMARISE, 1),
        JobKey("cam", job.key.kind, 2),
    ]
    for key in others:
        assert scenes.accept(Failure(key, job.task, FailureKind.FAILED, "not ours")) == []
    assert len(scenes.accept(described(job, "one"))) == 1
    assert scenes.accept(described(job, "again")) == []


def test_at_the_end_what_waits_is_still_looked_at_and_nothing_new_is() -> None:
    scenes = track()
    scenes.push(frame(0))
    first = job_of(scenes)
    scenes.push(frame(1_000, 1))
    scenes.finish()
    scenes.push(frame(5_000, 2))
    assert not scenes.is_done
    scenes.accept(described(first, "one"))
    assert not scenes.is_done
    second = job_of(scenes)
    assert second.frames[0].start_sample == ms_to_samples(1_000)
    assert not scenes.is_done
    scenes.accept(described(second, "two"))
    assert scenes.is_done
    assert scenes.take_job() is None


def test_without_a_frame_the_end_is_the_end() -> None:
    scenes = track()
    assert not scenes.is_done
    scenes.finish()
    assert scenes.is_done


def outcome_of(job: Job, kind: str) -> Outcome:
    return described(job, kind) if kind in ("one", "two") else failed(job, FailureKind(kind))


steps = st.one_of(
    st.tuples(st.just("push"), st.sampled_from([0, 100, 1_000, 12_000]), st.integers(0, 1)),
    st.tuples(st.just("take")),
    st.tuples(st.just("accept"), st.sampled_from(["one", "two", "failed", "expired", "unavailable", "superseded"])),
)


@given(st.lists(steps, max_size=40))
@settings(max_examples=150, deadline=None)
def test_however_calls_are_interleaved_jobs_come_one_by_one_and_each_keyframe_has_one_fate(
    calls: list[tuple[Any, ...]],
) -> None:
    scenes, ms, in_flight = track(), 0, None
    jobs: list[Job] = []
    records: list[BaseRecord] = []
    num_silent = 0
    for call in [*calls, ("finish",), *[("accept", "two"), ("take",)] * 2]:
        if call[0] == "push":
            ms += call[1]
            scenes.push(frame(ms, call[2]))
        elif call[0] == "take":
            job = scenes.take_job()
            assert job is None or in_flight is None
            if job is not None:
                in_flight = job
                jobs.append(job)
        elif call[0] == "finish":
            scenes.finish()
        elif in_flight is not None:
            made = scenes.accept(outcome_of(in_flight, call[1]))
            assert len(made) <= 1
            num_silent += not made
            records += made
            in_flight = None
    if in_flight is not None:
        records += scenes.accept(described(in_flight, "last"))
    assert scenes.is_done
    assert [job.key.number for job in jobs] == list(range(1, len(jobs) + 1))
    seen = [job.frames[0].start_sample for job in jobs]
    assert all(after - before >= ms_to_samples(1_000) for before, after in itertools.pairwise(seen))
    assert len(jobs) == len(records) + num_silent
    assert [record.start_ms for record in records] == sorted(record.start_ms for record in records)


async def test_scenes_are_read_as_they_were_published(embedded_redis: Store, publisher: Publisher) -> None:
    scenes = track()
    writer = await publisher.open_stream("cam", STARTED_AT, tier="phi4")
    made: list[BaseRecord] = []
    for number in range(4):
        scenes.push(frame(1_000 * number, number))
        job = job_of(scenes)
        made += scenes.accept(failed(job, FailureKind.FAILED) if number == 2 else described(job, f"scene {number}"))
    for record in [*made, health("cam", "ended", 4_000)]:
        await writer.publish(record)
    await writer.close()
    seen = await collect(embedded_redis, "cam")
    assert [(followed.kind, followed.entry_id) for followed in seen if followed.kind == "scenes"] == [
        ("scenes", "1-1"),
        ("scenes", "2-1"),
        ("scenes", "3-1"),
    ]
    stamps = {"emitted_at": None, "utc_start": None}
    assert (
        sorted((followed.record.model_copy(update=stamps) for followed in seen[:-1]), key=lambda r: r.start_ms) == made
    )
    only = await collect(embedded_redis, "cam", kinds=[KeyKind.SCENES])
    assert [followed.record.start_ms for followed in only] == [0, 1_000, 3_000]
