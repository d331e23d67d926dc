"""What waits for one reader: a bounded queue in which only partials are given up, and only when it is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from actors.entries import parse_id
from actors.follow import Followed
from actors.store import KeyKind


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait for one reader (docs/architecture.md)."""

    max_events: int = 256
    max_bytes: int = 1 << 20


class FeedEntry(NamedTuple):
    """One entry as all readers of a stream share it."""

    name: str  # of its key: a `KeyKind`, or `translations:LANG`
    kind: KeyKind
    entry_id: str
    order: tuple[int, int]  # the id, to compare
    utterance: int  # 0: about none
    is_final: bool
    data: str  # the record as JSON, one line
    num_bytes: int  # of `data`


def entry_of(followed: Followed) -> FeedEntry:
    """Return `followed` as all readers of its stream share it."""
    data = followed.record.model_dump_json(exclude_none=True)
    return FeedEntry(
        name=followed.kind,
        kind=KeyKind(followed.kind.partition(":")[0]),
        entry_id=followed.entry_id,
        order=parse_id(followed.entry_id),
        utterance=getattr(followed.record, "utterance", 0),
        is_final=followed.kind == KeyKind.TRANSCRIPTS,
        data=data,
        num_bytes=len(data.encode()),
    )


class Waiting(NamedTuple):
    """One entry that waits, and the newest partial that came up to it: what was given up is not to be sent later."""

    entry: FeedEntry
    partial_id: str | None


class Backlog:
    """Entries for one reader, in order. When they are too many, only the newest partial of an utterance stays.

    A partial whose final waits too is given up as well. One entry fits always, however long it is.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Waiting] = deque()
        self._num_bytes = 0
        self._partial_id: str | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_bytes(self) -> int:
        """How long the records that wait are, as JSON in UTF-8."""
        return self._num_bytes

    def push(self, entry: FeedEntry) -> bool:
        """Append `entry`; False if there is no room, also without the partials that can be given up."""
        if entry.kind is KeyKind.PARTIALS:
            self._partial_id = entry.entry_id
        self._waiting.append(Waiting(entry, self._partial_id))
        self._num_bytes += entry.num_bytes
        if self._is_too_full():
            self._refill(coalesced(self._waiting))
        return not self._is_too_full()

    def take(self, max_bytes: int) -> list[Waiting]:
        """Remove and return what is first in line: as many as `max_bytes` holds, at least one if any waits."""
        taken: list[Waiting] = []
        num_bytes = 0
        while self._waiting and (not taken or num_bytes + self._waiting[0].entry.num_bytes <= max_bytes):
            taken.append(self._waiting.popleft())
            num_bytes += taken[-1].entry.num_bytes
        self._num_bytes -= num_bytes
        return taken

    def clear(self) -> None:
        """Forget what waits."""
        self._refill(())

    def _is_too_full(self) -> bool:
        if len(self._waiting) > self._limits.max_events:
            return True
        return len(self._waiting) > 1 and self._num_bytes > self._limits.max_bytes

    def _refill(self, waiting: Iterable[Waiting]) -> None:
        self._waiting = deque(waiting)
        self._num_bytes = sum(item.entry.num_bytes for item in self._waiting)


def coalesced(waiting: Iterable[Waiting]) -> list[Waiting]:
    """Return `waiting` without the partials that a later partial or the final of their utterance replaces."""
    kept: list[Waiting] = []
    replaced: set[int] = set()
    for item in reversed(list(waiting)):
        entry = item.entry
        if entry.kind is KeyKind.PARTIALS:
            if entry.utterance in replaced:
                continue
            replaced.add(entry.utterance)
        elif entry.is_final:
            replaced.add(entry.utterance)
        kept.append(item)
    return kept[::-1]
