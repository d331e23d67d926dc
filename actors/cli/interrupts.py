"""Ctrl-C: the first one ends the job in order, the second one at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

_SHOW_CURSOR = "\x1b[?25h"
_EXIT_AT_ONCE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Takes SIGINT and SIGTERM while it is entered. `requested` is set by the first; the second ends the process."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._cancelled_by_signal: asyncio.Task[Any] | None = None

    def arm(self) -> None:
        """Take the signals (again: libraries that start in between bring handlers of their own)."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._handle)

    @contextlib.contextmanager
    def cancelling_this_task(self) -> Iterator[None]:
        """Within the block a signal cancels the task that runs it."""
        self._cancelled_by_signal = asyncio.current_task()
        try:
            yield
        finally:
            self._cancelled_by_signal = None

    def take_cancellation(self) -> bool:
        """Return whether the cancellation that this task just got was a signal's; it goes on then."""
        task = asyncio.current_task()
        if not self.requested.is_set() or task is None:
            return False
        task.uncancel()
        return True

    def _handle(self) -> None:
        if self.requested.is_set():
            if sys.stdout.isatty():
                sys.stdout.write(_SHOW_CURSOR)
                sys.stdout.flush()
            os._exit(_EXIT_AT_ONCE)
        self.requested.set()
        if self._cancelled_by_signal is not None:
            self._cancelled_by_signal.cancel()

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number, handler in self._before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
