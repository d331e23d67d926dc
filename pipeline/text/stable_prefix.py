"""The stable prefix of a growing transcript: the part of a partial that a viewer may already trust.

A unit (a word, or one character of a script written without spaces) becomes stable when two consecutive hypotheses
agree on it and on everything before it; what was once stable stays until the final. The rule is the "local agreement"
of Liu et al. 2020 (https://arxiv.org/abs/2005.11185) with the longest agreement ever instead of the last one, and four
exceptions, for words on which two hypotheses agree and which the final does not keep (docs/decisions/0012):

- words of a hypothesis that the model itself is unsure of;
- the last unit of a hypothesis, which its sound may have cut in the middle;
- words behind speech that the hypothesis passes over: what is missing there comes in the final and moves them;
- words so late in an utterance that it may still be cut before them: they are then the next utterance's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, kana, CJK ideographs.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"\s*(?:[{_SPACELESS}]|[^\s{_SPACELESS}]+)")
_NOT_WORD = re.compile(r"[\W_]+")

_WORD_MS = 480
"""New sound after which a unit at the end of two hypotheses is the same word and not the same half of one."""

_SURE_LOGPROB = -0.5
"""Average log-probability below which a hypothesis makes nothing stable: the model guesses. Of right texts of more than
two seconds, one in a hundred is below."""


def split_units(text: str) -> list[str]:
    """Return the units of `text`, each with the white space in front of it."""
    return _UNIT.findall(text)


def normalise_unit(unit: str) -> str:
    """Return what of `unit` counts for agreement: letters and digits, without case (or the sign itself)."""
    return _NOT_WORD.sub("", unit).casefold() or unit.strip()


def count_agreeing(first: list[str], second: list[str]) -> int:
    """Return how many leading units of the two lists agree."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if normalise_unit(a) != normalise_unit(b):
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Heard:
    """What is known of the sound of a hypothesis.

    `length_ms` is its length from the utterance's start. `has_paused` says that nobody spoke at its end: the last word
    is whole. `num_certain` is how many units stand before the first speech without words; None: all.
    `average_logprob` is the hypothesis's own.
    """

    length_ms: int
    has_paused: bool = False
    num_certain: int | None = None
    average_logprob: float = 0.0


@dataclass(slots=True)
class _Seen:
    """Since when consecutive hypotheses have agreed on a unit, and whether a word or a pause ever followed it."""

    length_ms: int
    is_whole: bool = False


class StablePrefix:
    """The stable prefix of one utterance, revised by one hypothesis after another.

    Args:
        max_length_ms: sound from here on may still be cut off and become the next utterance; None: none of it.
    """

    def __init__(self, max_length_ms: int | None = None) -> None:
        self._max_length_ms = max_length_ms
        self._num_kept: int | None = None
        self._stable: list[str] = []
        self._previous: list[str] = []
        self._seen: list[_Seen] = []
        self._num_shown = 0

    @property
    def num_confirmed(self) -> int:
        """How many units are stable and stand in the last hypothesis too, in the same place."""
        return count_agreeing(self._stable, self._previous)

    def revise(self, text: str, heard: Heard) -> tuple[str, int]:
        """Take the next hypothesis; return the text to show and how many of its characters are stable.

        Where the hypothesis contradicts the stable prefix, the prefix is shown in place of as many units.
        """
        units = split_units(text.strip())
        is_late = self._max_length_ms is not None and heard.length_ms > self._max_length_ms
        if is_late and self._num_kept is None:
            self._num_kept = len(self._previous)
        num_agreeing = count_agreeing(self._previous, units)
        seen = self._seen[:num_agreeing] + [_Seen(heard.length_ms) for _ in units[num_agreeing:]]
        num_stable = self._num_trusted(units, seen[:num_agreeing], heard)
        if num_stable > len(self._stable):
            self._stable += units[len(self._stable) : num_stable]
        for index, unit in enumerate(seen, start=1):
            unit.is_whole |= heard.has_paused or index < len(units)
        self._previous, self._seen = units, seen
        return self._show(units)

    def show_doubtful(self, text: str) -> tuple[str, int] | None:
        """Return what `revise` would, for a text that is no evidence; None if less than what was shown before."""
        units = split_units(text.strip())
        return self._show(units) if units and len(units) >= self._num_shown else None

    def _num_trusted(self, units: list[str], agreeing: list[_Seen], heard: Heard) -> int:
        if heard.average_logprob < _SURE_LOGPROB:
            return 0
        num_trusted = 0
        for unit in agreeing:
            if num_trusted >= len(self._stable) and not unit.is_whole and heard.length_ms - unit.length_ms < _WORD_MS:
                break
            num_trusted += 1
        if num_trusted == len(units) and units and not units[-1][-1].isalnum():
            # Whisper ends every hypothesis with a full stop; the last unit's punctuation is not news yet.
            num_trusted -= 1
        bounds = (heard.num_certain, self._num_kept)
        return min(num_trusted, *(bound for bound in bounds if bound is not None), len(units))

    def _show(self, units: list[str]) -> tuple[str, int]:
        shown = self._stable + units[len(self._stable) :]
        self._num_shown = len(shown)
        return "".join(shown), len("".join(self._stable))
