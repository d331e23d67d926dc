"""Slotted key/value memory of a decoder without cross-attention, with a hard bound.

As in pipeline/decode/kv_cache.py a slot is not an identity, everything is allocated once, and on a CPU the system
commits a page of a slot only when it is first written. What differs: there is no context beside the tokens, and the
numbers have the dtype of the weights (bfloat16: 128 KiB a token of the real model).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decode.runner import Lease
from pipeline.models.phi4.lora import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi4Lease(Lease):
    """A lease, and what is settled for the request as a whole: keys of other choices do not fit together.

    `token_capacity` counts prompt and new tokens; audio and picture positions are among them, not context.
    """

    adapter: Adapter
    has_long_factors: bool


class Phi4KvMemory:
    """Keys and values, each [layers, slots, key/value heads, max_tokens, head width], on one device."""

    def __init__(
        self,
        *,
        num_slots: int,
        num_layers: int,
        num_heads: int,
        max_tokens: int,
        head_width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_slots, self.max_tokens = num_slots, max_tokens
        shape = (num_layers, num_slots, num_heads, max_tokens, head_width)
        # Zeros, not whatever was there: masked places are multiplied by zero, and zero times infinity is not zero.
        self.keys, self.values = _zeros(shape, device, dtype), _zeros(shape, device, dtype)
        self._generations = [0] * num_slots
        self._is_open = [False] * num_slots

    @property
    def num_open(self) -> int:
        """Slots that are leased."""
        return sum(self._is_open)

    def open(self, slot: int, token_capacity: int, adapter: Adapter, *, has_long_factors: bool) -> Phi4Lease:
        """Lease `slot`.

        Raises:
            ValueError: if the request is larger than a slot.
            RuntimeError: if the slot is leased already.
        """
        if not 1 <= token_capacity <= self.max_tokens:
            raise ValueError(f"{token_capacity} tokens do not fit a slot of {self.max_tokens}")
        if self._is_open[slot]:
            raise RuntimeError(f"slot {slot} is leased already (generation {self._generations[slot]})")
        self._is_open[slot] = True
        self._generations[slot] += 1
        return Phi4Lease(
            slot, self._generations[slot], token_capacity, 0, adapter=adapter, has_long_factors=has_long_factors
        )

    def close(self, lease: Lease, *, is_spoilt: bool = False) -> None:
        """End `lease`; its slot can be opened again, and is wiped first if numbers in it may not be finite.

        Raises:
            RuntimeError: if it has ended already.
        """
        self.check(lease)
        self._is_open[lease.slot] = False
        if is_spoilt:
            self.keys[:, lease.slot] = 0.0
            self.values[:, lease.slot] = 0.0

    def check(self, lease: Lease) -> None:
        """Check that `lease` still holds its slot.

        Raises:
            RuntimeError: if it has ended.
        """
        if not self._is_open[lease.slot] or self._generations[lease.slot] != lease.generation:
            raise RuntimeError(f"the lease of slot {lease.slot}, generation {lease.generation}, has ended")


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros; on a CPU in pages that are committed when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
