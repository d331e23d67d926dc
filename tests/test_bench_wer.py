# ruff: noqa: RUF001  (typographic apostrophes are what is tested)
from __future__ import annotations

import pytest

from actors.bench.wer import Difference, WordErrors, count_errors, find_differences, normalise, pool


def test_english_is_compared_by_the_whisper_normaliser() -> None:
    assert normalise("Mr. Smith, what colour? It's forty-two!", "en") == "mister smith what color it is 42"
    assert count_errors("It's the colour", "it is the color", "en").num_errors == 0


def test_other_languages_keep_their_letters() -> None:
    assert normalise("Für die  Straße (laut) gibt’s 2 Züge.", "de") == "für die straße gibt s 2 züge"
    assert count_errors("Züge", "Zuge", "de").num_substitutions == 1
    assert count_errors("हिंदी", "हिदी", "hi").num_substitutions == 1


def test_scripts_without_spaces_count_characters() -> None:
    errors = count_errors("圧力が低い", "圧力は低い", "ja")
    assert (errors.num_substitutions, errors.num_reference_words) == (1, 5)


def test_each_kind_of_error_is_counted() -> None:
    assert count_errors("a b c d e f", "a x c e f g", "de") == WordErrors(1, 1, 1, 6)
    assert count_errors("a b c d e f", "a x c e f g", "de").rate == 0.5


@pytest.mark.parametrize(("heard", "rate"), [("", 0.0), ("hello there", 1.0)])
def test_without_reference_words_only_an_empty_text_is_right(heard: str, rate: float) -> None:
    assert count_errors("", heard, "en").rate == rate


def test_nothing_heard_is_all_words_deleted() -> None:
    assert count_errors("one word more", "", "en") == WordErrors(num_deletions=3, num_reference_words=3)


def test_pooling_weighs_words_not_files() -> None:
    total = pool([WordErrors(1, 0, 0, 1), WordErrors(0, 0, 0, 9)])
    assert total.rate == 0.1


def test_differences_show_both_sides() -> None:
    assert find_differences(
        "before the woodcutters of the Netherlands", "before the wood cutters of Netherlands", "en"
    ) == [
        Difference("", "wood"),
        Difference("woodcutters", "cutters"),
        Difference("the", ""),
    ]
    assert find_differences("a b", "", "de") == [Difference("a b", "")]
    assert find_differences("", "", "de") == []
