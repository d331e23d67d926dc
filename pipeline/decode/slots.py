"""What slotted key/value memories share: who has which slot, and memory that is committed when it is used."""

from __future__ import annotations

import math
import mmap

import torch

from pipeline.decode.runner import Lease


class SlotLeases:
    """Who has which slot. A slot is not an identity: whoever opens it gets a new generation of it."""

    def __init__(self, num_slots: int) -> None:
        self._generations = [0] * num_slots
        self._is_open = [False] * num_slots

    @property
    def num_open(self) -> int:
        """Slots that are leased."""
        return sum(self._is_open)

    def open(self, slot: int) -> int:
        """Return the generation of a new lease of `slot`.

        Raises:
            RuntimeError: if the slot is leased already.
        """
        if self._is_open[slot]:
            raise RuntimeError(f"slot {slot} is leased already (generation {self._generations[slot]})")
        self._is_open[slot] = True
        self._generations[slot] += 1
        return self._generations[slot]

    def close(self, lease: Lease) -> None:
        """End `lease`.

        Raises:
            RuntimeError: if it has ended already.
        """
        self.check(lease)
        self._is_open[lease.slot] = False

    def check(self, lease: Lease) -> None:
        """Check that `lease` still holds its slot.

        Raises:
            RuntimeError: if it has ended.
        """
        if not self._is_open[lease.slot] or self._generations[lease.slot] != lease.generation:
            raise RuntimeError(f"the lease of slot {lease.slot}, generation {lease.generation}, has ended")


def lazy_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return zeros of `shape`; on a CPU in pages that are committed when they are first written."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, device=device, dtype=dtype)
    # torch.zeros writes its zeros; pages straight from the system are zero without that.
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
