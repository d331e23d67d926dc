"""`surtitle config`: show, check."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from actors.cli.console import note
from actors.settings import LoadedSettings, check_config
from pipeline.errors import ConfigError

_WIDE = 60
"""Longer lines do not set the width of the column."""


def show_settings(loaded: LoadedSettings, *, is_changed_only: bool) -> None:
    """Print `key: value  # origin`, one a line."""
    values = [item for item in loaded.effective_values() if not is_changed_only or item.origin != "default"]
    width = max(
        (len(f"{item.key}: {item.value}") for item in values if len(item.key) + len(item.value) <= _WIDE), default=0
    )
    for item in values:
        typer.echo(f"{f'{item.key}: {item.value}':{width}}  # {item.origin}")


def check_files(names: Iterable[str]) -> int:
    """Print what is wrong with each file, all of it, and return the exit status."""
    status = 0
    for name in names:
        try:
            problems = [str(problem) for problem in check_config(name)]
        except ConfigError as exc:
            problems = [str(exc)]
        for problem in problems:
            note(f"surtitle: {problem}")
        if problems:
            status = 1
        else:
            typer.echo(f"{name}: ok")
    return status
