"""Embeddings to hypotheses: the shared decoder.

One engine serves all streams and tasks. Each `step` is one forward pass over rows of many requests: schedule, run,
account. A request holds one slot from its admission to the end of its last task; its tasks are decoded one after the
other over the same context, the transcription first. What a request gets does not depend on others nor on its draft.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol

import numpy as np

from pipeline.decode.guards import SILENCE, GuardParams, is_sparse, max_chars_of, token_cap
from pipeline.decode.runner import DecodeRunner, Lease, Row, RowResult, TimedText
from pipeline.decode.scheduler import Ended, EndReason, Piece, Priority, Progress, Scheduler, SchedulerParams, Work
from pipeline.decode.sequence import Feed, Limits, Prompt, TokenSequence
from pipeline.errors import StageError
from pipeline.items import (
    TRANSCRIBE,
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Hypothesis,
    Outcome,
    RequestKey,
    Task,
    TaskKind,
    Word,
)
from pipeline.models.weights import ModelParams
from pipeline.params import Params

_MAX_LANGUAGE_GUESSES = 4_096
_MAX_PROMPT_TOKENS = 8
_REQUEST_ERRORS = (StageError, RuntimeError, ValueError, IndexError)
"""What a runner raises over one request; that request fails, its neighbours go on."""
_MESSAGES = {
    EndReason.SUPERSEDED: (FailureKind.SUPERSEDED, "a newer snapshot of the utterance arrived"),
    EndReason.EXPIRED: (FailureKind.EXPIRED, "the deadline of the partial passed before it was decoded"),
    EndReason.REFUSED: (FailureKind.UNAVAILABLE, "the decoder's queue is full; submit the snapshot again later"),
}


class DecoderParams(Params):
    """Parameters of the shared decoder."""

    scheduler: SchedulerParams = SchedulerParams()
    guards: GuardParams = GuardParams()


class Prompter(Protocol):
    """How a model is asked: its special tokens, languages and targets (ISO 639-1)."""

    @property
    def eot(self) -> int:
        """The token that ends a text; tokens of text are below it."""
        ...

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that the model hears."""
        ...

    @property
    def translates_to(self) -> tuple[str, ...]:
        """Languages that the model translates to."""
        ...

    def prompt(self, task: Task, language: str | None, languages: Sequence[str], guess: str | None) -> Prompt:
        """Return the prompt of `task`; a `language` of None is to be detected among `languages`.

        Raises:
            ValueError: if the model knows none of the languages.
        """
        ...

    def language_of_prompt(self, prompt: Sequence[int]) -> str:
        """Return the language that a prompt names."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A loaded model: its runner and how it is asked."""

    runner: DecodeRunner
    prompter: Prompter


class _Active:
    """A request in the engine: the tasks still to come, and the sequence of the present one."""

    __slots__ = ("embeddings", "lease", "limits", "request", "sequence", "task", "tasks", "transcription")

    def __init__(self, request: DecodeRequest, embeddings: Embeddings, sequence: TokenSequence, limits: Limits) -> None:
        self.request = request
        self.embeddings = embeddings
        self.task = TRANSCRIBE
        self.tasks = deque(task for task in dict.fromkeys(request.tasks) if task.kind is not TaskKind.TRANSCRIBE)
        self.sequence = sequence
        self.limits = limits
        self.lease: Lease | None = None
        self.transcription: Hypothesis | None = None


class DecodeEngine:
    """The decoder stage. Synchronous and single-threaded: its owner calls everything from one thread.

    A request gets exactly one outcome for each of its tasks (a `Failure` whose task is None stands for all that are
    open), unless it is cancelled. The transcription is decoded even if only a translation is asked for: it tells the
    language, and silence.

    Args:
        model: which checkpoint, on which device.
        params: bounds and guards.
        parts: the loaded model, if there is one already.
        clock: seconds, to measure at load which arithmetic partials get; without it they are float32 unless the model
            parameters say otherwise.

    Raises:
        WeightsHashError: if a weight file is not the pinned one.
        ModelError: if the checkpoint cannot be used.
    """

    tier = "edge"

    def __init__(
        self,
        model: ModelParams,
        params: DecoderParams,
        *,
        parts: DecoderParts | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if parts is None:
            from pipeline.models.whisper.runner import load_parts  # noqa: PLC0415 - the engine itself knows no model

            parts = load_parts(model, params.scheduler.num_slots, clock)
        self._params = params
        self._runner = parts.runner
        self._prompter = parts.prompter
        self._scheduler: Scheduler[RequestKey] = Scheduler(params.scheduler)
        self._active: dict[RequestKey, _Active] = {}
        self._outcomes: list[Outcome] = []
        # The language last detected in a stream: a guess that saves a pass when it is right and changes no result.
        self._guesses: OrderedDict[str, str] = OrderedDict()

    @property
    def languages(self) -> tuple[str, ...]:
        """ISO 639-1 codes of the languages that it hears."""
        return self._prompter.languages

    @property
    def translates_to(self) -> tuple[str, ...]:
        """ISO 639-1 codes of the languages that it translates to."""
        return self._prompter.translates_to

    @property
    def partial_dtype(self) -> str:
        """The arithmetic of partials: "float32", "bfloat16" or "int8"."""
        return self._runner.partial_dtype

    @property
    def final_dtype(self) -> str:
        """The arithmetic of finals: "float32" or "int8"."""
        return self._runner.final_dtype

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._outcomes) or self._scheduler.has_work

    def submit(self, request: DecodeRequest, embeddings: Embeddings, *, deadline_ms: float | None = None) -> None:
        """Queue `request`; whatever is wrong with it is reported as an outcome by `step`.

        `deadline_ms` is the request's on the clock of `step`'s `now_ms`; its own, relative one is not looked at.

        Raises:
            ValueError: if its key is in work already, it has no task, or the deadline is not a number.
        """
        if request.key in self._active:
            raise ValueError(f"snapshot {request.key} is in work already")
        if not request.tasks:
            raise ValueError(f"snapshot {request.key} has no task")
        try:
            active = self._prepare(request, embeddings)
        except ValueError as exc:
            self._outcomes.append(Failure(request.key, None, FailureKind.FAILED, str(exc)))
            return
        key = request.key
        work = Work(
            id=key,
            priority=Priority.FINAL if request.is_final else Priority.PARTIAL,
            num_tokens=active.sequence.num_pending,
            num_context_tokens=math.ceil(len(embeddings.values) / self._runner.context_positions_per_token),
            lineage=(key.stream_id, key.utterance),
            revision=key.revision,
            deadline_ms=deadline_ms,
        )
        given_up = self._scheduler.submit(work)
        self._active[key] = active
        for ended in given_up:
            self._give_up(ended)

    def cancel(self, key: RequestKey) -> None:
        """Forget the request with `key`: it has no outcome from now on. Nothing happens if there is none."""
        ended = self._scheduler.cancel(key)
        if ended is not None:
            self._close(self._active.pop(key))
        self._outcomes = [outcome for outcome in self._outcomes if outcome.key != key]

    def step(self, now_ms: float = 0.0) -> list[Outcome]:
        """Run one forward pass and return the outcomes that are ready.

        `now_ms` is the time on the clock of the deadlines; without it none ever passes.
        """
        plan = self._scheduler.schedule(now_ms)
        for ended in plan.ended:
            self._give_up(ended)
        for key in plan.preempted:
            self._close(self._active[key])
            self._active[key].sequence.restart()
        reports: dict[RequestKey, Progress | EndReason] = {}
        running: list[tuple[_Active, Feed, Row]] = []
        for piece in plan.pieces:
            active = self._active[piece.id]
            try:
                running.append(self._row(active, piece))
            except _REQUEST_ERRORS as exc:
                reports[piece.id] = self._fail(active, exc)
        for (active, feed, _), result in zip(running, self._run([row for _, _, row in running]), strict=True):
            if isinstance(result, Exception):
                reports[active.request.key] = self._fail(active, result)
            else:
                active.sequence.account(feed, result)
                reports[active.request.key] = self._progress(active)
        self._scheduler.account(reports)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # -- requests ---------------------------------------------------------------------------------

    def _prepare(self, request: DecodeRequest, embeddings: Embeddings) -> _Active:
        values, runner = embeddings.values, self._runner
        if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != runner.context_width:
            raise ValueError(
                f"the embeddings are {values.dtype}{list(values.shape)}, expected float32[n, {runner.context_width}]"
            )
        if not 1 <= len(values) <= runner.max_context_positions:
            raise ValueError(
                f"{len(values)} positions of embeddings, the decoder takes 1 to {runner.max_context_positions}"
            )
        if not np.isfinite(values).all():
            raise ValueError("the embeddings have values that are not finite")
        guess = self._guesses.get(request.key.stream_id)
        prompt = self._prompter.prompt(TRANSCRIBE, request.language, request.languages, guess)
        prompt = replace(prompt, prefix=request.prefix)
        room = runner.max_tokens - _MAX_PROMPT_TOKENS - len(request.prefix) - 1
        if room < 1:
            raise ValueError(f"a prefix of {len(request.prefix)} tokens leaves no room for text")
        max_new_tokens = min(room, token_cap(embeddings.num_audio_samples, self._params.guards))
        # A loop in a final is told by repetition alone: nothing corrects it, and a few more passes do not matter.
        max_chars = None if request.is_final else max_chars_of(embeddings.num_audio_samples, self._params.guards)
        limits = Limits(max_new_tokens, self._prompter.eot, self._params.guards, max_chars)
        sequence = TokenSequence(prompt, request.draft, limits, self._prompter.decode)
        return _Active(request, embeddings, sequence, limits)

    def _give_up(self, ended: Ended[RequestKey]) -> None:
        self._close(self._active.pop(ended.id))
        kind, message = _MESSAGES[ended.reason]
        self._outcomes.append(Failure(ended.id, None, kind, message))

    def _fail(self, active: _Active, error: Exception) -> EndReason:
        key = active.request.key
        self._close(self._active.pop(key), is_spoilt=True)
        message = f"the decoder failed on this snapshot: {type(error).__name__}: {error}"
        self._outcomes.append(Failure(key, None, FailureKind.FAILED, message))
        return EndReason.FAILED

    def _close(self, active: _Active, *, is_spoilt: bool = False) -> None:
        if active.lease is not None:
            self._runner.close(active.lease, is_spoilt=is_spoilt)
            active.lease = None

    # -- one step ---------------------------------------------------------------------------------

    def _row(self, active: _Active, piece: Piece[RequestKey]) -> tuple[_Active, Feed, Row]:
        if active.lease is None:
            num_tokens = _MAX_PROMPT_TOKENS + len(active.request.prefix) + active.limits.max_new_tokens + 1
            active.lease = self._runner.open(
                piece.slot, active.embeddings.values, num_tokens, is_exact=active.request.is_final
            )
        feed = active.sequence.feed(piece.num_tokens)
        row = Row(active.lease, feed.position, feed.tokens, feed.pick_from, feed.is_begin, feed.reads_start)
        return active, feed, row

    def _run(self, rows: list[Row]) -> list[RowResult | Exception]:
        """Run `rows` together; if that fails, each alone, and return the error of those that fail again."""
        if not rows:
            return []
        try:
            return list(self._runner.run(rows))
        except _REQUEST_ERRORS as exc:
            if len(rows) == 1:
                return [exc]
            return [result for row in rows for result in self._run([row])]

    def _progress(self, active: _Active) -> Progress | EndReason:
        priority = Priority.FINAL if active.request.is_final else Priority.PARTIAL
        if active.sequence.is_finished:
            try:
                hypothesis = self._hypothesis(active)
            except _REQUEST_ERRORS as exc:
                return self._fail(active, exc)
            if active.task.kind is TaskKind.TRANSCRIBE:
                active.transcription = hypothesis
            if active.task in active.request.tasks:
                self._outcomes.append(hypothesis)
            if not self._begin_next_task(active):
                self._close(self._active.pop(active.request.key))
                return EndReason.FINISHED
        if active.task.kind is not TaskKind.TRANSCRIBE:
            priority = Priority.TRANSLATION
        return Progress(active.sequence.num_pending, active.sequence.num_resume_tokens, priority)

    def _hypothesis(self, active: _Active) -> Hypothesis:
        request, sequence = active.request, active.sequence
        language = self._prompter.language_of_prompt(sequence.prompt)
        words: tuple[Word, ...] = ()
        if self._has_timed_words(active) and active.lease is not None:
            text = TimedText(sequence.prompt, sequence.tokens, sequence.logprobs, language)
            words = self._runner.words(active.lease, text, active.embeddings.num_audio_samples)
        if request.language is None:
            self._guesses[request.key.stream_id] = language
            self._guesses.move_to_end(request.key.stream_id)
            if len(self._guesses) > _MAX_LANGUAGE_GUESSES:
                self._guesses.popitem(last=False)
        return Hypothesis(
            key=request.key,
            task=active.task,
            text=self._prompter.decode(sequence.tokens).strip(),
            tokens=sequence.tokens,
            words=words,
            language=language,
            average_logprob=sequence.average_logprob,
            no_speech_probability=sequence.start.no_speech_probability if sequence.start is not None else 0.0,
            num_passes=sequence.num_passes,
            guard=sequence.guard,
        )

    def _has_timed_words(self, active: _Active) -> bool:
        """Whether the words of what was decoded get times: finals, and partials that may have passed over speech."""
        if active.task.kind is not TaskKind.TRANSCRIBE:
            return False
        sequence, num_audio_samples = active.sequence, active.embeddings.num_audio_samples
        if active.request.is_final:
            return True
        return sequence.guard is None and (
            active.request.wants_words or is_sparse(len(sequence.tokens), num_audio_samples, self._params.guards)
        )

    def _begin_next_task(self, active: _Active) -> bool:
        """Begin the next task that needs decoding and return True; answer those before it that need none."""
        transcription = active.transcription
        if transcription is None:
            raise RuntimeError("a translation was begun before its transcription was there")
        while active.tasks:
            task = active.tasks.popleft()
            if transcription.guard == SILENCE or task.target_language == transcription.language:
                self._outcomes.append(replace(transcription, task=task, num_passes=0))
            elif task.target_language not in self.translates_to:
                can = ", ".join(self.translates_to) or "no language"
                message = f"the model does not translate to {task.target_language!r}, only to {can}"
                self._outcomes.append(Failure(active.request.key, task, FailureKind.FAILED, message))
            else:
                active.task = task
                active.sequence = self._continued(active.sequence, task, transcription.language, active.limits)
                return True
        return False

    def _continued(self, before: TokenSequence, task: Task, language: str, limits: Limits) -> TokenSequence:
        """Return the sequence of `task` in a slot where `before` has run: the start of its prompt is there already."""
        prompt = self._prompter.prompt(task, language, (), None)
        pairs = zip(prompt.tokens, before.prompt, strict=False)
        num_cached = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return TokenSequence(prompt, (), limits, self._prompter.decode, num_cached=num_cached, start=before.start)
