from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.decode.scheduler import (
    Ended,
    EndReason,
    Piece,
    Priority,
    Progress,
    Scheduler,
    SchedulerParams,
    Work,
)


@dataclass(frozen=True)
class Job:
    """What one piece of work takes: tokens fed first, then steps of one token, then perhaps more of these."""

    work: Work[int]
    num_decode_steps: int
    num_translation_steps: int = 0


class FakeRunner:
    """Runs steps by counting tokens; checks all that a real runner would trip over."""

    def __init__(self, params: SchedulerParams) -> None:
        self.params = params
        self.scheduler: Scheduler[int] = Scheduler(params)
        self.jobs: dict[int, Job] = {}
        self.left: dict[int, tuple[int, int, int]] = {}  # tokens pending, decode steps, translation steps
        self.slots: dict[int, int] = {}  # open slot -> id
        self.outcomes: dict[int, list[EndReason]] = defaultdict(list)
        self.served: list[tuple[int, ...]] = []
        self.preempted: list[int] = []
        self.now_ms = 0.0

    @property
    def open_jobs(self) -> dict[int, Job]:
        return {work_id: job for work_id, job in self.jobs.items() if work_id not in self.outcomes}

    @property
    def order(self) -> list[int]:
        """Everything that ran, in the order of its first piece."""
        return list(dict.fromkeys(work_id for served in self.served for work_id in served))

    def submit(self, job: Job) -> None:
        self.jobs[job.work.id] = job
        self.left[job.work.id] = (job.work.num_tokens, job.num_decode_steps, job.num_translation_steps)
        self.note(self.scheduler.submit(job.work))

    def cancel(self, work_id: int) -> None:
        ended = self.scheduler.cancel(work_id)
        if ended is not None:
            self.note((ended,))

    def note(self, ended: tuple[Ended[int], ...]) -> None:
        for end in ended:
            self.outcomes[end.id].append(end.reason)
            self.close(end.id)

    def close(self, work_id: int) -> None:
        self.slots = {slot: holder for slot, holder in self.slots.items() if holder != work_id}

    def step(self) -> None:
        step = self.scheduler.schedule(self.now_ms)
        for end in step.ended:
            assert end.reason is EndReason.EXPIRED
            assert self.is_late(end.id)
        self.note(step.ended)
        self.preempted += step.preempted
        assert not any(self.is_late(work_id) for work_id in self.open_jobs if work_id not in step.preempted)
        for work_id in step.preempted:
            self.close(work_id)
            job = self.jobs[work_id]
            _, decode_steps, translation_steps = self.left[work_id]
            self.left[work_id] = (job.work.num_tokens, decode_steps, translation_steps)
        self.check_budget(step.pieces)
        for piece in step.pieces:
            if piece.id not in self.slots.values():
                assert piece.slot not in self.slots
                self.slots[piece.slot] = piece.id
        self.served.append(tuple(piece.id for piece in step.pieces))
        self.scheduler.account({piece.id: self.run(piece) for piece in step.pieces})
        assert self.scheduler.num_running <= self.params.num_slots

    def is_late(self, work_id: int) -> bool:
        """Whether the deadline rules end it: that of partials only, later if it has run."""
        work = self.jobs[work_id].work
        if work.deadline_ms is None or work.priority is not Priority.PARTIAL:
            return False
        overrun_ms = self.params.max_overrun_ms if work_id in self.slots.values() else 0
        return self.now_ms > work.deadline_ms + overrun_ms

    def check_budget(self, pieces: tuple[Piece[int], ...]) -> None:
        cost = sum(
            piece.num_tokens + (0 if piece.id in self.slots.values() else self.jobs[piece.id].work.num_context_tokens)
            for piece in pieces
        )
        assert cost <= self.params.tokens_per_step or len(pieces) == 1
        assert len({piece.slot for piece in pieces}) == len(pieces)

    def run(self, piece: Piece[int]) -> Progress | EndReason:
        work = self.jobs[piece.id].work
        assert self.slots[piece.slot] == piece.id
        pending, decode_steps, translation_steps = self.left[piece.id]
        assert 1 <= piece.num_tokens <= pending
        pending -= piece.num_tokens
        if pending:
            self.left[piece.id] = (pending, decode_steps, translation_steps)
        elif decode_steps:
            self.left[piece.id] = (1, decode_steps - 1, translation_steps)
        elif translation_steps:
            self.left[piece.id] = (1, 0, translation_steps - 1)
        else:
            self.outcomes[piece.id].append(EndReason.FINISHED)
            self.close(piece.id)
            return EndReason.FINISHED
        is_translating = not pending and not decode_steps and self.jobs[piece.id].num_translation_steps > 0
        priority = Priority.TRANSLATION if is_translating else work.priority
        return Progress(self.left[piece.id][0], work.num_tokens, priority)

    def run_dry(self, max_steps: int) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.num_waiting} still wait, {self.scheduler.num_running} still run")


def job(
    work_id: int,
    priority: Priority,
    *,
    tokens: int = 4,
    steps: int = 3,
    lineage: int | None = None,
    revision: int = 0,
    deadline_ms: float | None = None,
) -> Job:
    return Job(Work(work_id, priority, tokens, 0, lineage, revision, deadline_ms), steps)


# Whatever arrives, in any order


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Jobs with the id 0 and no deadline."""
    work = Work(
        id=0,
        priority=draw(st.sampled_from(Priority)),
        num_tokens=draw(st.integers(1, 60)),
        num_context_tokens=draw(st.integers(0, 40)),
        lineage=draw(st.none() | st.integers(0, 3)),
        revision=draw(st.integers(0, 5)),
    )
    return Job(work, draw(st.integers(0, 6)), draw(st.integers(0, 3)))


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Work arrives, runs, expires, is cancelled. The runner checks each step; this checks what holds between them."""

    @initialize(
        num_slots=st.integers(1, 4),
        tokens_per_step=st.integers(8, 40),
        max_waiting=st.integers(1, 6),
        ageing_steps=st.integers(1, 8),
        max_overrun_ms=st.integers(0, 100),
    )
    def begin(self, **params: int) -> None:
        self.params = SchedulerParams(**params)
        self.runner = FakeRunner(self.params)

    @rule(drawn=jobs(), deadline_in_ms=st.none() | st.integers(-50, 500))
    def submit(self, drawn: Job, deadline_in_ms: int | None) -> None:
        deadline_ms = None if deadline_in_ms is None else self.runner.now_ms + deadline_in_ms
        work = replace(drawn.work, id=len(self.runner.jobs), deadline_ms=deadline_ms)
        self.runner.submit(replace(drawn, work=work))

    @rule(num_steps=st.integers(1, 5), ms_per_step=st.integers(0, 60))
    def run(self, num_steps: int, ms_per_step: int) -> None:
        for _ in range(num_steps):
            self.runner.now_ms += ms_per_step
            self.runner.step()

    @rule(work_id=st.integers(0, 60))
    def cancel(self, work_id: int) -> None:
        self.runner.cancel(work_id)

    @invariant()
    def nothing_is_lost_and_nothing_ends_twice(self) -> None:
        scheduler = self.runner.scheduler
        assert all(len(ends) == 1 for ends in self.runner.outcomes.values())
        assert scheduler.num_waiting + scheduler.num_running == len(self.runner.open_jobs)
        assert scheduler.has_work == bool(self.runner.open_jobs)

    @invariant()
    def memory_is_bounded(self) -> None:
        scheduler = self.runner.scheduler
        assert len(self.runner.slots) <= scheduler.num_running <= self.params.num_slots
        assert scheduler.num_waiting + scheduler.num_running <= self.params.max_waiting + self.params.num_slots

    @invariant()
    def no_partial_outlives_a_newer_snapshot(self) -> None:
        works = [job.work for job in self.runner.open_jobs.values()]
        newest: dict[object, int] = defaultdict(int)
        for work in works:
            newest[work.lineage] = max(newest[work.lineage], work.revision)
        partials = [work for work in works if work.priority is Priority.PARTIAL and work.lineage is not None]
        assert all(work.revision == newest[work.lineage] for work in partials)

    @invariant()
    def only_partials_are_given_up_for_being_stale(self) -> None:
        for work_id, ends in self.runner.outcomes.items():
            is_partial = self.runner.jobs[work_id].work.priority is Priority.PARTIAL
            assert is_partial or not {EndReason.SUPERSEDED, EndReason.EXPIRED} & set(ends)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run_dry(max_steps=20_000)
            assert self.runner.outcomes.keys() == self.runner.jobs.keys()
            assert not self.runner.slots
            assert self.runner.scheduler.num_running == self.runner.scheduler.num_waiting == 0


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


# Nothing starves


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_nothing_starves_while_finals_leave_room(data: st.DataObject) -> None:
    num_steps_each, num_newcomers, steps_between_finals = 3, 2, 6
    params = SchedulerParams(num_slots=data.draw(st.integers(1, 3)), ageing_steps=data.draw(st.integers(1, 4)))
    params = params.model_copy(update={"max_waiting": 5_000})
    runner = FakeRunner(params)
    below_final = st.sampled_from([priority for priority in Priority if priority is not Priority.FINAL])
    runner.submit(job(0, data.draw(below_final), steps=num_steps_each - 1))
    # Only what arrives before it has aged past every newcomer can go first; finals take less than half of the steps.
    num_ahead = num_newcomers * params.ageing_steps * (Priority.SUMMARY + 1) + params.num_slots
    newcomers = data.draw(st.lists(st.tuples(below_final, st.none() | st.integers(0, 20)), min_size=1, max_size=6))
    next_newcomer = cycle(newcomers)
    work_id = 0
    for step in range(2 * num_steps_each * (num_ahead + 1)):
        arrivals: list[tuple[Priority, int | None]] = [next(next_newcomer) for _ in range(num_newcomers)]
        if step % steps_between_finals == 0:
            arrivals.append((Priority.FINAL, None))
        for priority, deadline_ms in arrivals:
            work_id += 1
            runner.submit(job(work_id, priority, steps=num_steps_each - 1, deadline_ms=deadline_ms))
        runner.step()
        if 0 in runner.outcomes:
            break
    assert runner.outcomes[0] == [EndReason.FINISHED]


def test_a_final_without_a_deadline_is_served_however_many_with_one_keep_coming() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, ageing_steps=4))
    runner.submit(job(0, Priority.FINAL, steps=0))
    for work_id in range(1, 12):
        runner.submit(job(work_id, Priority.FINAL, steps=0, deadline_ms=work_id))
        runner.step()
    assert runner.outcomes[0] == [EndReason.FINISHED]
    assert runner.order[:2] == [1, 2]


def test_work_that_finals_keep_throwing_out_rises_above_its_neighbours() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=2))
    runner.submit(job(0, Priority.SUMMARY, steps=90))
    runner.submit(job(1, Priority.PARTIAL, steps=90))
    runner.step()
    for work_id in range(2, 6):
        runner.submit(job(work_id, Priority.FINAL, steps=0))
        runner.step()
        runner.step()
    assert runner.preempted == [0, 0, 0, 1]


# Priorities


def test_ageing_never_passes_a_final() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, ageing_steps=1))
    runner.submit(job(0, Priority.FINAL, steps=50))
    runner.submit(job(1, Priority.SUMMARY, steps=0))
    for _ in range(30):
        runner.step()
    runner.submit(job(2, Priority.FINAL, steps=0))
    runner.run_dry(200)
    assert runner.order == [0, 2, 1]


def test_work_waiting_for_a_slot_goes_by_priority_then_by_arrival() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1))
    for work_id, priority in enumerate([Priority.SUMMARY, Priority.TRANSLATION, Priority.PARTIAL, Priority.PARTIAL]):
        runner.submit(job(work_id, priority))
    runner.run_dry(100)
    assert runner.order == [2, 3, 1, 0]


def test_a_final_takes_the_slot_of_the_lowest_work_which_starts_again_later() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=2))
    runner.submit(job(0, Priority.SUMMARY, steps=9))
    runner.submit(job(1, Priority.PARTIAL, steps=9))
    runner.step()
    runner.submit(job(2, Priority.FINAL, steps=1))
    runner.step()
    assert runner.served[-1] == (2,), "a final has its steps for itself"
    runner.run_dry(100)
    assert all(runner.outcomes[work_id] == [EndReason.FINISHED] for work_id in range(3))


def test_finals_never_lose_their_slot() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1))
    runner.submit(job(0, Priority.FINAL, steps=5))
    runner.step()
    runner.submit(job(1, Priority.FINAL, steps=0))
    runner.run_dry(100)
    assert [served[0] for served in runner.served] == [0] * 6 + [1]


# Deadlines


@pytest.mark.parametrize("priority", [Priority.FINAL, Priority.PARTIAL], ids=["finals", "partials"])
def test_in_a_class_the_earliest_deadline_goes_first_then_arrival(priority: Priority) -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1))
    for work_id, deadline_ms in enumerate([None, 900.0, 300.0, 900.0, None]):
        runner.submit(job(work_id, priority, steps=0, deadline_ms=deadline_ms))
    runner.run_dry(100)
    assert runner.order == [2, 1, 3, 0, 4]


def test_a_deadline_never_passes_a_higher_class() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1))
    for work_id, (priority, deadline_ms) in enumerate(
        [(Priority.SUMMARY, 1), (Priority.PARTIAL, 9), (Priority.FINAL, 99)]
    ):
        runner.submit(job(work_id, priority, steps=0, deadline_ms=deadline_ms))
    runner.run_dry(100)
    assert runner.order == [2, 1, 0]


def test_a_partial_whose_deadline_passes_while_it_waits_ends_and_other_work_does_not() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, max_overrun_ms=1_000))
    runner.submit(job(0, Priority.FINAL, steps=2))
    for work_id, priority in enumerate(Priority, start=1):
        runner.submit(job(work_id, priority, deadline_ms=100))
    runner.now_ms = 100.0
    runner.step()
    assert not runner.outcomes
    runner.now_ms = 100.5
    runner.step()
    assert runner.outcomes == {1 + Priority.PARTIAL: [EndReason.EXPIRED]}
    runner.run_dry(200)
    assert [ends for work_id, ends in runner.outcomes.items() if work_id != 1 + Priority.PARTIAL] == [
        [EndReason.FINISHED]
    ] * 5


@pytest.mark.parametrize(("now_ms", "reason"), [(600.0, EndReason.FINISHED), (600.5, EndReason.EXPIRED)])
def test_a_partial_that_runs_may_overrun_its_deadline_but_not_for_long(now_ms: float, reason: EndReason) -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, max_overrun_ms=500))
    runner.submit(job(0, Priority.PARTIAL, steps=3, deadline_ms=100))
    runner.submit(job(1, Priority.PARTIAL, steps=0))
    runner.step()
    runner.now_ms = now_ms
    runner.run_dry(20)
    assert runner.outcomes == {0: [reason], 1: [EndReason.FINISHED]}
    assert len(runner.served) == (5 if reason is EndReason.FINISHED else 2)


def test_a_partial_that_has_a_slot_but_has_run_nothing_ends_at_its_deadline() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=2, tokens_per_step=16, max_overrun_ms=1_000))
    runner.submit(Job(Work(0, Priority.PARTIAL, 4, num_context_tokens=100, deadline_ms=50), 3))
    runner.submit(job(1, Priority.PARTIAL, deadline_ms=100))
    runner.step()
    assert (runner.served, runner.scheduler.num_running) == ([(0,)], 2)
    runner.now_ms = 101.0
    runner.step()
    assert runner.outcomes == {1: [EndReason.EXPIRED]}


def test_a_partial_that_waits_again_for_its_slot_ends_at_its_deadline() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, max_overrun_ms=1_000))
    runner.submit(job(0, Priority.PARTIAL, steps=9, deadline_ms=100))
    runner.step()
    runner.submit(job(1, Priority.FINAL, steps=3))
    runner.step()
    runner.now_ms = 101.0
    runner.step()
    assert runner.preempted == [0]
    assert runner.outcomes == {0: [EndReason.EXPIRED]}


def test_without_a_time_no_deadline_passes() -> None:
    scheduler: Scheduler[int] = Scheduler(SchedulerParams())
    scheduler.submit(Work(0, Priority.PARTIAL, 4, deadline_ms=0.0))
    step = scheduler.schedule()
    assert (step.ended, len(step.pieces)) == ((), 1)


# Newer snapshots


@pytest.mark.parametrize("has_run", [False, True], ids=["waiting", "running"])
@pytest.mark.parametrize("newer", [Priority.PARTIAL, Priority.FINAL])
def test_a_newer_snapshot_of_the_same_utterance_ends_an_older_partial(has_run: bool, newer: Priority) -> None:
    runner = FakeRunner(SchedulerParams())
    runner.submit(job(0, Priority.PARTIAL, lineage=7, revision=1))
    runner.submit(job(1, Priority.PARTIAL, lineage=8, revision=1))
    if has_run:
        runner.step()
    runner.submit(job(2, newer, lineage=7, revision=2))
    assert runner.outcomes[0] == [EndReason.SUPERSEDED]
    runner.run_dry(100)
    assert runner.outcomes[1] == runner.outcomes[2] == [EndReason.FINISHED]


def test_a_partial_that_arrives_after_a_newer_one_is_superseded_at_once() -> None:
    runner = FakeRunner(SchedulerParams())
    runner.submit(job(0, Priority.PARTIAL, lineage=7, revision=2))
    runner.submit(job(1, Priority.PARTIAL, lineage=7, revision=1))
    assert runner.outcomes == {1: [EndReason.SUPERSEDED]}


def test_a_final_is_never_superseded() -> None:
    runner = FakeRunner(SchedulerParams())
    runner.submit(job(0, Priority.FINAL, lineage=7, revision=1))
    runner.submit(job(1, Priority.FINAL, lineage=7, revision=2))
    runner.run_dry(100)
    assert runner.outcomes[0] == runner.outcomes[1] == [EndReason.FINISHED]


# Bounds


def test_a_full_queue_refuses_the_newcomer_but_gives_way_to_a_final() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, max_waiting=2))
    for work_id in range(3):
        runner.submit(job(work_id, Priority.PARTIAL))
    runner.submit(job(3, Priority.PARTIAL))
    assert runner.outcomes == {3: [EndReason.REFUSED]}
    runner.submit(job(4, Priority.FINAL))
    assert runner.outcomes[2] == [EndReason.REFUSED]
    for work_id in (5, 6, 7):
        runner.submit(job(work_id, Priority.FINAL))
    assert runner.outcomes[7] == [EndReason.REFUSED]


def test_a_long_prefill_is_fed_in_pieces_beside_short_steps() -> None:
    runner = FakeRunner(SchedulerParams(tokens_per_step=16))
    runner.submit(job(0, Priority.PARTIAL, tokens=1, steps=6))
    runner.submit(job(1, Priority.SUMMARY, tokens=40, steps=0))
    runner.run_dry(100)
    assert runner.served[:3] == [(0, 1)] * 3
    assert sum(1 in served for served in runner.served) == 3


def test_a_context_larger_than_the_budget_runs_in_a_step_of_its_own() -> None:
    runner = FakeRunner(SchedulerParams(tokens_per_step=16))
    runner.submit(Job(Work(0, Priority.PARTIAL, 4, 100), 1))
    runner.submit(job(1, Priority.PARTIAL))
    runner.run_dry(100)
    assert runner.served[0] == (0,)
    assert runner.outcomes[0] == runner.outcomes[1] == [EndReason.FINISHED]


def test_misuse_is_refused_with_a_clear_error() -> None:
    scheduler: Scheduler[int] = Scheduler(SchedulerParams())
    scheduler.submit(Work(0, Priority.PARTIAL, 4))
    with pytest.raises(ValueError, match="already queued"):
        scheduler.submit(Work(0, Priority.PARTIAL, 4))
    with pytest.raises(ValueError, match="at least one token"):
        scheduler.submit(Work(1, Priority.PARTIAL, 0))
    with pytest.raises(ValueError, match="deadline of nan ms"):
        scheduler.submit(Work(1, Priority.PARTIAL, 4, deadline_ms=math.nan))
    scheduler.schedule()
    with pytest.raises(RuntimeError, match="not accounted for"):
        scheduler.schedule()
    with pytest.raises(RuntimeError, match="not accounted for"):
        scheduler.submit(Work(2, Priority.PARTIAL, 4))
    with pytest.raises(ValueError, match="do not match"):
        scheduler.account({})
