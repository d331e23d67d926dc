"""The Decoder stage, shared by all streams: embeddings in, outcomes out as they are ready.

A plain class; `actors/app.py` makes a Serve deployment of it. One thread owns the engine and steps it; requests reach
it through a bounded queue, outcomes leave it through the event loop of whoever asked. This module imports no torch, so
that processes that only deploy the stage do not pay for it (3 s).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from actors.threads import choose_num_threads
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams
from pipeline.decode.runner import Context
from pipeline.errors import StageUnavailable
from pipeline.items import (
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Outcome,
    Pictures,
    RequestKey,
    Task,
    TaskKind,
)
from pipeline.models.weights import ModelParams

logger = logging.getLogger(__name__)

MAX_REQUESTS = 128
"""Requests that may be with the engine; further ones wait in their calls."""

_MAX_STEP_S = 60.0
_MAX_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class DecoderInfo:
    """What a decoder replica is."""

    tier: str
    model: str
    partial_dtype: str
    final_dtype: str
    num_threads: int
    languages: tuple[str, ...]
    translates_to: tuple[str, ...]
    tasks: frozenset[TaskKind]


@dataclass(slots=True)
class _Reply:
    """Where the outcomes of one call go. Touched on its event loop only."""

    loop: asyncio.AbstractEventLoop
    outcomes: asyncio.Queue[Outcome]
    open_tasks: dict[RequestKey, set[Task]] = field(default_factory=dict)
    admitted: set[RequestKey] = field(default_factory=set)  # those that have a place with the engine

    def take_note(self, outcome: Outcome) -> bool:
        """Return whether `outcome` is still expected, and expect it no more."""
        tasks = self.open_tasks.get(outcome.key)
        if tasks is None or (outcome.task is not None and outcome.task not in tasks):
            return False
        if outcome.task is not None:
            tasks.discard(outcome.task)
        if outcome.task is None or not tasks:
            del self.open_tasks[outcome.key]
        return True


@dataclass(frozen=True, slots=True)
class _Submit:
    request: DecodeRequest
    context: Context
    reply: _Reply
    deadline_ms: float | None  # on this process's monotonic clock


@dataclass(slots=True)
class _Undecided:
    """A request that the engine holds. Touched in the engine's thread only."""

    reply: _Reply
    num_open_tasks: int


@dataclass(frozen=True, slots=True)
class _Cancel:
    key: RequestKey
    reply: _Reply


_Command = _Submit | _Cancel | None  # None: wakes the thread, which looks whether it is to end


class Decoder:
    """Holds the engine and the one thread that steps it."""

    def __init__(self, model: ModelParams, params: DecoderParams) -> None:
        """Load the weights (this blocks for seconds).

        Raises:
            WeightsHashError: if a weight file is not the pinned one.
            ModelError: if the model cannot be loaded.
        """
        self._inbox: queue.Queue[_Command] = queue.Queue(maxsize=4 * MAX_REQUESTS)
        # Never more than the engine lets wait: what it refuses would have to be sent again.
        self._room = asyncio.Semaphore(min(MAX_REQUESTS, params.scheduler.max_waiting))
        self._broken: str | None = None
        self._stepping_since: float | None = None
        self._is_closed = False
        loaded: Future[DecoderInfo] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(lambda: _load(model, params), loaded), name="decoder-step", daemon=True
        )
        self._thread.start()
        self._info = loaded.result()

    async def decode(
        self,
        encoded: Sequence[Embeddings | Failure | None],
        requests: Sequence[DecodeRequest],
        pictures: Sequence[Pictures | Failure | None] | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Yield the outcomes of `requests` as they are ready, one for each task.

        `encoded` and `pictures` hold what each request is about at the same place, None where it has no sound or no
        pictures; a failure there is passed on. What is still undecided when the caller goes away is cancelled.
        Deadlines count from this call on.

        Raises:
            ValueError: if `encoded`, `pictures` and `requests` do not belong together.
        """
        inputs = _join(encoded, pictures, requests)
        arrived_ms = _now_ms()
        num_outcomes = sum(len(request.tasks) + 1 for request in requests)
        reply = _Reply(asyncio.get_running_loop(), asyncio.Queue(maxsize=2 * num_outcomes + 1))
        for item in inputs:
            if isinstance(item, Failure):
                yield item
        jobs = []
        for request, item in zip(requests, inputs, strict=True):
            if isinstance(item, Context):
                in_ms = request.deadline_in_ms
                jobs.append(_Submit(request, item, reply, None if in_ms is None else arrived_ms + in_ms))
                reply.open_tasks[request.key] = set(request.tasks)
        # Beside the reading of outcomes: it is answers that make room, perhaps for the rest of this very call.
        admission = asyncio.create_task(self._admit(jobs, reply), name="decoder-admission")
        try:
            while reply.open_tasks:
                outcome = await reply.outcomes.get()
                if reply.take_note(outcome):
                    if outcome.key not in reply.open_tasks:
                        self._leave(reply, outcome.key)
                    yield outcome
        finally:
            admission.cancel()
            for key in list(reply.admitted):
                self._put(_Cancel(key, reply))
                self._leave(reply, key)
            await asyncio.wait({admission})

    def info(self) -> DecoderInfo:
        """Return what this replica is."""
        return self._info

    def check_health(self) -> None:
        """Return when all is well.

        Raises:
            StageUnavailable: if the engine crashed or hangs. It does not recover: replace the decoder.
        """
        if self._broken is not None:
            raise StageUnavailable(self._broken)
        since = self._stepping_since
        if since is not None and time.monotonic() - since > _MAX_STEP_S:
            raise StageUnavailable(f"one decoder step has taken more than {_MAX_STEP_S:.0f} s")

    async def aclose(self) -> None:
        """End the thread after its step; what is undecided fails as UNAVAILABLE. Idempotent.

        A thread whose step does not end within ten seconds is left behind; until it does, what is undecided gets no
        outcome.
        """
        self._is_closed = True
        self._put(None)
        # A daemon: it holds up nobody's end.
        await asyncio.to_thread(self._thread.join, _MAX_CLOSE_S)
        if self._thread.is_alive():
            logger.error("the decoder's thread hangs and is left behind")

    # -- on the event loop ------------------------------------------------------------------------

    async def _admit(self, jobs: list[_Submit], reply: _Reply) -> None:
        for job in jobs:
            await self._room.acquire()
            reply.admitted.add(job.request.key)
            self._submit(job)

    def _leave(self, reply: _Reply, key: RequestKey) -> None:
        reply.admitted.remove(key)
        self._room.release()

    def _submit(self, command: _Submit) -> None:
        is_sent = not self._is_closed and self._put(command)
        # Looked at after the put: an engine that crashes in between has emptied its inbox before or sees the command.
        if self._broken is not None or not is_sent:
            message = self._broken or "the decoder is closed or far behind"
            command.reply.outcomes.put_nowait(Failure(command.request.key, None, FailureKind.UNAVAILABLE, message))

    def _put(self, command: _Command) -> bool:
        try:
            self._inbox.put_nowait(command)
        except queue.Full:
            return False
        return True

    # -- in the thread ----------------------------------------------------------------------------

    def _run(self, load: Callable[[], tuple[DecodeEngine, DecoderInfo]], loaded: Future[DecoderInfo]) -> None:
        try:
            engine, info = load()
        except BaseException as exc:
            loaded.set_exception(exc)
            return
        loaded.set_result(info)
        undecided: dict[RequestKey, _Undecided] = {}
        reason = "the decoder was closed"
        try:
            self._step_until_closed(engine, undecided)
        except Exception as exc:
            logger.exception("the decoder's engine crashed")
            reason = f"the decoder's engine crashed: {type(exc).__name__}"
        self._broken = reason
        self._stepping_since = None
        self._fail_rest(undecided, reason)

    def _step_until_closed(self, engine: DecodeEngine, undecided: dict[RequestKey, _Undecided]) -> None:
        while not self._is_closed:
            # Waits for a command only when there is nothing to decode.
            if not self._inbox.empty() or not engine.has_work:
                command = self._inbox.get()
                if command is not None:
                    _obey(engine, undecided, command)
                continue
            self._stepping_since = time.monotonic()
            for outcome in engine.step(_now_ms()):
                _settle(undecided, outcome)
            self._stepping_since = None

    def _fail_rest(self, undecided: dict[RequestKey, _Undecided], reason: str) -> None:
        for key in list(undecided):
            _settle(undecided, Failure(key, None, FailureKind.UNAVAILABLE, reason))
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, _Submit):
                _post(command.reply, Failure(command.request.key, None, FailureKind.UNAVAILABLE, reason))


def _join(
    encoded: Sequence[Embeddings | Failure | None],
    pictures: Sequence[Pictures | Failure | None] | None,
    requests: Sequence[DecodeRequest],
) -> list[Context | Failure]:
    """Return what each request is about, or why it cannot be asked."""
    pictures = pictures if pictures is not None else [None] * len(requests)
    for what, items in (("embeddings", encoded), ("pictures", pictures)):
        keys = [request.key if item is None else item.key for request, item in zip(requests, items, strict=False)]
        if len(items) != len(requests) or keys != [request.key for request in requests]:
            raise ValueError(f"{len(items)} {what} do not belong to {len(requests)} requests")
    joined: list[Context | Failure] = []
    for sound, picture in zip(encoded, pictures, strict=True):
        if isinstance(sound, Failure):
            joined.append(sound)
        elif isinstance(picture, Failure):
            joined.append(picture)
        else:
            joined.append(Context(sound, picture))
    return joined


def _now_ms() -> float:
    return time.monotonic() * 1_000


def _obey(engine: DecodeEngine, undecided: dict[RequestKey, _Undecided], command: _Submit | _Cancel) -> None:
    if isinstance(command, _Cancel):
        entry = undecided.get(command.key)
        if entry is not None and entry.reply is command.reply:
            engine.cancel(command.key)
            del undecided[command.key]
        return
    key = command.request.key
    if key in undecided:
        # Sent again while the first is undecided (its caller ran out of patience): the newer caller gets the answer.
        engine.cancel(key)
        _settle(undecided, Failure(key, None, FailureKind.UNAVAILABLE, "the snapshot was sent again"))
    try:
        engine.submit(command.request, command.context, deadline_ms=command.deadline_ms)
    except Exception as exc:
        logger.exception("the engine refused a request")
        _post(command.reply, Failure(key, None, FailureKind.FAILED, f"refused by the decoder: {type(exc).__name__}"))
        return
    undecided[key] = _Undecided(command.reply, len(command.request.tasks))


def _settle(undecided: dict[RequestKey, _Undecided], outcome: Outcome) -> None:
    entry = undecided.get(outcome.key)
    if entry is None:
        return
    entry.num_open_tasks -= 1
    if outcome.task is None or not entry.num_open_tasks:
        del undecided[outcome.key]
    _post(entry.reply, outcome)


def _post(reply: _Reply, outcome: Outcome) -> None:
    try:
        reply.loop.call_soon_threadsafe(reply.outcomes.put_nowait, outcome)
    except RuntimeError:
        logger.debug("an outcome came after its event loop had closed")


def _load(model: ModelParams, params: DecoderParams) -> tuple[DecodeEngine, DecoderInfo]:
    # Torch is imported here, in the thread that will use it: see the module's docstring.
    import torch  # noqa: PLC0415

    num_threads = choose_num_threads(model.decoder_threads, "decoder")
    torch.set_num_threads(num_threads)
    engine = DecodeEngine(model, params, clock=time.perf_counter)
    info = DecoderInfo(
        tier=engine.tier,
        model=model.name,
        partial_dtype=engine.partial_dtype,
        final_dtype=engine.final_dtype,
        num_threads=num_threads,
        languages=engine.languages,
        translates_to=engine.translates_to,
        tasks=engine.tasks,
    )
    return engine, info
