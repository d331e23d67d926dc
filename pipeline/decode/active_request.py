"""One request while the engine has it: its tasks one after the other, each a sequence over the same context."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import takewhile

from pipeline.decode.guards import SILENCE, max_chars_of, token_cap
from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import DecoderParts, Question
from pipeline.decode.runner import Context, Lease, StartReading
from pipeline.decode.scheduler import Priority
from pipeline.decode.sequence import Limits, Prompt, TokenSequence
from pipeline.items import (
    TRANSCRIBE,
    UNDETERMINED,
    DecodeRequest,
    Failure,
    FailureKind,
    Hypothesis,
    Outcome,
    Task,
    TaskKind,
)

_OF_SPEECH = frozenset({TaskKind.TRANSCRIBE, TaskKind.TRANSLATE})
_PRIORITIES = {
    TaskKind.TRANSLATE: Priority.TRANSLATION,
    TaskKind.ANSWER: Priority.TRANSLATION,  # somebody waits for it
    TaskKind.DESCRIBE: Priority.SCENE,
    TaskKind.SUMMARISE: Priority.SUMMARY,
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """One task of the request: what was asked, how, and within which limits."""

    question: Question
    prompt: Prompt
    limits: Limits


class ActiveRequest:
    """The tasks still to come, and the sequence of the present one.

    Where speech is to be transcribed or translated, the transcription is decoded first even if only a translation is
    asked for: it tells the language and silence, and a translation may go on from it.

    Args:
        request: what is asked.
        context: what it is about.
        parts: the model.
        params: bounds and guards.
        guess: the language last heard in the stream.

    Raises:
        ValueError: if the model cannot be asked that, or there is no room for an answer.
    """

    def __init__(
        self, request: DecodeRequest, context: Context, parts: DecoderParts, params: DecoderParams, guess: str | None
    ) -> None:
        self.request = request
        self.context = context
        self._parts = parts
        self._params = params
        tasks = list(dict.fromkeys(request.tasks))
        if any(task.kind in _OF_SPEECH for task in tasks):
            tasks = [TRANSCRIBE, *(task for task in tasks if task != TRANSCRIBE)]
        self._tasks = deque(tasks[1:])
        self._asked = self._ask(tasks[0], request.language, guess, ())
        self.sequence = self._sequence(self._asked, request.draft)
        self.lease: Lease | None = None
        self._transcription: Hypothesis | None = None

    @property
    def task(self) -> Task:
        """The present task."""
        return self._asked.question.task

    @property
    def priority(self) -> Priority:
        """That of the present task."""
        return _PRIORITIES.get(self.task.kind, Priority.FINAL if self.request.is_final else Priority.PARTIAL)

    @property
    def num_audio_samples(self) -> int:
        """Sound that it is about."""
        return 0 if self.context.sound is None else self.context.sound.num_audio_samples

    def open_lease(self, slot: int) -> Lease:
        """Return the lease of the request, opening it if there is none."""
        if self.lease is None:
            self.lease = self._parts.runner.open(
                slot,
                self.context,
                self.sequence.num_prompt_tokens,
                self._asked.limits.max_new_tokens + 1,
                is_exact=self.request.is_final,
            )
        return self.lease

    def close_lease(self, *, is_spoilt: bool = False) -> None:
        """End the lease if there is one; `is_spoilt`: what was computed under it may not be finite."""
        if self.lease is not None:
            self._parts.runner.close(self.lease, is_spoilt=is_spoilt)
            self.lease = None

    def language(self) -> str:
        """Return the language of what was heard, or of what the present task answers."""
        return self._parts.prompter.language_of(self._asked.question, self.sequence.prompt)

    def text(self) -> str:
        """Return what was decoded for the present task."""
        return self._parts.prompter.text_of(self.task, self.sequence.tokens).strip()

    def begin_next_task(self, answered: Hypothesis) -> tuple[list[Outcome], bool]:
        """Begin the next task that needs decoding, after the present one was `answered`.

        Returns:
            Outcomes of tasks that need no decoding, and whether there is another task now.
        """
        if self.task.kind is TaskKind.TRANSCRIBE:
            self._transcription = answered
        outcomes: list[Outcome] = []
        while self._tasks:
            task = self._tasks.popleft()
            outcome = self._answer_without_decoding(task)
            if outcome is None:
                try:
                    self._begin(task)
                except ValueError as exc:
                    outcome = Failure(self.request.key, task, FailureKind.FAILED, str(exc))
                else:
                    return outcomes, True
            outcomes.append(outcome)
        return outcomes, False

    def _answer_without_decoding(self, task: Task) -> Outcome | None:
        transcription, translates_to = self._transcription, self._parts.prompter.translates_to
        if task.kind is not TaskKind.TRANSLATE or transcription is None:
            return None
        if transcription.guard == SILENCE or task.target_language == transcription.language:
            return replace(transcription, task=task, num_passes=0)
        if task.target_language not in translates_to:
            can = ", ".join(translates_to) or "no language"
            message = f"the model does not translate to {task.target_language!r}, only to {can}"
            return Failure(self.request.key, task, FailureKind.FAILED, message)
        return None

    def _begin(self, task: Task) -> None:
        """Begin `task` over the same context: the start of its prompt is in the memory already."""
        before, transcription = self.sequence, self._transcription
        language = self.request.language
        transcript: tuple[int, ...] = ()
        if transcription is not None:
            transcript = transcription.tokens
            if transcription.language != UNDETERMINED:
                language = transcription.language
        asked = self._ask(task, language, None, transcript)
        tokens = asked.prompt.tokens
        num_cached, start = 0, None
        if self.lease is not None:
            renewed = self._parts.runner.renew(self.lease, len(tokens), asked.limits.max_new_tokens + 1)
            if renewed is None:
                self.close_lease()
            else:
                self.lease = renewed
                num_cached, start = _num_common(tokens, before.prompt), before.start
        self._asked = asked
        self.sequence = self._sequence(asked, asked.prompt.draft, num_cached, start)

    def _sequence(
        self, asked: _Asked, draft: tuple[int, ...], num_cached: int = 0, start: StartReading | None = None
    ) -> TokenSequence:
        prompter, task = self._parts.prompter, asked.question.task
        return TokenSequence(
            asked.prompt,
            draft,
            asked.limits,
            prompter.decode,
            num_cached=num_cached,
            start=start,
            num_before_text=lambda tokens: prompter.num_tokens_before_text(task, tokens),
        )

    def _ask(self, task: Task, language: str | None, guess: str | None, transcript: tuple[int, ...]) -> _Asked:
        request = self.request
        question = Question(task, language, request.languages, guess, request.text, self.context, transcript)
        prompt = self._parts.prompter.prompt(question)
        if task.kind is TaskKind.TRANSCRIBE:
            prompt = replace(prompt, prefix=request.prefix)
        return _Asked(question, prompt, self._limits(task, prompt))

    def _limits(self, task: Task, prompt: Prompt) -> Limits:
        num_prompt_tokens = len(prompt.tokens) + len(prompt.prefix)
        # One more than is kept: the token too many is decoded before it is dropped.
        room = self._parts.runner.max_new_tokens(num_prompt_tokens) - 1
        if room < 1:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens, with those of sound, pictures and text given, which "
                "leaves no room for text in a slot of the decoder: give less, or raise decoder.slot_tokens"
            )
        guards, num_samples = self._params.guards, self.num_audio_samples
        is_speech = task.kind in _OF_SPEECH
        wanted = token_cap(num_samples, guards) if is_speech else self._max_tokens_of(task)
        # A loop in a final is told by repetition alone: nothing corrects it, and a few more passes do not matter.
        has_max_chars = is_speech and not self.request.is_final
        return Limits(
            max_new_tokens=min(room, wanted + len(prompt.draft)),
            ends=self._parts.prompter.ends,
            num_text_tokens=self._parts.prompter.num_text_tokens,
            guards=guards,
            max_chars=max_chars_of(num_samples, guards) if has_max_chars else None,
        )

    def _max_tokens_of(self, task: Task) -> int:
        return {
            TaskKind.DESCRIBE: self._params.max_description_tokens,
            TaskKind.SUMMARISE: self._params.max_summary_tokens,
        }.get(task.kind, self._params.max_answer_tokens)


def _num_common(tokens: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens both begin with, but never all of `tokens`: the last one must be fed for a pick."""
    pairs = zip(tokens[:-1], other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
