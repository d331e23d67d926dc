"""How many streams a machine holds: which numbers are played, and what makes a round good. Plain Python, no I/O.

A round is N streams at once. Numbers double until a round misses a limit; then the distance between the largest good
and the smallest bad number is halved until they are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import Field

from pipeline.params import Params

IN_TIME = "in_time"
"""Missed by a round whose streams were not over in time. Its figures are of what came until then, so that they show no
limit as kept."""

LIMIT_NAMES = ("finalisation", "first_word", "emission_lag", "wer", "finals_lost", "streams_failed", IN_TIME)

_ROUNDING = 1e-9  # of a sum of two rates


class SweepLimits(Params):
    """What a round must keep to be good."""

    max_finalisation_p95_ms: float = Field(
        default=1_200.0, gt=0, description="last speech of an utterance to its final"
    )
    max_first_word_p95_ms: float | None = Field(
        default=1_500.0, gt=0, description="first speech to the first right word; null: not judged"
    )
    max_emission_lag_p95_ms: float | None = Field(
        default=2_500.0, gt=0, description="end of a word to its first appearance; null: not judged"
    )
    max_wer_points: float = Field(default=0.5, ge=0, description="word error rate above that of one stream, in points")
    max_finals_lost: int = Field(default=0, ge=0, description="utterances without a final")
    max_streams_failed: int = Field(default=0, ge=0, description="streams refused or ended by an error")

    @property
    def judged(self) -> tuple[str, ...]:
        """The names (of `LIMIT_NAMES`) of what is judged."""
        limits = {"first_word": self.max_first_word_p95_ms, "emission_lag": self.max_emission_lag_p95_ms}
        return tuple(name for name in LIMIT_NAMES if limits.get(name, 0.0) is not None)


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """What of a round is held against the limits. A percentile is None if nothing was measured."""

    num_streams: int
    finalisation_p95_ms: float | None
    first_word_p95_ms: float | None
    emission_lag_p95_ms: float | None
    wer: float | None  # None without a reference text
    num_finals_lost: int
    num_streams_failed: int
    num_streams_late: int


def find_missed(figures: RoundFigures, limits: SweepLimits, wer_of_one: float | None) -> tuple[str, ...]:
    """Return the names (of `LIMIT_NAMES`) of the limits that a round missed.

    What was not measured is missed, where it is judged; the word error rate is not judged without a reference text.
    """
    is_kept = {
        "finalisation": _is_within(figures.finalisation_p95_ms, limits.max_finalisation_p95_ms),
        "first_word": _is_within(figures.first_word_p95_ms, limits.max_first_word_p95_ms),
        "emission_lag": _is_within(figures.emission_lag_p95_ms, limits.max_emission_lag_p95_ms),
        "wer": figures.wer is None
        or wer_of_one is None
        or figures.wer <= wer_of_one + limits.max_wer_points / 100 + _ROUNDING,
        "finals_lost": figures.num_finals_lost <= limits.max_finals_lost,
        "streams_failed": figures.num_streams_failed <= limits.max_streams_failed,
        IN_TIME: figures.num_streams_late == 0,
    }
    return tuple(name for name in LIMIT_NAMES if not is_kept[name])


def find_largest_by_limit(
    rounds: Iterable[tuple[int, tuple[str, ...]]], names: Sequence[str] = LIMIT_NAMES
) -> dict[str, int]:
    """Return for each limit alone the largest number of streams that kept it; 0 if none did.

    Args:
        rounds: number of streams and the limits missed, of every round that was played.
        names: the limits that are judged.
    """
    largest = dict.fromkeys(names, 0)
    for num_streams, missed in rounds:
        for name in names:
            if name not in missed and IN_TIME not in missed:
                largest[name] = max(largest[name], num_streams)
    return largest


class StreamSearch:
    """Says which number of streams to play next; is told how each round went.

    Every number lies strictly between the largest good and the smallest bad one, so that none is played twice and the
    search ends, also where a larger number happens to go better than a smaller one.
    """

    def __init__(self, max_streams: int) -> None:
        if max_streams < 1:
            raise ValueError(f"max_streams is {max_streams}: at least one stream is needed")
        self._max_streams = max_streams
        self._largest_good = 0
        self._smallest_bad: int | None = None

    @property
    def largest_good(self) -> int:
        """The largest number of streams that was good; 0 if none was."""
        return self._largest_good

    def next_num_streams(self) -> int | None:
        """Return the number to play next; None when the search is over."""
        if self._smallest_bad is None:
            doubled = min(max(1, 2 * self._largest_good), self._max_streams)
            return doubled if doubled > self._largest_good else None
        middle = (self._largest_good + self._smallest_bad) // 2
        return middle if middle > self._largest_good else None

    def record(self, num_streams: int, *, is_good: bool) -> None:
        """Take note of a round.

        Raises:
            ValueError: if it is not the one that `next_num_streams` asked for.
        """
        if num_streams != self.next_num_streams():
            raise ValueError(f"a round of {num_streams} streams was not asked for")
        if is_good:
            self._largest_good = num_streams
        else:
            self._smallest_bad = num_streams


def _is_within(value: float | None, limit: float | None) -> bool:
    return limit is None or (value is not None and value <= limit)
