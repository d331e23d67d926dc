"""What people are told beside the captions: progress, notes and errors, all on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator


def fail(error: BaseException) -> int:
    """Write one line that says what and why, and return the exit status of a failed job."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    note(f"surtitle: {' '.join(str(error).split())}")
    return 1


def set_up_logging(line_format: str) -> None:
    """Log warnings to stderr as `line_format` says, and keep the news of libraries out of it."""
    logging.basicConfig(level=logging.WARNING, format=line_format)
    # Ray Serve sets level and handler of its logger when it is imported; a filter outlives that.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)


def note(text: str) -> None:
    """Write `text` and a line end to stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - the command line's own output


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show `text`, a spinner and the time that passes until the block ends; yields what changes the text.

    Nothing is shown where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.console import Console  # noqa: PLC0415 - only for people who watch
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(text, total=None)
        yield lambda changed: bar.update(task, description=changed)
