"""Which work runs in the decoder's next step: schedule, run, account.

Plain Python, no torch, no clock: age is counted in steps, and deadlines are compared with the time that the caller
gives. A piece of work is one snapshot or job that holds one slot of key/value memory from its admission to its end.
What it feeds is told in numbers of tokens: the prompt and draft at first, usually one token a step afterwards; which
they are is the caller's affair.

The verbs and their order follow nano-vllm and vLLM v1 (`schedule`, `execute_model`, `update_from_output`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Generic, TypeVar

from pydantic import Field

from pipeline.params import Params

IdT = TypeVar("IdT", bound=Hashable)


class Priority(IntEnum):
    """What goes first; a smaller number is served before a larger one."""

    FINAL = 0
    PARTIAL = 1
    TRANSLATION = 2
    SCENE = 3
    SUMMARY = 4


class SchedulerParams(Params):
    """Bounds of the decoder's queue and of one step."""

    num_slots: int = Field(default=16, ge=1, le=512, description="snapshots decoded at once, each in its own KV slot")
    tokens_per_step: int = Field(default=512, ge=8, le=65_536, description="tokens of one forward pass, at most")
    max_waiting: int = Field(default=256, ge=1, le=65_536, description="snapshots that may wait for a slot")
    ageing_steps: int = Field(
        default=64, ge=1, le=100_000, description="steps without service that raise a priority by one, never to final"
    )
    max_overrun_ms: int = Field(
        default=1_000, ge=0, le=600_000, description="how long a partial that runs may go on past its deadline"
    )


class EndReason(StrEnum):
    """How a piece of work ended."""

    FINISHED = "finished"
    FAILED = "failed"
    SUPERSEDED = "superseded"  # a newer revision of the same lineage arrived
    EXPIRED = "expired"  # the deadline of a partial passed
    CANCELLED = "cancelled"
    REFUSED = "refused"  # the waiting queue was full


@dataclass(frozen=True, slots=True)
class Work(Generic[IdT]):
    """One snapshot's decoding as the scheduler sees it.

    `num_tokens` are to be fed first (prompt and draft). `num_context_tokens` is what its context costs, in tokens'
    worth of arithmetic; it is spent with the first piece and cannot be split. Work of one `lineage` (an utterance) is
    ordered by `revision`: a newer one supersedes older partials. `deadline_ms` is on the clock of
    `schedule`'s `now_ms`: a partial is worth nothing after it, other work is only ordered by it.
    """

    id: IdT
    priority: Priority
    num_tokens: int
    num_context_tokens: int = 0
    lineage: Hashable | None = None
    revision: int = 0
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Piece(Generic[IdT]):
    """What one piece of work does in one step: feed up to `num_tokens` in `slot`, which its first piece opens."""

    id: IdT
    slot: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ended(Generic[IdT]):
    """Work that ended outside of `account`; the slot that it had opened, if any, is to be closed."""

    id: IdT
    reason: EndReason


@dataclass(frozen=True, slots=True)
class Step(Generic[IdT]):
    """One step: first close the slots of what `ended` and of what was `preempted`, then run the `pieces`.

    What was preempted starts again later.
    """

    ended: tuple[Ended[IdT], ...]
    preempted: tuple[IdT, ...]
    pieces: tuple[Piece[IdT], ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Account of a piece that goes on: tokens to feed next, and those to feed if it has to start again from nothing.

    `priority` is that of what comes next: a final's translation is no longer a final.
    """

    num_tokens: int
    num_resume_tokens: int
    priority: Priority


class _Entry(Generic[IdT]):
    """Work in the scheduler. `slot` None: it waits. A slot without context has run nothing yet."""

    __slots__ = (
        "arrival",
        "deadline_ms",
        "expires_ms",
        "has_context",
        "num_preempted",
        "num_resume_tokens",
        "num_tokens",
        "priority",
        "served_step",
        "slot",
        "work",
    )

    def __init__(self, work: Work[IdT], arrival: int, step: int) -> None:
        self.work = work
        self.arrival = arrival
        self.priority = work.priority
        self.deadline_ms = math.inf if work.deadline_ms is None else work.deadline_ms
        self.expires_ms = self.deadline_ms if work.priority is Priority.PARTIAL else math.inf
        self.num_tokens = work.num_tokens
        self.num_resume_tokens = work.num_tokens
        self.served_step = step
        self.num_preempted = 0
        self.slot: int | None = None
        self.has_context = False


class Scheduler(Generic[IdT]):
    """Admits work to slots and packs steps. Not thread-safe; one owner calls `schedule` and `account` in turn.

    Rules:
      - Order: finals, then the rest by class; in a class the earliest deadline, then arrival.
      - Every `ageing_steps` steps without service, and every loss of its slot, raise work by one class, without end but
        never to that of finals. So of two that wait, the one that has waited long enough longer goes first, whatever
        their classes and deadlines: however many keep coming, only finals can hold it up.
      - A final that finds no free slot takes that of the last work below final, which starts again later.
      - Work that a full queue cannot take is refused: the newcomer, or, for a final, the last waiting below final.
      - Partials that a newer revision of their lineage has overtaken end at once, wherever they are.
      - A partial that has run nothing, or waits again, ends when its deadline has passed: its answer would be stale.
        One that runs has been paid for, is mostly a few tokens from its end, and is the next draft: it ends only
        `max_overrun_ms` later, so that a long one cannot keep its slot from fresh ones. Other work never expires.
    """

    def __init__(self, params: SchedulerParams, *, has_one_arithmetic: bool = False) -> None:
        """`has_one_arithmetic`: finals and the rest are computed in the same way, so that they can share a step."""
        self._params = params
        self._has_one_arithmetic = has_one_arithmetic
        self._entries: dict[IdT, _Entry[IdT]] = {}
        self._lineages: dict[Hashable, list[_Entry[IdT]]] = {}
        self._free_slots = list(range(params.num_slots - 1, -1, -1))
        self._in_step: dict[IdT, Piece[IdT]] = {}
        self._num_arrived = 0
        self._num_steps = 0

    @property
    def num_waiting(self) -> int:
        """Work without a slot."""
        return len(self._entries) - self.num_running

    @property
    def num_running(self) -> int:
        """Work that holds a slot."""
        return self._params.num_slots - len(self._free_slots)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._entries)

    def submit(self, work: Work[IdT]) -> tuple[Ended[IdT], ...]:
        """Queue `work` and return what ended by that: what gave way to it, or itself if it was overtaken or refused.

        Raises:
            ValueError: if its id is already queued, it has no token to feed, or its deadline is not a number.
        """
        if work.id in self._entries:
            raise ValueError(f"work {work.id!r} is already queued")
        if work.num_tokens < 1 or work.num_context_tokens < 0:
            raise ValueError(f"work {work.id!r} must feed at least one token, got {work.num_tokens}")
        if work.deadline_ms is not None and math.isnan(work.deadline_ms):
            raise ValueError(f"work {work.id!r} has a deadline of {work.deadline_ms} ms, expected a number or None")
        self._check_between_steps()
        ended = self._supersede(work) or self._refuse(work)
        if any(end.id == work.id for end in ended):
            return ended
        self._num_arrived += 1
        entry = _Entry(work, self._num_arrived, self._num_steps)
        self._entries[work.id] = entry
        if work.lineage is not None:
            self._lineages.setdefault(work.lineage, []).append(entry)
        return ended

    def cancel(self, work_id: IdT) -> Ended[IdT] | None:
        """End the work with id `work_id` and return how, or None if there is none."""
        self._check_between_steps()
        entry = self._entries.get(work_id)
        return None if entry is None else self._end(entry, EndReason.CANCELLED)

    def schedule(self, now_ms: float = 0.0) -> Step[IdT]:
        """Return the next step at `now_ms`, on the clock of the deadlines; without it none ever passes.

        Its pieces must be accounted for before the next call.
        """
        self._check_between_steps()
        self._num_steps += 1
        ended = self._expire(now_ms)
        preempted = self._admit()
        pieces = self._pack()
        self._in_step = {piece.id: piece for piece in pieces}
        return Step(ended, preempted, pieces)

    def account(self, reports: Mapping[IdT, Progress | EndReason]) -> None:
        """Take what became of every piece of the last step: how it goes on, or how it ended.

        Raises:
            ValueError: if the reports are not one for each piece.
        """
        if reports.keys() != self._in_step.keys():
            raise ValueError(f"{len(reports)} reports do not match the {len(self._in_step)} pieces of the step")
        self._in_step = {}
        for work_id, report in reports.items():
            entry = self._entries[work_id]
            if isinstance(report, Progress):
                entry.num_tokens = report.num_tokens
                entry.num_resume_tokens = report.num_resume_tokens
                entry.priority = report.priority
            else:
                self._remove(entry)

    def _check_between_steps(self) -> None:
        if self._in_step:
            raise RuntimeError(f"{len(self._in_step)} pieces of the last step are not accounted for")

    def _supersede(self, work: Work[IdT]) -> tuple[Ended[IdT], ...]:
        """End the partials that `work` overtakes, or return that `work` is itself overtaken."""
        rivals = list(self._lineages.get(work.lineage, ())) if work.lineage is not None else []
        if work.priority is Priority.PARTIAL and any(rival.work.revision > work.revision for rival in rivals):
            return (Ended(work.id, EndReason.SUPERSEDED),)
        return tuple(
            self._end(rival, EndReason.SUPERSEDED)
            for rival in rivals
            if rival.work.priority is Priority.PARTIAL and rival.work.revision < work.revision
        )

    def _refuse(self, work: Work[IdT]) -> tuple[Ended[IdT], ...]:
        """If the queue is full, end the last waiting work below final for a final, or return that `work` is refused."""
        waiting = [entry for entry in self._entries.values() if entry.slot is None]
        if len(waiting) < self._params.max_waiting + len(self._free_slots):
            return ()
        if work.priority is Priority.FINAL:
            last = max(waiting, key=self._order)
            if last.priority is not Priority.FINAL:
                return (self._end(last, EndReason.REFUSED),)
        return (Ended(work.id, EndReason.REFUSED),)

    def _order(self, entry: _Entry[IdT]) -> tuple[bool, int, float, int]:
        raised = (self._num_steps - entry.served_step) // self._params.ageing_steps + entry.num_preempted
        priority = entry.priority
        return (priority is not Priority.FINAL, priority - raised, entry.deadline_ms, entry.arrival)

    def _expire(self, now_ms: float) -> tuple[Ended[IdT], ...]:
        overrun_ms = self._params.max_overrun_ms
        late = [entry for entry in self._entries.values() if now_ms > entry.expires_ms]
        return tuple(
            self._end(entry, EndReason.EXPIRED)
            for entry in late
            if not entry.has_context or now_ms > entry.expires_ms + overrun_ms
        )

    def _admit(self) -> tuple[IdT, ...]:
        preempted = []
        # Without a free slot only a final can get one: no need to order the others.
        has_free_slots = bool(self._free_slots)
        waiting = [
            entry
            for entry in self._entries.values()
            if entry.slot is None and (has_free_slots or entry.priority is Priority.FINAL)
        ]
        for entry in sorted(waiting, key=self._order):
            if not self._free_slots:
                victim = self._victim() if entry.priority is Priority.FINAL else None
                if victim is None:
                    break
                self._release(victim)
                victim.num_tokens = victim.num_resume_tokens
                victim.num_preempted += 1
                preempted.append(victim.work.id)
            entry.slot = self._free_slots.pop()
        return tuple(preempted)

    def _victim(self) -> _Entry[IdT] | None:
        below = [e for e in self._entries.values() if e.slot is not None and e.priority is not Priority.FINAL]
        return max(below, key=self._order, default=None)

    def _pack(self) -> tuple[Piece[IdT], ...]:
        left = self._params.tokens_per_step
        pieces: list[Piece[IdT]] = []
        running = [entry for entry in self._entries.values() if entry.slot is not None]
        if not self._has_one_arithmetic:
            # What goes along with finals then shares nothing with them and only makes their step longer.
            running = [entry for entry in running if entry.priority is Priority.FINAL] or running
        for entry in sorted(running, key=self._order):
            context = 0 if entry.has_context else entry.work.num_context_tokens
            # A context larger than a whole step runs in a step of its own, with one token.
            num_tokens = min(entry.num_tokens, max(left - context, 0 if pieces else 1))
            if num_tokens < 1 or entry.slot is None:
                continue
            pieces.append(Piece(entry.work.id, entry.slot, num_tokens))
            left -= context + num_tokens
            entry.has_context = True
            entry.served_step = self._num_steps
        return tuple(pieces)

    def _end(self, entry: _Entry[IdT], reason: EndReason) -> Ended[IdT]:
        self._remove(entry)
        return Ended(entry.work.id, reason)

    def _remove(self, entry: _Entry[IdT]) -> None:
        self._release(entry)
        del self._entries[entry.work.id]
        lineage = entry.work.lineage
        if lineage is not None:
            self._lineages[lineage].remove(entry)
            if not self._lineages[lineage]:
                del self._lineages[lineage]

    def _release(self, entry: _Entry[IdT]) -> None:
        if entry.slot is not None:
            self._free_slots.append(entry.slot)
            entry.slot, entry.has_context = None, False
