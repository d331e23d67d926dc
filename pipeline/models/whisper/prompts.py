"""How Whisper is asked: start, language, task, no timestamps."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.decode.prompting import Question
from pipeline.decode.sequence import Prompt
from pipeline.items import Task, TaskKind
from pipeline.models.whisper.tokenizer import WhisperTokenizer


class WhisperPrompter:
    """Implements `pipeline.decode.prompting.Prompter`."""

    def __init__(self, tokenizer: WhisperTokenizer) -> None:
        self._tokenizer = tokenizer
        self.ends = frozenset({tokenizer.eot})
        self.num_text_tokens = tokenizer.eot
        self.tasks = frozenset({TaskKind.TRANSCRIBE, TaskKind.TRANSLATE})
        self.languages = tokenizer.languages
        self.translates_to: tuple[str, ...] = ("en",) if tokenizer.is_multilingual else ()

    def prompt(self, question: Question) -> Prompt:
        """Return the prompt of a transcription or a translation to English.

        Raises:
            ValueError: if the model knows none of the languages, or the task is another one.
        """
        task, language = question.task, question.language
        if task.kind not in self.tasks:
            raise ValueError(f"Whisper cannot {task.kind}: it transcribes and translates")
        tokenizer = self._tokenizer
        if not tokenizer.is_multilingual:
            if language not in {None, "en"}:
                raise ValueError(f"language {language!r} is not one of this model's: it knows English only")
            return Prompt((tokenizer.sot, tokenizer.no_timestamps))
        task_token = tokenizer.transcribe if task.kind is TaskKind.TRANSCRIBE else tokenizer.translate
        choices: tuple[int, ...] = ()
        if language is None:
            known = [code for code in question.languages or self.languages if code in self.languages]
            if not known:
                raise ValueError(f"none of the languages {', '.join(question.languages)} is one of this model's")
            choices = tuple(tokenizer.language_token(code) for code in known)
            language = question.guess if question.guess in known else known[0]
        return Prompt((tokenizer.sot, tokenizer.language_token(language), task_token, tokenizer.no_timestamps), choices)

    def language_of(self, question: Question, prompt: Sequence[int]) -> str:  # noqa: ARG002 - the prompt says it
        """Return the ISO code of the language that `prompt` names."""
        return self._tokenizer.language_of(prompt[1]) if self._tokenizer.is_multilingual else "en"

    def text_of(self, task: Task, tokens: Sequence[int]) -> str:  # noqa: ARG002 - all of it, whatever the task
        """Return the text of `tokens`."""
        return self.decode(tokens)

    def num_tokens_before_text(self, task: Task, tokens: Sequence[int]) -> int:  # noqa: ARG002 - as `text_of`
        """Return 0."""
        return 0

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`."""
        return self._tokenizer.decode(tokens)
