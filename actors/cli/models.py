"""`surtitle models`: list, pull, verify, make-tiny."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import typer

from actors.cli.console import note, progress
from pipeline.models.inventory import list_models, verify_model
from pipeline.models.weights import pull_model


def show_models() -> None:
    """Print one line a model."""
    for info in list_models():
        state = "installed" if info.is_installed else "not installed"
        kind = f"tier {info.tier}, {info.layout} layout"
        typer.echo(f"{info.name}\t{state}\t{info.num_bytes / 1e6:.0f} MB\t{info.licence}\t{info.description}; {kind}")
        if info.location is not None:
            typer.echo(f"    {info.location}")


def pull(name: str, revision: str | None) -> None:
    """Fetch a model with a progress bar.

    Raises:
        ModelError: if it cannot be fetched.
    """
    if not sys.stderr.isatty():
        files = pull_model(name, revision)
        note(f"{name} is complete in {files.directory}")
        return
    from rich.console import Console  # noqa: PLC0415 - only for people who watch
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"fetching {name}", total=None)

        def advance(what: str, num_done: int, num_bytes: int) -> None:
            bar.update(task, description=what, completed=num_done, total=num_bytes)

        files = pull_model(name, revision, advance)
    note(f"{name} is complete in {files.directory}")


def verify(name: str, revision: str | None) -> int:
    """Print one line a file and return the exit status.

    Raises:
        ModelError: if the model cannot be located or read.
    """
    with progress(f"hashing the files of {name}"):
        report = verify_model(name, revision)
    note(f"{name}: tier {report.tier}, {report.layout} layout")
    for file in report.files:
        state = {True: "ok", False: "WRONG", None: "no hash is known"}[file.is_ok]
        typer.echo(f"{state}\t{file.sha256}\t{file.num_bytes}\t{file.path}")
        if file.is_ok is False:
            note(f"surtitle: {file.path} is not the pinned file: expected sha256 {file.expected_sha256}")
    return 0 if report.is_ok else 1


def write_tiny(directory: Path, layout: Literal["native", "original"], seed: int) -> None:
    """Write a random phi4 checkpoint, then print one line a file and what is in them.

    Raises:
        ModelError: if the directory holds something else, or cannot be written.
    """
    with progress("writing a tiny checkpoint"):
        from pipeline.models.phi4.tiny import write_tiny_checkpoint  # noqa: PLC0415 - torch takes 3 s to import

        tiny = write_tiny_checkpoint(directory, seed, layout)
    for path in tiny.paths:
        typer.echo(f"{path.stat().st_size}\t{path}")
    num_bytes = sum(path.stat().st_size for path in tiny.paths)
    note(
        f"{directory}: tier phi4, {layout} layout, seed {seed}: {len(tiny.paths)} files, "
        f"{tiny.num_parameters} random parameters, {num_bytes} bytes"
    )
