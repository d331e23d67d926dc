"""The seam between the decode engine and how a model is asked: tasks in, prompts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.decode.runner import Context, DecodeRunner
from pipeline.decode.sequence import Prompt
from pipeline.items import Task, TaskKind


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked about a context.

    A `language` of None is to be detected among `languages` (empty: all), `guess` being a likely one. `text` is what is
    to be summarised, or a typed question. `transcript` holds the tokens of the transcription, if there is one already.
    """

    task: Task
    language: str | None
    languages: tuple[str, ...]
    guess: str | None
    text: str
    context: Context
    transcript: tuple[int, ...] = ()


class Prompter(Protocol):
    """How a model is asked: its special tokens, tasks, languages and targets (ISO 639-1)."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        ...

    @property
    def num_text_tokens(self) -> int:
        """Tokens below this are text."""
        ...

    @property
    def tasks(self) -> frozenset[TaskKind]:
        """What the model can be asked."""
        ...

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that the model hears."""
        ...

    @property
    def translates_to(self) -> tuple[str, ...]:
        """Languages that the model translates to."""
        ...

    def prompt(self, question: Question) -> Prompt:
        """Return the prompt of a question.

        Raises:
            ValueError: if the model cannot be asked that; the message says why.
        """
        ...

    def language_of(self, question: Question, prompt: Sequence[int]) -> str:
        """Return the language of what was heard, or `und`; `prompt` is that of `question`, its language settled.

        Of a question about no sound it is the language of the answer.
        """
        ...

    def text_of(self, task: Task, tokens: Sequence[int]) -> str:
        """Return what `task` asked for of the decoded tokens."""
        ...

    def num_tokens_before_text(self, task: Task, tokens: Sequence[int]) -> int:
        """Return how many of the decoded tokens stand before what `task` asked for; 0 as long as that is not known."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A loaded model: its runner and how it is asked."""

    runner: DecodeRunner
    prompter: Prompter
    tier: Literal["edge", "phi4"] = "edge"
