"""Jobs on their way: the policy in plain Python, and the driver over real stages with a tiny Phi-4-multimodal."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.decoder import Decoder
from actors.dispatch import DispatchParams
from actors.job_queue import JobParams, JobQueue, Need, Settled, Ticket, need_of
from actors.local_stages import LocalStages, LocalTransport
from actors.metrics import Metrics
from actors.owned_thread import OwnedThread
from pipeline.audio.encoder_window import EncoderParams
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams
from pipeline.errors import StageUnavailable
from pipeline.items import (
    TRANSCRIBE,
    Failure,
    FailureKind,
    Frame,
    Hypothesis,
    Job,
    JobKey,
    Outcome,
    Snapshot,
    SnapshotKey,
    Task,
    TaskKind,
)
from pipeline.models.phi4.audio_stage import Phi4UtterancesToEmbeddings
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.timebase import SAMPLE_RATE_HZ
from pipeline.vision.frames_to_embeddings import FramesToEmbeddings
from pipeline.vision.params import VisionParams
from tests.tiny_whisper import save_tiny

FRAME = Frame(0, np.zeros((8, 8, 3), np.uint8))
SOUND = np.zeros(1_600, np.int16)
KINDS = (TaskKind.ANSWER, TaskKind.DESCRIBE, TaskKind.SUMMARISE)


def job(
    kind: TaskKind, number: int = 1, *, stream: str = "s", num_frames: int = 0, has_sound: bool = False, text: str = ""
) -> Job:
    key = JobKey(stream, kind, number)
    return Job(key, Task(kind), text, (FRAME,) * num_frames, SOUND if has_sound else None)


def scene(number: int = 1, *, stream: str = "s") -> Job:
    return job(TaskKind.DESCRIBE, number, stream=stream, num_frames=1)


def jobs_of(tickets: list[Ticket]) -> list[Job]:
    return [ticket.job for ticket in tickets]


def kinds_of(settled: Settled) -> list[tuple[int, FailureKind]]:
    return [(ticket.job.key.number, failure.kind) for ticket, failure in settled]


def queue_of(*items: Job, **params: float) -> JobQueue:
    queue = JobQueue(JobParams.model_validate(params))
    for item in items:
        queue.add(item, 0.0)
    return queue


# -- the policy -----------------------------------------------------------------------------------


def test_jobs_with_the_same_needs_go_together_and_each_need_has_its_own_call() -> None:
    items = [
        scene(stream="a"),
        job(TaskKind.SUMMARISE, text="t"),
        scene(stream="b"),
        job(TaskKind.ANSWER, has_sound=True),
    ]
    queue = queue_of(*items)
    calls = [jobs_of(queue.take()) for _ in range(4)]
    assert sorted(map(len, calls)) == [0, 1, 1, 2]
    assert [items[0], items[2]] in calls
    assert (queue.num_waiting, queue.num_in_flight) == (0, 4)


def test_the_next_call_of_a_need_waits_for_the_encoders_and_other_needs_do_not() -> None:
    queue = queue_of(scene(stream="a"))
    assert queue.take()
    queue.add(scene(stream="b"), 0.0)
    queue.add(job(TaskKind.SUMMARISE, text="t"), 0.0)
    assert [item.key.kind for item in jobs_of(queue.take())] == [TaskKind.SUMMARISE]
    assert not queue.take()
    queue.end_encoding(Need.FRAMES)
    assert jobs_of(queue.take()) == [scene(stream="b")]


def test_a_call_holds_so_many_frames_but_at_least_one_job() -> None:
    large = [job(TaskKind.ANSWER, stream=name, num_frames=3) for name in "ab"]
    queue = queue_of(*large, max_frames_per_call=2)
    assert jobs_of(queue.take()) == large[:1]
    queue.end_encoding(Need.FRAMES)
    assert jobs_of(queue.take()) == large[1:]


def test_long_sounds_go_to_the_encoder_that_captions_wait_for_one_by_one() -> None:
    second = np.zeros(SAMPLE_RATE_HZ, np.int16)
    jobs = [
        dataclasses.replace(job(TaskKind.SUMMARISE, stream=name), samples=np.tile(second, num_seconds))
        for name, num_seconds in (("a", 9), ("b", 1), ("c", 2), ("d", 1))
    ]
    queue = queue_of(*jobs, max_sound_s_per_call=3)
    calls = []
    for _ in range(3):
        calls.append([item.key.stream_id for item in jobs_of(queue.take())])
        queue.end_encoding(Need.SOUND)
    assert calls == [["a"], ["b", "c"], ["d"]]


def test_only_so_many_jobs_of_a_need_are_with_the_models() -> None:
    queue = queue_of(*(scene(stream=str(number)) for number in range(5)), max_in_flight=2)
    first = queue.take()
    queue.end_encoding(Need.FRAMES)
    assert (len(first), queue.take()) == (2, [])
    queue.land(first[0])
    assert len(queue.take()) == 1


def test_answers_go_before_scenes_and_scenes_before_summaries() -> None:
    late = [job(kind, stream=str(kind), num_frames=1) for kind in reversed(KINDS)]
    queue = queue_of(*late, max_frames_per_call=3)
    assert [item.key.kind for item in jobs_of(queue.take())] == list(KINDS)


def test_a_newer_picture_overtakes_one_that_waits_and_takes_its_place_though_the_queue_is_full() -> None:
    queue = queue_of(scene(1), scene(1, stream="t"), max_waiting=2)
    assert queue.has_room(scene(2))
    assert not queue.has_room(scene(1, stream="u"))
    _, overtaken = queue.add(scene(2), 1.0)
    assert kinds_of(overtaken) == [(1, FailureKind.SUPERSEDED)]
    assert jobs_of(queue.take()) == [scene(2), scene(1, stream="t")]


def test_summaries_and_answers_overtake_nothing() -> None:
    queue = queue_of()
    for kind in (TaskKind.SUMMARISE, TaskKind.ANSWER):
        for number in (1, 2):
            _, overtaken = queue.add(job(kind, number, text="t"), 0.0)
            assert not overtaken


def test_what_is_lost_goes_again_alone_and_is_then_given_up() -> None:
    queue = queue_of(scene(stream="a"), scene(stream="b"), job(TaskKind.SUMMARISE, text="t"))
    pictures, texts = sorted((queue.take(), queue.take()), key=len, reverse=True)
    assert not queue.lose(pictures, 1.0, "it died")
    assert not queue.take(), "a suspect goes while nothing else is in flight"
    queue.land(texts[0])
    queue.end_encoding(Need.TEXT)
    [first] = queue.take()
    queue.add(job(TaskKind.SUMMARISE, 2, text="t"), 1.0)
    assert not queue.take(), "nothing goes beside a suspect"
    assert kinds_of(queue.lose([first], 2.0, "it died")) == [(1, FailureKind.UNAVAILABLE)]
    [second] = queue.take()
    assert second.job.key.stream_id == "b"
    queue.land(second)
    assert jobs_of(queue.take()) == [job(TaskKind.SUMMARISE, 2, text="t")]


def test_what_never_reached_a_stage_counts_as_no_try_and_waits_at_its_place() -> None:
    queue = queue_of(scene(stream="a"), scene(stream="b"), max_tries=1)
    for _ in range(3):
        tickets = queue.take()
        queue.end_encoding(Need.FRAMES)
        assert len(tickets) == 2
        assert not queue.put_back(tickets)


def test_a_newer_picture_waits_in_place_of_a_lost_one() -> None:
    queue = queue_of(scene(1))
    lost = queue.take()
    queue.add(scene(2), 0.0)
    assert kinds_of(queue.lose(lost, 1.0, "it died")) == [(1, FailureKind.SUPERSEDED)]


def test_what_waited_for_too_long_is_given_up() -> None:
    queue = queue_of(scene(1), max_wait_ms=100)
    queue.add(job(TaskKind.ANSWER, 7, num_frames=1), 50.0)
    assert not queue.expire(99.9)
    [(ticket, failure)] = queue.expire(100.0)
    assert (ticket.job, failure.kind, failure.task) == (scene(1), FailureKind.UNAVAILABLE, Task(TaskKind.DESCRIBE))
    tickets = queue.take()
    assert kinds_of(queue.lose(tickets, 200.0, "it died")) == [(7, FailureKind.UNAVAILABLE)]


def test_what_nobody_waits_for_is_not_sent_nor_sent_again() -> None:
    queue = queue_of()
    waiting, _ = queue.add(scene(1, stream="a"), 0.0)
    queue.abandon(waiting)
    assert not queue.take()
    flying, _ = queue.add(scene(1, stream="b"), 0.0)
    queue.take()
    queue.abandon(flying)
    assert not queue.lose([flying], 1.0, "it died")
    assert (queue.num_waiting, queue.num_in_flight) == (0, 0)


def test_one_key_is_in_a_call_once() -> None:
    queue = queue_of(job(TaskKind.ANSWER, text="a", num_frames=1), job(TaskKind.ANSWER, text="b", num_frames=1))
    assert len(queue.take()) == 1
    queue.end_encoding(Need.FRAMES)
    assert len(queue.take()) == 1


class JobQueueMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: every job is at one place, and the limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.params = JobParams(max_waiting=5, max_frames_per_call=3, max_in_flight=3, max_wait_ms=1_000)
        self.queue = JobQueue(self.params)
        self.now_ms = 0.0
        self.numbers = 0
        self.calls: dict[Need, list[list[Ticket]]] = {need: [] for need in Need}
        self.encoding: set[Need] = set()
        self.open: set[Ticket] = set()

    def settle(self, settled: Settled) -> None:
        for ticket, failure in settled:
            assert failure.key == ticket.job.key
            self.open.remove(ticket)

    @rule(
        kind=st.sampled_from(KINDS),
        stream=st.sampled_from("ab"),
        num_frames=st.integers(0, 4),
        has_sound=st.booleans(),
    )
    def submit(self, kind: TaskKind, stream: str, num_frames: int, has_sound: bool) -> None:
        self.numbers += 1
        item = job(kind, self.numbers, stream=stream, num_frames=num_frames, has_sound=has_sound)
        if self.queue.has_room(item):
            ticket, overtaken = self.queue.add(item, self.now_ms)
            self.open.add(ticket)
            self.settle(overtaken)
        else:
            with pytest.raises(RuntimeError):
                self.queue.add(item, self.now_ms)

    @rule()
    def take(self) -> None:
        tickets = self.queue.take()
        if not tickets:
            return
        [need] = {need_of(item) for item in jobs_of(tickets)}
        assert need not in self.encoding
        assert len(tickets) == 1 or sum(len(item.frames) for item in jobs_of(tickets)) <= 3
        if any(ticket.num_tries > 1 for ticket in tickets):
            assert len(tickets) == self.queue.num_in_flight == 1
        self.encoding.add(need)
        self.calls[need].append(tickets)

    @precondition(lambda self: self.encoding)
    @rule(data=st.data())
    def encoded(self, data: st.DataObject) -> None:
        need = data.draw(st.sampled_from(sorted(self.encoding)))
        self.encoding.remove(need)
        self.queue.end_encoding(need)

    @precondition(lambda self: any(self.calls.values()))
    @rule(data=st.data(), fate=st.sampled_from(["answer", "lose", "put back"]))
    def end(self, data: st.DataObject, fate: str) -> None:
        need = data.draw(st.sampled_from([need for need in Need if self.calls[need]]))
        tickets = self.calls[need].pop(0)
        if not self.calls[need] and need in self.encoding:
            self.encoding.remove(need)
            self.queue.end_encoding(need)
        if fate == "answer":
            for ticket in tickets:
                if self.queue.land(ticket):
                    self.open.remove(ticket)
        elif fate == "lose":
            self.settle(self.queue.lose(tickets, self.now_ms, "it died"))
        else:
            self.settle(self.queue.put_back(tickets))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.open, key=lambda ticket: ticket.job.key.number)))
        self.queue.abandon(ticket)
        self.open.remove(ticket)

    @rule(passed_ms=st.floats(0, 600))
    def wait(self, passed_ms: float) -> None:
        self.now_ms += passed_ms
        self.settle(self.queue.expire(self.now_ms))

    @invariant()
    def every_job_is_somewhere(self) -> None:
        flying = [ticket for calls in self.calls.values() for tickets in calls for ticket in tickets]
        assert self.queue.num_in_flight == len(flying)
        assert self.queue.num_waiting == len(self.open - set(flying))
        assert self.queue.num_waiting <= self.params.max_waiting + len(self.open)
        for need, calls in self.calls.items():
            assert sum(map(len, calls)) <= self.params.max_in_flight, need


TestJobQueue = JobQueueMachine.TestCase
TestJobQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.booleans()), max_size=20))
@settings(max_examples=60, deadline=None)
def test_everything_that_waits_is_served_in_the_end(wanted: list[tuple[TaskKind, int, bool]]) -> None:
    queue = JobQueue(JobParams())
    for number, (kind, num_frames, has_sound) in enumerate(wanted):
        queue.add(job(kind, number, stream=str(number), num_frames=num_frames, has_sound=has_sound), 0.0)
    served = []
    while tickets := queue.take():
        queue.end_encoding(tickets[0].need)
        for ticket in tickets:
            queue.land(ticket)
            served.append(ticket.job.key.number)
    assert sorted(served) == list(range(len(wanted)))


# -- the driver -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    name = str(make_tiny(tmp_path_factory.mktemp("tiny-phi4")))
    return ModelParams(name=name, encoder_threads=1, decoder_threads=1)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@asynccontextmanager
async def open_stages(model: ModelParams, metrics: Metrics, **params: float) -> AsyncIterator[LocalStages]:
    stages = await LocalStages.open(
        model,
        EncoderParams(),
        DecoderParams(),
        DispatchParams(),
        metrics,
        jobs=JobParams.model_validate(params),
        vision=VisionParams(max_crops=2),
    )
    try:
        yield stages
    finally:
        await stages.aclose()


def picture(seed: int, start_sample: int = 0) -> Frame:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    return Frame(start_sample, pixels)


def noise(seed: int, num_samples: int = 16_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8_000, 8_000, num_samples).astype(np.int16)


def real_jobs() -> list[Job]:
    """One of each need, and some of them twice."""
    return [
        Job(JobKey("a", TaskKind.DESCRIBE, 1), Task(TaskKind.DESCRIBE), "", (picture(1),)),
        Job(JobKey("b", TaskKind.DESCRIBE, 1), Task(TaskKind.DESCRIBE), "", (picture(2), picture(3))),
        Job(JobKey("a", TaskKind.SUMMARISE, 1), Task(TaskKind.SUMMARISE), "What was said."),
        Job(JobKey("c", TaskKind.SUMMARISE, 1), Task(TaskKind.SUMMARISE), "", (), noise(4)),
        Job(JobKey("d", TaskKind.ANSWER, 1), Task(TaskKind.ANSWER), "What is it?", (picture(5),)),
        Job(JobKey("e", TaskKind.ANSWER, 1), Task(TaskKind.ANSWER), "", (picture(6),), noise(7)),
    ]


def content(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, num_passes=0) if isinstance(outcome, Hypothesis) else outcome


async def test_jobs_submitted_together_get_what_each_gets_alone(model: ModelParams, metrics: Metrics) -> None:
    items = real_jobs()
    async with open_stages(model, metrics) as stages, asyncio.timeout(120):
        assert stages.info.tier == "phi4"
        assert stages.info.eyes is not None
        assert {TaskKind.DESCRIBE, TaskKind.SUMMARISE, TaskKind.ANSWER} <= stages.info.tasks
        together = await asyncio.gather(*map(stages.submit_job, items))
        alone = [await stages.submit_job(item) for item in items]
    assert all(isinstance(outcome, Hypothesis) for outcome in together), together
    assert [outcome.key for outcome in together] == [item.key for item in items]
    assert [content(outcome) for outcome in together] == [content(outcome) for outcome in alone]
    for kind, num in (("describe", 4), ("summarise", 4), ("answer", 4)):
        labels = {"kind": kind, "outcome": "answered"}
        assert metrics.registry.get_sample_value("surtitle_jobs_total", labels) == num
        assert metrics.registry.get_sample_value("surtitle_job_ms_count", {"kind": kind}) == num


async def test_a_tier_without_eyes_does_no_jobs(tmp_path_factory: pytest.TempPathFactory, metrics: Metrics) -> None:
    whisper = ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))), encoder_threads=1, decoder_threads=1)
    async with open_stages(whisper, metrics) as stages:
        assert stages.info.eyes is None
        outcome = await stages.submit_job(scene())
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.task) == (FailureKind.FAILED, Task(TaskKind.DESCRIBE))
    assert "cannot describe" in outcome.message


async def test_a_newer_picture_overtakes_the_one_that_waits(model: ModelParams, metrics: Metrics) -> None:
    hang = Hang()
    items = [Job(JobKey("a", TaskKind.DESCRIBE, n), Task(TaskKind.DESCRIBE), "", (picture(n),)) for n in (1, 2, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FramesToEmbeddings, "encode", hang.wrap(FramesToEmbeddings.encode))
        async with open_stages(model, metrics) as stages, asyncio.timeout(60):
            hang.is_armed = True
            tasks = []
            for item in items:
                tasks.append(asyncio.create_task(stages.submit_job(item)))
                if not hang.is_reached.is_set():
                    await asyncio.to_thread(hang.is_reached.wait)
            overtaken = await tasks[1]
            # What needs no pictures does not wait for them.
            assert isinstance(await stages.submit_job(real_jobs()[2]), Hypothesis)
            hang.is_over.set()
            assert isinstance(await tasks[0], Hypothesis)
            assert isinstance(await tasks[2], Hypothesis)
    assert isinstance(overtaken, Failure)
    assert overtaken.kind is FailureKind.SUPERSEDED


async def test_what_is_open_when_the_stages_close_is_unavailable(model: ModelParams, metrics: Metrics) -> None:
    async with open_stages(model, metrics) as stages:
        task = asyncio.create_task(stages.submit_job(real_jobs()[0]))
        await asyncio.sleep(0)
    for outcome in (await task, await stages.submit_job(real_jobs()[0])):
        assert isinstance(outcome, Failure)
        assert outcome.kind is FailureKind.UNAVAILABLE


async def test_a_job_too_many_is_refused(model: ModelParams, metrics: Metrics) -> None:
    async with open_stages(model, metrics, max_waiting=1) as stages, asyncio.timeout(60):
        tasks = [asyncio.create_task(stages.submit_job(item)) for item in real_jobs()]
        outcomes = await asyncio.gather(*tasks)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert len(refused) == len(outcomes) - 1
    assert all("wait already" in failure.message for failure in refused)


async def test_a_consumer_that_goes_away_gives_its_job_up(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[Any] = []
    cancel = DecodeEngine.cancel
    is_stepping, may_step = threading.Event(), threading.Event()
    step = DecodeEngine.step

    def slow_step(engine: DecodeEngine, now_ms: float) -> list[Outcome]:
        is_stepping.set()
        may_step.wait()
        return step(engine, now_ms)

    monkeypatch.setattr(DecodeEngine, "cancel", lambda engine, key: (cancelled.append(key), cancel(engine, key)))
    monkeypatch.setattr(DecodeEngine, "step", slow_step)
    item = real_jobs()[2]
    async with open_stages(model, metrics) as stages, asyncio.timeout(60):
        task = asyncio.create_task(stages.submit_job(item))
        await asyncio.to_thread(is_stepping.wait)
        task.cancel()
        await asyncio.wait({task})
        while stages.num_in_flight:  # noqa: ASYNC110 - the call ends on this loop
            await asyncio.sleep(0.01)
        may_step.set()
        # The same again: nothing of the first is left that could stand in its way.
        assert isinstance(await stages.submit_job(item), Hypothesis)
    assert item.key in cancelled


@dataclasses.dataclass
class Hang:
    """While it is armed, the next call of a stage hangs, until that is over."""

    is_armed: bool = False
    is_over: threading.Event = dataclasses.field(default_factory=threading.Event)
    is_reached: threading.Event = dataclasses.field(default_factory=threading.Event)

    def wrap(self, method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def hang_or_call(*arguments: Any) -> list[Any]:
            if self.is_armed:
                self.is_armed = False
                self.is_reached.set()
                self.is_over.wait()
            return method(*arguments)

        return hang_or_call


async def test_eyes_that_hang_are_replaced_and_the_job_is_done(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hang = Hang()
    monkeypatch.setattr("actors.vision_encoder._MAX_CALL_S", 0.0)
    monkeypatch.setattr(FramesToEmbeddings, "encode", hang.wrap(FramesToEmbeddings.encode))
    item = real_jobs()[0]
    async with open_stages(model, metrics, call_timeout_ms=1_500) as stages, asyncio.timeout(60):
        expected = await stages.submit_job(item)
        hang.is_armed = True
        try:
            outcome = await stages.submit_job(item)
        finally:
            hang.is_over.set()
    assert isinstance(expected, Hypothesis)
    assert content(outcome) == content(expected)
    assert "replacing the vision encoder" in caplog.text
    assert metrics.registry.get_sample_value("surtitle_stage_losses_total") == 1


@pytest.mark.parametrize("waits", ["snapshot", "job"])
async def test_what_waits_for_ears_that_are_replaced_is_sent_again(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, waits: str
) -> None:
    hang = Hang()
    monkeypatch.setattr(Phi4UtterancesToEmbeddings, "encode", hang.wrap(Phi4UtterancesToEmbeddings.encode))
    final = Snapshot(SnapshotKey("a", 1, 1), 0, True, 0, noise(3), None, (), (), (TRANSCRIBE,))
    summary = Job(JobKey("b", TaskKind.SUMMARISE, 1), Task(TaskKind.SUMMARISE), samples=noise(4))
    both = Job(JobKey("c", TaskKind.ANSWER, 1), Task(TaskKind.ANSWER), "", (picture(5),), noise(5))
    async with open_stages(model, metrics) as stages, asyncio.timeout(60):

        async def serve_final() -> list[Outcome]:
            return [outcome async for outcome in stages.submit(final)]

        async def serve_summary() -> list[Outcome]:
            return [await stages.submit_job(summary)]

        serve, occupy = (serve_final, serve_summary) if waits == "snapshot" else (serve_summary, serve_final)
        hang.is_armed = True
        occupying = asyncio.create_task(occupy())
        try:
            await asyncio.to_thread(hang.is_reached.wait)
            waiting = asyncio.create_task(serve())
            await asyncio.sleep(0.5)  # it is in the queue of the ears' thread
            monkeypatch.setattr(OwnedThread, "is_hanging", property(lambda _: not hang.is_over.is_set()))
            replacing = asyncio.create_task(stages.submit_job(both))
            while "replacing the audio encoder" not in caplog.text:  # noqa: ASYNC110 - told by the log alone
                await asyncio.sleep(0.01)
            monkeypatch.undo()
            [outcome] = await waiting
            assert isinstance(outcome, Hypothesis)
            assert isinstance(await replacing, Hypothesis)
        finally:
            hang.is_over.set()
        [outcome] = await occupying
        assert isinstance(outcome, Hypothesis)


async def test_a_job_is_done_again_when_the_decoder_crashed_under_it_and_one_that_crashes_all_is_given_up(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_crashes = 0
    step = DecodeEngine.step

    def step_or_crash(engine: DecodeEngine, now_ms: float) -> list[Outcome]:
        nonlocal num_crashes
        if num_crashes:
            num_crashes -= 1
            raise MemoryError("as a real engine would")
        return step(engine, now_ms)

    items = real_jobs()
    async with open_stages(model, metrics) as stages, asyncio.timeout(120):
        expected = await asyncio.gather(*map(stages.submit_job, items))
        monkeypatch.setattr(DecodeEngine, "step", step_or_crash)
        num_crashes = 1
        assert list(map(content, await asyncio.gather(*map(stages.submit_job, items)))) == list(map(content, expected))
        num_crashes = 2
        failure = await stages.submit_job(items[0])
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.task, num_crashes) == (FailureKind.UNAVAILABLE, items[0].task, 0)
        assert content(await stages.submit_job(items[0])) == content(expected[0])
    assert (metrics.registry.get_sample_value("surtitle_stage_losses_total") or 0) >= 3


async def test_a_call_that_cannot_be_sent_waits_for_the_stages(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = asyncio.Event()
    num_refused = 0
    start_jobs = LocalTransport.start_jobs

    async def start_or_refuse(transport: LocalTransport, jobs: list[Job], requests: Any) -> Any:
        nonlocal num_refused
        if not is_over.is_set():
            num_refused += 1
            if num_refused == 2:
                is_over.set()
            raise StageUnavailable("the stages are gone")
        return await start_jobs(transport, jobs, requests)

    monkeypatch.setattr(LocalTransport, "start_jobs", start_or_refuse)
    async with open_stages(model, metrics, max_tries=1) as stages, asyncio.timeout(60):
        assert isinstance(await stages.submit_job(real_jobs()[0]), Hypothesis)
    assert num_refused == 2


async def test_a_defect_on_the_way_fails_its_jobs_only(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.decode

    def decode_or_raise(decoder: Decoder, encoded: Any, requests: Any, pictures: Any = None) -> Any:
        if requests[0].key.stream_id == "bad":
            raise ZeroDivisionError
        return decode(decoder, encoded, requests, pictures)

    monkeypatch.setattr(Decoder, "decode", decode_or_raise)
    item = real_jobs()[2]
    bad = dataclasses.replace(item, key=JobKey("bad", TaskKind.SUMMARISE, 1))
    async with open_stages(model, metrics) as stages, asyncio.timeout(60):
        failure = await stages.submit_job(bad)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.message) == (FailureKind.FAILED, "internal error: ZeroDivisionError")
        assert isinstance(await stages.submit_job(item), Hypothesis)
