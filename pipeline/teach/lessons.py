"""Requests as the service makes them, with their answers: the tokens of one lesson."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pipeline.decode.prompting import Question
from pipeline.decode.runner import Context
from pipeline.items import Embeddings, JobKey, Picture, Pictures, Task, TaskKind
from pipeline.models.phi4.config import Phi4Config
from pipeline.models.phi4.prompts import SEPARATOR, Phi4Prompter
from pipeline.models.phi4.tokenizer import END, PICTURE, SOUND, Phi4Tokenizer
from pipeline.teach.network import Row
from pipeline.vision.crop_layout import CropLayout

_KEY = JobKey("lesson", TaskKind.ANSWER, 1)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is asked and what is to be said.

    Args:
        task: as the service asks.
        answer: the text of the answer; of a chained translation what stands behind the separator.
        transcript: of a chained translation what stands before it; None: it is asked for directly.
        text: what is to be summarised, or a typed question.
    """

    task: Task
    answer: str
    transcript: str | None = None
    text: str = ""


class Teacher:
    """Makes rows of lessons, through the prompter that the service uses."""

    def __init__(self, tokenizer: Tokenizer, config: Phi4Config) -> None:
        self.tokenizer = Phi4Tokenizer(tokenizer)
        self._chained = Phi4Prompter(self.tokenizer, config)
        self._direct = Phi4Prompter(self.tokenizer, config, chains_translations=False)
        self._sound, self._picture = self.tokenizer.special(SOUND), self.tokenizer.special(PICTURE)

    def tokens(
        self, lesson: Lesson, num_sound_tokens: int = 0, layouts: Sequence[CropLayout] = ()
    ) -> tuple[tuple[int, ...], int]:
        """Return prompt and answer with its end, and how many tokens the prompt has.

        The separator is encoded alone, as the draft of a translation has it.
        """
        sound = Embeddings(_KEY, np.empty((num_sound_tokens, 0), np.float32), 0) if num_sound_tokens else None
        pictures = tuple(Picture(layout, np.empty(0, np.float32)) for layout in layouts)
        context = Context(sound, Pictures(_KEY, pictures) if pictures else None)
        is_direct = lesson.task.kind is TaskKind.TRANSLATE and lesson.transcript is None
        prompter = self._direct if is_direct else self._chained
        prompt = prompter.prompt(Question(lesson.task, None, (), None, lesson.text, context)).tokens
        return (*prompt, *self.answer(lesson)), len(prompt)

    def answer(self, lesson: Lesson) -> tuple[int, ...]:
        """Return the tokens of the answer and of its end."""
        encode = self.tokenizer.encode
        if lesson.transcript is None:
            spoken = encode(lesson.answer)
        else:
            spoken = [*encode(lesson.transcript), *encode(f" {SEPARATOR}"), *encode(f" {lesson.answer}")]
        return (*spoken, self.tokenizer.special(END))

    def row_of_text(self, lesson: Lesson, sound: Sequence[int] = (), picture: Sequence[int] = ()) -> Row:
        """Return a row in which tokens of text stand in for sound and for a picture: where both come in later."""
        layout = CropLayout(1, 1, 1, 1, 2, 1) if picture else None
        tokens, num_prompt_tokens = self.tokens(lesson, 1 if sound else 0, [layout] if layout else [])
        found: list[int] = []
        has_picture = False
        for token in tokens:
            if token == self._sound:
                found += sound
            elif token != self._picture:
                found.append(token)
            elif not has_picture:
                has_picture = True
                found += picture
        return Row(tuple(found), num_prompt_tokens + len(found) - len(tokens))
