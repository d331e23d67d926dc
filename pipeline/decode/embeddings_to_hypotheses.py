"""Embeddings to hypotheses: the shared decoder.

One engine serves all streams and tasks. Each `step` is one forward pass over rows of many requests: schedule, run,
account. A request holds one slot from its admission to the end of its last task; its tasks are decoded one after the
other over the same context, the transcription first. What a request gets does not depend on others nor on its draft.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from pipeline.decode.active_request import ActiveRequest
from pipeline.decode.guards import is_sparse
from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import DecoderParts
from pipeline.decode.runner import Context, Row, RowResult, TimedText
from pipeline.decode.scheduler import Ended, EndReason, Piece, Progress, Scheduler, Work
from pipeline.decode.sequence import Feed
from pipeline.errors import StageError
from pipeline.items import DecodeRequest, Failure, FailureKind, Hypothesis, JobKey, Outcome, RequestKey, TaskKind, Word
from pipeline.models.weights import ModelParams

__all__ = ["DecodeEngine", "DecoderParams", "DecoderParts"]

_MAX_LANGUAGE_GUESSES = 4_096
_REQUEST_ERRORS = (StageError, RuntimeError, ValueError, IndexError)
"""What a runner raises over one request; that request fails, its neighbours go on."""
_MESSAGES = {
    EndReason.SUPERSEDED: (FailureKind.SUPERSEDED, "a newer snapshot of the utterance arrived"),
    EndReason.EXPIRED: (FailureKind.EXPIRED, "the deadline of the partial passed before it was decoded"),
    EndReason.REFUSED: (FailureKind.UNAVAILABLE, "the decoder's queue is full; submit the snapshot again later"),
}


class DecodeEngine:
    """The decoder stage. Synchronous and single-threaded: its owner calls everything from one thread.

    A request gets exactly one outcome for each of its tasks (a `Failure` whose task is None stands for all that are
    open), unless it is cancelled.

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

    def __init__(
        self,
        model: ModelParams,
        params: DecoderParams,
        *,
        parts: DecoderParts | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if parts is None:
            from pipeline.decode.loading import load_parts  # noqa: PLC0415 - the engine itself knows no model

            parts = load_parts(model, params, clock)
        self._params = params
        self._parts = parts
        self._runner = parts.runner
        self._prompter = parts.prompter
        self._scheduler: Scheduler[RequestKey] = Scheduler(
            params.scheduler, has_one_arithmetic=parts.runner.has_one_arithmetic
        )
        self._active: dict[RequestKey, ActiveRequest] = {}
        self._outcomes: list[Outcome] = []
        # The language last detected in a stream: a guess that saves a pass when it is right and changes no result.
        self._guesses: OrderedDict[str, str] = OrderedDict()

    @property
    def tier(self) -> str:
        """The tier that the model makes: "edge" or "phi4"."""
        return self._parts.tier

    @property
    def tasks(self) -> frozenset[TaskKind]:
        """What can be asked."""
        return self._prompter.tasks

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

    def submit(self, request: DecodeRequest, context: Context, *, deadline_ms: float | None = None) -> None:
        """Queue `request` about `context`; whatever is wrong with it is reported as an outcome by `step`.

        `deadline_ms` is the request's on the clock of `step`'s `now_ms`; its own, relative one is not looked at.

        Raises:
            ValueError: if its key is in work already, it has no task, or the deadline is not a number.
        """
        key = request.key
        if key in self._active:
            raise ValueError(f"{key} is in work already")
        if not request.tasks:
            raise ValueError(f"{key} has no task")
        try:
            self._runner.check(context)
            active = ActiveRequest(request, context, self._parts, self._params, self._guesses.get(key.stream_id))
        except ValueError as exc:
            self._outcomes.append(Failure(key, None, FailureKind.FAILED, str(exc)))
            return
        work = Work(
            id=key,
            priority=active.priority,
            num_tokens=active.sequence.num_pending,
            num_context_tokens=self._runner.context_cost(context),
            lineage=None if isinstance(key, JobKey) else (key.stream_id, key.utterance),
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
            self._active.pop(key).close_lease()
        self._outcomes = [outcome for outcome in self._outcomes if outcome.key != key]

    def step(self, now_ms: float = 0.0) -> list[Outcome]:
        """Run one forward pass and return the outcomes that are ready.

        `now_ms` is the time on the clock of the deadlines; without it none ever passes.
        """
        plan = self._scheduler.schedule(now_ms)
        for ended in plan.ended:
            self._give_up(ended)
        for key in plan.preempted:
            self._active[key].close_lease()
            self._active[key].sequence.restart()
        reports: dict[RequestKey, Progress | EndReason] = {}
        running: list[tuple[ActiveRequest, Feed, Row]] = []
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

    def _give_up(self, ended: Ended[RequestKey]) -> None:
        self._active.pop(ended.id).close_lease()
        kind, message = _MESSAGES[ended.reason]
        self._outcomes.append(Failure(ended.id, None, kind, message))

    def _fail(self, active: ActiveRequest, error: Exception) -> EndReason:
        key = active.request.key
        self._active.pop(key).close_lease(is_spoilt=True)
        message = f"the decoder failed on this request: {type(error).__name__}: {error}"
        self._outcomes.append(Failure(key, None, FailureKind.FAILED, message))
        return EndReason.FAILED

    # -- one step ---------------------------------------------------------------------------------

    def _row(self, active: ActiveRequest, piece: Piece[RequestKey]) -> tuple[ActiveRequest, Feed, Row]:
        lease = active.open_lease(piece.slot)
        feed = active.sequence.feed(piece.num_tokens)
        row = Row(lease, feed.position, feed.tokens, feed.pick_from, feed.is_begin, feed.reads_start)
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

    def _progress(self, active: ActiveRequest) -> Progress | EndReason:
        if active.sequence.is_finished:
            try:
                hypothesis = self._hypothesis(active)
                is_wanted = active.task in active.request.tasks
                answered, goes_on = active.begin_next_task(hypothesis)
            except _REQUEST_ERRORS as exc:
                return self._fail(active, exc)
            self._outcomes += [hypothesis, *answered] if is_wanted else answered
            if not goes_on:
                self._active.pop(active.request.key).close_lease()
                return EndReason.FINISHED
        return Progress(active.sequence.num_pending, active.sequence.num_resume_tokens, active.priority)

    def _hypothesis(self, active: ActiveRequest) -> Hypothesis:
        request, sequence = active.request, active.sequence
        language = active.language()
        words: tuple[Word, ...] = ()
        if self._has_timed_words(active) and active.lease is not None:
            text = TimedText(sequence.prompt, sequence.tokens, sequence.logprobs, language)
            words = self._runner.words(active.lease, text, active.num_audio_samples)
        if request.language is None and active.task.kind is TaskKind.TRANSCRIBE:
            self._guesses[request.key.stream_id] = language
            self._guesses.move_to_end(request.key.stream_id)
            if len(self._guesses) > _MAX_LANGUAGE_GUESSES:
                self._guesses.popitem(last=False)
        return Hypothesis(
            key=request.key,
            task=active.task,
            text=active.text(),
            tokens=sequence.tokens,
            words=words,
            language=language,
            average_logprob=sequence.average_logprob,
            no_speech_probability=sequence.start.no_speech_probability if sequence.start is not None else 0.0,
            num_passes=sequence.num_passes,
            guard=sequence.guard,
        )

    def _has_timed_words(self, active: ActiveRequest) -> bool:
        """Whether the words of what was decoded get times: finals, and partials that may have passed over speech."""
        if active.task.kind is not TaskKind.TRANSCRIBE:
            return False
        if active.request.is_final:
            return True
        num_tokens = len(active.sequence.tokens)
        return active.sequence.guard is None and (
            active.request.wants_words or is_sparse(num_tokens, active.num_audio_samples, self._params.guards)
        )
