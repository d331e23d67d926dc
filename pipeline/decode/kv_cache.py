"""Slotted key/value memory with a hard bound.

Everything is allocated once: a slot has room for `max_tokens` text tokens and `max_context_positions` positions of
context, and nothing is ever copied or grown while decoding. On a CPU the system commits a page of a slot only when it
is first written: a slot that was never used costs nothing, one of short utterances less than one of long ones. A slot
is not an identity: whoever opens it gets a `Lease`, which ends when the slot is closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.decode.runner import Lease
from pipeline.decode.slots import SlotLeases, lazy_zeros


@dataclass(frozen=True, slots=True)
class KvShape:
    """Dimensions of the memory. The queries of `num_kept_queries` attention heads are kept, for word times."""

    num_slots: int
    num_layers: int
    num_heads: int
    head_width: int
    max_tokens: int
    max_context_positions: int
    num_kept_queries: int


class KvMemory:
    """Keys and values of every layer and slot, float32, one device.

    `keys`, `values`: [layers, slots, heads, max_tokens, head_width]; `context_values`: the same over context positions;
    `context_keys`: [layers, slots, heads, head_width, max_context_positions]; `queries`: [kept, slots, max_tokens,
    head_width].
    """

    def __init__(self, shape: KvShape, device: torch.device) -> None:
        self.shape = shape
        leading = (shape.num_layers, shape.num_slots, shape.num_heads)
        text = (*leading, shape.max_tokens, shape.head_width)
        context = (*leading, shape.max_context_positions, shape.head_width)
        # Zeros, not whatever was there: masked places are multiplied by zero, and zero times infinity is not zero.
        self.keys = lazy_zeros(text, device)
        self.values = lazy_zeros(text, device)
        # Transposed: the product of a few queries with it is a third faster so.
        self.context_keys = lazy_zeros((*leading, shape.head_width, shape.max_context_positions), device)
        self.context_values = lazy_zeros(context, device)
        self.queries = lazy_zeros((shape.num_kept_queries, shape.num_slots, shape.max_tokens, shape.head_width), device)
        self._leases = SlotLeases(shape.num_slots)

    @property
    def num_open(self) -> int:
        """Slots that are leased."""
        return self._leases.num_open

    def open(self, slot: int, token_capacity: int, num_context_positions: int, *, is_exact: bool = True) -> Lease:
        """Lease `slot`.

        Raises:
            ValueError: if the request is larger than a slot.
            RuntimeError: if the slot is leased already.
        """
        if not 1 <= token_capacity <= self.shape.max_tokens:
            raise ValueError(f"{token_capacity} tokens do not fit a slot of {self.shape.max_tokens}")
        if not 1 <= num_context_positions <= self.shape.max_context_positions:
            raise ValueError(
                f"{num_context_positions} context positions do not fit a slot of {self.shape.max_context_positions}"
            )
        return Lease(slot, self._leases.open(slot), token_capacity, num_context_positions, is_exact)

    def close(self, lease: Lease, *, is_spoilt: bool = False) -> None:
        """End `lease`; its slot can be opened again, and is wiped first if numbers in it may not be finite.

        Masked places count zero times, and zero times infinity would spoil whoever has the slot next.

        Raises:
            RuntimeError: if it has ended already.
        """
        self._leases.close(lease)
        if is_spoilt:
            for tensor in (self.keys, self.values, self.context_keys, self.context_values, self.queries):
                tensor[:, lease.slot] = 0.0

    def check(self, lease: Lease) -> None:
        """Check that `lease` still holds its slot.

        Raises:
            RuntimeError: if it has ended.
        """
        self._leases.check(lease)
