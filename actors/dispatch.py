"""Which snapshots go into the next call: the policy, without I/O, threads or a clock.

Snapshots wait here until a call has room for them; what waits goes together, so batches form by themselves exactly when
there is load. The driver (`actors/stage_driver.py`) tells the time and carries the calls out.

The rules:
    - finals first, in calls of their own, as an encoder answers a call as a whole; then partials of utterances that
      show nothing yet, then others, each in the order of arrival; a partial that has waited for `max_overtaken_ms` is
      overtaken by finals only, and goes along with them;
    - one partial in flight per utterance; a newer one, or the final, replaces one that still waits;
    - up to `max_work_ms` of predicted time per call, but at least one snapshot;
    - what is lost with a stage is submitted again one by one, each with nothing else in flight, so that the one that
      kills stages is found: finals only, within `max_final_wait_ms`; one that was alone `max_kills` times is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from actors.cadence import CadenceParams
from pipeline.items import Failure, FailureKind, Outcome, RequestKey, Snapshot
from pipeline.params import Params
from pipeline.stream_params import NUM_OPENING_SNAPSHOTS


class DispatchParams(Params):
    """How snapshots are gathered into calls, and what happens when a stage dies under them."""

    max_work_ms: float = Field(default=120.0, gt=0, le=10_000, description="predicted encoder time of one call")
    max_calls_per_replica: int = Field(default=1, ge=1, le=16, description="calls in flight to one encoder replica")
    max_waiting_snapshots: int = Field(
        default=256, ge=1, le=100_000, description="snapshots that wait for a call; further finals wait outside"
    )
    max_in_flight_snapshots: int = Field(
        default=64, ge=1, le=10_000, description="snapshots sent and not answered yet; bounds memory for embeddings"
    )
    max_overtaken_ms: float = Field(
        default=640.0, ge=0, le=60_000, description="a partial that waited so long goes before first partials as well"
    )
    max_partial_wait_ms: float = Field(
        default=5_000.0, gt=0, le=600_000, description="a partial that no stage took for so long is dropped"
    )
    max_final_wait_ms: float = Field(
        default=120_000.0, gt=0, le=3_600_000, description="a final that was not answered for so long is given up"
    )
    max_kills: int = Field(default=2, ge=1, le=10, description="stages a snapshot may kill, alone in flight")
    call_timeout_ms: float = Field(
        default=30_000.0, gt=0, le=600_000, description="a call that shows no progress for so long counts as lost"
    )
    cadence: CadenceParams = CadenceParams()


UtteranceKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a call: predicted encoder time, and the longest waits, in milliseconds."""

    work_ms: float
    final_wait_ms: float
    partial_wait_ms: float


@dataclass(slots=True)
class _Entry:
    snapshot: Snapshot  # its tasks are those still open
    order: int
    submitted_ms: float
    queued_ms: float  # when it, or the one whose place it took, came
    num_kills: int = 0
    is_suspect: bool = False  # was in flight when a stage died
    was_alone: bool = True  # nothing else was in flight during its latest call
    is_abandoned: bool = False  # nobody waits for its outcomes any more


class DispatchQueue:
    """Snapshots that wait and snapshots that are in flight. Not thread-safe; the driver owns it."""

    def __init__(self, params: DispatchParams, predict_ms: Callable[[Sequence[Snapshot]], float]) -> None:
        """`predict_ms` gives the time that an encoder is expected to take for a call, in milliseconds."""
        self._params = params
        self._predict_ms = predict_ms
        self._num_added = 0
        self._finals: dict[RequestKey, _Entry] = {}
        self._suspects: dict[RequestKey, _Entry] = {}
        self._partials: dict[UtteranceKey, _Entry] = {}
        self._in_flight: dict[RequestKey, _Entry] = {}
        self._partials_in_flight: set[UtteranceKey] = set()

    @property
    def num_waiting(self) -> int:
        """Snapshots that wait for a call."""
        return len(self._finals) + len(self._suspects) + len(self._partials)

    @property
    def num_in_flight(self) -> int:
        """Snapshots sent and not answered yet."""
        return len(self._in_flight)

    @property
    def has_urgent_waiting(self) -> bool:
        """Whether a final, or a partial of an utterance of which nothing was shown yet, waits for a call."""
        return bool(self._finals or self._suspects) or any(
            is_opening(entry.snapshot) for entry in self._partials.values()
        )

    def has_room(self) -> bool:
        """Whether another snapshot may wait."""
        return self.num_waiting < self._params.max_waiting_snapshots

    def is_in_flight(self, key: RequestKey) -> bool:
        """Whether `key` was sent and has open tasks."""
        return key in self._in_flight

    def add(self, snapshot: Snapshot, now_ms: float) -> list[Failure]:
        """Let `snapshot` wait; return the failures of the snapshots (perhaps itself) that this overtakes.

        A partial for which there is no room fails at once (UNAVAILABLE): the next one is seconds away. The caller lets
        finals wait outside until `has_room`.

        Raises:
            ValueError: if a snapshot of the same key is here already.
            RuntimeError: if it is a final and there is no room.
        """
        key = snapshot.key
        if key in self._in_flight or self._waiting(key) is not None:
            raise ValueError(f"snapshot {key} was submitted twice")
        self._num_added += 1
        entry = _Entry(snapshot, self._num_added, now_ms, now_ms)
        if snapshot.is_final:
            if not self.has_room():
                raise RuntimeError(f"{self.num_waiting} snapshots wait already; wait for has_room()")
            overtaken = self._partials.pop(_utterance_of(key), None)
            self._finals[key] = entry
            return [_superseded(overtaken.snapshot)] if overtaken else []
        return self._add_partial(entry)

    def waiting(self, now_ms: float) -> Waiting:
        """Return what waits and could be sent; what waits for another snapshot's answer does not count."""
        partials = self._sendable_partials()
        finals = self._finals.values()
        return Waiting(
            work_ms=self._predict_ms([entry.snapshot for entry in (*finals, *partials)]),
            final_wait_ms=max((now_ms - entry.submitted_ms for entry in finals), default=0.0),
            partial_wait_ms=max((now_ms - entry.submitted_ms for entry in partials), default=0.0),
        )

    def can_take(self) -> bool:
        """Whether `take` would return something."""
        if self._suspects:
            return not self._in_flight
        return not self._has_suspect_in_flight() and self._room > 0 and bool(self._finals or self._sendable_partials())

    def take(self, now_ms: float) -> list[Snapshot]:
        """Return the snapshots of the next call, which are in flight from now on; empty when nothing may be sent."""
        chosen = self._choose(now_ms)
        is_alone = len(chosen) == 1 and not self._in_flight
        if chosen:
            for other in self._in_flight.values():
                other.was_alone = False
        for entry in chosen:
            self._unqueue(entry)
            entry.was_alone = is_alone
            self._in_flight[entry.snapshot.key] = entry
            if not entry.snapshot.is_final:
                self._partials_in_flight.add(_utterance_of(entry.snapshot.key))
        return [entry.snapshot for entry in chosen]

    def answer(self, outcome: Outcome) -> bool:
        """Take note of an outcome of a snapshot in flight; False when nobody waits for it (any more)."""
        entry = self._in_flight.get(outcome.key)
        if entry is None:
            return False
        if outcome.task is None:
            self._land(entry)
            return True
        if outcome.task not in entry.snapshot.tasks:
            return False
        open_tasks = tuple(task for task in entry.snapshot.tasks if task != outcome.task)
        entry.snapshot = replace(entry.snapshot, tasks=open_tasks)
        if not open_tasks:
            self._land(entry)
        return True

    def put_back(self, keys: Iterable[RequestKey]) -> list[Failure]:
        """Let snapshots wait again that never reached a stage; return the failures of those overtaken meanwhile."""
        return [failure for entry in self._landed(keys) if (failure := self._requeue(entry)) is not None]

    def lose(self, keys: Iterable[RequestKey], now_ms: float, reason: str) -> list[Failure]:
        """Take note that a stage died (or fell silent) under `keys`; return what is not submitted again."""
        failures = []
        for entry in self._landed(keys):
            snapshot = entry.snapshot
            if entry.was_alone:
                entry.num_kills += 1
            if not snapshot.is_final:
                failures.append(Failure(snapshot.key, None, FailureKind.UNAVAILABLE, reason))
            elif entry.num_kills >= self._params.max_kills:
                message = f"given up: {entry.num_kills} stages died while they worked on nothing else ({reason})"
                failures.append(Failure(snapshot.key, None, FailureKind.FAILED, message))
            elif now_ms - entry.submitted_ms >= self._params.max_final_wait_ms:
                failures.append(_expired(entry, now_ms, reason))
            else:
                entry.is_suspect = True
                self._suspects[snapshot.key] = entry
        return failures

    def expire(self, now_ms: float) -> list[Failure]:
        """Drop what has waited for too long and return its failures. What is in flight has its call's timeout."""
        late_partials = [
            entry for entry in self._partials.values()
            if now_ms - entry.submitted_ms >= self._params.max_partial_wait_ms
        ]  # fmt: skip
        late_finals = [
            entry for entry in (*self._finals.values(), *self._suspects.values())
            if now_ms - entry.submitted_ms >= self._params.max_final_wait_ms
        ]  # fmt: skip
        for entry in (*late_partials, *late_finals):
            self._unqueue(entry)
        return [_expired(entry, now_ms, "no stage took it") for entry in (*late_partials, *late_finals)]

    def abandon(self, key: RequestKey) -> None:
        """Take note that nobody waits for `key` (any more). What is in flight is not sent again."""
        entry = self._waiting(key)
        if entry is not None:
            self._unqueue(entry)
        if key in self._in_flight:
            self._in_flight[key].is_abandoned = True

    def is_abandoned(self, keys: Iterable[RequestKey]) -> bool:
        """Whether nobody waits for any of `keys` any more."""
        return all(key not in self._in_flight or self._in_flight[key].is_abandoned for key in keys)

    def _add_partial(self, entry: _Entry) -> list[Failure]:
        snapshot = entry.snapshot
        utterance = _utterance_of(snapshot.key)
        waiting = self._partials.get(utterance)
        if waiting is None and self._is_overtaken(snapshot.key):
            return [_superseded(snapshot)]
        if waiting is None and not self.has_room():
            message = f"{self.num_waiting} snapshots wait already"
            return [Failure(snapshot.key, None, FailureKind.UNAVAILABLE, message)]
        if waiting is None:
            self._partials[utterance] = entry
            return []
        if waiting.snapshot.key.revision >= snapshot.key.revision:
            return [_superseded(snapshot)]
        # The newer one takes the older one's place in the queue: an utterance is not set back by talking on.
        entry.order, entry.queued_ms = waiting.order, waiting.queued_ms
        self._partials[utterance] = entry
        return [_superseded(waiting.snapshot)]

    def _choose(self, now_ms: float) -> list[_Entry]:
        if self._suspects:
            return [] if self._in_flight else [min(self._suspects.values(), key=lambda entry: entry.order)]
        if self._has_suspect_in_flight():
            return []
        return list(self._next_entries(now_ms))

    def _next_entries(self, now_ms: float) -> Iterator[_Entry]:
        chosen: list[Snapshot] = []
        finals = sorted(self._finals.values(), key=lambda entry: entry.order)
        partials = sorted(self._sendable_partials(), key=lambda entry: (self._rank(entry, now_ms), entry.order))
        if finals:
            # An encoder answers a call as a whole: a final does not wait for partials that go along.
            partials = [entry for entry in partials if self._rank(entry, now_ms) == 0]
        for entry in (*finals, *partials):
            is_too_much = self._predict_ms([*chosen, entry.snapshot]) > self._params.max_work_ms
            if len(chosen) >= self._room or (chosen and is_too_much):
                return
            chosen.append(entry.snapshot)
            yield entry

    def _rank(self, entry: _Entry, now_ms: float) -> int:
        if now_ms - entry.queued_ms >= self._params.max_overtaken_ms:
            return 0
        return 1 if is_opening(entry.snapshot) else 2

    def _sendable_partials(self) -> list[_Entry]:
        return [entry for utterance, entry in self._partials.items() if utterance not in self._partials_in_flight]

    def _has_suspect_in_flight(self) -> bool:
        return any(entry.is_suspect for entry in self._in_flight.values())

    @property
    def _room(self) -> int:
        return self._params.max_in_flight_snapshots - len(self._in_flight)

    def _landed(self, keys: Iterable[RequestKey]) -> list[_Entry]:
        entries = [self._in_flight[key] for key in keys if key in self._in_flight]
        for entry in entries:
            self._land(entry)
        return [entry for entry in entries if not entry.is_abandoned]

    def _land(self, entry: _Entry) -> None:
        key = entry.snapshot.key
        del self._in_flight[key]
        if not entry.snapshot.is_final:
            self._partials_in_flight.discard(_utterance_of(key))

    def _requeue(self, entry: _Entry) -> Failure | None:
        key = entry.snapshot.key
        if entry.is_suspect:
            self._suspects[key] = entry
        elif entry.snapshot.is_final:
            self._finals[key] = entry
        elif self._is_overtaken(key):
            return _superseded(entry.snapshot)
        else:
            self._partials[_utterance_of(key)] = entry
        return None

    def _is_overtaken(self, key: RequestKey) -> bool:
        utterance = _utterance_of(key)
        finals = (*self._finals, *self._suspects)
        return utterance in self._partials or any(_utterance_of(final) == utterance for final in finals)

    def _waiting(self, key: RequestKey) -> _Entry | None:
        partial = self._partials.get(_utterance_of(key))
        if partial is not None and partial.snapshot.key == key:
            return partial
        return self._finals.get(key) or self._suspects.get(key)

    def _unqueue(self, entry: _Entry) -> None:
        key = entry.snapshot.key
        self._finals.pop(key, None)
        self._suspects.pop(key, None)
        if self._partials.get(_utterance_of(key)) is entry:
            del self._partials[_utterance_of(key)]


def is_opening(snapshot: Snapshot) -> bool:
    """Whether this is one of the first partials of an utterance of which nothing was shown yet: it carries no text.

    Text is a draft, or a prefix: words that are stable, behind which there may be none yet. One of noise never has any,
    and counts for as many partials only as the stream takes at the minimum cadence.
    """
    has_text = bool(snapshot.prefix or snapshot.draft)
    return not snapshot.is_final and not has_text and snapshot.key.revision <= NUM_OPENING_SNAPSHOTS


def _utterance_of(key: RequestKey) -> UtteranceKey:
    return (key.stream_id, key.utterance)


def _superseded(snapshot: Snapshot) -> Failure:
    message = "a newer snapshot of the same utterance came before this one was sent"
    return Failure(snapshot.key, None, FailureKind.SUPERSEDED, message)


def _expired(entry: _Entry, now_ms: float, reason: str) -> Failure:
    waited_s = (now_ms - entry.submitted_ms) / 1_000
    message = f"no answer within {waited_s:.1f} s ({reason})"
    return Failure(entry.snapshot.key, None, FailureKind.UNAVAILABLE, message)
