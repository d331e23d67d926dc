"""From the flags of `surtitle caption` to the specification of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from actors.spec import StreamSpec
from pipeline.errors import MediaError, SourceNotFound

_FLAGS = {
    "source": "SOURCE",
    "stream_id": "--stream-id",
    "language": "--language",
    "translate_to": "--translate",
    "summary_minutes": "--summary",
}

_FORMS = {
    "stream_id": "give 1 to 64 of A-Z a-z 0-9 . _ -",
    "language": "give a code such as de, or auto",
    "translate_to": "give a code such as en",
}


def make_spec(**values: Any) -> StreamSpec:
    """Return the specification; a path becomes absolute, since a gateway has a working directory of its own.

    Raises:
        typer.BadParameter: naming the flag, if a value has not the right form.
        SourceNotFound, MediaError: as `check_path`.
    """
    values["source"] = check_path(values["source"])
    try:
        return StreamSpec(**values)
    except ValidationError as exc:
        details = exc.errors(include_url=False, include_context=False, include_input=False)
        field = str(details[0]["loc"][0])
        expected = _FORMS.get(field) or details[0]["msg"]
        raise typer.BadParameter(f"{_FLAGS.get(field, field)}: {expected}") from exc


def check_path(source: str) -> str:
    """Return the path of a media file as an absolute one, since a gateway has a directory of its own; a URL as it is.

    Raises:
        SourceNotFound: if it leads nowhere; told here, before any model is loaded.
        MediaError: if it is a directory.
    """
    if "://" in source:
        return source
    path = Path(source).expanduser()
    if not path.exists():
        raise SourceNotFound(f"{path}: no such file: check the path")
    if path.is_dir():
        raise MediaError(f"{path} is a directory: give one media file")
    return str(path.absolute())
