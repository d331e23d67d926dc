from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.stable_prefix import StablePrefix, count_agreeing, split_units

WORDS = st.lists(st.sampled_from(["the", "then", "quick", "Quick,", "fox.", "fox", "狐", "は", "-"]), max_size=6)


def test_a_word_is_stable_when_two_consecutive_hypotheses_agree_on_it():
    prefix = StablePrefix()
    assert prefix.revise("Printing in the") == ("Printing in the", 0)
    shown, stable_chars = prefix.revise("Printing in the only")
    assert shown == "Printing in the only"
    assert shown[:stable_chars] == "Printing in the"


def test_a_stable_word_stays_when_later_hypotheses_change_their_mind():
    prefix = StablePrefix()
    prefix.revise("for all though")
    prefix.revise("for all though the")
    shown, stable_chars = prefix.revise("for although the Chinese")
    assert shown == "for all though Chinese"
    assert shown[:stable_chars] == "for all though"


def test_the_full_stop_of_an_unfinished_sentence_is_not_stable():
    prefix = StablePrefix()
    prefix.revise("we are at.")
    shown, stable_chars = prefix.revise("we are at.")
    assert shown[:stable_chars] == "we are"
    shown, stable_chars = prefix.revise("we are at present concerned.")
    assert shown[:stable_chars] == "we are at"


def test_case_and_punctuation_do_not_break_agreement():
    assert count_agreeing(split_units("Printing, in the"), split_units("printing in The")) == 3


def test_scripts_without_spaces_are_stable_by_character():
    prefix = StablePrefix()
    prefix.revise("今日は天")
    shown, stable_chars = prefix.revise("今日は良い天気")
    assert shown[:stable_chars] == "今日は"


@given(st.lists(WORDS, min_size=1, max_size=8))
def test_the_stable_prefix_never_shrinks_and_is_always_shown(hypotheses):
    prefix = StablePrefix()
    stable = ""
    for words in hypotheses:
        shown, stable_chars = prefix.revise(" ".join(words))
        assert shown[:stable_chars].startswith(stable)
        assert stable_chars <= len(shown)
        stable = shown[:stable_chars]


@given(st.text())
def test_units_lose_nothing_but_trailing_space(text):
    assert "".join(split_units(text)) == text[: len(text.rstrip())] or "".join(split_units(text)) == text
