"""Options that several commands share, and the settings that they make."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.settings import LoadedSettings

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="NAME|FILE", help="A file in configs/ by name, or a path. Default: edge."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one value, as vad.hangover_ms=600. May be repeated."),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to FILE instead of to the terminal.")
]


class Runtime(StrEnum):
    """Where the models run."""

    RAY = "ray"
    LOCAL = "local"


RuntimeOption = Annotated[
    Runtime | None, typer.Option("--runtime", help="ray: as deployments of a cluster; local: in this process.")
]


ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|DIR", help="A known model, a directory or a hub id, for model.name."),
]


class OutputFormat(StrEnum):
    """How records are shown."""

    LIVE = "live"
    TEXT = "text"
    JSONL = "jsonl"
    VTT = "vtt"
    SRT = "srt"


FormatOption = Annotated[
    OutputFormat | None,
    typer.Option("--format", help="Default: by the suffix of --output; live on a terminal; text otherwise."),
]


def load(
    config: str | None, sets: Sequence[str] | None, runtime: Runtime | None = None, model: str | None = None
) -> LoadedSettings:
    """Return the settings of these options.

    A model's directory becomes absolute: the processes of a cluster have a working directory of their own.

    Raises:
        ConfigError: if a value is unknown or impossible.
    """
    from actors.settings import load_settings  # noqa: PLC0415 - takes half a second
    from actors.settings_layers import Override, parse_set_flag  # noqa: PLC0415

    overrides = []
    if model is not None:
        directory = Path(model).expanduser()
        name = str(directory.absolute()) if directory.is_dir() else model
        # The revision of another model means nothing for this one.
        overrides += [Override("model.name", name, "flag --model"), Override("model.revision", "null", "flag --model")]
    overrides += [parse_set_flag(text) for text in sets or ()]
    if runtime is not None:
        overrides.append(Override("runtime", runtime.value, "flag --runtime"))
    return load_settings(config, overrides)


def choose_format(asked: OutputFormat | None, output: Path | None, *, is_terminal: bool) -> OutputFormat:
    """Return the format for what was asked.

    Raises:
        typer.BadParameter: if a live view is to go into a file.
    """
    if output is not None and asked is OutputFormat.LIVE:
        raise typer.BadParameter("a live view needs a terminal; give --format text, jsonl, vtt or srt for a file")
    if asked is not None:
        return asked
    if output is not None:
        suffix = output.suffix.lower().lstrip(".")
        return OutputFormat(suffix) if suffix in {"jsonl", "vtt", "srt"} else OutputFormat.TEXT
    return OutputFormat.LIVE if is_terminal else OutputFormat.TEXT
