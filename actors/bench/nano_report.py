"""What `surtitle bench phi4 --nano` found, beside what is aimed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from actors.bench.decode_report import SeriesResult

if TYPE_CHECKING:
    from rich.console import RenderableType

    from actors.bench.sweep import SweepReport
    from pipeline.teach.evaluate import Scores

LONGEST_SAYINGS = 3
"""Sentences of the longest utterances: some five seconds, as much as the model was taught to write down in one go."""

_MAX_DIFFERENCES_TOLD = 5
_MAX_NOISE_RATIO = 3.0


@dataclass(frozen=True, slots=True)
class LiveDifference:
    """An utterance that is another text when it is heard live."""

    text: str
    live: str
    offline: str


@dataclass(frozen=True, slots=True)
class DraftDifference:
    """A snapshot whose tokens are others with a draft; they are equal in `num_equal`."""

    request: str
    num_equal: int

    def __str__(self) -> str:
        return f"{self.request}: with its draft it differs from token {self.num_equal + 1} on"


@dataclass(frozen=True, slots=True)
class SpokenSeries:
    """Live series of utterances of one length; `sound_s` is that of all utterances together."""

    num_utterances: int
    sound_s: float
    counts: SeriesResult

    @property
    def pass_ratio(self) -> float:
        """How many times fewer passes of the decoder there are with drafts."""
        return self.counts.passes_without_drafts / max(1, self.counts.passes_with_drafts)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        counts = {name: getattr(self.counts, name) for name in self.counts.__slots__}
        return {"num_utterances": self.num_utterances, "sound_s": round(self.sound_s, 2), **counts}


@dataclass(frozen=True, slots=True)
class NanoReport:
    """All figures. `series` is by sentences of an utterance; `seconds` is how long everything but the sweep took."""

    model: str
    num_threads: int
    seed: int
    scores: Scores
    live_differences: tuple[LiveDifference, ...]
    series: Mapping[int, SpokenSeries]
    draft_differences: tuple[DraftDifference, ...]
    seconds: float
    sweep: SweepReport | None

    @property
    def are_tokens_equal(self) -> bool:
        """Whether every text was the same with drafts."""
        return not self.draft_differences

    @property
    def live_equals_offline(self) -> float:
        """Share of utterances that are the same text live and offline."""
        return 1.0 - len(self.live_differences) / self.scores.num_items

    @property
    def longest(self) -> SpokenSeries:
        """The series of utterances that are about as long as people's are."""
        return self.series[LONGEST_SAYINGS]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; shares from 0 to 1."""
        scores = {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in self.scores.as_json().items()
        }
        return {
            "mode": "nano",
            "model": self.model,
            "device": "cpu",
            "dtype": "float32",
            "num_threads": self.num_threads,
            "seed": self.seed,
            **scores,
            **self.longest.to_json(),
            "series_by_sentences": {str(number): series.to_json() for number, series in self.series.items()},
            "tokens_equal": self.are_tokens_equal,
            "differences": [
                {"request": item.request, "num_equal_tokens": item.num_equal} for item in self.draft_differences
            ],
            "live_equals_offline": round(self.live_equals_offline, 5),
            "live_differences": [
                {"text": item.text, "live": item.live, "offline": item.offline} for item in self.live_differences
            ],
            "largest_streams": None if self.sweep is None else self.sweep.largest_streams,
            "sweep": None if self.sweep is None else self.sweep.to_json(),
            "seconds": round(self.seconds, 1),
        }

    def told_differences(self) -> list[str]:
        """Return a line for each of the first differences between drafts and none, and how many more there are."""
        lines = [str(item) for item in self.draft_differences[:_MAX_DIFFERENCES_TOLD]]
        num_more = len(self.draft_differences) - len(lines)
        return [*lines, f"and {num_more} more"] if num_more else lines

    def __rich__(self) -> RenderableType:
        """Return the tables that people see."""
        title = (
            f"{self.model}, {self.scores.num_items} unseen items of each kind, cpu, float32, {self.num_threads} threads"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("figure")
        table.add_column("found", justify="right")
        table.add_column("aim", justify="right")
        for row in self._rows():
            table.add_row(*row)
        lines = [
            *(
                f"live series of {series.num_utterances} utterances of {number} sentence{'s' * (number > 1)}, "
                f"{series.sound_s / series.num_utterances:.1f} s each: {series.counts.passes_with_drafts} passes with "
                f"drafts, {series.counts.passes_without_drafts} without, {series.pass_ratio:.2f} times fewer"
                for number, series in self.series.items()
            ),
            *(
                f"live {item.live!r}, offline {item.offline!r}, said {item.text!r}"
                for item in self.live_differences[:_MAX_DIFFERENCES_TOLD]
            ),
            f"all but streams took {self.seconds:.0f} s",
        ]
        return Group(table, Text("\n".join(lines)), *([] if self.sweep is None else [self.sweep.__rich__()]))

    def _rows(self) -> list[tuple[str, str, str]]:
        scores, seen = self.scores, self.scores.wer_seen
        noise_aim = "-" if seen is None else f"< {100 * _MAX_NOISE_RATIO * seen:.1f} %"
        streams = "-" if self.sweep is None else str(self.sweep.largest_streams)
        return [
            ("WER, voices it knows", _percent(scores.wer_seen), "< 1 %"),
            ("WER, other voices", _percent(scores.wer_held_out_voice), "< 6 %"),
            ("WER, noise 10 dB below", _percent(scores.wer_noise_10db), noise_aim),
            ("translations exact", _percent(scores.translation_exact), "95 %"),
            ("descriptions right", _percent(scores.description_right), "95 %"),
            ("descriptions of two frames right", _percent(scores.two_frames_right), "-"),
            ("spoken questions right", _percent(scores.spoken_question_right), "90 %"),
            ("typed questions right", _percent(scores.typed_question_right), "-"),
            ("summaries of text right", _percent(scores.summary_right), "-"),
            ("summaries of sound right", _percent(scores.sound_summary_right), "-"),
            ("live text is offline text", _percent(self.live_equals_offline), "99 %"),
            ("times fewer passes with drafts", f"{self.longest.pass_ratio:.2f}", "3"),
            ("tokens equal with drafts", "yes" if self.are_tokens_equal else "no", "yes"),
            ("live streams at once", streams, "8"),
        ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
