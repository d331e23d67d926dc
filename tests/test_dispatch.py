"""The dispatch policy: what goes into the next call, and what becomes of what was lost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.cost_model import CostModel
from actors.dispatch import DispatchParams, DispatchQueue, Waiting, is_opening
from pipeline.items import TRANSCRIBE, Failure, FailureKind, Snapshot, SnapshotKey, Task, TaskKind
from pipeline.stream_params import NUM_OPENING_SNAPSHOTS

ENGLISH = Task(TaskKind.TRANSLATE, "en")


def snapshot(
    utterance: int = 1,
    revision: int = 1,
    *,
    is_final: bool = False,
    num_samples: int = 16_000,
    stream: str = "a",
    draft: tuple[int, ...] = (),
    prefix: tuple[int, ...] = (),
) -> Snapshot:
    return Snapshot(
        key=SnapshotKey(stream, utterance, revision),
        channel=0,
        is_final=is_final,
        start_sample=0,
        samples=np.zeros(num_samples, np.int16),
        language="en",
        languages=(),
        draft=draft,
        tasks=(TRANSCRIBE, ENGLISH) if is_final else (TRANSCRIBE,),
        prefix=prefix,
    )


def _predict_ms(snapshots: Sequence[Snapshot]) -> float:
    return sum(len(item.samples) for item in snapshots) / 160


def queue_of(*snapshots: Snapshot, **params: float) -> DispatchQueue:
    """A queue in which a second of sound costs 100 ms."""
    queue = DispatchQueue(DispatchParams.model_validate(params), _predict_ms)
    for item in snapshots:
        assert queue.add(item, now_ms=0) == []
    return queue


def answer_all(queue: DispatchQueue, *sent: Snapshot) -> None:
    for item in sent:
        queue.answer(Failure(item.key, None, FailureKind.FAILED, "answered"))


def test_finals_go_before_partials_and_both_in_the_order_of_arrival() -> None:
    first, second = snapshot(1), snapshot(2)
    third, fourth = snapshot(3, is_final=True), snapshot(4, is_final=True)
    queue = queue_of(first, second, third, fourth, max_work_ms=1_000)
    assert queue.take(0) == [third, fourth], "a final does not wait for partials that go along"
    assert queue.take(0) == [first, second]


def test_utterances_that_show_nothing_yet_go_before_others_but_not_for_ever() -> None:
    shown, noise = snapshot(1, 5, draft=(7,)), snapshot(2, NUM_OPENING_SNAPSHOTS + 1)
    new, final = snapshot(3, NUM_OPENING_SNAPSHOTS), snapshot(4, is_final=True)
    queue = queue_of(shown, noise, new, final, max_work_ms=1_000, max_overtaken_ms=640)
    assert queue.waiting(10) == Waiting(work_ms=400, final_wait_ms=10, partial_wait_ms=10)
    assert [queue.take(639), queue.take(639)] == [[final], [new, shown, noise]]
    queue = queue_of(shown, noise, new, final, max_work_ms=1_000, max_overtaken_ms=640)
    assert queue.take(640) == [final, shown, noise, new]


def test_an_utterance_with_stable_words_is_not_new_though_it_has_no_draft() -> None:
    shown, new = snapshot(1, 3, prefix=(7,)), snapshot(2, 3)
    queue = queue_of(shown, max_work_ms=1_000)
    assert not queue.has_urgent_waiting
    assert queue.add(new, now_ms=0) == []
    assert queue.has_urgent_waiting
    assert queue.take(0) == [new, shown]


@given(
    arrivals=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=4, max_size=60),
    call_ms=st.integers(10, 250),
    max_overtaken_ms=st.integers(0, 1_000),
)
def test_a_crowd_of_new_utterances_starves_nobody(arrivals, call_ms, max_overtaken_ms) -> None:
    """New utterances come without end; a partial of an old one waits for what came before it ages, and no more."""
    num_waiting_before = sum(num for num, _ in arrivals[: 1 + max_overtaken_ms // call_ms])
    queue = queue_of(snapshot(999, 9, draft=(7,)), max_work_ms=100, max_overtaken_ms=max_overtaken_ms)
    numbers = itertools.count(1)
    now_ms, taken = 0, []
    for num, has_draft in itertools.cycle(arrivals):
        for number in itertools.islice(numbers, num):
            if queue.has_room():
                queue.add(snapshot(number, 3 if has_draft else 1, draft=(7,) if has_draft else ()), now_ms)
        sent = queue.take(now_ms)
        answer_all(queue, *sent)
        taken += sent
        if sent[0].key.utterance == 999:
            break
        assert len(taken) <= 1 + max_overtaken_ms // call_ms + num_waiting_before
        now_ms += call_ms


def test_a_call_holds_as_much_work_as_is_asked_for_but_at_least_one_snapshot() -> None:
    long = snapshot(1, is_final=True, num_samples=160_000)
    short = [snapshot(number, is_final=True) for number in (2, 3, 4)]
    queue = queue_of(long, *short, max_work_ms=250)
    assert queue.take(0) == [long]
    assert queue.take(0) == short[:2]
    assert queue.take(0) == short[2:]


def test_a_newer_partial_replaces_the_one_that_waits_and_keeps_its_place() -> None:
    old, other, new = snapshot(1, 1), snapshot(2, 1), snapshot(1, 2)
    queue = queue_of(old, other, max_work_ms=150)
    [failure] = queue.add(new, now_ms=1)
    assert (failure.key, failure.kind) == (old.key, FailureKind.SUPERSEDED)
    assert queue.take(0) == [new]


def test_the_final_replaces_the_partial_that_waits() -> None:
    partial, final = snapshot(1, 1), snapshot(1, 2, is_final=True)
    queue = queue_of(partial)
    assert [failure.key for failure in queue.add(final, now_ms=1)] == [partial.key]
    assert queue.take(0) == [final]
    assert not queue.can_take()


def test_only_one_partial_of_an_utterance_is_in_flight_but_its_final_may_follow_at_once() -> None:
    first, second, final = snapshot(1, 1), snapshot(1, 2), snapshot(1, 3, is_final=True)
    queue = queue_of(first)
    assert queue.take(0) == [first]
    queue.add(second, now_ms=1)
    assert queue.take(0) == []
    queue.add(final, now_ms=2)
    assert queue.take(0) == [final]


def test_a_final_lost_in_company_is_sent_again_alone_with_only_its_open_tasks() -> None:
    final, other, partial = snapshot(1, is_final=True), snapshot(2, is_final=True), snapshot(3)
    queue = queue_of(final, other, partial, max_work_ms=1_000)
    sent = [*queue.take(0), *queue.take(0)]
    queue.answer(Failure(final.key, TRANSCRIBE, FailureKind.FAILED, "one task is answered"))
    [failure] = queue.lose([item.key for item in sent], 10, "replica died")
    assert (failure.key, failure.kind) == (partial.key, FailureKind.UNAVAILABLE)
    [again] = queue.take(0)
    assert (again.key, again.tasks) == (final.key, (ENGLISH,))
    assert queue.take(0) == [], "a suspect is alone in flight"
    answer_all(queue, again)
    assert [item.key for item in queue.take(0)] == [other.key]


def test_a_snapshot_that_kills_two_stages_alone_is_given_up() -> None:
    poison = snapshot(1, is_final=True)
    queue = queue_of(poison, max_kills=2)
    queue.take(0)
    assert queue.lose([poison.key], 10, "died") == []
    queue.take(0)
    [failure] = queue.lose([poison.key], 20, "died")
    assert failure.kind is FailureKind.FAILED
    assert "2 stages died" in failure.message
    assert queue.num_waiting == queue.num_in_flight == 0


def test_deaths_in_company_never_condemn_a_final() -> None:
    finals = [snapshot(number, is_final=True) for number in range(1, 5)]
    queue = queue_of(*finals, max_kills=1, max_work_ms=1_000)
    sent = queue.take(0)
    assert queue.lose([item.key for item in sent], 10, "died") == []


def test_what_never_reached_a_stage_waits_again_without_blame() -> None:
    partial, final = snapshot(1), snapshot(2, is_final=True)
    queue = queue_of(partial, final)
    sent = [*queue.take(0), *queue.take(0)]
    newer = snapshot(1, 2)
    queue.add(newer, now_ms=1)
    [failure] = queue.put_back([item.key for item in sent])
    assert (failure.key, failure.kind) == (partial.key, FailureKind.SUPERSEDED)
    assert [queue.take(0), queue.take(0)] == [[final], [newer]]


def test_what_waits_for_too_long_is_told_so() -> None:
    partial, final = snapshot(1), snapshot(2, is_final=True)
    queue = queue_of(partial, final, max_partial_wait_ms=100, max_final_wait_ms=1_000)
    assert queue.expire(99) == []
    assert [failure.key for failure in queue.expire(100)] == [partial.key]
    assert [(failure.key, failure.kind) for failure in queue.expire(1_000)] == [(final.key, FailureKind.UNAVAILABLE)]
    assert not queue.can_take()


def test_nobody_waits_for_an_abandoned_snapshot_and_it_is_not_sent_again() -> None:
    waiting, sent = snapshot(1, is_final=True, num_samples=160_000), snapshot(2, is_final=True)
    queue = queue_of(sent, waiting)
    assert queue.take(0) == [sent]
    queue.abandon(waiting.key)
    queue.abandon(sent.key)
    assert queue.is_abandoned([sent.key])
    assert queue.lose([sent.key], 1, "died") == []
    assert queue.num_waiting == queue.num_in_flight == 0


def test_without_room_a_partial_fails_at_once_and_a_final_is_refused() -> None:
    queue = queue_of(snapshot(1), max_waiting_snapshots=1)
    [failure] = queue.add(snapshot(2), now_ms=0)
    assert failure.kind is FailureKind.UNAVAILABLE
    with pytest.raises(RuntimeError, match="has_room"):
        queue.add(snapshot(3, is_final=True), now_ms=0)


def test_the_same_snapshot_twice_is_refused() -> None:
    queue = queue_of(snapshot(1))
    with pytest.raises(ValueError, match="twice"):
        queue.add(snapshot(1), now_ms=0)


@given(ratio=st.floats(0.3, 3.5), num_seconds=st.integers(1, 30))
@settings(max_examples=30)
def test_the_cost_model_follows_what_is_measured_of_each_kind(ratio: float, num_seconds: int) -> None:
    cost = CostModel(lambda num_samples, is_final: num_samples / (80 if is_final else 160))
    partial, final = (snapshot(1, num_samples=num_seconds * 16_000, is_final=is_final) for is_final in (False, True))
    partial_ms = num_seconds * 100
    assert [cost.predict_ms([partial]), cost.predict_ms([final])] == [partial_ms, 2 * partial_ms]
    for _ in range(200):
        cost.observe([final], ratio * 2 * partial_ms)
    assert cost.predict_ms([final]) == pytest.approx(ratio * 2 * partial_ms, rel=0.05)
    assert cost.predict_ms([partial]) == partial_ms
    for _ in range(200):
        cost.observe([partial], partial_ms / ratio)
    assert cost.predict_ms([partial]) == pytest.approx(partial_ms / ratio, rel=0.05)
    together_ms = cost.predict_ms([partial, final])
    for _ in range(200):
        cost.observe([partial, final], 1.5 * together_ms)
    assert cost.predict_ms([partial, final]) == pytest.approx(1.5 * together_ms, rel=0.05)


def test_partials_of_a_call_run_side_by_side_and_finals_one_behind_the_other() -> None:
    cost = CostModel(lambda num_samples, _: num_samples / 160, num_side_by_side=2)
    final, partials = snapshot(1, is_final=True, num_samples=32_000), [snapshot(n) for n in (2, 3, 4)]
    assert cost.predict_ms([]) == 0
    assert cost.predict_ms(partials[:1]) == cost.predict_ms(partials[:2]) == 100
    assert cost.predict_ms(partials) == 150
    assert cost.predict_ms([final, *partials]) == 350
    assert cost.predict_ms([final, final]) == 400


class DispatchMachine(RuleBasedStateMachine):
    """Any order of events: every snapshot gets each of its outcomes once, finals never get SUPERSEDED."""

    @initialize(max_work_ms=st.integers(50, 1_000), max_in_flight=st.integers(1, 8), max_kills=st.integers(1, 3))
    def start(self, max_work_ms: int, max_in_flight: int, max_kills: int) -> None:
        self.params = DispatchParams(
            max_work_ms=max_work_ms,
            max_in_flight_snapshots=max_in_flight,
            max_kills=max_kills,
            max_waiting_snapshots=12,
            max_overtaken_ms=150,
            max_partial_wait_ms=500,
            max_final_wait_ms=5_000,
        )
        self.queue = DispatchQueue(self.params, _predict_ms)
        self.now_ms = 0.0
        self.revisions: dict[int, int] = {}
        self.closed: set[int] = set()
        self.open: dict[SnapshotKey, Snapshot] = {}
        self.calls: list[list[SnapshotKey]] = []
        self.places: dict[SnapshotKey, float] = {}  # when each, or the one that it replaced, came

    def settle(self, failures: list[Failure]) -> None:
        for failure in failures:
            settled = self.open.pop(failure.key)
            assert not (settled.is_final and failure.kind is FailureKind.SUPERSEDED)

    @rule(
        utterance=st.integers(1, 6),
        is_final=st.booleans(),
        num_samples=st.integers(1, 100_000),
        draft=st.sampled_from([(), (7,)]),
    )
    def submit(self, utterance: int, is_final: bool, num_samples: int, draft: tuple[int, ...]) -> None:
        if utterance in self.closed or (is_final and not self.queue.has_room()):
            return
        self.revisions[utterance] = self.revisions.get(utterance, 0) + 1
        item = snapshot(utterance, self.revisions[utterance], is_final=is_final, num_samples=num_samples, draft=draft)
        replaced = [
            key for key in self.open if key.utterance == utterance and not any(key in keys for keys in self.calls)
        ]
        self.places[item.key] = min((self.places[key] for key in replaced), default=self.now_ms)
        self.open[item.key] = item
        if is_final:
            self.closed.add(utterance)
        self.settle(self.queue.add(item, self.now_ms))

    @rule()
    def send(self) -> None:
        could_take = self.queue.can_take()
        num_in_flight = self.queue.num_in_flight
        taken = self.queue.take(self.now_ms)
        assert could_take == bool(taken)
        if not taken:
            return
        assert num_in_flight + len(taken) <= self.params.max_in_flight_snapshots
        work_ms = [len(item.samples) / 160 for item in taken]
        assert len(taken) == 1 or sum(work_ms) <= self.params.max_work_ms
        ranks = [self.rank(item) for item in taken]
        assert ranks == sorted(ranks), "finals, what waited for long, what shows nothing yet, the rest"
        self.calls.append([item.key for item in taken])

    def rank(self, item: Snapshot) -> int:
        if item.is_final or self.now_ms - self.places[item.key] >= self.params.max_overtaken_ms:
            return 0 if item.is_final else 1
        return 2 if is_opening(item) else 3

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        keys = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        for key in keys:
            for task in self.open[key].tasks:
                if self.queue.is_in_flight(key):
                    # Not where the task was answered before the snapshot was lost and sent again.
                    self.queue.answer(Failure(key, task, FailureKind.FAILED, "answered"))
            assert not self.queue.is_in_flight(key)
            del self.open[key]

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), is_death=st.booleans())
    def lose(self, data: st.DataObject, is_death: bool) -> None:
        keys = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        self.settle(self.queue.lose(keys, self.now_ms, "died") if is_death else self.queue.put_back(keys))

    @rule(ms=st.integers(1, 400))
    def wait(self, ms: int) -> None:
        self.now_ms += ms
        self.settle(self.queue.expire(self.now_ms))

    @invariant()
    def everything_is_somewhere_and_bounded(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.num_waiting + self.queue.num_in_flight == len(self.open)
        assert self.queue.num_waiting <= self.params.max_waiting_snapshots + self.params.max_in_flight_snapshots
        in_flight = [self.open[key] for keys in self.calls for key in keys]
        partials = [item.key.utterance for item in in_flight if not item.is_final]
        assert len(partials) == len(set(partials)), "one partial in flight per utterance"

    def teardown(self) -> None:
        """Whatever happened, answering all that is sent empties the queue."""
        for _ in range(100):
            for keys in self.calls:
                for key in keys:
                    self.queue.answer(Failure(key, None, FailureKind.FAILED, "answered"))
                    self.open.pop(key, None)
            self.calls = []
            self.send()
            if not self.calls:
                break
        assert not self.open


TestDispatchMachine = DispatchMachine.TestCase
TestDispatchMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
