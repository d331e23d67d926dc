"""Latencies of one stream from its records and when they were received: pure functions (docs/performance.md).

Media time is mapped to wall time by one anchor, the wall time at which sample 0 was heard. All times are milliseconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pipeline.items import CloseReason
from pipeline.records import ErrorRecord, FinalRecord, PartialRecord, Record
from pipeline.text.stable_prefix import normalise_unit, split_units

_UNITS_PER_EDIT = 4
"""Of so many units in front of a hard cut, a partial may have one otherwise and still tell where the cut lies."""


@dataclass(frozen=True, slots=True)
class Received:
    """One record and the wall time (ms) at which a consumer had read it from Redis."""

    record: Record
    at_ms: float


@dataclass(frozen=True, slots=True)
class UtteranceTimes:
    """Where the detector heard the first and last speech of an utterance, in media time."""

    onset_ms: int
    last_speech_ms: int


@dataclass(frozen=True, slots=True)
class Percentiles:
    """By nearest rank: the smallest value that at least p percent of all are not above; and the arithmetic mean.

    All are None without values.
    """

    p50: float | None
    p95: float | None
    mean: float | None
    num: int

    @staticmethod
    def of(values: Iterable[float]) -> Percentiles:
        """Return the percentiles of `values`."""
        ordered = sorted(values)
        mean = math.fsum(ordered) / len(ordered) if ordered else None
        return Percentiles(_nearest_rank(ordered, 50), _nearest_rank(ordered, 95), mean, len(ordered))

    def to_json(self) -> dict[str, float | int | None]:
        """Return the values rounded to a tenth of a millisecond."""
        p50, p95, mean = (None if value is None else round(value, 1) for value in (self.p50, self.p95, self.mean))
        return {"p50": p50, "p95": p95, "mean": mean, "num": self.num}


@dataclass(slots=True)
class Latencies:
    """Every single measurement, of one stream or of several put together."""

    first_word_ms: list[float] = field(default_factory=list)
    emission_lag_ms: list[float] = field(default_factory=list)
    stable_lag_ms: list[float] = field(default_factory=list)
    commit_lag_ms: list[float] = field(default_factory=list)
    finalisation_ms: list[float] = field(default_factory=list)
    cadence_ms: list[float] = field(default_factory=list)
    num_stable_words: int = 0
    num_stable_words_lost: int = 0
    num_partials: int = 0
    num_finals: int = 0
    num_finals_lost: int = 0
    num_duplicate_finals: int = 0

    def add(self, other: Latencies) -> None:
        """Put the measurements of another stream to these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def measure(received: Sequence[Received], anchor_ms: float, utterances: Mapping[int, UtteranceTimes]) -> Latencies:
    """Return the latencies of one stream of one channel.

    The first words of an utterance behind a hard cut were heard and shown as the end of the one before: what partials
    of that one had behind the words that its final kept counts as shown of this one.

    Args:
        received: its records in the order in which a consumer got them.
        anchor_ms: wall time of media sample 0.
        utterances: by number, all utterances that are in the sound: every one owes a final.
    """
    result = Latencies()
    partials: dict[int, list[tuple[PartialRecord, float]]] = defaultdict(list)
    finals: dict[int, tuple[FinalRecord, float]] = {}
    for item in received:
        if isinstance(item.record, PartialRecord):
            partials[item.record.utterance].append((item.record, item.at_ms))
            result.num_partials += 1
        elif isinstance(item.record, FinalRecord):
            result.num_duplicate_finals += item.record.utterance in finals
            finals.setdefault(item.record.utterance, (item.record, item.at_ms))
    result.num_finals = len(finals)
    result.num_finals_lost = sum(number not in finals for number in utterances)
    for history in partials.values():
        result.cadence_ms += [later - earlier for (_, earlier), (_, later) in pairwise(history)]
    histories = _find_histories(partials, finals)
    for number, (final, at_ms) in finals.items():
        times = utterances.get(number)
        if times is not None and final.text:
            num_stable, num_lost = count_stable_words([record for record, _ in partials[number]], final)
            result.num_stable_words += num_stable
            result.num_stable_words_lost += num_lost
            _measure_utterance(result, histories[number], (final, at_ms), _Wall(anchor_ms, times))
    return result


def find_error_records(received: Iterable[Received]) -> list[ErrorRecord]:
    """Return the records that stand in the place of one that failed for good."""
    return [item.record for item in received if isinstance(item.record, ErrorRecord)]


def count_lost_words(stable: Sequence[str], final: Sequence[str]) -> int:
    """Return how many word edits turn `stable` into a beginning of `final`: what viewers were shown and must unlearn.

    Units are compared by their letters and digits, without case. The beginning that costs least counts.
    """
    return min(_count_edits(list(map(normalise_unit, stable)), list(map(normalise_unit, final))))


def count_stable_words(partials: Sequence[PartialRecord], final: FinalRecord) -> tuple[int, int]:
    """Return how many words of an utterance were ever shown as stable, and how many of them the final does not keep."""
    longest = max(map(_stable_units, partials), key=len, default=[])
    return len(longest), count_lost_words(longest, split_units(final.text))


@dataclass(frozen=True, slots=True)
class _Wall:
    """An utterance's times on the consumer's clock."""

    anchor_ms: float
    times: UtteranceTimes

    @property
    def onset_ms(self) -> float:
        return self.anchor_ms + self.times.onset_ms

    @property
    def last_speech_ms(self) -> float:
        return self.anchor_ms + self.times.last_speech_ms


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a viewer saw of an utterance from wall time `at_ms` on: its units as they are compared, the first stable.

    `heard_ms` is the media time up to which sound had been heard for it.
    """

    units: list[str]
    num_stable: int
    heard_ms: int
    at_ms: float

    @staticmethod
    def of(record: PartialRecord, at_ms: float) -> _Shown:
        return _Shown(_compared_units(record.text), len(_stable_units(record)), record.end_ms, at_ms)


def _find_histories(
    partials: Mapping[int, Sequence[tuple[PartialRecord, float]]], finals: Mapping[int, tuple[FinalRecord, float]]
) -> dict[int, list[_Shown]]:
    """Return, by number, what was shown of every utterance with a final before that, in the order of time."""
    histories: dict[int, list[_Shown]] = {}
    for number in sorted(finals):
        shown = [_Shown.of(record, at_ms) for record, at_ms in partials.get(number, [])]
        if number - 1 in finals:
            shown += _behind_hard_cut(histories[number - 1], *finals[number - 1])
        histories[number] = sorted(shown, key=lambda seen: seen.at_ms)
    return histories


def _behind_hard_cut(history: Iterable[_Shown], final: FinalRecord, final_at_ms: float) -> list[_Shown]:
    """Return what `history`, of the utterance that ended with `final`, shows of the next one, if `final` is a hard cut.

    A partial that had heard nothing behind the cut cannot show it, and nobody sees one that comes behind its final.
    """
    if final.close_reason != CloseReason.LIMIT:
        return []
    kept = _compared_units(final.text)
    found: list[_Shown] = []
    for shown in history:
        place = _find_joint(kept, shown.units)
        if place is not None and shown.heard_ms > final.end_ms and shown.at_ms <= final_at_ms:
            num_stable = max(0, shown.num_stable - place)
            found.append(replace(shown, units=shown.units[place:], num_stable=num_stable))
    return found


def _find_joint(kept: Sequence[str], shown: Sequence[str]) -> int | None:
    """Return how many of the units `shown` are those that a final `kept`; None where that is not certain.

    It is the beginning of `shown` that the fewest edits turn `kept` into. Where the unit in front of the cut is another
    or missing, two beginnings are equally near, and what stands behind has no certain place.
    """
    edits = _count_edits(kept, shown)
    fewest = min(edits)
    if not kept or edits.count(fewest) > 1 or _UNITS_PER_EDIT * fewest > len(kept):
        return None
    return edits.index(fewest)


def _measure_utterance(
    result: Latencies, history: Sequence[_Shown], final_and_time: tuple[FinalRecord, float], wall: _Wall
) -> None:
    final, final_at_ms = final_and_time
    units = _compared_units(final.text)
    shown = [(seen.units, seen.at_ms) for seen in history]
    stable = [(seen.units[: seen.num_stable], seen.at_ms) for seen in history]
    whole = (units, final_at_ms)

    first_word_at_ms = _first_time(0, units, [*shown, whole])
    result.first_word_ms.append(first_word_at_ms - wall.onset_ms)
    result.finalisation_ms.append(final_at_ms - wall.last_speech_ms)
    for place, end_ms in word_ends(final, units):
        said_at_ms = wall.anchor_ms + end_ms
        result.emission_lag_ms.append(_first_time(place, units, [*shown, whole]) - said_at_ms)
        result.stable_lag_ms.append(_first_time(place, units, [*stable, whole]) - said_at_ms)
        result.commit_lag_ms.append(final_at_ms - said_at_ms)


def _first_time(place: int, units: Sequence[str], history: Sequence[tuple[Sequence[str], float]]) -> float:
    """Return when the final's unit at `place` was first seen there; the last of `history` is the final itself."""
    return next(at_ms for seen, at_ms in history if len(seen) > place and seen[place] == units[place])


def _count_edits(units: Sequence[str], whole: Sequence[str]) -> list[int]:
    """Return how many edits turn `units` into the first 0, 1, …, len(whole) units of `whole`."""
    before = list(range(len(whole) + 1))
    for row, unit in enumerate(units, start=1):
        current = [row]
        for column, other in enumerate(whole, start=1):
            current.append(min(before[column - 1] + (unit != other), before[column] + 1, current[-1] + 1))
        before = current
    return before


def _compared_units(text: str) -> list[str]:
    return [normalise_unit(unit) for unit in split_units(text)]


def _stable_units(record: PartialRecord) -> list[str]:
    """Return the units whose letters lie wholly within the stable prefix."""
    stable = record.text[: record.stable_chars]
    units = split_units(stable)
    if units and record.stable_chars < len(record.text):
        whole = split_units(record.text)[len(units) - 1]
        if normalise_unit(whole) != normalise_unit(units[-1]):
            units.pop()
    return [normalise_unit(unit) for unit in units]


def word_ends(final: FinalRecord, units: Sequence[str]) -> list[tuple[int, int]]:
    """Return (place among the units, end in media ms) of every word of the final that has a time.

    Words of the model and units of the text are matched by their characters without white space: a model's word may be
    several units (scripts without spaces) or part of one. A unit ends where the word of its last character ends.
    """
    ends: list[int] = []  # characters up to and with each word
    position = 0
    for word in final.words:
        position += len("".join(word.text.split()))
        ends.append(position)
    result: list[tuple[int, int]] = []
    position = 0
    for place, unit in enumerate(split_units(final.text)):
        position += len("".join(unit.split()))
        index = bisect_left(ends, position)
        if index < len(ends) and units[place]:
            result.append((place, final.words[index].end_ms))
    return result


def _nearest_rank(ordered: Sequence[float], percent: int) -> float | None:
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else None
