"""`surtitle bench`: runs a benchmark with a progress bar and prints its table, or JSON as the last line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.cli.console import progress, set_up_logging
from actors.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_STREAMS = 4
DEFAULT_STAGGER_MS = 1_000

_FILE_WIDTH_CHARS = 120


def accuracy(settings: Settings, media: Path, *, is_given: bool, is_json: bool) -> None:
    """Measure word error rates over the recordings of a folder.

    Raises:
        SurtitleError: if media or models cannot be used.
    """
    from actors.bench.accuracy import AccuracyOptions, run_accuracy  # noqa: PLC0415 - imports torch
    from actors.bench.tables import accuracy_table  # noqa: PLC0415

    options = AccuracyOptions(media=media, settings=settings, language="given" if is_given else "auto")
    with show_bar() as advance:
        report = run_accuracy(options, advance)
    print_report(accuracy_table(report), report.to_json(), is_json=is_json)


def live(
    settings: Settings,
    media: Path,
    seconds: float | None,
    language: str,
    *,
    num_streams: int | None,
    stagger_ms: int | None,
    is_json: bool,
) -> None:
    """Measure latencies and CPU time of streams at once.

    Raises:
        SurtitleError: if media, models, Redis or the service cannot be used.
    """
    from actors.bench.live import LiveOptions, run_live  # noqa: PLC0415

    set_up_logging("surtitle: %(message)s")
    options = LiveOptions(
        media,
        num_streams=DEFAULT_STREAMS if num_streams is None else num_streams,
        settings=settings,
        seconds=seconds or 0.0,
        stagger_ms=DEFAULT_STAGGER_MS if stagger_ms is None else stagger_ms,
        language=language,
    )
    with progress("starting the service") as report_progress:
        report = run_live(options, report_progress)
    print_report(report, report.to_json(), is_json=is_json)


def sweep(
    settings: Settings,
    media: Path,
    seconds: float | None,
    language: str,
    *,
    max_streams: int | None,
    plot: Path | None,
    is_json: bool,
) -> None:
    """Measure how many streams stay within the limits, and draw it in the file `plot`.

    Raises:
        SurtitleError: if media, models, Redis or the service cannot be used, or nothing can be drawn.
    """
    from actors.bench.live import LiveOptions  # noqa: PLC0415
    from actors.bench.plot import check_plotting, draw_sweep  # noqa: PLC0415
    from actors.bench.sweep import DEFAULT_MAX_STREAMS, DEFAULT_SECONDS, SweepOptions, run_sweep  # noqa: PLC0415

    if plot is not None:
        check_plotting(plot)
    set_up_logging("surtitle: %(message)s")
    asked_s = DEFAULT_SECONDS if seconds is None else seconds
    options = SweepOptions(
        LiveOptions(media, settings=settings, seconds=asked_s, language=language),
        max_streams=DEFAULT_MAX_STREAMS if max_streams is None else max_streams,
    )
    with progress("starting the service") as report_progress:
        report = run_sweep(options, report_progress)
    if plot is not None:
        draw_sweep(report, plot)
    print_report(report, report.to_json(), is_json=is_json)


def memory(settings: Settings, media: Path, minutes: float, language: str, *, is_json: bool) -> bool:
    """Measure the memory of the service over one long stream; return whether it stayed flat.

    Raises:
        SurtitleError: if media, models, Redis or the service cannot be used.
    """
    from actors.bench.memory import MemoryOptions, run_memory  # noqa: PLC0415

    set_up_logging("surtitle: %(message)s")
    options = MemoryOptions(media, settings=settings, media_s=60 * minutes, language=language)
    with progress("starting the service") as report_progress:
        report = run_memory(options, report_progress)
    print_report(report, report.to_json(), is_json=is_json)
    return report.is_flat


@contextlib.contextmanager
def show_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield what takes note of progress; shown where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _what, _num_done, _num_all: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)

        def advance(what: str, num_done: int, num_all: int) -> None:
            bar.update(task, description=what, completed=num_done, total=num_all)

        yield advance


def print_report(table: RenderableType, values: dict[str, Any], *, is_json: bool) -> None:
    """Print `table`, and `values` as one line of JSON behind it if asked for."""
    # A file or pipe has no width of its own, and what a table leaves out for want of it is lost.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _FILE_WIDTH_CHARS)
    console.print(table)
    if is_json:
        print(json.dumps(values, ensure_ascii=False))  # noqa: T201 - the command line's own output
