from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.final_in_progress import FinalInProgress
from pipeline.items import (
    TRANSCRIBE,
    CloseReason,
    Failure,
    FailureKind,
    Hypothesis,
    Outcome,
    Snapshot,
    SnapshotKey,
    Task,
    TaskKind,
    Word,
)
from pipeline.records import BaseRecord, FinalRecord
from pipeline.text.hypotheses_to_records import Utterance
from pipeline.text.skipped_speech import SkippedSpeechParams, Stretch, find_skipped, put_in, shortened
from tests.media import read_pcm
from tests.models import answer, base_encoder, base_engine, request

PARAMS = SkippedSpeechParams()
KEY = SnapshotKey("s", 1, 3)


def words(*timed: tuple[str, float, float]) -> tuple[Word, ...]:
    return tuple(Word(text, int(start * 16_000), int(end * 16_000), 0.9) for text, start, end in timed)


def hypothesis(*timed: tuple[str, float, float], joint: str = " ", **changes: object) -> Hypothesis:
    spoken = words(*timed)
    text = joint.join(word.text for word in spoken)
    made = Hypothesis(KEY, TRANSCRIBE, text, tuple(range(len(spoken))), spoken, "en", -0.2, 0.0, 1)
    return replace(made, **changes)


def seconds(stretch: Stretch) -> tuple[float, float]:
    return stretch.start_sample / 16_000, stretch.end_sample / 16_000


def test_words_that_follow_each_other_hide_nothing():
    spoken = words(("One", 0.1, 0.5), ("two", 0.5, 1.4), ("three.", 2.0, 3.0))
    assert find_skipped(spoken, 16_000 * 4, PARAMS) == []
    assert find_skipped((), 16_000 * 9, PARAMS) == []


def test_a_tail_a_hole_and_a_long_word_are_found():
    spoken = words(("One", 0.0, 0.5), ("two", 2.0, 2.5), ("three", 2.5, 5.0), ("four", 5.0, 5.5))
    found = find_skipped(spoken, 16_000 * 8, PARAMS)
    assert [(seconds(s), s.first, s.last) for s in found] == [
        ((0.5, 2.0), 1, 1),
        ((2.5, 5.0), 2, 3),
        ((5.5, 8.0), 4, 4),
    ]


def test_two_long_words_in_a_row_are_one_stretch():
    spoken = words(("about", 0.0, 0.5), ("In", 0.5, 3.0), ("being", 3.0, 4.5), ("modern.", 4.5, 5.0))
    (stretch,) = find_skipped(spoken, 16_000 * 5, PARAMS)
    assert (seconds(stretch), stretch.first, stretch.last) == ((0.5, 4.5), 1, 3)


def test_words_of_a_tail_are_put_behind_the_last():
    final = hypothesis(("by", 0.0, 0.5), ("process,", 0.5, 1.0))
    (stretch,) = find_skipped(final.words, 16_000 * 4, PARAMS)
    look = hypothesis(("process.", 0.0, 0.2), ("At", 0.4, 0.6), ("that", 0.6, 1.0), ("level.", 1.0, 3.5))
    whole = put_in(final, look, stretch, 16_000)
    assert whole is not None
    assert whole.text == "by process, At that level."
    assert [word.start_sample / 16_000 for word in whole.words] == [0.0, 0.5, 1.4, 1.6, 2.0]
    assert whole.num_passes == 2


@pytest.mark.parametrize(
    ("hiding", "found", "text"),
    [
        ("For", ["A", "thin", "stripe.", "For"], "modern. A thin stripe. For although"),
        ("For", ["A", "thin", "stripe."], "modern. A thin stripe. For although"),
        ("process,", ["The", "small", "dog."], "modern. process, The small dog. although"),
        ("For", ["Modern.", "A", "dog.", "For", "although"], "modern. A dog. For although"),
    ],
)
def test_a_sentence_that_a_long_word_hid_is_put_where_it_was_said(hiding, found, text):
    final = hypothesis(("modern.", 0.0, 1.0), (hiding, 1.0, 4.0), ("although", 4.0, 4.5))
    (stretch,) = find_skipped(final.words, 16_000 * 5, PARAMS)
    look = hypothesis(*((word, n * 0.5, n * 0.5 + 0.5) for n, word in enumerate(found)))
    whole = put_in(final, look, stretch, 16_000)
    assert whole is not None
    assert whole.text == text
    ends = [0, *(word.end_sample for word in whole.words)]
    assert all(word.start_sample >= end for word, end in zip(whole.words, ends, strict=False))


def test_a_second_look_that_finds_nothing_new_changes_nothing():
    final = hypothesis(("phone", 0.0, 0.5), ("555-123-4567.", 0.5, 4.0))
    (stretch,) = find_skipped(final.words, 16_000 * 4, PARAMS)
    assert put_in(final, hypothesis(("555-123-4567.", 0.2, 3.5)), stretch, 0) is None
    assert put_in(final, hypothesis(guard="silence"), stretch, 0) is None


def test_a_sentence_that_stands_beside_the_stretch_is_not_put_in_again():
    """The first look at a hole put the sentence in, without room of its own; the word before it is long now."""
    final = hypothesis(
        ("by", 0.0, 0.1),
        ("similar", 0.1, 0.6),
        ("process,", 0.6, 4.0),
        ("the", 4.0, 4.0),
        ("child", 4.0, 4.0),
        ("hurt.", 4.0, 4.2),
        ("Sunday", 4.2, 4.8),
    )
    [stretch] = find_skipped(final.words, int(16_000 * 4.8), PARAMS)
    look = hypothesis(("Process,", 0.0, 0.6), ("the", 0.9, 1.1), ("child", 1.1, 1.6), ("hurt.", 1.6, 2.2))
    whole = put_in(final, look, stretch, int(16_000 * 0.6))
    assert whole is not None
    assert whole.text == "by similar Process, the child hurt. Sunday"
    assert [seconds(s) for s in find_skipped(whole.words, int(16_000 * 4.8), PARAMS)] == [(2.8, 4.2)]
    behind = hypothesis(("similar", 0.1, 0.5), ("process,", 0.5, 0.9), ("a", 0.9, 1.0), ("thin", 1.0, 1.5))
    hole = Stretch(int(16_000 * 0.6), int(16_000 * 2.0), 3, 3)
    whole = put_in(final, behind, hole, 0)
    assert whole is not None
    assert whole.text == "by similar process, a thin the child hurt. Sunday"


def test_languages_without_spaces_are_joined_without_spaces():
    final = hypothesis(("今日", 0.0, 0.5), ("は", 0.5, 0.7), joint="")
    (stretch,) = find_skipped(final.words, 16_000 * 4, PARAMS)
    whole = put_in(final, hypothesis(("良い", 0.2, 0.8), ("天気", 0.8, 1.5), joint=""), stretch, 16_000)
    assert whole is not None
    assert whole.text == "今日は良い天気"


def test_a_stretch_is_shortened_once_and_only_if_enough_is_left():
    once = shortened(Stretch(0, 16_000 * 4, 0, 1), PARAMS)
    assert once is not None
    assert seconds(once) == (0.0, 3.2)
    assert shortened(once, PARAMS) is None
    assert shortened(Stretch(0, 16_000, 0, 1), PARAMS) is None
    assert shortened(Stretch(0, 16_000 * 4, 1, 1), PARAMS) is None


def in_progress(samples, tasks=(TRANSCRIBE,), **changes: object) -> tuple[FinalInProgress, Snapshot]:
    snapshot = Snapshot(KEY, 0, True, 32_000, samples, None, (), (5, 6), tasks)
    end_sample = 32_000 + len(samples)
    utterance = Utterance("s", 1, 0, 32_000, end_sample, "edge", is_language_given=False)
    final = FinalInProgress(
        utterance,
        snapshot,
        speech_end_sample=end_sample,
        params=SkippedSpeechParams(**changes),
    )
    final.close(4, CloseReason.LONG)
    return final, snapshot


def records_of(final: FinalInProgress, outcome: Outcome) -> list[tuple[Task, BaseRecord]]:
    assert final.accept(outcome)
    return final.take_records()


def test_a_failed_second_look_leaves_the_first(speech):
    final, _ = in_progress(read_pcm(speech)[: 16_000 * 6])
    assert records_of(final, hypothesis(("Good", 0.0, 0.5), ("morning", 0.5, 1.0))) == []
    look = final.take_snapshot()
    assert look is not None
    assert final.take_snapshot() is None
    assert look.start_sample == 32_000 + 16_000 - 3_200
    assert (look.language, look.draft, look.tasks, look.is_final) == ("en", (), (TRANSCRIBE,), True)
    ((task, record),) = records_of(final, Failure(look.key, None, FailureKind.FAILED, "lost"))
    assert task == TRANSCRIBE
    assert isinstance(record, FinalRecord)
    assert (record.text, record.revision, record.sequence) == ("Good morning", KEY.revision, 4)
    assert final.is_done


@pytest.mark.parametrize("num_found", [0, 1])
def test_after_a_second_look_that_failed_nothing_else_is_looked_at(speech, num_found):
    final, snapshot = in_progress(read_pcm(speech)[: 16_000 * 12])
    said = hypothesis(*((f"w{n}", n * 2.0, n * 2.0 + 0.3) for n in range(5)))
    assert records_of(final, replace(said, key=snapshot.key)) == []
    for _ in range(num_found):
        look = final.take_snapshot()
        assert look is not None
        assert records_of(final, hypothesis(("found", 0.5, 1.0), key=look.key)) == []
    look = final.take_snapshot()
    assert look is not None
    ((task, record),) = records_of(final, Failure(look.key, None, FailureKind.UNAVAILABLE, "no stage took it"))
    assert (task, record.text) == (TRANSCRIBE, " ".join(["w0", *["found"] * num_found, "w1 w2 w3 w4"]))
    assert final.is_done
    assert final.take_snapshot() is None


def test_a_translation_that_fails_takes_nothing_from_a_transcription_that_is_looked_at_again(speech):
    english = Task(TaskKind.TRANSLATE, "en")
    final, snapshot = in_progress(read_pcm(speech)[: 16_000 * 6], tasks=(TRANSCRIBE, english))
    assert records_of(final, hypothesis(("Good", 0.0, 0.5))) == []
    look = final.take_snapshot()
    assert look is not None
    ((task, error),) = records_of(final, Failure(snapshot.key, None, FailureKind.UNAVAILABLE, "the decoder died"))
    assert (task, error.kind) == (english, "error")
    ((task, record),) = records_of(final, Failure(look.key, None, FailureKind.UNAVAILABLE, "the decoder died"))
    assert (task, record.text) == (TRANSCRIBE, "Good")
    assert final.is_done


def test_without_looks_allowed_the_first_hypothesis_is_the_final(speech):
    final, _ = in_progress(read_pcm(speech)[: 16_000 * 6], max_looks=0)
    ((_, record),) = records_of(final, hypothesis(("Good", 0.0, 0.5)))
    assert isinstance(record, FinalRecord)
    assert record.text == "Good"


def test_looks_are_bounded(speech):
    final, snapshot = in_progress(read_pcm(speech)[: 16_000 * 12], max_looks=2)
    outcome = hypothesis(*((f"w{n}", n * 2.0, n * 2.0 + 0.3) for n in range(5)))
    assert records_of(final, replace(outcome, key=snapshot.key)) == []
    num_looks = 0
    while not final.is_done:
        look = final.take_snapshot()
        assert look is not None
        num_looks += 1
        records_of(final, hypothesis(("mumble", 0.0, 0.5), key=look.key, average_logprob=-2.0))
    assert num_looks == 2


def test_a_real_tail_that_the_decoder_left_out_is_found_again(speech):
    """The decoder is made to stop early by hand; the second look is the real model's."""
    samples = read_pcm(speech)[: 16_000 * 7]
    final, snapshot = in_progress(samples)
    engine = base_engine()

    def decode(item: Snapshot) -> Hypothesis:
        (embeddings,) = base_encoder().encode([item])
        (outcome,) = answer(engine, request(item.key, language="en"), embeddings)
        assert isinstance(outcome, Hypothesis)
        return outcome

    whole = decode(snapshot)
    kept = next(n for n, word in enumerate(whole.words) if word.text.startswith("factory")) + 1
    cut_text = " ".join(word.text for word in whole.words[:kept])
    assert records_of(final, replace(whole, words=whole.words[:kept], text=cut_text)) == []
    look = final.take_snapshot()
    assert look is not None
    ((_, record),) = records_of(final, decode(look))
    assert isinstance(record, FinalRecord)
    assert record.text.split() == whole.text.split()
