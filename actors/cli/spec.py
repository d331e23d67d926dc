"""From the flags of `surtitle caption` to the specification of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from actors.spec import StreamSpec

_FLAGS = {
    "source": "SOURCE",
    "stream_id": "--stream-id",
    "language": "--language",
    "translate_to": "--translate",
    "summary_minutes": "--summary",
}


def make_spec(**values: Any) -> StreamSpec:
    """Return the specification; a path becomes absolute, since a gateway has a working directory of its own.

    Raises:
        typer.BadParameter: naming the flag, if a value has not the right form.
    """
    if "://" not in values["source"]:
        values["source"] = str(Path(values["source"]).expanduser().absolute())
    try:
        return StreamSpec(**values)
    except ValidationError as exc:
        detail = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        flag = _FLAGS.get(str(detail["loc"][0]), str(detail["loc"][0]))
        raise typer.BadParameter(f"{flag}: {detail['msg']}") from exc
