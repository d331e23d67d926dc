"""How Phi-4-multimodal is asked: all its prompts.

Form: `<|user|>` pictures, sound, instruction `<|end|><|assistant|>`, without newlines. A picture or a sound is its
placeholder token once for each position. The instruction comes last, so that all tasks about one context begin with the
same tokens, and what was computed for those serves all of them.

Source of the form and, unless said otherwise, of the instructions: model card, "Input Formats"
(https://huggingface.co/microsoft/Phi-4-multimodal-instruct), as in the technical report
(https://arxiv.org/abs/2503.01743). The card's example of text alone has a system turn ("You are a helpful assistant."),
the others have none; it is left out here.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile

from pipeline.decode.prompting import Question
from pipeline.decode.sequence import Prompt
from pipeline.errors import ConfigError, ModelError
from pipeline.items import UNDETERMINED, Task, TaskKind
from pipeline.models.phi4.config import Phi4Config
from pipeline.models.phi4.languages import ENGLISH, HEARD, LANGUAGES, check_translation
from pipeline.models.phi4.tokenizer import ASSISTANT, END, PICTURE, SOUND, USER, Phi4Tokenizer

TRANSCRIPTION = "Transcribe the audio clip into text."
"""Model card, "Automatic Speech Recognition". No language is named: the model finds it by itself."""

TRANSLATION = "Translate the audio to {language}."
"""Model card, "Automatic Speech Translation". The language by its English name."""

CHAINED_TRANSLATION = (
    "Transcribe the audio to text, and then translate the audio to {language}. Use <sep> as a separator between the "
    "original transcript and the translation."
)
"""Model card, "Automatic Speech Translation with chain-of-thoughts"; on average 0.9 to 2.5 BLEU better (report)."""

SEPARATOR = "<sep>"
"""Text, not a special token. The report scores what stands behind it."""

# A separator that touched the transcript's last mark would make one token with it (".<"), and what is verified would
# differ from the transcript's own tokens there. With the space it begins a token of its own. No space behind it: in
# languages with spaces that belongs to the translation's first token.
_DRAFTED_SEPARATOR = f" {SEPARATOR}"

DESCRIPTION = "Describe the image in detail."
DESCRIPTIONS = "Summarize the content of the images."
"""Model card, "Vision-Language Format", for one picture and for several."""

BREVITY = " Use one or two sentences."
"""Our wish behind a description: a scene of a live stream is read at a glance, and the next one comes in seconds. Every
token more is a pass of the decoder that captions share."""

SOUND_SUMMARY = "Summarize the main points of the audio in a few sentences."
TEXT_SUMMARY = "Summarize the main points of the following transcript in a few sentences.\n\n"
"""Ours: the report has a free instruction for each summary ("Summarize in bullet points the key product specifications
discussed."), and the model was taught English ones only."""

_HEARD_TASKS = frozenset({TaskKind.TRANSCRIBE, TaskKind.TRANSLATE})


class Phi4Prompter:
    """How the model of one checkpoint is asked.

    Args:
        tokenizer: the checkpoint's.
        config: the checkpoint's.
        chains_translations: translations are asked for behind a transcript, which is given as a draft: better, and
            dearer by the pass that verifies it.

    Raises:
        ModelError: if tokenizer and config are not of one checkpoint.
    """

    def __init__(self, tokenizer: Phi4Tokenizer, config: Phi4Config, *, chains_translations: bool = True) -> None:
        for name, token in ((PICTURE, config.vision.placeholder_token), (SOUND, config.audio.placeholder_token)):
            if tokenizer.special(name) != token:
                raise ModelError(
                    f"the config says {token} for {name}, the tokenizer {tokenizer.special(name)}: they are not of one "
                    f"checkpoint"
                )
        self._tokenizer = tokenizer
        self._chains_translations = chains_translations
        self._picture, self._sound = tokenizer.special(PICTURE), tokenizer.special(SOUND)
        self.languages: tuple[str, ...] = HEARD
        self.translates_to: tuple[str, ...] = HEARD
        self.tasks: frozenset[TaskKind] = frozenset(TaskKind)
        # The published config.json names one of both; a text that does not stop at the other never stops.
        self.ends: frozenset[int] = tokenizer.ends | frozenset(config.end_tokens)
        self.num_text_tokens: int = tokenizer.num_text_tokens

    def prompt(self, question: Question) -> Prompt:
        """Return the prompt of `question`; of its `text` only summaries and answers take notice.

        Raises:
            ValueError: if the question lacks what its task is about, or its language is none of the model's.
        """
        instruction = self._tokenizer.encode(self._instruction(question))
        special = self._tokenizer.special
        tokens = (special(USER), *self._context(question), *instruction, special(END), special(ASSISTANT))
        return Prompt(tokens, draft=self._draft(question))

    def text_of(self, task: Task, tokens: Sequence[int]) -> str:
        """Return the text that `tokens` answer `task` with; of a chained translation what stands behind the transcript.

        Empty while a chained translation has not come to its separator. Without control characters, but for ends of
        lines: a question can make the model spell what a terminal would obey.
        """
        text = self.decode(tokens)
        if task.kind is TaskKind.TRANSLATE and self._chains_translations:
            text = text.partition(SEPARATOR)[2]
        return "".join(character for character in text if character == "\n" or not _is_control(character)).strip()

    def num_tokens_before_text(self, task: Task, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` are a chained translation's transcript and separator; 0 before it comes to that.

        The token in which the separator ends counts as its.
        """
        if task.kind is not TaskKind.TRANSLATE or not self._chains_translations:
            return 0
        found = bisect_left(range(len(tokens) + 1), True, key=lambda num: SEPARATOR in self.decode(tokens[:num]))
        return found if found <= len(tokens) else 0

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without an unfinished character at the end."""
        return self._tokenizer.decode(tokens)

    def language_of(self, question: Question, prompt: Sequence[int]) -> str:  # noqa: ARG002 - no prompt names one
        """Return the language that was spoken, ISO 639-1 or "und" where nobody told it; of other tasks the answer's."""
        if question.task.kind in _HEARD_TASKS:
            return _told(question) or UNDETERMINED
        return ENGLISH

    def _context(self, question: Question) -> list[int]:
        """Return the placeholders."""
        pictures, sound = question.context.pictures, question.context.sound
        num_picture = 0 if pictures is None else sum(picture.layout.num_tokens for picture in pictures.pictures)
        num_sound = 0 if sound is None else len(sound.values)
        return [self._picture] * num_picture + [self._sound] * num_sound

    def _instruction(self, question: Question) -> str:
        kind, text = question.task.kind, question.text.strip()
        sound, pictures = question.context.sound, question.context.pictures
        if kind in _HEARD_TASKS:
            return self._heard_instruction(question)
        if kind is TaskKind.SUMMARISE:
            if (sound is None) == (not text):
                raise ValueError("a summary is either of sound or of a text: give one of them")
            return SOUND_SUMMARY if sound is not None else TEXT_SUMMARY + text
        if kind is TaskKind.DESCRIBE:
            if pictures is None or not pictures.pictures:
                raise ValueError("a description is of pictures, and there is none")
            return (DESCRIPTION if len(pictures.pictures) == 1 else DESCRIPTIONS) + BREVITY
        if not text and sound is None:
            raise ValueError("there is no question: neither typed nor spoken")
        # A spoken question stands alone (model card, "Spoken-query Question Answering" and "Vision-Speech Format"). One
        # that is typed is asked as it is: a wish of ours behind it could contradict it.
        return text

    def _heard_instruction(self, question: Question) -> str:
        task, language = question.task, _told(question)
        if question.context.sound is None:
            raise ValueError(f"the task {task.kind.value!r} is about sound, and there is none")
        if language is not None and language not in HEARD:
            raise ValueError(f"language {language!r} is not one of this model's: {', '.join(HEARD)}")
        if language is None and question.languages and not any(code in HEARD for code in question.languages):
            raise ValueError(f"none of the languages {', '.join(question.languages)} is one of this model's")
        if task.kind is TaskKind.TRANSCRIBE:
            return TRANSCRIPTION  # it is asked the same in all languages, and nothing is to be detected
        target = task.target_language or ""
        try:
            check_translation(language, target)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        form = CHAINED_TRANSLATION if self._chains_translations else TRANSLATION
        return form.format(language=LANGUAGES[target].name)

    def _draft(self, question: Question) -> tuple[int, ...]:
        if question.task.kind is not TaskKind.TRANSLATE or not self._chains_translations:
            return ()
        transcript = tuple(takewhile(lambda token: 0 <= token < self.num_text_tokens, question.transcript))
        return (*transcript, *self._tokenizer.encode(_DRAFTED_SEPARATOR)) if transcript else ()


def _told(question: Question) -> str | None:
    """Return the language that somebody told; that of an answer of ours may be none."""
    return None if question.language == UNDETERMINED else question.language


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc"
