"""How Whisper is asked: start, language, task, no timestamps."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.decode.sequence import Prompt
from pipeline.items import Task, TaskKind
from pipeline.models.whisper.tokenizer import WhisperTokenizer


class WhisperPrompter:
    """Implements `pipeline.decode.embeddings_to_hypotheses.Prompter`."""

    def __init__(self, tokenizer: WhisperTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eot = tokenizer.eot
        self.languages = tokenizer.languages
        self.translates_to: tuple[str, ...] = ("en",) if tokenizer.is_multilingual else ()

    def prompt(self, task: Task, language: str | None, languages: Sequence[str], guess: str | None) -> Prompt:
        """Return the prompt of `task` in `language`; None is to be detected among `languages` (empty: all).

        Raises:
            ValueError: if the model knows none of the languages.
        """
        tokenizer = self._tokenizer
        if not tokenizer.is_multilingual:
            if language not in {None, "en"}:
                raise ValueError(f"language {language!r} is not one of this model's: it knows English only")
            return Prompt((tokenizer.sot, tokenizer.no_timestamps))
        task_token = tokenizer.transcribe if task.kind is TaskKind.TRANSCRIBE else tokenizer.translate
        choices: tuple[int, ...] = ()
        if language is None:
            known = [code for code in languages or self.languages if code in self.languages]
            if not known:
                raise ValueError(f"none of the languages {', '.join(languages)} is one of this model's")
            choices = tuple(tokenizer.language_token(code) for code in known)
            language = guess if guess in known else known[0]
        return Prompt((tokenizer.sot, tokenizer.language_token(language), task_token, tokenizer.no_timestamps), choices)

    def language_of_prompt(self, prompt: Sequence[int]) -> str:
        """Return the ISO code of the language that `prompt` names."""
        return self._tokenizer.language_of(prompt[1]) if self._tokenizer.is_multilingual else "en"

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`."""
        return self._tokenizer.decode(tokens)
