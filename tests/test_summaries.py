# ruff: noqa: RUF001  (text in other scripts is meant as it is)
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.records import FinalRecord, SummaryRecord
from pipeline.text.sentences import ends_sentence, split_sentences, words_of
from pipeline.text.transcripts_to_summaries import SummaryParams, TranscriptsToSummaries

MEETING = (
    "The pump in hall three has lost pressure since Monday.",
    "Good morning everybody.",
    "We replaced the seal of the pump in hall three last week.",
    "Coffee is over there.",
    "The pressure of the pump fell again after the seal was replaced.",
    "I was on holiday.",
    "So the seal of the pump is to be checked again and the pressure logged every hour.",
    "Thanks, bye.",
)


def final(sequence: int, text: str, *, start_ms: int, language: str = "en", channel: int = 0) -> FinalRecord:
    return FinalRecord(
        stream="s",
        start_ms=start_ms,
        end_ms=start_ms + 1_500,
        utterance=sequence,
        revision=1,
        channel=channel,
        text=text,
        language=language,
        language_source="given",
        tier="edge",
        sequence=sequence,
        close_reason="pause",
        average_logprob=-0.2,
    )


def summarise(
    texts: tuple[str, ...], params: SummaryParams | None = None, *, step_ms: int = 5_000, language: str = "en"
) -> list[SummaryRecord]:
    stage = TranscriptsToSummaries(params or SummaryParams(), "s", "edge")
    records: list[SummaryRecord] = []
    for index, text in enumerate(texts):
        records += stage.push(final(index + 1, text, start_ms=index * step_ms, language=language))
    return records + stage.finish()


def test_one_short_sentence_gives_that_sentence() -> None:
    (closing,) = summarise(("Stop the line.",))
    assert closing.text == "Stop the line."
    assert closing.scope == "closing"
    assert (closing.covers_from, closing.covers_to) == (1, 1)


def test_a_stream_without_words_has_no_summary() -> None:
    assert summarise(("", "  ", "...")) == []
    assert TranscriptsToSummaries(SummaryParams(), "s", "edge").finish() == []


def test_the_sentences_that_share_the_subject_are_chosen_and_stand_in_time_order() -> None:
    (closing,) = summarise(MEETING, SummaryParams(num_closing_sentences=3))
    chosen = split_sentences(closing.text)
    assert len(chosen) == 3
    assert all("pump" in sentence for sentence in chosen)
    assert [MEETING.index(sentence) for sentence in chosen] == sorted(MEETING.index(sentence) for sentence in chosen)


def test_a_rolling_summary_is_due_at_each_multiple_of_the_period_and_covers_what_the_last_did_not() -> None:
    records = summarise(MEETING * 3, SummaryParams(every_minutes=0.5, num_sentences=2))
    rolling = [record for record in records if record.scope == "rolling"]
    # Finals end at 1.5 s, 6.5 s, ...: the first that reaches 30 s, 60 s, 90 s are those of sequence 7, 13, 19.
    assert [(record.covers_from, record.covers_to) for record in rolling] == [(1, 7), (8, 13), (14, 19)]
    assert [(record.start_ms, record.end_ms) for record in rolling][:2] == [(0, 31_500), (35_000, 61_500)]
    assert (records[-1].scope, records[-1].covers_from, records[-1].covers_to) == ("closing", 1, 24)


def test_a_silent_stretch_gives_no_rolling_summary_and_counts_to_the_next() -> None:
    texts = ("", "", "The gate is open.", "The gate is shut.")
    records = summarise(texts, SummaryParams(every_minutes=0.1), step_ms=6_000)
    assert [(record.scope, record.covers_from, record.covers_to) for record in records] == [
        ("rolling", 1, 3),
        ("rolling", 4, 4),
        ("closing", 1, 4),
    ]


def test_only_media_time_decides_when_a_summary_is_due() -> None:
    stage = TranscriptsToSummaries(SummaryParams(every_minutes=1.0), "s", "edge")
    assert [len(stage.push(final(i + 1, f"Item {i} is here.", start_ms=i))) for i in range(50)] == [0] * 50
    assert len(stage.push(final(51, "The last item is here.", start_ms=58_500))) == 1


def test_a_sentence_cut_over_two_finals_is_one_sentence() -> None:
    (closing,) = summarise(
        ("Printing differs from most of the arts and crafts", "represented in the exhibition. It is modern."),
        SummaryParams(num_closing_sentences=1, max_join_gap_ms=5_000),
    )
    assert closing.text in {
        "Printing differs from most of the arts and crafts represented in the exhibition.",
        "It is modern.",
    }


def test_unfinished_sentences_of_two_channels_or_far_apart_are_not_joined() -> None:
    stage = TranscriptsToSummaries(SummaryParams(), "s", "edge")
    stage.push(final(1, "on the left", start_ms=0, channel=0))
    stage.push(final(2, "on the right", start_ms=100, channel=1))
    stage.push(final(3, "much later", start_ms=20_000, channel=0))
    (closing,) = stage.finish()
    assert closing.text == "on the left on the right much later"


def test_the_closing_summary_of_a_long_stream_chooses_from_all_of_it() -> None:
    params = SummaryParams(every_minutes=0.1, num_sentences=1, num_closing_sentences=4)
    texts = tuple(f"The report number {i} of the turbine is filed." for i in range(40))
    closing = summarise(texts, params)[-1]
    assert len(split_sentences(closing.text)) == 4
    assert closing.covers_to == 40


def test_what_is_held_does_not_grow_with_the_stream() -> None:
    params = SummaryParams(every_minutes=1.0, num_sentences=3, max_sentences_open=10, max_sentences_kept=10)
    stage = TranscriptsToSummaries(params, "s", "edge")
    for index in range(600):
        stage.push(final(index + 1, f"Pallet {index} goes to bay {index % 7}. Truck {index}.", start_ms=index * 2_000))
        assert len(stage._open) <= 10
        assert len(stage._kept) <= 10
        assert len(stage._unfinished) <= 1
    assert len(split_sentences(stage.finish()[0].text)) == 5


def test_a_speaker_who_never_ends_a_sentence_is_bounded_too() -> None:
    params = SummaryParams(max_sentence_chars=100, max_sentences_open=10, num_closing_sentences=2)
    stage = TranscriptsToSummaries(params, "s", "edge")
    for index in range(300):
        stage.push(final(index + 1, f"and then number {index}", start_ms=index * 500))
    assert sum(len(sentence.text) for sentence in [*stage._open, *stage._unfinished.values()]) < 12 * 200
    assert stage.finish()[0].text


def test_sentences_said_twice_are_taken_once() -> None:
    (closing,) = summarise(
        ("Stop the line.", "Stop the line!", "stop the line."), SummaryParams(num_closing_sentences=3)
    )
    assert closing.text == "Stop the line."


@pytest.mark.parametrize(
    ("language", "texts", "subject"),
    [
        (
            "de",
            (
                "Die Pumpe verliert Druck.",
                "Guten Morgen.",
                "Der Druck der Pumpe wird geprüft.",
                "Die Pumpe hat keinen Druck.",
            ),
            "Pumpe",
        ),
        (
            "ja",
            ("ポンプの圧力が下がった。", "おはようございます。", "ポンプの圧力を測る。", "ポンプの圧力は低い。"),
            "ポンプ",
        ),
        (
            "ru",
            ("Насос теряет давление.", "Доброе утро.", "Давление насоса проверят.", "Насос теряет давление опять."),
            "авлен",
        ),
        ("jw", ("Pompa kelangan tekanan.", "Sugeng enjing.", "Tekanan pompa dipriksa.", "Pompa lan tekanan."), "ompa"),
    ],
)
def test_other_languages_are_ranked_by_their_own_words(language: str, texts: tuple[str, ...], subject: str) -> None:
    (closing,) = summarise(texts, SummaryParams(num_closing_sentences=2), language=language)
    assert closing.language == language
    sentences = split_sentences(closing.text)
    assert len(sentences) == 2
    assert all(subject in sentence for sentence in sentences)


def test_a_language_that_nobody_told_is_ranked_without_stop_words() -> None:
    (closing,) = summarise(MEETING, SummaryParams(num_closing_sentences=3), language="und")
    assert closing.language == "und"
    assert all("pump" in sentence for sentence in split_sentences(closing.text))


def test_another_process_with_another_hash_seed_gives_the_same_summary() -> None:
    program = (
        "import json, sys\n"
        "from tests.test_summaries import MEETING, summarise\n"
        "print(json.dumps([r.model_dump() for r in summarise(MEETING)]))\n"
    )
    root = Path(__file__).parents[1]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "77")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0]) == [record.model_dump() for record in summarise(MEETING)]


def test_a_finished_stage_refuses_more_and_closes_once() -> None:
    stage = TranscriptsToSummaries(SummaryParams(), "s", "edge")
    stage.push(final(1, "Stop the line.", start_ms=0))
    assert len(stage.finish()) == 1
    assert stage.finish() == []
    with pytest.raises(RuntimeError, match="finished"):
        stage.push(final(2, "Again.", start_ms=2_000))


def test_lengths_that_cannot_be_held_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValidationError, match="num_sentences=20 is more than half of max_sentences_open=10"):
        SummaryParams(num_sentences=20, max_sentences_open=10)
    with pytest.raises(ValidationError, match="max_sentences_kept=10"):
        SummaryParams(num_closing_sentences=11, max_sentences_kept=10)


def test_sentences_are_split_at_their_ends_only() -> None:
    assert split_sentences('Dr. J. Smith came. "Well!" he said. It cost 3.50 euros... and more? Yes.') == [
        "Dr. J. Smith came.",
        '"Well!" he said.',
        "It cost 3.50 euros... and more?",
        "Yes.",
    ]
    assert split_sentences("今日は。元気？はい") == ["今日は。", "元気？", "はい"]
    assert ends_sentence("It is so.”")
    assert not ends_sentence("with Dr.")


def test_words_fold_case_and_unspaced_scripts_give_pairs() -> None:
    assert words_of("Don’t STOP, forty-two Straße!") == ("don’t", "stop", "forty-two", "strasse")
    assert words_of("圧力 A圧力計") == ("圧力", "a", "圧力", "力計")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from('aZé .!?…"。？।Dr1\n漢'), max_size=60))
def test_splitting_loses_nothing_but_white_space(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=12), st.integers(1, 5))
def test_any_text_gives_a_summary_of_its_own_sentences_or_none(texts: list[str], num_sentences: int) -> None:
    params = SummaryParams(every_minutes=0.2, num_sentences=num_sentences, num_closing_sentences=num_sentences)
    spoken = Counter("".join(texts))
    for record in summarise(tuple(texts), params):
        assert record.text
        assert Counter("".join(record.text.split())) <= spoken
