"""What the engine asks of a model about one request."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.decode.runner import Context
from pipeline.items import Task


@dataclass(frozen=True, slots=True)
class Question:
    """One task about one context.

    `language` None is to be detected among `languages` (empty: all), of which `guess` was the last one in the stream.
    `text` is what is to be summarised, or a typed question. `transcript` holds the tokens of the context's
    transcription, if there is one already.
    """

    task: Task
    language: str | None
    languages: tuple[str, ...]
    guess: str | None
    text: str
    context: Context
    transcript: tuple[int, ...] = ()
