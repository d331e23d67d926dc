from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.decode.kv_cache import KvMemory, KvShape

CPU = torch.device("cpu")
MIB = 1 << 20
BASE = KvShape(
    16, num_layers=6, num_heads=8, head_width=64, max_tokens=448, max_context_positions=1_500, num_kept_queries=8
)


def tensors(memory: KvMemory) -> list[torch.Tensor]:
    return [memory.keys, memory.values, memory.context_keys, memory.context_values, memory.queries]


def num_bytes(memory: KvMemory) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(memory))


def private_bytes() -> int:
    """Resident memory of this process that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1_024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slot_costs_memory_only_once_it_is_used() -> None:
    before = private_bytes()
    memory = KvMemory(BASE, CPU)
    per_slot = num_bytes(memory) / BASE.num_slots
    assert per_slot > 40 * MIB
    assert private_bytes() - before < per_slot / 4
    for tensor in tensors(memory):
        assert not tensor[:, 3].any()  # reading commits nothing
    assert private_bytes() - before < per_slot / 4
    for tensor in tensors(memory):
        tensor[:, 3] = 1
    assert per_slot * 0.9 < private_bytes() - before < per_slot * 1.5


def test_all_of_it_is_zero_writable_and_of_its_shape() -> None:
    shape = replace(BASE, num_slots=2, num_layers=1, max_tokens=64, max_context_positions=50)
    memory = KvMemory(shape, CPU)
    assert memory.keys.shape == memory.values.shape == (1, 2, 8, 64, 64)
    assert memory.context_keys.shape == (1, 2, 8, 64, 50)
    assert memory.context_values.shape == (1, 2, 8, 50, 64)
    assert memory.queries.shape == (8, 2, 64, 64)
    for tensor in tensors(memory):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(1)
        assert tensor.all()


def test_a_model_without_alignment_heads_keeps_no_queries() -> None:
    assert KvMemory(replace(BASE, num_kept_queries=0), CPU).queries.numel() == 0


def test_a_spoilt_slot_is_clean_for_the_next() -> None:
    memory = KvMemory(replace(BASE, num_slots=2, num_layers=1, max_tokens=64, max_context_positions=50), CPU)
    spoilt, other = memory.open(0, 64, 50), memory.open(1, 64, 50)
    for tensor in tensors(memory):
        tensor[:, 0], tensor[:, 1] = torch.nan, 1.0
    memory.close(spoilt, is_spoilt=True)
    for tensor in tensors(memory):
        assert not tensor[:, 0].any()
        assert (tensor[:, 1] == 1).all()
    memory.close(other)
    assert all((tensor[:, 1] == 1).all() for tensor in tensors(memory))
