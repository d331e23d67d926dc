from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
            assert (end.slot is None) == (end.id not in self.slots.values())
            self.outcomes[end.id].append(end.reason)
            self.close(end.id)

    def close(self, work_id: int) -> None:
        self.slots = {slot: holder for slot, holder in self.slots.items() if holder != work_id}

    def step(self) -> None:
        step = self.scheduler.schedule()
        for work_id in step.preempted:
            self.close(work_id)
            job = self.jobs[work_id]
            _, decode_steps, translation_steps = self.left[work_id]
            self.left[work_id] = (job.work.num_tokens, decode_steps, translation_steps)
        self.check_budget(step.pieces)
        self.served.append(tuple(piece.id for piece in step.pieces))
        self.scheduler.account({piece.id: self.run(piece) for piece in step.pieces})
        assert self.scheduler.num_running <= self.params.num_slots

    def check_budget(self, pieces: tuple[Piece[int], ...]) -> None:
        cost = sum(
            piece.num_tokens + piece.opens_slot * self.jobs[piece.id].work.num_context_tokens for piece in pieces
        )
        assert cost <= self.params.tokens_per_step or len(pieces) == 1
        assert len({piece.slot for piece in pieces}) == len(pieces)

    def run(self, piece: Piece[int]) -> Progress | EndReason:
        work = self.jobs[piece.id].work
        if piece.opens_slot:
            assert piece.slot not in self.slots
            self.slots[piece.slot] = piece.id
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
    work_id: int, priority: Priority, *, tokens: int = 4, steps: int = 3, lineage: int | None = None, revision: int = 0
) -> Job:
    return Job(Work(work_id, priority, tokens, 0, lineage, revision), steps)


@st.composite
def jobs(draw: st.DrawFn, work_id: int) -> Job:
    work = Work(
        id=work_id,
        priority=draw(st.sampled_from(list(Priority))),
        num_tokens=draw(st.integers(1, 60)),
        num_context_tokens=draw(st.integers(0, 40)),
        lineage=draw(st.none() | st.integers(0, 3)),
        revision=draw(st.integers(0, 5)),
    )
    return Job(work, draw(st.integers(0, 6)), draw(st.integers(0, 3)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_arrives_every_piece_of_work_has_exactly_one_outcome(data: st.DataObject) -> None:
    params = SchedulerParams(
        num_slots=data.draw(st.integers(1, 4)),
        tokens_per_step=data.draw(st.integers(8, 40)),
        max_waiting=data.draw(st.integers(1, 6)),
        ageing_steps=data.draw(st.integers(1, 8)),
    )
    runner = FakeRunner(params)
    num_jobs = data.draw(st.integers(1, 25))
    for work_id in range(num_jobs):
        runner.submit(data.draw(jobs(work_id)))
        assert runner.scheduler.num_waiting <= params.max_waiting + params.num_slots
        for _ in range(data.draw(st.integers(0, 3))):
            runner.step()
        if data.draw(st.integers(0, 9)) == 0:
            runner.cancel(data.draw(st.integers(0, work_id)))
    runner.run_dry(max_steps=20_000)
    assert {work_id: len(ends) for work_id, ends in runner.outcomes.items()} == dict.fromkeys(range(num_jobs), 1)
    assert not runner.slots
    assert runner.scheduler.num_running == runner.scheduler.num_waiting == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([Priority.PARTIAL, Priority.TRANSLATION, Priority.SUMMARY]), min_size=1, max_size=12))
def test_a_summary_is_served_however_many_partials_keep_coming(others: list[Priority]) -> None:
    params = SchedulerParams(num_slots=1, ageing_steps=4)
    runner = FakeRunner(params)
    runner.submit(job(0, Priority.SUMMARY))
    next_id = 1
    for _ in range(60):
        for priority in others[:3]:
            runner.submit(job(next_id, priority, steps=0))
            next_id += 1
        runner.step()
    assert runner.outcomes[0] == [EndReason.FINISHED]


def test_ageing_never_passes_a_final() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1, ageing_steps=1))
    runner.submit(job(0, Priority.FINAL, steps=50))
    runner.submit(job(1, Priority.SUMMARY, steps=0))
    for _ in range(30):
        runner.step()
    runner.submit(job(2, Priority.FINAL, steps=0))
    runner.run_dry(200)
    order = list(dict.fromkeys(work_id for served in runner.served for work_id in served))
    assert order == [0, 2, 1]


def test_work_waiting_for_a_slot_goes_by_priority_then_by_arrival() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1))
    for work_id, priority in enumerate([Priority.SUMMARY, Priority.TRANSLATION, Priority.PARTIAL, Priority.PARTIAL]):
        runner.submit(job(work_id, priority))
    runner.run_dry(100)
    assert list(dict.fromkeys(work_id for served in runner.served for work_id in served)) == [2, 3, 1, 0]


def test_a_final_takes_the_slot_of_the_lowest_work_which_starts_again_later() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=2))
    runner.submit(job(0, Priority.SUMMARY, steps=9))
    runner.submit(job(1, Priority.PARTIAL, steps=9))
    runner.step()
    runner.submit(job(2, Priority.FINAL, steps=1))
    runner.step()
    assert runner.served[-1] == (2, 1)
    runner.run_dry(100)
    assert all(runner.outcomes[work_id] == [EndReason.FINISHED] for work_id in range(3))


def test_finals_never_lose_their_slot() -> None:
    runner = FakeRunner(SchedulerParams(num_slots=1))
    runner.submit(job(0, Priority.FINAL, steps=5))
    runner.step()
    runner.submit(job(1, Priority.FINAL, steps=0))
    runner.run_dry(100)
    assert [served[0] for served in runner.served] == [0] * 6 + [1]


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
    scheduler.schedule()
    with pytest.raises(RuntimeError, match="not accounted for"):
        scheduler.schedule()
    with pytest.raises(RuntimeError, match="not accounted for"):
        scheduler.submit(Work(2, Priority.PARTIAL, 4))
    with pytest.raises(ValueError, match="do not match"):
        scheduler.account({})
