from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio.endpointing import Close, Endpointer, EndpointLimits, Open
from pipeline.items import CloseReason

LIMITS = EndpointLimits(
    onset=3,
    min_speech=5,
    hangover=12,
    pre_roll=6,
    post_roll=5,
    soft_limit=60,
    soft_pause=6,
    limit_pause=2,
    hard_limit=100,
    cut_search=30,
    quiet_span=4,
)


@dataclass(frozen=True)
class Found:
    start: int
    onset: int
    close: Close


def drive(speech: list[bool], energies: list[float] | None = None) -> list[Found]:
    """Run the policy over windows as its driver does: a new instance at every close."""
    energies = energies or [1.0] * len(speech)
    endpointer, position, opened = Endpointer(LIMITS, 0), 0, None
    found: list[Found] = []
    while position < len(speech):
        decision = endpointer.step(speech[position], energies[position])
        position += 1
        if isinstance(decision, Open):
            opened = decision
        elif isinstance(decision, Close):
            assert opened is not None
            found.append(Found(opened.start, opened.onset, decision))
            position = decision.end
            is_cut = decision.reason is CloseReason.LIMIT
            opened = Open(position, position) if is_cut else None
            endpointer = Endpointer(LIMITS, position, is_open=is_cut)
    close = endpointer.finish()
    if close is not None:
        assert opened is not None
        found.append(Found(opened.start, opened.onset, close))
    return found


def windows(*runs: tuple[int, bool]) -> list[bool]:
    return [is_speech for length, is_speech in runs for _ in range(length)]


runs_of_windows = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=25).map(lambda runs: windows(*runs))


@settings(max_examples=300, deadline=None)
@given(runs_of_windows, st.integers(0, 10_000))
def test_utterances_are_disjoint_ordered_and_no_longer_than_the_limit(speech: list[bool], seed: int) -> None:
    energies = np.random.default_rng(seed).integers(0, 5, len(speech)).astype(float).tolist()
    found = drive(speech, energies)
    for item in found:
        assert 0 <= item.start <= item.onset <= item.close.speech_end <= item.close.end <= len(speech)
        assert item.start < item.close.end
        assert item.close.end - item.start <= LIMITS.hard_limit
        assert item.onset - item.start <= LIMITS.pre_roll
    for before, after in pairwise(found):
        assert before.close.end <= after.start
        assert (before.close.reason is CloseReason.LIMIT) <= (after.start == before.close.end)


@settings(max_examples=300, deadline=None)
@given(runs_of_windows)
def test_every_long_enough_run_of_speech_lies_in_utterances(speech: list[bool]) -> None:
    covered = [False] * len(speech)
    for item in drive(speech):
        covered[item.start : item.close.end] = [True] * (item.close.end - item.start)
    length = 0
    for index, is_speech in enumerate([*speech, False]):
        if is_speech:
            length += 1
            continue
        if length >= LIMITS.min_speech:
            assert all(covered[index - length : index])
        length = 0


@settings(max_examples=200, deadline=None)
@given(runs_of_windows)
def test_a_pause_as_long_as_the_hangover_always_ends_an_utterance(speech: list[bool]) -> None:
    for item in drive(speech):
        silence = 0
        for index in range(item.onset, item.close.end):
            silence = 0 if speech[index] else silence + 1
            assert silence < LIMITS.hangover


def test_speech_opens_with_pre_roll_and_a_pause_closes_with_post_roll() -> None:
    (item,) = drive(windows((20, False), (10, True), (20, False)))
    assert (item.start, item.onset) == (20 - LIMITS.pre_roll, 20)
    assert item.close == Close(30 + LIMITS.post_roll, 30, CloseReason.PAUSE)


def test_speech_opens_as_soon_as_it_is_long_enough() -> None:
    endpointer = Endpointer(LIMITS, 0)
    decisions = [endpointer.step(True, 1.0) for _ in range(LIMITS.min_speech)]
    assert decisions == [None] * (LIMITS.min_speech - 1) + [Open(0, 0)]


@pytest.mark.parametrize(
    "speech",
    [
        windows((20, False), (LIMITS.min_speech - 1, True), (30, False)),
        windows((2, True), (1, False)) * 30,
        windows((LIMITS.min_speech - 1, True), (LIMITS.soft_pause, False)) * 10,
    ],
    ids=["too short", "never unbroken for the onset", "short bursts a pause apart"],
)
def test_blips_open_nothing(speech: list[bool]) -> None:
    assert drive(speech) == []


def test_pre_roll_never_reaches_into_the_utterance_before() -> None:
    first, second = drive(windows((20, True), (LIMITS.hangover, False), (20, True), (20, False)))
    assert first.close.end == 20 + LIMITS.post_roll
    assert second.start == max(first.close.end, 20 + LIMITS.hangover - LIMITS.pre_roll)


def test_a_long_utterance_closes_at_a_short_pause_and_leaves_half_of_it_to_the_next() -> None:
    pause = LIMITS.soft_pause
    first, second = drive(windows((LIMITS.soft_limit, True), (pause, False), (30, True), (20, False)))
    assert first.close == Close(LIMITS.soft_limit + pause // 2, LIMITS.soft_limit, CloseReason.LONG)
    assert second.start == first.close.end
    assert second.onset == LIMITS.soft_limit + pause


def test_a_short_pause_before_the_soft_limit_closes_nothing() -> None:
    (item,) = drive(windows((30, True), (LIMITS.soft_pause, False), (10, True), (20, False)))
    assert item.close.reason is CloseReason.PAUSE


def test_the_nearer_the_hard_limit_the_shorter_a_pause_is_enough() -> None:
    for num_speech, pause in ((LIMITS.soft_limit, 6), (80, 4), (97, 3)):
        for length, reason in ((pause, CloseReason.LONG), (pause - 1, CloseReason.LIMIT)):
            item = drive(windows((num_speech, True), (length, False), (LIMITS.hard_limit, True)))[0]
            assert item.close.reason is reason, (num_speech, length)
            if reason is CloseReason.LONG:
                assert item.close.speech_end == num_speech


def test_endless_speech_is_cut_in_the_middle_of_its_longest_hole() -> None:
    hole, short = 3, 1
    speech = windows((78, True), (hole, False), (8, True), (short, False), (60, True), (20, False))
    first, second = drive(speech)
    assert first.close == Close(78 + (hole + 1) // 2, 78, CloseReason.LIMIT)
    assert (second.start, second.onset) == (first.close.end, first.close.end)


def test_endless_speech_without_a_hole_is_cut_where_it_is_quietest() -> None:
    energies = [100.0] * 150
    energies[40:44] = [0.0] * 4  # out of reach
    energies[85:89] = [50.0, 1.0, 1.0, 50.0]
    first, *_ = drive([True] * 150, energies)
    assert first.close == Close(87, 87, CloseReason.LIMIT)


def test_of_equally_quiet_places_the_last_is_taken() -> None:
    first, *_ = drive([True] * 150)
    assert first.close.end == LIMITS.hard_limit - LIMITS.quiet_span + (LIMITS.quiet_span + 1) // 2


def test_silence_behind_a_cut_closes_what_the_cut_opened() -> None:
    endpointer = Endpointer(LIMITS, 7, is_open=True)
    decisions = [endpointer.step(False, 0.0) for _ in range(LIMITS.hangover)]
    assert decisions[-1] == Close(7 + LIMITS.post_roll, 7, CloseReason.PAUSE)
    assert set(decisions[:-1]) == {None}


def test_the_end_of_the_stream_closes_behind_the_last_speech() -> None:
    (item,) = drive(windows((20, True), (3, False)))
    assert item.close == Close(23, 20, CloseReason.END)
    (item,) = drive(windows((20, True), (LIMITS.post_roll + 3, False)))
    assert item.close == Close(20 + LIMITS.post_roll, 20, CloseReason.END)
    assert Endpointer(LIMITS, 0).finish() is None


def test_an_endpointer_serves_one_utterance() -> None:
    endpointer = Endpointer(LIMITS, 0, is_open=True)
    assert endpointer.is_open
    endpointer.finish()
    assert not endpointer.is_open
    with pytest.raises(RuntimeError, match="start a new Endpointer"):
        endpointer.step(True, 1.0)
