"""Which jobs go into the next call: the policy, without I/O, threads or a clock.

Jobs (descriptions, summaries, answers) wait here until a call may take them. The driver (`actors/job_driver.py`) tells
the time and carries the calls out.

The rules:
    - jobs with the same needs go together, so that the frames of all streams share batches of crops; a call holds up to
      `max_frames_per_call` frames and `max_sound_s_per_call` of sound, but at least one job: captions wait for the same
      encoder;
    - one call of a kind of need is with the encoders at once, and no more than `max_in_flight` of its jobs are with the
      models: what needs no pictures never waits behind pictures;
    - answers go before scenes, scenes before summaries, each in the order of arrival;
    - a newer description of a stream overtakes one that still waits, and takes its place in the queue;
    - what is lost with a stage is sent again alone, with no other job in flight, `max_tries` times in all: so the one
      that kills stages is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from pydantic import Field

from pipeline.items import Failure, FailureKind, Job, TaskKind
from pipeline.params import Params
from pipeline.timebase import SAMPLE_RATE_HZ


class JobParams(Params):
    """Jobs: what is asked of the models besides captions."""

    max_waiting: int = Field(default=64, ge=1, le=10_000, description="jobs that wait for a call; more are refused")
    max_wait_ms: float = Field(
        default=120_000.0,
        gt=0,
        le=3_600_000,
        description="a job that was not answered for so long is not sent (again)",
    )
    call_timeout_ms: float = Field(
        default=60_000.0, gt=0, le=3_600_000, description="a call of jobs that gives nothing for so long counts as lost"
    )
    max_frames_per_call: int = Field(default=16, ge=1, le=256, description="frames of one call, of all streams")
    max_sound_s_per_call: int = Field(
        default=60, ge=1, le=3_600, description="sound of one call, of all jobs; captions wait until it is encoded"
    )
    max_in_flight: int = Field(
        default=8, ge=1, le=128, description="jobs with the models at once, of those with the same needs"
    )
    max_tries: int = Field(default=2, ge=1, le=10, description="how often a job is sent whose stages died, at most")


class Need(StrEnum):
    """What a job needs beside the decoder."""

    TEXT = "text"  # nothing: its text is all
    FRAMES = "frames"
    SOUND = "sound"
    BOTH = "both"


_PRIORITIES = {TaskKind.ANSWER: 0, TaskKind.DESCRIBE: 1}
_LAST_PRIORITY = 2


@dataclass(slots=True, eq=False)
class Ticket:
    """One submission of a job. Two submissions of one job are two tickets."""

    job: Job
    order: int
    submitted_ms: float
    num_tries: int = 0
    is_abandoned: bool = False  # nobody waits for its outcome any more

    @property
    def need(self) -> Need:
        """What its job needs."""
        return need_of(self.job)


Settled = list[tuple[Ticket, Failure]]
"""Jobs that are over without an answer, and why."""


class JobQueue:
    """Jobs that wait and jobs that are in flight. Not thread-safe; the driver owns it."""

    def __init__(self, params: JobParams) -> None:
        self._params = params
        self._num_added = 0
        self._waiting: list[Ticket] = []
        self._in_flight: dict[Need, set[Ticket]] = {need: set() for need in Need}
        self._encoding: set[Need] = set()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a call."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Jobs that are with the models."""
        return sum(map(len, self._in_flight.values()))

    def has_room(self, job: Job) -> bool:
        """Whether `job` may wait: there is a place, or one whose place it takes."""
        return len(self._waiting) < self._params.max_waiting or self._overtaken_by(job) is not None

    def add(self, job: Job, now_ms: float) -> tuple[Ticket, Settled]:
        """Let `job` wait; return its ticket and what it overtakes.

        Raises:
            RuntimeError: if there is no room.
        """
        if not self.has_room(job):
            raise RuntimeError(f"{self.num_waiting} jobs wait already; look at has_room()")
        self._num_added += 1
        ticket = Ticket(job, self._num_added, now_ms)
        overtaken = self._overtaken_by(job)
        self._waiting.append(ticket)
        if overtaken is None:
            return ticket, []
        # Its place, so that a stream that shows much is not set back by it.
        ticket.order = overtaken.order
        self._waiting.remove(overtaken)
        return ticket, [(overtaken, _superseded(overtaken))]

    def take(self) -> list[Ticket]:
        """Return the jobs of the next call, all with the same needs and in flight from now on; empty: none may go."""
        chosen = self._choose()
        for ticket in chosen:
            self._waiting.remove(ticket)
            ticket.num_tries += 1
            self._in_flight[ticket.need].add(ticket)
            self._encoding.add(ticket.need)
        return chosen

    def end_encoding(self, need: Need) -> None:
        """Take note that the encoders are done with the latest call of this need, or that it is over."""
        self._encoding.discard(need)

    def land(self, ticket: Ticket) -> bool:
        """Take note that a job in flight is over; return whether somebody waits for its outcome."""
        self._in_flight[ticket.need].discard(ticket)
        return not ticket.is_abandoned

    def put_back(self, tickets: Iterable[Ticket]) -> Settled:
        """Let jobs wait again that never reached a stage; return those overtaken meanwhile."""
        settled: Settled = []
        for ticket in tickets:
            ticket.num_tries -= 1
            if self.land(ticket):
                settled += self._wait_again(ticket)
        return settled

    def lose(self, tickets: Iterable[Ticket], now_ms: float, reason: str) -> Settled:
        """Take note that a stage died (or fell silent) under `tickets`; return what is not sent again."""
        settled: Settled = []
        for ticket in tickets:
            if not self.land(ticket):
                continue
            if ticket.num_tries >= self._params.max_tries:
                settled.append((ticket, _unavailable(ticket, f"lost with a stage {ticket.num_tries} times ({reason})")))
            elif self._is_late(ticket, now_ms):
                settled.append((ticket, self._expired(ticket, now_ms, reason)))
            else:
                settled += self._wait_again(ticket)
        return settled

    def expire(self, now_ms: float) -> Settled:
        """Drop what has waited for too long and return it. What is in flight has its call's timeout."""
        late = [ticket for ticket in self._waiting if self._is_late(ticket, now_ms)]
        self._waiting = [ticket for ticket in self._waiting if ticket not in late]
        return [(ticket, self._expired(ticket, now_ms, "no stage took it")) for ticket in late]

    def abandon(self, ticket: Ticket) -> None:
        """Take note that nobody waits for `ticket` any more. What is in flight is not sent again."""
        ticket.is_abandoned = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def _choose(self) -> list[Ticket]:
        suspects = [ticket for ticket in self._waiting if ticket.num_tries]
        flying = [ticket for tickets in self._in_flight.values() for ticket in tickets]
        if suspects:
            return [] if flying else [min(suspects, key=_rank)]
        if any(ticket.num_tries > 1 for ticket in flying):
            return []
        for need in Need:
            if chosen := self._choose_of(need):
                return chosen
        return []

    def _choose_of(self, need: Need) -> list[Ticket]:
        room = self._params.max_in_flight - len(self._in_flight[need])
        if need in self._encoding or room < 1:
            return []
        chosen: list[Ticket] = []
        keys = set()
        max_samples = self._params.max_sound_s_per_call * SAMPLE_RATE_HZ
        num_frames = num_samples = 0
        for ticket in sorted((ticket for ticket in self._waiting if ticket.need is need), key=_rank):
            num_frames += len(ticket.job.frames)
            num_samples += 0 if ticket.job.samples is None else len(ticket.job.samples)
            is_large = num_frames > self._params.max_frames_per_call or num_samples > max_samples
            if len(chosen) == room or (chosen and is_large):
                break
            # The outcomes of a call are told apart by their keys.
            if ticket.job.key not in keys:
                keys.add(ticket.job.key)
                chosen.append(ticket)
        return chosen

    def _wait_again(self, ticket: Ticket) -> Settled:
        if any(_overtakes(other.job, ticket.job) for other in self._waiting):
            return [(ticket, _superseded(ticket))]
        self._waiting.append(ticket)
        return []

    def _overtaken_by(self, job: Job) -> Ticket | None:
        return next((ticket for ticket in self._waiting if _overtakes(job, ticket.job)), None)

    def _is_late(self, ticket: Ticket, now_ms: float) -> bool:
        return now_ms - ticket.submitted_ms >= self._params.max_wait_ms

    def _expired(self, ticket: Ticket, now_ms: float, reason: str) -> Failure:
        return _unavailable(ticket, f"no answer within {(now_ms - ticket.submitted_ms) / 1_000:.1f} s ({reason})")


def need_of(job: Job) -> Need:
    """Return what `job` needs beside the decoder."""
    if job.samples is not None:
        return Need.BOTH if job.frames else Need.SOUND
    return Need.FRAMES if job.frames else Need.TEXT


def _rank(ticket: Ticket) -> tuple[int, int]:
    return (_PRIORITIES.get(ticket.job.task.kind, _LAST_PRIORITY), ticket.order)


def _overtakes(newer: Job, older: Job) -> bool:
    return (
        newer.key.kind is older.key.kind is TaskKind.DESCRIBE
        and newer.key.stream_id == older.key.stream_id
        and newer.key.number > older.key.number
    )


def _superseded(ticket: Ticket) -> Failure:
    message = "a newer picture of the same stream came before this one was looked at"
    return Failure(ticket.job.key, ticket.job.task, FailureKind.SUPERSEDED, message)


def _unavailable(ticket: Ticket, message: str) -> Failure:
    return Failure(ticket.job.key, ticket.job.task, FailureKind.UNAVAILABLE, message)
