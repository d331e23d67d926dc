"""Figures of one stream from what its client was shown and when: the same for every system (docs/peers.md).

A system is seen as a row of views: after each message, the text that will not change any more and the text that may.
Nothing else of a system is used, neither its word times nor its utterances. What was said, and when, is known from
elsewhere (`Spoken`). Pure functions; all times are milliseconds, media time is mapped to wall time by one anchor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jiwer

from actors.bench.latency import Received, UtteranceTimes, word_ends
from actors.bench.wer import WordErrors, count_errors
from pipeline.records import BaseRecord, FinalRecord, PartialRecord
from pipeline.text.stable_prefix import normalise_unit, split_units


@dataclass(frozen=True, slots=True)
class View:
    """What a viewer sees from wall time `at_ms` (ms) on: committed text, then text that may still change."""

    committed: str
    tail: str
    at_ms: float

    @property
    def text(self) -> str:
        """All that is shown."""
        return f"{self.committed} {self.tail}".strip()


@dataclass(frozen=True, slots=True)
class SpokenWord:
    """One word of the reference, as it is compared. End and utterance are None where no final has its place."""

    unit: str
    end_ms: int | None
    utterance: int | None


@dataclass(frozen=True, slots=True)
class Spoken:
    """What is said in the sound: the reference text, its words in order, and the detector's utterances."""

    text: str
    language: str
    words: tuple[SpokenWord, ...]
    utterances: Mapping[int, UtteranceTimes]

    @property
    def places(self) -> dict[int, list[int]]:
        """The places of the words of every utterance that has some, by its number."""
        places: dict[int, list[int]] = defaultdict(list)
        for place, word in enumerate(self.words):
            if word.utterance is not None and word.utterance in self.utterances:
                places[word.utterance].append(place)
        return dict(sorted(places.items()))

    @property
    def last_end_ms(self) -> int:
        """When the last word ends whose time is known; 0 without one."""
        return max((word.end_ms for word in self.words if word.end_ms is not None), default=0)


@dataclass(slots=True)
class ViewLatencies:
    """Every single measurement, of one stream or of several put together."""

    first_word_ms: list[float] = field(default_factory=list)
    emission_lag_ms: list[float] = field(default_factory=list)
    commit_lag_ms: list[float] = field(default_factory=list)
    finalisation_ms: list[float] = field(default_factory=list)
    num_words: int = 0
    num_words_right: int = 0
    num_utterances: int = 0
    num_utterances_never_final: int = 0
    words: WordErrors = field(default_factory=WordErrors)

    def add(self, other: ViewLatencies) -> None:
        """Put the measurements of another stream to these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def time_reference(
    text: str, language: str, finals: Iterable[FinalRecord], utterances: Mapping[int, UtteranceTimes]
) -> Spoken:
    """Return when the words of reference `text` end, by the word times of `finals` on the same sound.

    The two texts are matched by the least number of edits. A word that the finals have differently has the time of what
    stands in its place; one that they leave out has none.
    """
    heard: list[SpokenWord] = []
    for final in sorted(finals, key=lambda final: final.sequence):
        units = _units(final.text)
        ends = dict(word_ends(final, units))
        heard += [
            SpokenWord(unit, ends.get(place), final.utterance) for place, unit in enumerate(units) if _is_word(unit)
        ]
    units = _words(text)
    nothing = SpokenWord("", None, None)
    placed = {place: heard[other] for place, other in _pairs(units, [word.unit for word in heard])}
    words = [replace(placed.get(place, nothing), unit=unit) for place, unit in enumerate(units)]
    return Spoken(text, language, tuple(words), utterances)


def measure_views(
    views: Sequence[View], anchor_ms: float, spoken: Spoken, *, is_complete: bool = True
) -> ViewLatencies:
    """Return the figures of one stream.

    Only words that the last view shows as the reference has them are timed: what was heard wrongly has no time at which
    it was right. An utterance without such a word is never final.

    Args:
        views: in the order in which they were seen.
        anchor_ms: wall time of media sample 0.
        spoken: what is said in the sound.
        is_complete: whether the last view is of the whole sound. If not, it is matched with the beginning of the
            reference that it fits best.
    """
    text = views[-1].text if views else ""
    result = ViewLatencies(
        num_words=len(spoken.words),
        num_utterances=len(spoken.places),
        words=count_errors(spoken.text, text, spoken.language),
    )
    final = _words(text)
    seen, committed = _first_times(views, final)
    units = [word.unit for word in spoken.words]
    if is_complete:
        right = {place: other for place, other in _pairs(units, final) if units[place] == final[other]}
    else:
        right = {place: other for other, place in match_beginning(final, units)}
    result.num_words_right = len(right)
    for place, other in right.items():
        end_ms = spoken.words[place].end_ms
        if end_ms is not None:
            result.emission_lag_ms.append(seen[other] - anchor_ms - end_ms)
            if other in committed:
                result.commit_lag_ms.append(committed[other] - anchor_ms - end_ms)
    _measure_utterances(result, spoken, right, (seen, committed), anchor_ms)
    return result


def find_seconds_behind(views: Sequence[View], spoken: Spoken) -> float:
    """Return how many seconds of speech follow the last word of the reference that the last view shows."""
    final = _words(views[-1].text) if views else []
    pairs = match_beginning(final, [word.unit for word in spoken.words])
    ends = [spoken.words[place].end_ms or 0 for _, place in pairs]
    return (spoken.last_end_ms - max(ends, default=0)) / 1_000


def view_records(received: Iterable[Received]) -> list[View]:
    """Return what a viewer of surtitle's records sees: finals in order, then the partials behind the last of them."""
    finals: dict[int, FinalRecord] = {}
    partials: dict[int, PartialRecord] = {}
    views: list[View] = []
    for item in received:
        if not _take(item.record, finals, partials):
            continue
        committed = " ".join(final.text for _, final in sorted(finals.items()) if final.text)
        tail = " ".join(partial.text for _, partial in sorted(partials.items()))
        views.append(View(committed, tail, item.at_ms))
    return views


def match_beginning(shown: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Return (place in `shown`, place in `target`) of every word of `shown` that `target` has at its place.

    `shown` is matched with the beginning of `target` that costs the fewest edits (the shortest of several), so that a
    word too many or too few does not move all that follow it, and what is still to come costs nothing.
    """
    start = 0
    while start < min(len(shown), len(target)) and shown[start] == target[start]:
        start += 1
    left, right = shown[start:], target[start : start + 2 * (len(shown) - start)]  # more costs more
    costs = [list(range(len(right) + 1))]
    for line, word in enumerate(left):
        above, row = costs[-1], [line + 1]
        for column, other in enumerate(right):
            row.append(min(above[column] + (word != other), above[column + 1] + 1, row[-1] + 1))
        costs.append(row)
    line, column = len(left), costs[-1].index(min(costs[-1]))
    found: list[tuple[int, int]] = []
    while line and column:
        is_equal = left[line - 1] == right[column - 1]
        if costs[line][column] == costs[line - 1][column - 1] + (not is_equal):
            line, column = line - 1, column - 1
            if is_equal:
                found.append((start + line, start + column))
        elif costs[line][column] == costs[line - 1][column] + 1:
            line -= 1
        else:
            column -= 1
    return [(place, place) for place in range(start)] + found[::-1]


def _first_times(views: Sequence[View], final: Sequence[str]) -> tuple[dict[int, float], dict[int, float]]:
    """Return, by place in `final`, when its word was first seen there, and when first in the committed text."""
    seen: dict[int, float] = {}
    committed: dict[int, float] = {}
    before: tuple[list[str], list[str]] | None = None
    for view in views:
        certain, whole = _words(view.committed), _words(view.text)
        if before == (certain, whole):
            continue
        before = (certain, whole)
        for times, words in ((seen, whole), (committed, certain)):
            for _, place in match_beginning(words, final):
                times.setdefault(place, view.at_ms)
    return seen, committed


def _measure_utterances(
    result: ViewLatencies,
    spoken: Spoken,
    right: Mapping[int, int],
    times: tuple[Mapping[int, float], Mapping[int, float]],
    anchor_ms: float,
) -> None:
    seen, committed = times
    final_at_ms = -math.inf
    for number, places in spoken.places.items():
        own = [right[place] for place in places if place in right]
        utterance = spoken.utterances[number]
        if own:
            result.first_word_ms.append(seen[own[0]] - anchor_ms - utterance.onset_ms)
        # All that was said up to here, in earlier utterances too.
        final_at_ms = max([final_at_ms, *(committed.get(place, math.inf) for place in own)])
        if own and final_at_ms < math.inf:
            result.finalisation_ms.append(final_at_ms - anchor_ms - utterance.last_speech_ms)
        else:
            result.num_utterances_never_final += 1


def _take(record: BaseRecord, finals: dict[int, FinalRecord], partials: dict[int, PartialRecord]) -> bool:
    """Take a record into what is shown; return whether it changes it."""
    if isinstance(record, FinalRecord):
        finals.setdefault(record.sequence, record)
        partials.pop(record.utterance, None)
        return True
    if isinstance(record, PartialRecord) and all(final.utterance != record.utterance for final in finals.values()):
        partials[record.utterance] = record
        return True
    return False


def _pairs(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (place in `first`, place in `second`) of all words that the fewest edits pair, equal or not."""
    if not first or not second:
        return
    for edit in jiwer.process_words(" ".join(first), " ".join(second)).alignments[0]:
        if edit.type in {"equal", "substitute"}:
            yield from zip(
                range(edit.ref_start_idx, edit.ref_end_idx), range(edit.hyp_start_idx, edit.hyp_end_idx), strict=True
            )


def _units(text: str) -> list[str]:
    return [normalise_unit(unit) for unit in split_units(text)]


def _words(text: str) -> list[str]:
    """Return the words of `text` by their letters and digits; signs alone are none."""
    return [unit for unit in _units(text) if _is_word(unit)]


def _is_word(unit: str) -> bool:
    return any(map(str.isalnum, unit))
