"""Release results in the order of their sequence numbers, whatever order they arrive in."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """Holds results until all earlier ones are there. What it holds is bounded by what its owner has in flight."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._waiting: dict[int, T] = {}

    def put(self, sequence: int, result: T) -> list[T]:
        """Take the result of `sequence`; return all results that may go out now, in order.

        Raises:
            ValueError: if `sequence` was given before.
        """
        if sequence < self._next or sequence in self._waiting:
            raise ValueError(f"sequence {sequence} was already given")
        self._waiting[sequence] = result
        released: list[T] = []
        while self._next in self._waiting:
            released.append(self._waiting.pop(self._next))
            self._next += 1
        return released
