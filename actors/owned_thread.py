"""The one thread that an encoder stage computes in, and how it fares: calls that fail, calls that never end.

This module imports no torch, as the stages do not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from pipeline.errors import StageUnavailable
from pipeline.items import Failure, FailureKind, RequestKey

logger = logging.getLogger(__name__)

_MAX_FAILURES_IN_A_ROW = 3


class _Keyed(Protocol):
    @property
    def key(self) -> RequestKey: ...


_Loaded = TypeVar("_Loaded")
_Item = TypeVar("_Item", bound=_Keyed)
_Result = TypeVar("_Result")


class OwnedThread:
    """One thread; calls wait for it in their order.

    Args:
        name: of the stage, as failures tell it ("audio encoder").
        max_call_s: a call that takes longer hangs.
    """

    def __init__(self, name: str, max_call_s: float) -> None:
        self._name = name
        self._max_call_s = max_call_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name.replace(" ", "-"))
        self._num_failures_in_a_row = 0
        self._computing_since: float | None = None

    @property
    def is_hanging(self) -> bool:
        """Whether a call has taken longer than any should."""
        since = self._computing_since
        return since is not None and time.monotonic() - since > self._max_call_s

    def load(self, load: Callable[[], _Loaded]) -> _Loaded:
        """Return what `load` gives in the thread (this blocks), which ends if that raises."""
        try:
            return self._thread.submit(load).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def run(
        self, encode: Callable[[list[_Item]], Sequence[_Result | Failure | Exception]], items: list[_Item]
    ) -> list[_Result | Failure]:
        """Return what `encode` gives for `items` in the thread; an exception in the place of a result is a failure.

        Raises:
            StageUnavailable: if the thread was ended before it came to this call.
        """
        try:
            result = self._thread.submit(lambda: self._run(encode, items))
        except RuntimeError as exc:
            raise StageUnavailable(f"the {self._name} was closed") from exc
        try:
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled the caller: `aclose` took the call out of the queue.
            raise StageUnavailable(f"the {self._name} was closed") from exc

    def check_health(self) -> None:
        """Return when all is well.

        Raises:
            StageUnavailable: if calls failed several times in a row, or one hangs.
        """
        if self._num_failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            raise StageUnavailable(f"the encoder failed {self._num_failures_in_a_row} times in a row")
        if self.is_hanging:
            raise StageUnavailable(f"the encoder has worked on one call for more than {self._max_call_s:.0f} s")

    async def aclose(self) -> None:
        """End the thread after what it is doing; one that hangs is left behind. Idempotent."""
        await asyncio.to_thread(self._thread.shutdown, wait=not self.is_hanging, cancel_futures=True)

    def _run(
        self, encode: Callable[[list[_Item]], Sequence[_Result | Failure | Exception]], items: list[_Item]
    ) -> list[_Result | Failure]:
        self._computing_since = time.monotonic()
        try:
            outcomes = encode(items)
        finally:
            self._computing_since = None
        for outcome in outcomes:
            self._num_failures_in_a_row = self._num_failures_in_a_row + 1 if isinstance(outcome, Exception) else 0
        return [
            Failure(item.key, None, FailureKind.FAILED, f"the {self._name} failed: {type(outcome).__name__}")
            if isinstance(outcome, Exception)
            else outcome
            for item, outcome in zip(items, outcomes, strict=True)
        ]


def encode_isolated(
    encode: Callable[[list[_Item]], Sequence[_Result]], items: list[_Item]
) -> list[_Result | Exception]:
    """Encode together; when that raises, one by one, so that a bad item fails alone. Threads may run it at once."""
    try:
        return list(encode(items))
    except Exception as exc:
        if len(items) > 1:
            return [result for item in items for result in encode_isolated(encode, [item])]
        logger.exception("an item could not be encoded")
        return [exc]
