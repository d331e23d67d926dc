"""The part of an open utterance that partials look at, with hypotheses made by hand, then by Whisper base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.items import TRANSCRIBE, Hypothesis, Outcome, SnapshotKey, Word
from pipeline.local import LocalModels, caption_items
from pipeline.open_utterance import OpenUtterance
from pipeline.records import BaseRecord, FinalRecord, PartialRecord
from pipeline.stream_params import CaptionParams, SnapshotParams, StreamParams
from pipeline.text.partial_window import PartialWindow
from pipeline.text.skipped_speech import SkippedSpeechParams
from pipeline.text.stable_prefix import Heard, StablePrefix, count_agreeing, split_units
from pipeline.timebase import ms_to_samples
from tests.media import read_pcm
from tests.models import base_encoder, base_engine

KEEP = 2_500
"""Samples here are as good as milliseconds: the window only compares and adds them."""

TOKENS = {
    **{"the": (1,), "pump": (2, 3), "stopped": (4, 5, 6), "and": (7,), "Pump,": (8, 3, 9), "then": (10, 11)},
    **{"狐が": (20,), "warm - up": (21, 22)},
}
"""Of words; those of a word stand in front of no other word's, so that tokens can be read back."""

Timed = Sequence[tuple[str, int]]
"""Words and where they begin in the window."""


def hypothesis(timed: Timed, *, has_num_tokens: bool = True) -> Hypothesis:
    words = tuple(
        Word(text, start, start + 100, 0.9, len(TOKENS[text]) if has_num_tokens else 0) for text, start in timed
    )
    text = " ".join(text for text, _ in timed)
    tokens = tuple(token for word, _ in timed for token in TOKENS[word])
    return Hypothesis(SnapshotKey("s", 1, 1), TRANSCRIBE, text, tokens, words, "en", -0.1, 0.0, 1)


def texts_of(tokens: Sequence[int]) -> list[str]:
    """The words that `tokens` are the tokens of."""
    texts: list[str] = []
    place = 0
    while place < len(tokens):
        [text] = [text for text, own in TOKENS.items() if own == tuple(tokens[place : place + len(own)])]
        texts.append(text)
        place += len(TOKENS[text])
    return texts


SENTENCE = (("the", 0), ("pump", 700), ("stopped", 1_500), ("and", 2_200), ("then", 4_000))


def advanced(window: PartialWindow, heard: Hypothesis, num_confirmed: int, end_sample: int) -> PartialWindow:
    window.accept(heard)
    window.advance(heard, num_confirmed, end_sample, KEEP)
    return window


def test_what_is_stable_and_long_ago_is_cut_off_and_what_is_stable_and_recent_is_given() -> None:
    window = advanced(PartialWindow(16_000), hypothesis(SENTENCE), 4, 16_000 + 4_300)
    # "stopped" is the last word that begins 2,500 before the end; "and" begins later
    assert (window.start_sample, window.head, window.num_head_units) == (16_000 + 1_500, "the pump", 2)
    assert (window.head_tokens, window.prefix, window.draft) == ((1, 2, 3), (4, 5, 6, 7), (10, 11))
    assert window.tokens == hypothesis(SENTENCE).tokens
    assert window.whole_text(" stopped and then") == "the pump stopped and then"


def test_the_next_hypothesis_goes_on_from_what_was_given() -> None:
    window = advanced(PartialWindow(0), hypothesis(SENTENCE), 4, 4_300)
    heard = hypothesis((("stopped", 0), ("and", 700), ("the", 2_500), ("pump", 3_200)))
    window.accept(heard)
    assert (window.prefix, window.draft) == ((4, 5, 6, 7), (1, 2, 3))
    assert texts_of(window.tokens) == ["the", "pump", "stopped", "and", "the", "pump"]
    window.advance(heard, 6, 1_500 + 5_100, KEEP)
    assert (window.start_sample, window.head) == (1_500 + 2_500, "the pump stopped and")
    assert (texts_of(window.prefix), window.draft) == (["the", "pump"], ())


@pytest.mark.parametrize("num_confirmed", [0, 1, 2])
def test_no_word_is_cut_off_before_the_one_behind_it_is_stable_too(num_confirmed: int) -> None:
    window = advanced(PartialWindow(0), hypothesis(SENTENCE), num_confirmed, 60_000)
    assert (window.start_sample, window.head) == ((0, "") if num_confirmed < 2 else (700, "the"))


def test_a_word_that_begins_within_what_is_kept_stays_in_the_window() -> None:
    assert advanced(PartialWindow(0), hypothesis(SENTENCE), 5, 700 + KEEP - 1).start_sample == 0
    assert advanced(PartialWindow(0), hypothesis(SENTENCE), 5, 700 + KEEP).start_sample == 700


def test_without_a_head_the_text_of_the_window_is_the_whole_text() -> None:
    assert PartialWindow(0).whole_text("  the pump ") == "the pump"
    assert PartialWindow(0).tokens == ()


def without_words() -> Hypothesis:
    return replace(hypothesis(SENTENCE), words=())


def with_more_text_than_words() -> Hypothesis:
    return replace(hypothesis(SENTENCE), text="and the pump stopped and then")


def with_two_units_in_a_word() -> Hypothesis:
    words = (Word("the pump", 0, 500, 0.9, 3), Word("", 500, 600, 0.9, 0), Word("stopped", 700, 900, 0.9, 3))
    return replace(hypothesis(SENTENCE), text="the pump stopped", tokens=(1, 2, 3, 4, 5, 6), words=words)


@pytest.mark.parametrize(
    "heard",
    [
        hypothesis((("狐が", 0), ("狐が", 700), ("狐が", 1_500))),
        hypothesis((("the", 0), ("狐が", 700), ("the", 1_500), ("pump", 2_000))),
        hypothesis((("the", 0), ("warm - up", 700), ("pump", 1_500))),
        hypothesis(SENTENCE, has_num_tokens=False),
        without_words(),
        with_more_text_than_words(),
        with_two_units_in_a_word(),
        hypothesis(()),
    ],
    ids=[
        "no spaces",
        "some without spaces",
        "two units a word",
        "no token counts",
        "no words",
        "more text",
        "uneven",
        "nothing",
    ],
)
def test_words_that_are_no_units_and_those_that_do_not_tell_their_tokens_leave_the_window_alone(
    heard: Hypothesis,
) -> None:
    window = advanced(PartialWindow(5), heard, 100, 60_000)
    assert window == PartialWindow(5, draft=heard.tokens)


def draw_hypothesis(data: st.DataObject, given_words: list[str], last: list[str], end: int) -> Hypothesis:
    """A hypothesis over `end` samples: what is given, some of the last words, and others."""
    kept = last[len(given_words) :][: data.draw(st.integers(0, 8))]
    new = data.draw(st.lists(st.sampled_from(["the", "pump", "stopped", "and", "Pump,", "then"]), max_size=5))
    texts = [*given_words, *kept, *new]
    starts = data.draw(st.lists(st.integers(0, end - 1), min_size=len(texts), max_size=len(texts)))
    heard = hypothesis(list(zip(texts, sorted(starts), strict=True)))
    return replace(heard, average_logprob=data.draw(st.sampled_from([-0.1, -0.1, -0.9])))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_however_hypotheses_change_only_stable_words_are_cut_off_and_no_token_is_lost(data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, 100_000))
    window, stable, end, last = PartialWindow(begin), StablePrefix(), begin, list[str]()
    for _ in range(data.draw(st.integers(1, 12))):
        end += data.draw(st.integers(200, 2_000))
        before = copy.deepcopy(window)
        given_words = texts_of(window.prefix)
        heard = draw_hypothesis(data, given_words, last, end - window.start_sample)
        window.accept(heard)
        assert window.tokens == before.head_tokens + heard.tokens
        whole = window.whole_text(heard.text)
        has_paused = data.draw(st.booleans())
        shown, stable_chars = stable.revise(
            whole, Heard(end - begin, has_paused, average_logprob=heard.average_logprob)
        )
        window.advance(heard, stable.num_confirmed, end, KEEP)

        # every token is in one of the three, in order, and the head says what it said
        assert window.tokens == before.head_tokens + heard.tokens
        assert window.head == " ".join(texts_of(window.head_tokens))
        assert window.num_head_units == len(split_units(window.head))
        assert window.whole_text(" ".join(texts_of(window.prefix + window.draft))) == whole
        # what is cut off or given is stable, and was shown
        stable_units = split_units(shown[:stable_chars])
        fixed = texts_of(window.head_tokens + window.prefix)
        assert count_agreeing(stable_units, fixed) == len(fixed)
        # the window moves forwards, as far as it may and no further
        last = texts_of(window.prefix + window.draft)
        num_cut = window.num_head_units - before.num_head_units
        if num_cut:
            assert window.start_sample == before.start_sample + heard.words[num_cut].start_sample
            assert window.start_sample <= end - KEEP
        else:
            assert window == replace(before, draft=window.draft)
        num_left = count_agreeing(stable_units, split_units(whole)) - before.num_head_units
        later = heard.words[num_cut + 1 : num_left]
        assert all(before.start_sample + word.start_sample > end - KEEP for word in later)


def test_a_hypothesis_that_contradicts_stable_words_does_not_cut_its_own_off() -> None:
    stable, window = StablePrefix(), PartialWindow(0)
    for texts in (("the", "pump", "stopped", "and"), ("the", "pump", "stopped", "and", "then")):
        heard = hypothesis([(text, 600 * place) for place, text in enumerate(texts)])
        window.accept(heard)
        stable.revise(window.whole_text(heard.text), Heard(2_400 + 600 * (len(texts) - 4)))
    assert stable.num_confirmed == 4
    changed = hypothesis([(text, 600 * place) for place, text in enumerate(("the", "pump", "then", "the", "pump"))])
    window.accept(changed)
    shown, stable_chars = stable.revise(changed.text, Heard(6_000))
    assert shown[:stable_chars] == "the pump stopped and"
    window.advance(changed, stable.num_confirmed, 6_000, KEEP)
    assert (window.head, texts_of(window.prefix), texts_of(window.draft)) == ("the", ["pump"], ["then", "the", "pump"])


def test_speech_without_words_is_looked_for_in_the_window_and_counted_from_the_utterance_on() -> None:
    utterance = OpenUtterance(1, 0, 16_000, 16_000, 200_000, 0, StablePrefix())
    utterance.window = PartialWindow(96_000)
    heard = hypothesis((("the", 0), ("pump", 16_000), ("stopped", 32_000), ("and", 48_000)))
    utterance.window.accept(heard)
    utterance.window.advance(heard, 4, 200_000, 200_000 - 96_000 - 32_000)
    assert (utterance.window.num_head_units, utterance.window.start_sample) == (2, 128_000)
    utterance.snapshot_end_sample = 200_000
    params = SkippedSpeechParams()
    for timed, num_certain in (
        ((("stopped", 0), ("and", 6_000), ("then", 12_000)), None),
        ((("stopped", 0), ("and", 50_000), ("then", 56_000)), 2 + 1),
    ):
        seen = utterance.heard(hypothesis(timed), params)
        assert (seen.length_ms, seen.num_certain) == (11_500, num_certain)


# Whisper base, on speech without a pause


def caption_long(samples: np.ndarray, window_ms: int) -> tuple[list[BaseRecord], list[Hypothesis]]:
    params = StreamParams(
        vad=VadParams(soft_limit_ms=15_000),
        captions=CaptionParams(language="en"),
        snapshots=SnapshotParams(window_ms=window_ms, cadence_ms=1_280),
    )
    outcomes: list[Outcome] = []
    records = caption_items(
        [np.atleast_2d(samples)], params, LocalModels(base_encoder(), base_engine()), on_outcome=outcomes.append
    )
    return records, [outcome for outcome in outcomes if isinstance(outcome, Hypothesis)]


def spoken(text: str) -> str:
    return " ".join(word.strip(".,;?!").lower() for word in text.split())


def test_partials_that_look_at_the_last_seconds_end_like_those_that_look_at_all(media: Path, one_thread: None) -> None:
    samples = read_pcm(media / "long.wav")[: ms_to_samples(12_500)]
    records, heard = caption_long(samples, 2_500)
    whole_records, whole_heard = caption_long(samples, 30_000)
    [final] = [record for record in records if isinstance(record, FinalRecord)]
    [whole_final] = [record for record in whole_records if isinstance(record, FinalRecord)]
    assert final.end_ms - final.start_ms >= 12_000
    # revisions are counted alike: the moments of partials do not depend on the window
    assert final.model_dump(exclude={"emitted_at"}) == whole_final.model_dump(exclude={"emitted_at"})
    for these in (records, whole_records):
        partials = [record for record in these if isinstance(record, PartialRecord)]
        last = spoken(partials[-1].text)
        said = spoken(final.text).split()
        # the final has heard a little more
        bound = min(jiwer.wer(" ".join(said[:count]), last) for count in range(len(said) - 4, len(said) + 1))
        assert bound <= 0.1
        assert all(record.start_ms == final.start_ms for record in partials)
    assert max(len(item.tokens) for item in whole_heard[:-1]) > 1.5 * max(len(item.tokens) for item in heard[:-1])
