"""What `surtitle bench phi4 --scaled` found."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_MAX_DIFFERENCES_TOLD = 5


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Where the time of the stages went, in one run. `other_s`: schedule, prompts, projections of the sound."""

    encoder_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    other_s: float = 0.0
    num_passes: int = 0


@dataclass(frozen=True, slots=True)
class Phi4Difference:
    """A text that is not that of the whole model. `margin`: between its two best logits at the first other token."""

    request: int
    num_equal: int
    margin: float

    def __str__(self) -> str:
        return (
            f"request {self.request} differs from token {self.num_equal + 1} on, where the whole model's best logit is "
            f"{self.margin:.2g} above its second"
        )


@dataclass(frozen=True, slots=True)
class Phi4Report:
    """All figures; seconds are those of each repeat, all requests together."""

    num_parameters: int
    num_threads: int
    num_requests: int
    sound_s: float
    max_new_tokens: int
    num_prompt_tokens: int
    num_tokens: int
    num_different_tokens: int
    engine_s: tuple[float, ...]
    generate_s: tuple[float, ...]
    stages: StageSeconds
    differences: tuple[Phi4Difference, ...]

    @property
    def are_tokens_equal(self) -> bool:
        """Whether every text was that of the whole model, in every run."""
        return not self.differences

    @property
    def speedup_vs_generate(self) -> float:
        """How many times the requests a second of generate the stages serve, by the best run of each."""
        return min(self.generate_s) / min(self.engine_s)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "mode": "scaled",
            "num_parameters": self.num_parameters,
            "device": "cpu",
            "dtype": "float32",
            "num_threads": self.num_threads,
            "num_requests": self.num_requests,
            "sound_s": self.sound_s,
            "max_new_tokens": self.max_new_tokens,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_tokens": self.num_tokens,
            "num_different_tokens": self.num_different_tokens,
            "tokens_equal": self.are_tokens_equal,
            "differences": [
                {"request": item.request, "num_equal_tokens": item.num_equal, "margin": item.margin}
                for item in self.differences
            ],
            "speedup_vs_generate": round(self.speedup_vs_generate, 3),
            "speedup_vs_generate_median": round(
                statistics.median(self.generate_s) / statistics.median(self.engine_s), 3
            ),
            "requests_per_s": {
                "engine": round(self.num_requests / min(self.engine_s), 3),
                "generate": round(self.num_requests / min(self.generate_s), 3),
            },
            "ways": {
                name: {
                    "best_s": round(min(seconds), 4),
                    "median_s": round(statistics.median(seconds), 4),
                    "seconds": [round(value, 4) for value in seconds],
                }
                for name, seconds in (("engine", self.engine_s), ("generate", self.generate_s))
            },
            "stages": {
                "encoder_s": round(self.stages.encoder_s, 4),
                "prefill_s": round(self.stages.prefill_s, 4),
                "decode_s": round(self.stages.decode_s, 4),
                "other_s": round(self.stages.other_s, 4),
                "num_passes": self.stages.num_passes,
            },
        }

    def told_differences(self) -> list[str]:
        """Return a line for each of the first differences, and how many more there are."""
        lines = [str(item) for item in self.differences[:_MAX_DIFFERENCES_TOLD]]
        num_more = len(self.differences) - len(lines)
        return [*lines, f"and {num_more} more"] if num_more else lines

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        title = (
            f"{self.num_requests} requests of {self.sound_s:g} s at once, random weights, "
            f"{self.num_parameters / 1e6:.0f} million parameters, cpu, float32, {self.num_threads} threads"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("way")
        for name in ("requests/s", "best s", "median s", "against generate"):
            table.add_column(name, justify="right")
        rows = (("stages, all at once", self.engine_s), ("transformers' generate, one by one", self.generate_s))
        for label, seconds in rows:
            table.add_row(
                label,
                f"{self.num_requests / min(seconds):.2f}",
                f"{min(seconds):.3f}",
                f"{statistics.median(seconds):.3f}",
                f"{min(self.generate_s) / min(seconds):.2f}",
            )
        stages = self.stages
        lines = [
            f"the stages' best run: encoder {stages.encoder_s:.3f} s, prompts {stages.prefill_s:.3f} s, single tokens "
            f"{stages.decode_s:.3f} s, all else {stages.other_s:.3f} s; {stages.num_passes} passes",
            f"prompts of {self.num_prompt_tokens} tokens; {self.num_tokens} tokens of text, "
            f"{self.num_different_tokens} different ones",
        ]
        if self.are_tokens_equal:
            lines.append("all texts have the same tokens both ways")
        return Group(table, Text("\n".join(lines)))
