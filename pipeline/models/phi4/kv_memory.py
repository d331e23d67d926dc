"""Slotted key/value memory of a decoder without cross-attention, with a hard bound.

As in pipeline/decode/kv_cache.py a slot is not an identity, everything is allocated once, and on a CPU the system
commits a page of a slot only when it is first written. What differs: there is no context beside the tokens, and the
numbers have the dtype of the weights (bfloat16: 128 KiB a token of the real model).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pipeline.decode.runner import Lease
from pipeline.decode.slots import SlotLeases, lazy_zeros
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
        self.keys, self.values = lazy_zeros(shape, device, dtype), lazy_zeros(shape, device, dtype)
        self._leases = SlotLeases(num_slots)

    @property
    def num_open(self) -> int:
        """Slots that are leased."""
        return self._leases.num_open

    def open(self, slot: int, token_capacity: int, adapter: Adapter, *, has_long_factors: bool) -> Phi4Lease:
        """Lease `slot`.

        Raises:
            ValueError: if the request is larger than a slot.
            RuntimeError: if the slot is leased already.
        """
        self._check_capacity(token_capacity)
        generation = self._leases.open(slot)
        return Phi4Lease(slot, generation, token_capacity, 0, adapter=adapter, has_long_factors=has_long_factors)

    def renew(self, lease: Phi4Lease, token_capacity: int) -> Phi4Lease:
        """End `lease` and return a new one of its slot, which keeps what is in it.

        Raises:
            ValueError: if the request is larger than a slot; `lease` is as it was.
            RuntimeError: if it has ended already.
        """
        self._check_capacity(token_capacity)
        self._leases.close(lease)
        return replace(lease, generation=self._leases.open(lease.slot), token_capacity=token_capacity)

    def close(self, lease: Lease, *, is_spoilt: bool = False) -> None:
        """End `lease`; its slot can be opened again, and is wiped first if numbers in it may not be finite.

        Raises:
            RuntimeError: if it has ended already.
        """
        self._leases.close(lease)
        if is_spoilt:
            self.keys[:, lease.slot] = 0.0
            self.values[:, lease.slot] = 0.0

    def check(self, lease: Lease) -> None:
        """Check that `lease` still holds its slot.

        Raises:
            RuntimeError: if it has ended.
        """
        self._leases.check(lease)

    def _check_capacity(self, token_capacity: int) -> None:
        if not 1 <= token_capacity <= self.max_tokens:
            raise ValueError(f"{token_capacity} tokens do not fit a slot of {self.max_tokens}")
