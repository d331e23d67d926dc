from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.items import TRANSCRIBE, Hypothesis, SnapshotKey, Word
from pipeline.text.skipped_speech import SkippedSpeechParams, num_units_before_skipped
from pipeline.text.stable_prefix import Heard, StablePrefix, count_agreeing, split_units

WORDS = st.lists(st.sampled_from(["the", "then", "quick", "Quick,", "fox.", "fox", "狐", "は", "-"]), max_size=6)


class Growing:
    """A stable prefix that hears so much more with every hypothesis."""

    def __init__(self, step_ms: int = 640, max_length_ms: int | None = None) -> None:
        self._prefix = StablePrefix(max_length_ms)
        self._step_ms = step_ms
        self._length_ms = 0

    def revise(self, text: str, *, has_paused: bool = False, num_certain: int | None = None) -> tuple[str, int]:
        self._length_ms += self._step_ms
        return self._prefix.revise(text, Heard(self._length_ms, has_paused, num_certain))

    def stable(self, text: str, *, has_paused: bool = False, num_certain: int | None = None) -> str:
        shown, stable_chars = self.revise(text, has_paused=has_paused, num_certain=num_certain)
        return shown[:stable_chars]

    def show_doubtful(self, text: str) -> tuple[str, int] | None:
        return self._prefix.show_doubtful(text)


def test_a_word_is_stable_when_two_consecutive_hypotheses_agree_on_it() -> None:
    prefix = Growing()
    assert prefix.revise("Printing in the") == ("Printing in the", 0)
    shown, stable_chars = prefix.revise("Printing in the only")
    assert shown == "Printing in the only"
    assert shown[:stable_chars] == "Printing in the"


def test_a_stable_word_stays_when_later_hypotheses_change_their_mind() -> None:
    prefix = Growing()
    prefix.revise("for all though")
    prefix.revise("for all though the")
    shown, stable_chars = prefix.revise("for although the Chinese")
    assert shown == "for all though Chinese"
    assert shown[:stable_chars] == "for all though"


def test_the_full_stop_of_an_unfinished_sentence_is_not_stable() -> None:
    prefix = Growing()
    prefix.revise("we are at.")
    shown, stable_chars = prefix.revise("we are at.")
    assert shown[:stable_chars] == "we are"
    shown, stable_chars = prefix.revise("we are at present concerned.")
    assert shown[:stable_chars] == "we are at"


def test_case_and_punctuation_do_not_break_agreement() -> None:
    assert count_agreeing(split_units("Printing, in the"), split_units("printing in The")) == 3


def test_scripts_without_spaces_are_stable_by_character() -> None:
    prefix = Growing()
    prefix.revise("今日は天")
    shown, stable_chars = prefix.revise("今日は良い天気")
    assert shown[:stable_chars] == "今日は"


def test_the_same_half_of_a_word_heard_twice_within_a_syllable_is_not_stable() -> None:
    quick = Growing(step_ms=320)
    quick.revise("at present concern")
    assert quick.stable("at present concern") == "at present"
    assert quick.stable("at present concerned") == "at present"
    assert quick.stable("at present concerned differs") == "at present"
    assert quick.stable("at present concerned differs") == "at present concerned"


def test_the_last_word_is_stable_at_once_where_a_pause_followed_it() -> None:
    quick = Growing(step_ms=320)
    quick.revise("at present concerned", has_paused=True)
    assert quick.stable("at present concerned", has_paused=True) == "at present concerned"


def test_the_last_word_is_stable_after_so_much_new_sound_that_it_would_have_grown() -> None:
    slow = Growing(step_ms=640)
    slow.revise("at present concerned")
    assert slow.stable("at present concerned") == "at present concerned"


def test_nothing_behind_passed_over_speech_becomes_stable() -> None:
    prefix = Growing()
    for _ in range(4):
        assert prefix.stable("comparatively modern. For although", num_certain=2) in ("", "comparatively modern.")
    assert prefix.stable("comparatively modern. A thin stripe. For although") == "comparatively modern."
    assert prefix.stable("comparatively modern. A thin stripe. For although") == (
        "comparatively modern. A thin stripe. For although"
    )


def test_words_that_may_still_be_cut_off_do_not_become_stable() -> None:
    prefix = Growing(max_length_ms=1_920)
    for text in ("one two", "one two three", "one two three four"):
        prefix.revise(text)
    for _ in range(3):
        assert prefix.stable("one two three four five six") == "one two three four"


def test_an_unsure_hypothesis_makes_nothing_stable() -> None:
    prefix = StablePrefix()
    prefix.revise("sempre la radio", Heard(2_000, average_logprob=-0.2))
    assert prefix.revise("sempre la radio non", Heard(2_640, average_logprob=-1.0)) == ("sempre la radio non", 0)
    shown, stable_chars = prefix.revise("sempre la radio nacque", Heard(3_280, average_logprob=-0.2))
    assert shown[:stable_chars] == "sempre la radio"


def test_a_doubtful_text_is_shown_but_is_no_evidence() -> None:
    prefix = Growing()
    assert prefix.show_doubtful("Printing") == ("Printing", 0)
    assert prefix.revise("Printing in the") == ("Printing in the", 0)
    assert prefix.show_doubtful("Printing in the only") == ("Printing in the only", 0)
    assert prefix.show_doubtful("Printing") is None
    assert prefix.show_doubtful("") is None
    assert prefix.stable("Printing at a") == "Printing"


def timed(*words: tuple[str, int, int]) -> Hypothesis:
    """A transcription whose words have these times in milliseconds."""
    found = tuple(Word(text, start * 16, end * 16, 0.9) for text, start, end in words)
    text = " ".join(word.text for word in found)
    return Hypothesis(SnapshotKey("s", 1, 1), TRANSCRIBE, text, (), found, "en", -0.2, 0.0, 1)


def test_units_are_certain_up_to_the_first_speech_without_words() -> None:
    params = SkippedSpeechParams(min_hole_ms=1_200, min_word_ms=2_000)
    hole = timed(("comparatively", 0, 800), ("modern.", 800, 1_400), ("For", 3_000, 3_200), ("although", 3_200, 3_600))
    assert num_units_before_skipped(hole, 3_600 * 16, params) == 2
    stretched = timed(("comparatively", 0, 800), ("modern.", 800, 3_000), ("For", 3_000, 3_200))
    assert num_units_before_skipped(stretched, 3_200 * 16, params) == 1
    tail = timed(("comparatively", 0, 800), ("modern.", 800, 1_400))
    assert num_units_before_skipped(tail, 5_000 * 16, params) is None
    assert num_units_before_skipped(timed(), 5_000 * 16, params) is None


@given(st.lists(WORDS, min_size=1, max_size=8), st.sampled_from([320, 640]))
def test_the_stable_prefix_never_shrinks_and_is_always_shown(hypotheses: list[list[str]], step_ms: int) -> None:
    prefix = Growing()
    stable = ""
    for words in hypotheses:
        shown, stable_chars = prefix.revise(" ".join(words))
        assert shown[:stable_chars].startswith(stable)
        assert stable_chars <= len(shown)
        stable = shown[:stable_chars]


@given(st.text())
def test_units_lose_nothing_but_trailing_space(text: str) -> None:
    assert "".join(split_units(text)) == text[: len(text.rstrip())] or "".join(split_units(text)) == text
