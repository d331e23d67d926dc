"""Carries snapshots through the stages: what both implementations of `Stages` share.

It owns the dispatch queue, keeps calls in flight, hands every outcome to whoever submitted the snapshot, and submits
again what was lost. How a call reaches the models is the transport's affair (`actors/transport.py`). Jobs go their own
way beside it (`actors/job_driver.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from actors.audio_encoder import EncoderInfo
from actors.cadence import CadencePolicy
from actors.cost_model import CostModel
from actors.decoder import DecoderInfo
from actors.dispatch import DispatchParams, DispatchQueue
from actors.job_driver import JobDriver
from actors.job_queue import JobParams
from actors.load_meter import LoadMeter
from actors.metrics import Metrics
from actors.stages import EyesInfo, StagesInfo
from actors.transport import StageCall, Transport
from pipeline.errors import StageUnavailable
from pipeline.items import DecodeRequest, Failure, FailureKind, Job, Outcome, RequestKey, Snapshot
from pipeline.stream_params import SnapshotParams

logger = logging.getLogger(__name__)

_TICK_S = 0.25
"""How often what waits is looked at for having waited too long, and the cadence adapts."""


class StageDriver:
    """`Stages` over a transport. Belongs to the event loop on which `start` is called."""

    def __init__(
        self,
        transport: Transport,
        info: StagesInfo,
        params: DispatchParams,
        cost: CostModel,
        metrics: Metrics,
        *,
        snapshots: SnapshotParams | None = None,
        jobs: JobParams | None = None,
    ) -> None:
        """`snapshots` holds the bounds of the cadence."""
        bounds = snapshots or SnapshotParams()
        self._transport = transport
        self._info = info
        self._params = params
        self._cost = cost
        self._metrics = metrics
        self._queue = DispatchQueue(params, cost.predict_ms)
        self._jobs = JobDriver(transport, jobs or JobParams(), metrics)
        self._mailboxes: dict[RequestKey, asyncio.Queue[Outcome]] = {}
        self._submitted_ms: dict[RequestKey, float] = {}
        self._wakeup = asyncio.Event()
        self._has_room = asyncio.Condition()
        self._num_encoding = 0
        self._sent_ms = -math.inf
        self._progress_at = time.monotonic()
        self._cadence = CadencePolicy(params.cadence, bounds.min_cadence_ms, bounds.max_cadence_ms)
        # At the longest cadence a partial that is late by another one is not worth its work.
        self._partial_deadline_ms = 2.0 * bounds.max_cadence_ms
        self._load = LoadMeter(_now_ms())
        self._calls: set[asyncio.Task[None]] = set()
        self._decoding: dict[StageCall, set[RequestKey]] = {}
        self._sender: asyncio.Task[None] | None = None
        self._adapter: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def info(self) -> StagesInfo:
        """What answers."""
        return self._info

    @property
    def cadence_ms(self) -> int:
        """New sound between two partials of an utterance that the stages can bear now, in milliseconds."""
        return self._cadence.company_cadence_ms if self._queue.num_waiting else self._cadence.cadence_ms

    @property
    def num_in_flight(self) -> int:
        """Snapshots and jobs that are with the models."""
        return self._queue.num_in_flight + self._jobs.num_in_flight

    def start(self) -> None:
        """Start sending. Call once, on the event loop that will submit."""
        self._sender = asyncio.create_task(self._send_forever(), name="stage-sender")
        self._adapter = asyncio.create_task(self._adapt_forever(), name="stage-cadence")
        self._jobs.start()

    async def submit(self, snapshot: Snapshot) -> AsyncGenerator[Outcome, None]:
        """Yield one outcome for each task of `snapshot` (see `Stages.submit`)."""
        key, params, submitted_ms = snapshot.key, self._params, _now_ms()
        wait_ms = params.max_final_wait_ms if snapshot.is_final else params.max_partial_wait_ms
        try:
            async with asyncio.timeout(wait_ms / 1_000), self._has_room:
                await self._has_room.wait_for(lambda: self._is_closed or self._may_enter(snapshot))
        except TimeoutError:
            yield Failure(key, None, FailureKind.UNAVAILABLE, f"no place to wait within {wait_ms / 1_000:.1f} s")
            return
        if self._is_closed or self._sender is None:
            yield Failure(key, None, FailureKind.UNAVAILABLE, "the stages are closed")
            return
        mailbox: asyncio.Queue[Outcome] = asyncio.Queue(maxsize=len(snapshot.tasks) + 1)
        failures = self._queue.add(snapshot, submitted_ms)
        self._mailboxes[key] = mailbox
        self._submitted_ms[key] = submitted_ms
        self._deliver_failures(failures)
        self._wakeup.set()
        num_open = len(snapshot.tasks)
        try:
            while num_open:
                outcome = await mailbox.get()
                num_open = 0 if outcome.task is None else num_open - 1
                yield outcome
        finally:
            del self._mailboxes[key]
            self._submitted_ms.pop(key, None)
            self._wakeup.set()
            if num_open:
                self._queue.abandon(key)
                await self._tell_room()

    async def submit_job(self, job: Job) -> Outcome:
        """Return what came of `job` (see `Stages.submit_job`)."""
        if job.task.kind not in self._info.tasks or (job.frames and self._info.eyes is None):
            message = f"{self._info.model} cannot {job.task.kind.value} this"
            return Failure(job.key, job.task, FailureKind.FAILED, message)
        return await self._jobs.submit(job)

    def withdraw(self, key: RequestKey) -> None:
        """Fail `key` as superseded (see `Stages.withdraw`)."""
        if key in self._mailboxes:
            self._queue.abandon(key)
            message = "what it was taken for did not come about"
            self._deliver_failures([Failure(key, None, FailureKind.SUPERSEDED, message)])
            self._wakeup.set()

    async def aclose(self) -> None:
        """Fail what waits, give up what is in flight, close the transport. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        tasks = [*self._calls, *(task for task in (self._sender, self._adapter) if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self._jobs.aclose(), return_exceptions=True)
        await self._tell_room()
        for key in list(self._mailboxes):
            self._deliver(Failure(key, None, FailureKind.UNAVAILABLE, "the stages were closed"))
        await self._transport.aclose()

    def _may_enter(self, snapshot: Snapshot) -> bool:
        # A session that was given up may have left this key in flight; its late outcomes must not be taken for answers.
        is_left_behind = self._queue.is_in_flight(snapshot.key) and snapshot.key not in self._mailboxes
        return not is_left_behind and (not snapshot.is_final or self._queue.has_room())

    # -- sending ----------------------------------------------------------------------------------

    async def _send_forever(self) -> None:
        while True:
            self._wakeup.clear()
            if expired := self._queue.expire(_now_ms()):
                self._deliver_failures(expired)
                await self._tell_room()
            wait_ms = 0.0
            if self._num_encoding < self._transport.max_calls and self._queue.can_take():
                wait_ms = 0.0 if self._queue.has_urgent_waiting else self._sent_ms + self._cadence.gather_ms - _now_ms()
                if wait_ms <= 0:
                    await self._send_one()
                    continue
            timeout_s = wait_ms / 1_000 or (_TICK_S if self._queue.num_waiting else None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakeup.wait(), timeout_s)

    async def _send_one(self) -> None:
        snapshots: list[Snapshot] = []
        try:
            async with self._transport.open_lane() as lane:
                # Only now is it decided what goes along: a place has become free.
                snapshots = self._queue.take(_now_ms())
                if not snapshots:
                    return
                call = await lane.start(snapshots, [self._request_of(snapshot) for snapshot in snapshots])
        except StageUnavailable as exc:
            logger.warning("no call could be sent: %s", exc)
            self._deliver_failures(self._queue.put_back(snapshot.key for snapshot in snapshots))
            await asyncio.sleep(_TICK_S)
            return
        except Exception as exc:
            # A defect of this program must not stop the sender: every stream waits for it.
            logger.exception("a call could not be sent")
            self._fail_open([snapshot.key for snapshot in snapshots], f"internal error: {type(exc).__name__}")
            await self._tell_room()
            await asyncio.sleep(_TICK_S)
            return
        self._observe_queue_wait(snapshots)
        self._sent_ms = _now_ms()
        self._add_encoding(1)
        task = asyncio.create_task(self._carry(call, snapshots), name="stage-call")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        await self._tell_room()

    def _request_of(self, snapshot: Snapshot) -> DecodeRequest:
        return DecodeRequest.of(snapshot, None if snapshot.is_final else self._partial_deadline_ms)

    async def _carry(self, call: StageCall, snapshots: list[Snapshot]) -> None:
        # What this call still owes. A key that it has answered is none of its business: it may be in flight anew.
        open_keys = [snapshot.key for snapshot in snapshots]
        encoding = asyncio.create_task(self._watch_encoding(call, snapshots), name="stage-encoding")
        try:
            await self._receive(call, open_keys, encoding)
        except StageUnavailable as exc:
            if open_keys:
                logger.warning("a stage was lost under %d snapshots: %s", len(open_keys), exc)
                self._lose(open_keys, str(exc))
        except Exception as exc:
            # A defect of this program, not of a stage. Its snapshots fail; other calls and streams go on.
            logger.exception("a call failed")
            self._fail_open(open_keys, f"internal error: {type(exc).__name__}")
        finally:
            encoding.cancel()
            await asyncio.wait({encoding})
            self._load.end_decoding(len(self._decoding.pop(call, ())), _now_ms())
            await call.aclose()
            self._wakeup.set()
            await self._tell_room()

    async def _receive(self, call: StageCall, open_keys: list[RequestKey], encoding: asyncio.Task[float]) -> None:
        """Deliver the outcomes of `call`, taking from `open_keys` what is answered, to its end.

        One that has answered everything ends by itself; only what nobody waits for is given up before.
        """
        lost: list[RequestKey] = []
        reason = ""
        async with aclosing(call.outcomes()) as raw, aclosing(self._patiently(raw)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Failure) and outcome.kind is FailureKind.UNAVAILABLE:
                    lost.append(outcome.key)
                    reason = outcome.message
                    continue
                if outcome.key in open_keys and self._queue.answer(outcome):
                    self._deliver(outcome)
                    self._note_decoded(call, outcome.key)
                    if not self._queue.is_in_flight(outcome.key):
                        open_keys.remove(outcome.key)
                    if encoding.done() and not encoding.cancelled():
                        self._metrics.decode_ms.observe((time.perf_counter() - encoding.result()) * 1_000)
                if open_keys and self._queue.is_abandoned(open_keys):
                    break
        if lost:
            self._lose(lost, reason)
        self._fail_open(open_keys, "the decoder ended without an outcome")

    async def _patiently(self, outcomes: AsyncGenerator[Outcome, None]) -> AsyncGenerator[Outcome, None]:
        """Yield from `outcomes`; raise StageUnavailable when they stop coming.

        A call may wait long behind others, so silence counts only while no call gets an answer, or for four times as
        long.
        """
        timeout_s = self._params.call_timeout_ms / 1_000
        while True:
            began = time.monotonic()
            pending = asyncio.ensure_future(anext(outcomes))
            try:
                while not pending.done():
                    await asyncio.wait({pending}, timeout=timeout_s)
                    now = time.monotonic()
                    is_silent = now - max(began, self._progress_at) >= timeout_s or now - began >= 4 * timeout_s
                    if not pending.done() and is_silent:
                        raise StageUnavailable(f"no outcome for {now - began:.0f} s")
                outcome = pending.result()
            except StopAsyncIteration:
                return
            finally:
                if not pending.done():
                    pending.cancel()
                    await asyncio.wait({pending})
            self._progress_at = time.monotonic()
            yield outcome

    async def _watch_encoding(self, call: StageCall, snapshots: list[Snapshot]) -> float:
        """Return when the encoder was done (`time.perf_counter`)."""
        started = time.perf_counter()
        is_only = self._num_encoding == 1
        try:
            await call.wait_encoded()
            encoded_at = time.perf_counter()
            open_keys = {snapshot.key for snapshot in snapshots if self._queue.is_in_flight(snapshot.key)}
            self._decoding[call] = open_keys
            self._load.add_decoding(len(open_keys), _now_ms())
            elapsed_ms = (encoded_at - started) * 1_000
            self._metrics.encode_ms.observe(elapsed_ms)
            if is_only:
                # A call behind another one has waited for it as well: its time says nothing about its work.
                self._cost.observe(snapshots, elapsed_ms)
            return encoded_at
        finally:
            self._add_encoding(-1)
            self._wakeup.set()

    async def _tell_room(self) -> None:
        """Let those that wait outside look again: whatever takes snapshots out of the queue must call this."""
        async with self._has_room:
            self._has_room.notify_all()

    # -- load -------------------------------------------------------------------------------------

    async def _adapt_forever(self) -> None:
        while True:
            self._metrics.on_cadence(self._cadence)
            await asyncio.sleep(_TICK_S)
            now_ms = _now_ms()
            waiting = self._queue.waiting(now_ms)
            self._load.note_wait(waiting.final_wait_ms, is_final=True)
            self._load.note_wait(waiting.partial_wait_ms, is_final=False)
            # Several encoders share what waits.
            self._cadence.tick(self._load.take(now_ms, waiting.work_ms / self._transport.max_calls))

    def _add_encoding(self, num_calls: int) -> None:
        self._num_encoding += num_calls
        self._load.set_encoding(self._num_encoding / self._transport.max_calls, _now_ms())

    def _note_decoded(self, call: StageCall, key: RequestKey) -> None:
        open_keys = self._decoding.get(call, set())
        if key in open_keys and not self._queue.is_in_flight(key):
            open_keys.remove(key)
            self._load.end_decoding(1, _now_ms())

    # -- outcomes ---------------------------------------------------------------------------------

    def _lose(self, keys: list[RequestKey], reason: str) -> None:
        self._metrics.stage_losses.inc()
        failures = self._queue.lose(keys, _now_ms(), reason)
        given_up = {failure.key for failure in failures}
        self._metrics.retries.inc(sum(key not in given_up and key in self._mailboxes for key in keys))
        self._deliver_failures(failures)

    def _fail_open(self, keys: Iterable[RequestKey], message: str) -> None:
        for key in keys:
            if self._queue.is_in_flight(key):
                failure = Failure(key, None, FailureKind.FAILED, message)
                self._queue.answer(failure)
                self._deliver(failure)

    def _deliver_failures(self, failures: Iterable[Failure]) -> None:
        for failure in failures:
            if failure.kind is FailureKind.SUPERSEDED:
                self._metrics.superseded.inc()
            self._deliver(failure)

    def _deliver(self, outcome: Outcome) -> None:
        mailbox = self._mailboxes.get(outcome.key)
        if mailbox is not None:
            mailbox.put_nowait(outcome)

    def _observe_queue_wait(self, snapshots: list[Snapshot]) -> None:
        now_ms = _now_ms()
        for snapshot in snapshots:
            submitted_ms = self._submitted_ms.pop(snapshot.key, None)
            if submitted_ms is not None:  # not one that is sent again
                self._load.note_wait(now_ms - submitted_ms, is_final=snapshot.is_final)
                self._metrics.queue_wait_ms.observe(now_ms - submitted_ms)


def stages_info(encoder: EncoderInfo, decoder: DecoderInfo, eyes: EyesInfo | None = None) -> StagesInfo:
    """Return what the stages are together.

    Each measures for itself which arithmetic partials get, so they may differ.
    """
    encoder_dtypes = f"partials in {encoder.partial_dtype}, finals in {encoder.final_dtype}"
    decoder_dtypes = f"partials in {decoder.partial_dtype}, finals in {decoder.final_dtype}"
    is_same = encoder_dtypes == decoder_dtypes
    return StagesInfo(
        tier=decoder.tier,
        model=decoder.model,
        arithmetic=encoder_dtypes if is_same else f"encoder: {encoder_dtypes}; decoder: {decoder_dtypes}",
        languages=decoder.languages,
        translates_to=decoder.translates_to,
        tasks=decoder.tasks,
        eyes=eyes,
    )


def _now_ms() -> float:
    return time.monotonic() * 1_000
