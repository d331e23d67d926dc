from __future__ import annotations

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


def partial(text: str, stable_chars: int, *, utterance: int = 1, revision: int = 1) -> PartialRecord:
    return PartialRecord(
        stream="s",
        start_ms=700,
        end_ms=2_000,
        utterance=utterance,
        revision=revision,
        channel=0,
        text=text,
        language="en",
        language_source="given",
        tier="edge",
        stable_chars=stable_chars,
    )


def final(text: str, ends_ms: list[int], *, utterance: int = 1, words: list[str] | None = None) -> FinalRecord:
    spoken = words if words is not None else text.split()
    return FinalRecord(
        stream="s",
        start_ms=700,
        end_ms=4_000,
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
        close_reason="pause",
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


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_no_words_are_lost_exactly_when_stable_begins_the_final(stable: list[str], kept: list[str]) -> None:
    lost = count_lost_words(stable, kept)
    assert (lost == 0) == (kept[: len(stable)] == stable)
    assert lost <= len(stable)
