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
    settings: Settings, media: Path, num_streams: int, min_seconds: float, stagger_ms: int, *, is_json: bool
) -> None:
    """Measure latencies and CPU time of streams at once.

    Raises:
        SurtitleError: if media, models, Redis or the service cannot be used.
    """
    from actors.bench.live import LiveOptions, run_live  # noqa: PLC0415
    from actors.bench.tables import live_table  # noqa: PLC0415

    set_up_logging("surtitle: %(message)s")
    options = LiveOptions(
        media=media, num_streams=num_streams, settings=settings, min_seconds=min_seconds, stagger_ms=stagger_ms
    )
    with progress("starting the service") as report_progress:
        report = run_live(options, report_progress)
    print_report(live_table(report), report.to_json(), is_json=is_json)


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
    console = Console(file=sys.stdout)
    console.print(table)
    if is_json:
        print(json.dumps(values, ensure_ascii=False))  # noqa: T201 - the command line's own output
