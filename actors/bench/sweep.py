"""`surtitle bench live --sweep`: how many live streams this machine holds, on one running service.

Which numbers are played and what a good round is: `actors.bench.search`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.bench.latency import Percentiles
from actors.bench.live import LiveOptions, LiveReport, Progress, open_bench
from actors.bench.search import RoundFigures, StreamSearch, SweepLimits, find_largest_by_limit, find_missed

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_MAX_STREAMS = 64
DEFAULT_SECONDS = 60.0
START_CYCLE_MS = 8_000.0
"""The streams of every round start within this time, evenly: a sentence and its pause. A fixed distance would let few
streams speak in unison and stretch rounds of many."""


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What to play (its `num_streams` and `stagger_ms` are not used), and how far to go."""

    live: LiveOptions
    max_streams: int = DEFAULT_MAX_STREAMS
    limits: SweepLimits = field(default_factory=SweepLimits)
    start_cycle_ms: float = START_CYCLE_MS


@dataclass(frozen=True, slots=True)
class SweepRound:
    """One round and the limits that it missed."""

    report: LiveReport
    missed: tuple[str, ...]

    @property
    def num_streams(self) -> int:
        """How many streams were played at once."""
        return len(self.report.streams)


@dataclass(frozen=True, slots=True)
class SweepReport:
    """All rounds, in the order in which they were played."""

    largest_streams: int
    limits: SweepLimits
    rounds: tuple[SweepRound, ...]

    @property
    def largest_streams_by_limit(self) -> dict[str, int]:
        """For each limit alone the largest number of streams played that kept it; 0 if none did."""
        rounds = ((played.num_streams, played.missed) for played in self.rounds)
        return find_largest_by_limit(rounds, self.limits.judged)

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values; a round has what `LiveReport.to_json` gives, and its verdict."""
        return {
            "largest_streams": self.largest_streams,
            "largest_streams_by_limit": self.largest_streams_by_limit,
            "limits": self.limits.model_dump(),
            "rounds": [
                {**played.report.to_json(), "is_good": not played.missed, "missed": list(played.missed)}
                for played in self.rounds
            ],
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        from actors.bench.tables import sweep_table  # noqa: PLC0415 - tables know the reports, not the other way

        return sweep_table(self)


def run_sweep(options: SweepOptions, on_progress: Progress | None = None) -> SweepReport:
    """Start the service, play rounds until the search is over, stop it and return what was measured.

    A stream that fails or is not over in time makes its round a miss.

    Raises:
        MediaError: if the media cannot be used.
        ServiceError, StoreError, ModelError: if the service does not start, or breaks.
    """
    return asyncio.run(measure_sweep(options, on_progress))


async def measure_sweep(options: SweepOptions, on_progress: Progress | None = None) -> SweepReport:
    """Do what `run_sweep` does, on a running event loop."""
    search = StreamSearch(options.max_streams)
    rounds: list[SweepRound] = []
    wer_of_one: float | None = None
    async with open_bench(options.live, options.max_streams, on_progress) as bench:
        while (num_streams := search.next_num_streams()) is not None:
            report = await bench.play(num_streams, options.start_cycle_ms / num_streams)
            figures = figures_of(report)
            if num_streams == 1:
                wer_of_one = figures.wer
            missed = find_missed(figures, options.limits, wer_of_one)
            rounds.append(SweepRound(report, missed))
            search.record(num_streams, is_good=not missed)
    return SweepReport(search.largest_good, options.limits, tuple(rounds))


def figures_of(report: LiveReport) -> RoundFigures:
    """Return what of a round is held against the limits."""
    total, words = report.latencies, report.words
    return RoundFigures(
        num_streams=len(report.streams),
        finalisation_p95_ms=Percentiles.of(total.finalisation_ms).p95,
        first_word_p95_ms=Percentiles.of(total.first_word_ms).p95,
        emission_lag_p95_ms=Percentiles.of(total.emission_lag_ms).p95,
        wer=None if words is None else words.rate,
        num_finals_lost=total.num_finals_lost,
        num_streams_failed=report.num_streams_failed,
        num_streams_late=report.num_streams_late,
    )
