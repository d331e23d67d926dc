"""The stable prefix of a growing transcript: the part of a partial that a viewer may already trust.

A unit (a word, or one character of a script written without spaces) becomes stable when two consecutive hypotheses
agree on it and on everything before it; what was once stable stays until the final. The rule is the "local agreement"
of Liu et al. 2020 (https://arxiv.org/abs/2005.11185) with the longest agreement ever instead of the last one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, kana, CJK ideographs.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"\s*(?:[{_SPACELESS}]|[^\s{_SPACELESS}]+)")
_NOT_WORD = re.compile(r"[\W_]+")


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


@dataclass(slots=True)
class StablePrefix:
    """The stable prefix of one utterance, revised by one hypothesis after another."""

    _stable: list[str] = field(default_factory=list)
    _previous: list[str] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        """How many units are stable."""
        return len(self._stable)

    def revise(self, text: str) -> tuple[str, int]:
        """Take the next hypothesis; return the text to show and how many of its characters are stable.

        Where the hypothesis contradicts the stable prefix, the prefix is shown in place of as many units.
        """
        units = split_units(text.strip())
        num_agreeing = count_agreeing(self._previous, units)
        if num_agreeing == len(units) and units and not units[-1][-1].isalnum():
            # Whisper ends every hypothesis with a full stop; the last unit's punctuation is not news yet.
            num_agreeing -= 1
        if num_agreeing > len(self._stable):
            self._stable += units[len(self._stable) : num_agreeing]
        self._previous = units
        stable = "".join(self._stable)
        shown = stable + "".join(units[len(self._stable) :])
        return shown, len(stable)
