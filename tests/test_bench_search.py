from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.bench.search import (
    LIMIT_NAMES,
    RoundFigures,
    StreamSearch,
    SweepLimits,
    find_largest_by_limit,
    find_missed,
)

GOOD = RoundFigures(
    num_streams=4,
    finalisation_p95_ms=1_200.0,
    first_word_p95_ms=1_500.0,
    emission_lag_p95_ms=2_500.0,
    wer=0.025,
    num_finals_lost=0,
    num_streams_failed=0,
    num_streams_late=0,
)


def search(max_streams: int, good: dict[int, bool]) -> tuple[int, list[int]]:
    """Return what is found, and the numbers in the order in which they were played."""
    policy, played = StreamSearch(max_streams), []
    while (num_streams := policy.next_num_streams()) is not None:
        played.append(num_streams)
        policy.record(num_streams, is_good=good[num_streams])
        assert len(played) <= max_streams
    return policy.largest_good, played


def test_numbers_double_until_a_round_misses_and_then_close_in() -> None:
    found, played = search(64, {number: number <= 11 for number in range(1, 65)})
    assert (found, played) == (11, [1, 2, 4, 8, 16, 12, 10, 11])


def test_one_stream_that_misses_ends_the_search_at_none() -> None:
    assert search(64, dict.fromkeys(range(1, 65), False)) == (0, [1])


def test_the_bound_itself_is_played_also_where_doubling_passes_it() -> None:
    assert search(24, dict.fromkeys(range(1, 25), True)) == (24, [1, 2, 4, 8, 16, 24])
    assert search(1, {1: True}) == (1, [1])


@given(st.integers(1, 300), st.data())
def test_a_machine_that_holds_so_many_streams_is_found_to_hold_them(max_streams: int, data: st.DataObject) -> None:
    held = data.draw(st.integers(0, max_streams))
    found, played = search(max_streams, {number: number <= held for number in range(1, max_streams + 1)})
    assert found == held
    assert len(played) == len(set(played))
    assert len(played) <= 2 * max_streams.bit_length() + 1


@given(st.integers(1, 300), st.data())
def test_rounds_that_go_now_well_now_badly_still_end_in_a_good_one(max_streams: int, data: st.DataObject) -> None:
    verdicts = data.draw(st.lists(st.booleans(), min_size=max_streams, max_size=max_streams))
    good = dict(enumerate(verdicts, start=1))
    found, played = search(max_streams, good)
    assert len(played) == len(set(played))
    assert all(1 <= number <= max_streams for number in played)
    assert found == max((number for number in played if good[number]), default=0)
    # It is no artefact of where the search happened to stop: its neighbour was played and missed, or is out of bounds.
    assert found == max_streams or good[found + 1] is False
    assert found + 1 in [*played, max_streams + 1]


def test_a_round_that_was_not_asked_for_is_refused() -> None:
    policy = StreamSearch(8)
    with pytest.raises(ValueError, match="round of 2 streams was not asked for"):
        policy.record(2, is_good=True)
    with pytest.raises(ValueError, match="max_streams is 0"):
        StreamSearch(0)


def test_a_round_at_all_limits_misses_none() -> None:
    assert find_missed(GOOD, SweepLimits(), 0.02) == ()


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("finalisation_p95_ms", 1_200.1, "finalisation"),
        ("finalisation_p95_ms", None, "finalisation"),
        ("first_word_p95_ms", 1_500.1, "first_word"),
        ("emission_lag_p95_ms", 2_500.1, "emission_lag"),
        ("wer", 0.0251, "wer"),
        ("num_finals_lost", 1, "finals_lost"),
        ("num_streams_failed", 1, "streams_failed"),
        ("num_streams_late", 1, "in_time"),
    ],
)
def test_each_limit_is_missed_by_its_own_figure(field: str, value: float | None, name: str) -> None:
    assert find_missed(dataclasses.replace(GOOD, **{field: value}), SweepLimits(), 0.02) == (name,)


def test_words_are_not_judged_without_a_text_to_compare_with() -> None:
    assert find_missed(dataclasses.replace(GOOD, wer=None), SweepLimits(), None) == ()
    assert find_missed(dataclasses.replace(GOOD, wer=0.9), SweepLimits(), None) == ()


def test_a_latency_without_a_limit_is_not_judged_whether_it_was_measured_or_not() -> None:
    limits = SweepLimits(max_first_word_p95_ms=None, max_emission_lag_p95_ms=None)
    slow = dataclasses.replace(GOOD, first_word_p95_ms=9_000.0, emission_lag_p95_ms=None)
    assert find_missed(slow, limits, 0.02) == ()
    assert find_missed(dataclasses.replace(slow, finalisation_p95_ms=None), limits, 0.02) == ("finalisation",)
    assert set(LIMIT_NAMES) - set(limits.judged) == {"first_word", "emission_lag"}
    assert SweepLimits().judged == LIMIT_NAMES


def test_limits_are_judged_one_by_one_since_one_can_hide_the_others() -> None:
    rounds: list[tuple[int, tuple[str, ...]]] = [(1, ()), (2, ("first_word",)), (4, ("first_word", "wer"))]
    largest = find_largest_by_limit(rounds)
    assert set(largest) == set(LIMIT_NAMES)
    assert (largest["first_word"], largest["wer"], largest["finalisation"]) == (1, 2, 4)
    assert set(find_largest_by_limit([]).values()) == {0}


def test_figures_of_a_round_that_was_cut_off_show_no_limit_as_kept() -> None:
    largest = find_largest_by_limit([(1, ()), (2, ("finals_lost", "in_time"))])
    assert set(largest.values()) == {1}
