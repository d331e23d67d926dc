from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.bench.latency import (
    Latencies,
    Percentiles,
    Received,
    UtteranceTimes,
    count_lost_words,
    find_error_records,
    measure,
)
from pipeline.records import ErrorRecord, FinalRecord, PartialRecord, WordRecord

ANCHOR_MS = 1_000_000.0


def partial(
    text: str, stable_chars: int, *, utterance: int = 1, revision: int = 1, end_ms: int = 2_000
) -> PartialRecord:
    return PartialRecord(
        stream="s",
        start_ms=700,
        end_ms=end_ms,
        utterance=utterance,
        revision=revision,
        channel=0,
        text=text,
        language="en",
        language_source="given",
        tier="edge",
        stable_chars=stable_chars,
    )


def final(
    text: str,
    ends_ms: list[int],
    *,
    utterance: int = 1,
    words: list[str] | None = None,
    close_reason: str = "pause",
    end_ms: int = 4_000,
) -> FinalRecord:
    spoken = words if words is not None else text.split()
    return FinalRecord(
        stream="s",
        start_ms=700,
        end_ms=end_ms,
        utterance=utterance,
        revision=9,
        channel=0,
        text=text,
        language="en",
        language_source="given",
        tier="edge",
        words=[
            WordRecord(text=word, start_ms=end - 100, end_ms=end, probability=0.9)
            for word, end in zip(spoken, ends_ms, strict=True)
        ],
        sequence=utterance,
        close_reason=close_reason,
        average_logprob=-0.1,
    )


def at(media_ms: float, record: PartialRecord | FinalRecord | ErrorRecord) -> Received:
    return Received(record, ANCHOR_MS + media_ms)


TIMES = {1: UtteranceTimes(onset_ms=1_000, last_speech_ms=3_000)}

# Speech from 1.0 s to 3.0 s: "The cat sat down", words end at 1.3, 1.8, 2.4 and 3.0 s.
CAT = [
    at(1_700, partial("A", 0)),
    at(2_300, partial("The cat", 0)),
    at(2_900, partial("The cat sat.", 7)),
    at(3_650, final("The cat sat down.", [1_300, 1_800, 2_400, 3_000])),
]


def test_first_word_latency_waits_for_the_word_that_the_final_has() -> None:
    assert measure(CAT, ANCHOR_MS, TIMES).first_word_ms == [1_300]


def test_emission_lag_is_from_a_words_end_to_its_first_appearance_at_its_place() -> None:
    assert measure(CAT, ANCHOR_MS, TIMES).emission_lag_ms == [1_000, 500, 500, 650]


def test_stable_lag_waits_until_the_word_is_in_the_stable_prefix_or_the_final() -> None:
    assert measure(CAT, ANCHOR_MS, TIMES).stable_lag_ms == [1_600, 1_100, 1_250, 650]


def test_commit_lag_and_finalisation_are_measured_at_the_final() -> None:
    latencies = measure(CAT, ANCHOR_MS, TIMES)
    assert latencies.commit_lag_ms == [2_350, 1_850, 1_250, 650]
    assert latencies.finalisation_ms == [650]


def test_cadence_is_the_time_between_partials_of_one_utterance() -> None:
    other = [at(5_000, partial("Yes", 0, utterance=2)), at(5_640, partial("Yes sir", 3, utterance=2))]
    assert measure([*CAT, *other], ANCHOR_MS, TIMES).cadence_ms == [600, 600, 640]


def test_a_word_seen_at_another_place_does_not_count() -> None:
    records = [at(2_000, partial("Oh the cat", 0)), at(3_500, final("The cat.", [1_300, 1_800]))]
    assert measure(records, ANCHOR_MS, TIMES).emission_lag_ms == [2_200, 1_700]


def test_without_partials_the_final_is_the_first_record() -> None:
    latencies = measure(CAT[-1:], ANCHOR_MS, TIMES)
    assert latencies.first_word_ms == [2_650]
    assert latencies.emission_lag_ms == latencies.commit_lag_ms
    assert latencies.cadence_ms == []


def test_a_stable_prefix_that_ends_within_a_word_does_not_make_the_word_stable() -> None:
    records = [at(2_000, partial("The catalogue", 7)), at(3_500, final("The cat.", [1_300, 1_800]))]
    latencies = measure(records, ANCHOR_MS, TIMES)
    assert latencies.num_stable_words == 1
    assert latencies.num_stable_words_lost == 0
    assert latencies.stable_lag_ms == [700, 1_700]


def test_stable_words_that_the_final_changes_are_counted() -> None:
    records = [at(2_000, partial("The hat sat", 7)), at(3_500, final("The cat sat.", [1_300, 1_800, 2_400]))]
    latencies = measure(records, ANCHOR_MS, TIMES)
    assert (latencies.num_stable_words, latencies.num_stable_words_lost) == (2, 1)


def test_punctuation_and_case_are_not_a_change() -> None:
    assert count_lost_words(["the", "Cat,"], ["The", "cat", "sat"]) == 0


def test_lost_words_are_the_edits_to_the_best_beginning_of_the_final() -> None:
    assert count_lost_words([], ["a"]) == 0
    assert count_lost_words(["a", "b"], []) == 2
    assert count_lost_words(["b", "c"], ["a", "b", "c", "d"]) == 1
    assert count_lost_words(["a", "x", "c"], ["a", "c"]) == 1


def test_finals_that_never_came_and_those_that_came_twice_are_counted() -> None:
    times = {number: UtteranceTimes(number * 1_000, number * 1_000 + 500) for number in (1, 2, 3)}
    lost = ErrorRecord(
        stream="s", start_ms=2_000, end_ms=2_500, utterance=2, sequence=2, task="transcribe", message="no decoder"
    )
    records = [at(1_800, final("Yes.", [1_400])), at(1_900, final("Yes.", [1_400])), at(3_000, lost)]
    latencies = measure(records, ANCHOR_MS, times)
    assert latencies.num_finals_lost == 2
    assert latencies.num_duplicate_finals == 1
    assert latencies.finalisation_ms == [300]
    assert find_error_records(records) == [lost]


def test_a_final_without_text_is_not_lost_and_has_no_latency() -> None:
    latencies = measure([at(3_500, final("", []))], ANCHOR_MS, TIMES)
    assert (latencies.num_finals, latencies.num_finals_lost) == (1, 0)
    assert latencies.finalisation_ms == []


def test_characters_of_scripts_without_spaces_are_placed_by_the_words_that_hold_them() -> None:
    records = [
        at(2_000, partial("圧力", 0)),
        at(3_500, final("圧力が低い。", [1_300, 1_500, 2_400], words=["圧力", "が", "低い。"])),
    ]
    latencies = measure(records, ANCHOR_MS, TIMES)
    assert latencies.emission_lag_ms[:3] == [700, 700, 2_000]
    assert latencies.emission_lag_ms[3:5] == [1_100, 1_100]


def test_streams_are_put_together() -> None:
    both = Latencies()
    both.add(measure(CAT, ANCHOR_MS, TIMES))
    both.add(measure(CAT, ANCHOR_MS - 100, TIMES))
    assert both.finalisation_ms == [650, 750]
    assert both.num_finals == 2


@pytest.mark.parametrize(
    ("values", "p50", "p95", "mean"),
    [
        ([], None, None, None),
        ([7.0], 7.0, 7.0, 7.0),
        ([1.0, 2.0], 1.0, 2.0, 1.5),
        ([float(i) for i in range(1, 101)], 50.0, 95.0, 50.5),
    ],
)
def test_percentiles_are_by_nearest_rank(
    values: list[float], p50: float | None, p95: float | None, mean: float | None
) -> None:
    percentiles = Percentiles.of(reversed(values))
    assert percentiles == Percentiles(p50=p50, p95=p95, mean=mean, num=len(values))
    assert percentiles.to_json() == {"p50": p50, "p95": p95, "mean": mean, "num": len(values)}


# "The cat sat right there", then, at 3.0 s, "on the old mat", whose words end at 3.3, 3.5, 3.9 and 4.4 s. The first
# utterance closes at 5.0 s; until then its partials show what is said.
CUT_TIMES = {1: UtteranceTimes(1_000, 2_980), 2: UtteranceTimes(3_050, 4_400)}
OWN = [
    at(5_600, partial("On the old", 6, utterance=2, end_ms=4_600)),
    at(6_000, final("On the old mat.", [3_300, 3_500, 3_900, 4_400], utterance=2, end_ms=4_600)),
]
OWN_EMISSION_LAGS = [2_300, 2_100, 1_700, 1_600]


def closing(
    close_reason: str,
    text: str = "The cat sat right there.",
    ends_ms: Sequence[int] = (1_300, 1_800, 2_200, 2_600, 2_900),
) -> Received:
    return at(5_000, final(text, list(ends_ms), close_reason=close_reason, end_ms=3_000))


def cut_with(text: str, *, at_ms: int = 3_700, end_ms: int = 3_640) -> Latencies:
    """Measure the story with one partial of the first utterance."""
    records = sorted([at(at_ms, partial(text, 0, end_ms=end_ms)), closing("limit"), *OWN], key=lambda item: item.at_ms)
    return measure(records, ANCHOR_MS, CUT_TIMES)


def story(close_reason: str) -> Latencies:
    shown = [
        at(2_700, partial("The cat sat right", 0, end_ms=2_640)),
        at(3_700, partial("The cat sat right there on", 17, end_ms=3_640)),
        at(4_300, partial("The cat sat right there on the cold", 30, end_ms=4_240)),
    ]
    return measure([*shown, closing(close_reason), *OWN], ANCHOR_MS, CUT_TIMES)


def test_behind_a_hard_cut_what_was_shown_before_it_counts() -> None:
    latencies = story("limit")
    assert latencies.first_word_ms == [1_700, 650]
    assert latencies.emission_lag_ms[5:] == [400, 800, 1_700, 1_600]
    assert latencies.stable_lag_ms[5:] == [1_000, 800, 2_100, 1_600]


def test_a_stable_prefix_that_ends_before_the_cut_makes_nothing_behind_it_stable() -> None:
    shown = at(3_700, partial("The cat sat right there on the old", 17, end_ms=3_640))
    latencies = measure([shown, closing("limit"), *OWN], ANCHOR_MS, CUT_TIMES)
    assert latencies.stable_lag_ms[5:] == [2_300, 2_100, 2_100, 1_600]


@pytest.mark.parametrize("close_reason", ["pause", "long", "end"])
def test_behind_any_other_end_nothing_of_the_utterance_before_counts(close_reason: str) -> None:
    latencies = story(close_reason)
    assert latencies.first_word_ms == [1_700, 2_550]
    assert latencies.emission_lag_ms[5:] == OWN_EMISSION_LAGS
    assert latencies.stable_lag_ms[5:] == [2_300, 2_100, 2_100, 1_600]


def test_a_hard_cut_changes_nothing_for_the_utterance_before_it_nor_what_is_not_about_first_sight() -> None:
    cut, paused = story("limit"), story("pause")
    assert cut.emission_lag_ms[:5] == paused.emission_lag_ms[:5] == [1_400, 900, 500, 100, 800]
    assert cut.stable_lag_ms[:5] == paused.stable_lag_ms[:5]
    assert cut.commit_lag_ms == paused.commit_lag_ms
    assert cut.finalisation_ms == paused.finalisation_ms == [2_020, 1_600]
    assert cut.cadence_ms == paused.cadence_ms == [1_000, 600]
    assert (cut.num_stable_words, cut.num_stable_words_lost) == (9, 2)
    assert (paused.num_stable_words, paused.num_stable_words_lost) == (9, 2)


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat right there on",
        "The bat sat right there on",
        "Cat sat right there on",
        "Oh, the cat sat right there on",
        "THE - CAT, sat right there. On",
    ],
)
def test_a_word_wrong_far_from_the_cut_does_not_hide_where_it_lies(text: str) -> None:
    assert cut_with(text).first_word_ms[1] == 650


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat right where on",  # another word in front of the cut
        "The cat sat right on",  # none there
        "The cat sat right oh there on",  # too much there: "there" may be the next utterance's
        "The bat sat tight there on",  # too many others
        "The cat sat right there and on",  # the place is certain, and "on" is not the first word there
        "The cat sat right there there on",
        "The cat sat right there",
        "On",
    ],
)
def test_a_word_whose_place_behind_the_cut_is_not_certain_does_not_count(text: str) -> None:
    latencies = cut_with(text)
    assert latencies.first_word_ms[1] == 2_550
    assert latencies.emission_lag_ms[5:] == OWN_EMISSION_LAGS


def test_a_partial_that_had_heard_nothing_behind_the_cut_does_not_show_what_follows() -> None:
    text = "The cat sat right there on"
    assert cut_with(text, end_ms=3_000).first_word_ms[1] == 2_550
    assert cut_with(text, end_ms=3_001).first_word_ms[1] == 650


def test_a_partial_that_comes_behind_its_final_is_not_seen() -> None:
    text = "The cat sat right there on"
    assert cut_with(text, at_ms=5_001).first_word_ms[1] == 2_550
    assert cut_with(text, at_ms=4_999).first_word_ms[1] == 1_949


def test_behind_a_hard_cut_that_kept_no_words_no_place_is_certain() -> None:
    records = [at(3_700, partial("On the", 0, end_ms=3_640)), closing("limit", "", ()), *OWN]
    assert measure(records, ANCHOR_MS, CUT_TIMES).first_word_ms == [2_550]


def test_behind_a_final_that_never_came_only_own_partials_count() -> None:
    records = [at(3_700, partial("The cat sat right there on", 0, end_ms=3_640)), *OWN]
    assert measure(records, ANCHOR_MS, CUT_TIMES).first_word_ms == [2_550]


@pytest.mark.parametrize(
    ("second_ends", "first_word_ms", "lags"), [("limit", 430, [350, 800]), ("pause", 1_780, [1_700, 1_300])]
)
def test_what_was_shown_counts_behind_two_cuts_in_a_row(second_ends: str, first_word_ms: int, lags: list[int]) -> None:
    second = final("On the old mat.", [3_300, 3_500, 3_900, 4_400], utterance=2, close_reason=second_ends, end_ms=4_500)
    records = [
        at(4_950, partial("The cat sat right there on the old mat beside", 0, end_ms=4_890)),
        closing("limit"),
        at(5_800, partial("On the gold mat beside me", 0, utterance=2, end_ms=5_700)),
        at(6_000, second),
        at(6_300, final("Beside me.", [4_600, 5_000], utterance=3, end_ms=5_200)),
    ]
    times = {**CUT_TIMES, 3: UtteranceTimes(4_520, 5_000)}
    latencies = measure(records, ANCHOR_MS, times)
    assert latencies.first_word_ms == [3_950, 1_900, first_word_ms]
    assert latencies.emission_lag_ms[5:] == [1_650, 1_450, 1_050, 550, *lags]


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
)
def test_a_partial_that_is_right_shows_every_word_behind_the_cut(kept: list[str], following: list[str]) -> None:
    records = [
        at(3_700, partial(" ".join(kept + following), 0, end_ms=3_640)),
        closing("limit", " ".join(kept), [2_900] * len(kept)),
        at(6_000, final(" ".join(following), [3_300] * len(following), utterance=2)),
    ]
    latencies = measure(records, ANCHOR_MS, CUT_TIMES)
    assert latencies.first_word_ms[1] == 650
    assert latencies.emission_lag_ms[len(kept) :] == [400] * len(following)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_no_words_are_lost_exactly_when_stable_begins_the_final(stable: list[str], kept: list[str]) -> None:
    lost = count_lost_words(stable, kept)
    assert (lost == 0) == (kept[: len(stable)] == stable)
    assert lost <= len(stable)
