"""Carries jobs through the stages: what both implementations of `Stages` share, beside the snapshots' driver.

Which jobs go together and when is decided in `actors/job_queue.py`; how a call reaches the models is the transport's
affair (`actors/transport.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace

from actors.job_queue import JobParams, JobQueue, Need, Settled, Ticket
from actors.metrics import Metrics
from actors.transport import JobTransport, StageCall
from pipeline.errors import StageUnavailable
from pipeline.items import DecodeRequest, Failure, FailureKind, Job, Outcome

logger = logging.getLogger(__name__)

_TICK_S = 0.25
"""How often what waits is looked at for having waited too long."""


@dataclass(slots=True, eq=False)
class _Call:
    """One call: what it needs, and the jobs that it still owes an outcome."""

    need: Need
    owed: list[Ticket]
    is_encoding: bool = True

    def take_owed(self) -> list[Ticket]:
        """Return what is owed; it is the caller's affair from now on."""
        owed, self.owed = self.owed, []
        return owed


class JobDriver:
    """The way of jobs through the stages. Belongs to the event loop on which `start` is called."""

    def __init__(self, transport: JobTransport, params: JobParams, metrics: Metrics) -> None:
        self._transport = transport
        self._params = params
        self._metrics = metrics
        self._queue = JobQueue(params)
        self._answers: dict[Ticket, asyncio.Future[Outcome]] = {}
        self._wakeup = asyncio.Event()
        self._calls: dict[asyncio.Task[None], _Call] = {}
        self._sender: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_in_flight(self) -> int:
        """Jobs that are with the models."""
        return self._queue.num_in_flight

    def start(self) -> None:
        """Start sending. Call once, on the event loop that will submit."""
        self._sender = asyncio.create_task(self._send_forever(), name="job-sender")

    async def submit(self, job: Job) -> Outcome:
        """Return what came of `job` (see `Stages.submit_job`)."""
        submitted_ms = _now_ms()
        outcome = await self._submit(job)
        self._metrics.on_job(job, outcome, _now_ms() - submitted_ms)
        return outcome

    async def aclose(self) -> None:
        """Fail what waits and give up what is in flight. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        tasks = [*self._calls, *([] if self._sender is None else [self._sender])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for ticket in list(self._answers):
            failure = Failure(ticket.job.key, ticket.job.task, FailureKind.UNAVAILABLE, "the stages were closed")
            self._deliver(ticket, failure)

    async def _submit(self, job: Job) -> Outcome:
        if self._is_closed or self._sender is None:
            return Failure(job.key, job.task, FailureKind.UNAVAILABLE, "the stages are closed")
        if not self._queue.has_room(job):
            message = f"{self._queue.num_waiting} jobs wait already: try again later"
            return Failure(job.key, job.task, FailureKind.UNAVAILABLE, message)
        ticket, overtaken = self._queue.add(job, _now_ms())
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._answers[ticket] = answer
        self._settle(overtaken)
        self._wakeup.set()
        try:
            return await answer
        finally:
            del self._answers[ticket]
            if not answer.done() or answer.cancelled():
                self._give_up(ticket)

    def _give_up(self, ticket: Ticket) -> None:
        self._queue.abandon(ticket)
        for task, call in self._calls.items():
            if ticket in call.owed and all(other.is_abandoned for other in call.owed):
                task.cancel()
        self._wakeup.set()

    # -- sending ----------------------------------------------------------------------------------

    async def _send_forever(self) -> None:
        while True:
            self._wakeup.clear()
            self._settle(self._queue.expire(_now_ms()))
            while tickets := self._queue.take():
                call = _Call(tickets[0].need, tickets)
                task = asyncio.create_task(self._carry(call), name="job-call")
                self._calls[task] = call
                task.add_done_callback(self._end_call)
            self._metrics.jobs_waiting.set(self._queue.num_waiting)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakeup.wait(), _TICK_S if self._queue.num_waiting else None)

    def _end_call(self, task: asyncio.Task[None]) -> None:
        # Not in the task itself: one that is cancelled before it began runs none of its code.
        call = self._calls.pop(task)
        for ticket in call.take_owed():
            self._queue.land(ticket)
        self._end_encoding(call)

    async def _carry(self, call: _Call) -> None:
        """Send one call and deliver its outcomes."""
        jobs = [ticket.job for ticket in call.owed]
        try:
            sent = await self._transport.start_jobs(jobs, [DecodeRequest.of_job(job) for job in jobs])
        except StageUnavailable as exc:
            logger.warning("no call of jobs could be sent: %s", exc)
            await asyncio.sleep(_TICK_S)
            self._settle(self._queue.put_back(call.take_owed()))
            return
        except Exception as exc:
            # A defect of this program, or a stage that cannot be replaced: these jobs fail, others go on.
            logger.exception("a call of jobs could not be sent")
            self._fail(call.take_owed(), f"internal error: {type(exc).__name__}")
            return
        encoding = asyncio.create_task(self._watch_encoding(sent, call), name="job-encoding")
        try:
            await self._receive(sent, call)
        except StageUnavailable as exc:
            self._lose(call.take_owed(), str(exc))
        except Exception as exc:
            logger.exception("a call of jobs failed")
            self._fail(call.take_owed(), f"internal error: {type(exc).__name__}")
        finally:
            encoding.cancel()
            await asyncio.wait({encoding})
            await sent.aclose()

    async def _watch_encoding(self, sent: StageCall, call: _Call) -> None:
        await sent.wait_encoded()
        self._end_encoding(call)

    def _end_encoding(self, call: _Call) -> None:
        if call.is_encoding:
            call.is_encoding = False
            self._queue.end_encoding(call.need)
        self._wakeup.set()

    async def _receive(self, sent: StageCall, call: _Call) -> None:
        """Deliver the outcomes of one call, to its end.

        Raises:
            StageUnavailable: if a stage died under it, or nothing comes for `call_timeout_ms`.
        """
        # Lost ones stay owed until the others are answered: whatever else ends the call, they are not forgotten.
        lost: list[Ticket] = []
        reason = ""
        async with aclosing(sent.outcomes()) as outcomes:
            while (outcome := await self._next_of(outcomes)) is not None:
                ticket = next((ticket for ticket in call.owed if ticket.job.key == outcome.key), None)
                if ticket is None:
                    continue
                if isinstance(outcome, Failure) and outcome.kind is FailureKind.UNAVAILABLE:
                    lost.append(ticket)
                    reason = outcome.message
                    continue
                call.owed.remove(ticket)
                self._queue.land(ticket)
                self._deliver(ticket, outcome)
                self._wakeup.set()
        call.owed = [ticket for ticket in call.owed if ticket not in lost]
        self._lose(lost, reason)
        self._fail(call.take_owed(), "the decoder ended without an outcome")

    async def _next_of(self, outcomes: AsyncGenerator[Outcome, None]) -> Outcome | None:
        timeout_s = self._params.call_timeout_ms / 1_000
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(outcomes, None)
        except TimeoutError as exc:
            raise StageUnavailable(f"no outcome for {timeout_s:.0f} s") from exc

    # -- outcomes ---------------------------------------------------------------------------------

    def _lose(self, tickets: list[Ticket], reason: str) -> None:
        if tickets:
            logger.warning("a stage was lost under %d jobs: %s", len(tickets), reason)
            self._metrics.stage_losses.inc()
            self._settle(self._queue.lose(tickets, _now_ms(), reason))
            self._wakeup.set()

    def _fail(self, tickets: Iterable[Ticket], message: str) -> None:
        for ticket in tickets:
            self._queue.land(ticket)
            self._deliver(ticket, Failure(ticket.job.key, ticket.job.task, FailureKind.FAILED, message))

    def _settle(self, settled: Settled) -> None:
        for ticket, failure in settled:
            self._deliver(ticket, failure)

    def _deliver(self, ticket: Ticket, outcome: Outcome) -> None:
        answer = self._answers.get(ticket)
        if answer is not None and not answer.done():
            # A failure of all tasks is one of the only one.
            answer.set_result(outcome if outcome.task is not None else replace(outcome, task=ticket.job.task))


def _now_ms() -> float:
    return time.monotonic() * 1_000
