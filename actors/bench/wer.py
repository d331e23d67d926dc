"""Word error rates: the field's normalisers, jiwer's alignment, sums over words.

English goes through Whisper's English normaliser, every other language through its basic one (Radford et al. 2022,
"Robust Speech Recognition via Large-Scale Weak Supervision", appendix C). Scripts written without spaces are split into
characters, so that their figure is a character error rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

_UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where the hypothesis is not the reference; an empty side is an insertion or a deletion."""

    reference: str
    hypothesis: str


@dataclass(frozen=True, slots=True)
class WordErrors:
    """The errors of one text, or of several added up."""

    num_substitutions: int = 0
    num_deletions: int = 0
    num_insertions: int = 0
    num_reference_words: int = 0

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(
            self.num_substitutions + other.num_substitutions,
            self.num_deletions + other.num_deletions,
            self.num_insertions + other.num_insertions,
            self.num_reference_words + other.num_reference_words,
        )

    @property
    def num_errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.num_substitutions + self.num_deletions + self.num_insertions

    @property
    def rate(self) -> float:
        """Errors per reference word; may exceed 1. Without reference words: 0 if nothing was inserted, else 1."""
        if self.num_reference_words == 0:
            return float(self.num_insertions > 0)
        return self.num_errors / self.num_reference_words


def normalise(text: str, language: str) -> str:
    """Return `text` as it is compared: words of `language` (ISO 639-1), lower case, with single spaces between."""
    return " ".join(cast(str, _normaliser(language)(text)).split())


def count_errors(reference: str, hypothesis: str, language: str) -> WordErrors:
    """Return the word errors of `hypothesis` by the least number of edits, after normalising both."""
    expected, heard = normalise(reference, language), normalise(hypothesis, language)
    if not expected:
        # jiwer refuses an empty reference: all that was heard is inserted.
        return WordErrors(num_insertions=len(heard.split()))
    output = jiwer.process_words(expected, heard)
    return WordErrors(output.substitutions, output.deletions, output.insertions, len(expected.split()))


def find_differences(reference: str, hypothesis: str, language: str) -> list[Difference]:
    """Return where the two texts differ after normalising, in order."""
    expected, heard = normalise(reference, language), normalise(hypothesis, language)
    if not expected or not heard:
        return [Difference(expected, heard)] if expected != heard else []
    output = jiwer.process_words(expected, heard)
    expected_words, heard_words = output.references[0], output.hypotheses[0]
    return [
        Difference(
            " ".join(expected_words[edit.ref_start_idx : edit.ref_end_idx]),
            " ".join(heard_words[edit.hyp_start_idx : edit.hyp_end_idx]),
        )
        for edit in output.alignments[0]
        if edit.type != "equal"
    ]


def pool(errors: Iterable[WordErrors]) -> WordErrors:
    """Return the sum: its rate weighs every reference word alike, whichever file it is in."""
    return sum(errors, WordErrors())


@lru_cache(maxsize=16)
def _normaliser(language: str) -> EnglishTextNormalizer | BasicTextNormalizer:
    if language == "en":
        return EnglishTextNormalizer()
    # Marks are letters in Indic scripts, Thai and others; removing them would hide errors.
    return BasicTextNormalizer(split_letters=language in _UNSPACED_LANGUAGES, preserve_marks=True)
