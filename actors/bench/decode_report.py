"""What `surtitle bench decoder` found: every way's time, passes and tokens, and where texts differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_LABELS = {
    "engine": "engine",
    "without_drafts": "engine without drafts",
    "one_by_one": "engine without drafts, one by one",
    "one_by_one_with_drafts": "engine with drafts, one by one",
    "generate": "transformers' generate, one by one",
    "reduced_precision": "engine, reduced precision",
    "series_with_drafts": "the live series with drafts",
}
_MAX_DIFFERENCES_TOLD = 5


@dataclass(frozen=True, slots=True)
class WayResult:
    """One way to decode all requests: `seconds` of each repeat; `num_different` texts are not the plain engine's."""

    name: str
    seconds: tuple[float, ...]
    num_tokens: int
    num_passes: int
    num_steps: int
    num_different: int

    @property
    def tokens_per_s(self) -> float:
        """Text tokens, ends included, a second; by the median time."""
        return self.num_tokens / statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "tokens_per_s": round(self.tokens_per_s, 2),
            "tokens_per_s_best": round(self.num_tokens / min(self.seconds), 2),
            "median_s": round(statistics.median(self.seconds), 4),
            "best_s": round(min(self.seconds), 4),
            "seconds": [round(value, 4) for value in self.seconds],
            "num_tokens": self.num_tokens,
            "num_passes": self.num_passes,
            "num_steps": self.num_steps,
        }


@dataclass(frozen=True, slots=True)
class SeriesResult:
    """The live series: passes are those of the requests, summed; steps are the engine's, many requests in each."""

    num_snapshots: int = 0
    num_tokens: int = 0
    passes_with_drafts: int = 0
    passes_without_drafts: int = 0
    steps_with_drafts: int = 0
    steps_without_drafts: int = 0

    def __add__(self, other: SeriesResult) -> SeriesResult:
        return SeriesResult(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Difference:
    """A text that is not that of the engine without drafts and batches; they are equal in `num_equal` tokens."""

    request: str
    way: str
    num_equal: int

    def __str__(self) -> str:
        return f"{self.request}: {_LABELS[self.way]} differs from token {self.num_equal + 1} on"


@dataclass(frozen=True, slots=True)
class DecoderReport:
    """All figures. `ways` in the order of the table; `reduced` is set where partials are not decoded in float32."""

    model: str
    device: str
    dtype: str
    partial_dtype: str
    num_threads: int
    num_requests: int
    num_utterances: int
    num_drafts: int
    num_guarded: int
    num_positions: int
    ways: tuple[WayResult, ...]
    reduced: WayResult | None
    series: SeriesResult
    differences: tuple[Difference, ...]

    @property
    def are_tokens_equal(self) -> bool:
        """Whether every text was the same every way, in every run."""
        return not self.differences

    def ratio(self, way: str, to: str) -> float:
        """Return how many times the tokens a second of way `to` way `way` gives."""
        speeds = {result.name: result.tokens_per_s for result in self.ways}
        return speeds[way] / speeds[to]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        reduced = self.reduced
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "num_threads": self.num_threads,
            "num_requests": self.num_requests,
            "num_utterances": self.num_utterances,
            "num_drafts": self.num_drafts,
            "num_guarded": self.num_guarded,
            "num_context_positions": self.num_positions,
            "tokens_equal": self.are_tokens_equal,
            "differences": [
                {"request": item.request, "way": item.way, "num_equal_tokens": item.num_equal}
                for item in self.differences
            ],
            "speedup_vs_generate": round(self.ratio("engine", "generate"), 3),
            "speedup_of_batching": round(self.ratio("without_drafts", "one_by_one"), 3),
            "speedup_of_drafts": round(self.ratio("engine", "without_drafts"), 3),
            "tokens_per_s": {way.name: round(way.tokens_per_s, 2) for way in self.ways},
            "ways": {way.name: way.to_json() for way in self.ways},
            "num_snapshots": self.series.num_snapshots,
            "passes_with_drafts": self.series.passes_with_drafts,
            "passes_without_drafts": self.series.passes_without_drafts,
            "steps_with_drafts": self.series.steps_with_drafts,
            "steps_without_drafts": self.series.steps_without_drafts,
            "reduced_precision": None
            if reduced is None
            else {
                "dtype": self.partial_dtype,
                **reduced.to_json(),
                "different_share": round(reduced.num_different / self.num_requests, 4),
            },
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        title = (
            f"{self.num_requests} requests from {self.num_utterances} utterances, {self.model} on {self.device}, "
            f"{self.dtype}, {self.num_threads} threads"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("way")
        for name in ("tokens/s", "best", "median s", "best s", "passes", "steps", "against generate"):
            table.add_column(name, justify="right")
        slowest = next(way for way in self.ways if way.name == "generate").tokens_per_s
        for way in (*self.ways, *([] if self.reduced is None else [self.reduced])):
            table.add_row(
                _LABELS[way.name],
                f"{way.tokens_per_s:,.1f}",
                f"{way.num_tokens / min(way.seconds):,.1f}",
                f"{statistics.median(way.seconds):.3f}",
                f"{min(way.seconds):.3f}",
                f"{way.num_passes:,}",
                f"{way.num_steps:,}",
                f"{way.tokens_per_s / slowest:.2f}",
            )
        return Group(table, Text("\n".join(self._lines())))

    def told_differences(self) -> list[str]:
        """Return a line for each of the first differences, and how many more there are."""
        lines = [str(item) for item in self.differences[:_MAX_DIFFERENCES_TOLD]]
        num_more = len(self.differences) - len(lines)
        return [*lines, f"and {num_more} more"] if num_more else lines

    def _lines(self) -> list[str]:
        series = self.series
        fewer = series.passes_without_drafts / max(1, series.passes_with_drafts)
        lines = [
            f"batching {self.ratio('without_drafts', 'one_by_one'):.2f} times as fast, drafts another "
            f"{self.ratio('engine', 'without_drafts'):.2f} times; {self.num_drafts} requests had a draft",
            f"live series, {series.num_snapshots} snapshots: {series.passes_with_drafts} passes with drafts, "
            f"{series.passes_without_drafts} without, {fewer:.2f} times fewer; "
            f"{series.steps_with_drafts} and {series.steps_without_drafts} steps of the engine",
            f"texts that a guard has cut, compared up to the cut: {self.num_guarded}",
        ]
        if self.reduced is not None:
            lines.append(
                f"in {self.partial_dtype} {self.reduced.num_different} of {self.num_requests} texts are others"
            )
        if self.are_tokens_equal:
            lines.append("all texts have the same tokens every way")
        return lines
