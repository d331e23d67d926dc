"""A session's observer that shows the records to somebody else too."""

from __future__ import annotations

from collections.abc import Callable

from actors.session import SessionObserver
from pipeline.items import Outcome, Snapshot
from pipeline.records import BaseRecord


class RecordTap:
    """`SessionObserver` that tells `observer` everything and `on_record`, which must not block, each record."""

    def __init__(self, observer: SessionObserver, on_record: Callable[[BaseRecord], None]) -> None:
        self._observer = observer
        self._on_record = on_record

    def on_record(self, record: BaseRecord) -> None:
        """Pass on a record that was handed to the publisher."""
        self._observer.on_record(record)
        self._on_record(record)

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Pass on a snapshot that is about to be submitted."""
        self._observer.on_snapshot(snapshot)

    def on_outcome(self, snapshot: Snapshot, outcome: Outcome) -> None:
        """Pass on an outcome of a submitted snapshot."""
        self._observer.on_outcome(snapshot, outcome)

    def on_keyframes_dropped(self, num_keyframes: int) -> None:
        """Pass on that nobody will look at some keyframes."""
        self._observer.on_keyframes_dropped(num_keyframes)
