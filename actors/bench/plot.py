"""A drawing of a sweep: latency against the number of streams. matplotlib comes with the extra `bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from actors.bench.latency import Percentiles
from actors.bench.sweep import SweepReport, SweepRound
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_INCHES = (11.0, 4.2)
_DOTS_PER_INCH = 120


def check_plotting(path: Path) -> None:
    """Return if `draw_sweep` can write a PNG to `path`: to be asked before minutes are spent on what is to be drawn.

    Raises:
        ConfigError: if matplotlib is missing, or `path` is no place for a PNG.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - an extra, and half a second
    except ImportError as exc:
        raise ConfigError(
            f"--plot needs matplotlib, which is not installed: {sys.executable} -m pip install 'surtitle[bench]'"
        ) from exc
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes PNG files, and {path.name!r} does not end in .png")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--plot cannot write {path}: its folder must be there")


def draw_sweep(report: SweepReport, path: Path) -> None:
    """Write p50 and p95 of the three latencies against the number of streams, with their limits, as a PNG.

    Raises:
        ConfigError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra, and half a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    limits = report.limits
    drawn = (
        ("first word", "first_word_ms", limits.max_first_word_p95_ms),
        ("emission lag", "emission_lag_ms", limits.max_emission_lag_p95_ms),
        ("finalisation", "finalisation_ms", limits.max_finalisation_p95_ms),
    )
    rounds = sorted(report.rounds, key=lambda played: played.num_streams)
    for axes, (title, name, limit_ms) in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        _draw(axes, rounds, name, limit_ms)
        axes.set_title(title)
    figure.suptitle(f"{report.largest_streams} live streams within the limits, {report.rounds[0].report.model}")
    try:
        figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    except OSError as exc:
        raise ConfigError(f"--plot cannot write {path}: {exc.strerror}") from exc


def _draw(axes: Axes, rounds: list[SweepRound], name: str, limit_ms: float | None) -> None:
    values = [Percentiles.of(getattr(played.report.latencies, name)) for played in rounds]
    for label, ordinates in (("p50", [value.p50 for value in values]), ("p95", [value.p95 for value in values])):
        points = [
            (played.num_streams, ms / 1_000) for played, ms in zip(rounds, ordinates, strict=True) if ms is not None
        ]
        axes.plot([number for number, _ in points], [seconds for _, seconds in points], marker="o", label=label)
    if limit_ms is not None:
        axes.axhline(limit_ms / 1_000, color="tab:red", linestyle="--", label="limit of p95")
    axes.set_xscale("log", base=2)
    axes.set_xticks([played.num_streams for played in rounds], [str(played.num_streams) for played in rounds])
    axes.minorticks_off()
    axes.set_xlabel("live streams")
    axes.set_ylabel("s")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
