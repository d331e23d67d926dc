"""Which device and which arithmetic a model uses on this machine, decided by short probes at load."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.errors import ModelError
from pipeline.models.weights import ModelParams

Clock = Callable[[], float]
"""Seconds on any steady clock (`time.perf_counter`), handed in by who owns one: only the arithmetic of partials and
cost estimates depend on it."""

# As `torch.cpu.get_capabilities` names them, on x86 and on ARM.
_CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16")
# Rows, inputs, outputs. From tiny upwards: without bfloat16 instructions a product can take 150 times as long as in
# float32, so a slow machine is found out before a product that matters is tried.
_PROBE_SHAPES = ((8, 32, 32), (32, 128, 128), (128, 256, 256), (128, 512, 512))
_PROBE_REPEATS = 3
_GIVE_UP_FACTOR = 2.0
_NOISE_S = 2e-4
_MIN_SPEED_UP = 1.1


def choose_device(model: ModelParams) -> torch.device:
    """Return the device that `model.device` asks for; "auto" is cuda when there is one.

    Raises:
        ModelError: if cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if model.device == "cuda" and not has_cuda:
        raise ModelError("model.device is 'cuda', but torch finds no CUDA device: set it to 'cpu' or 'auto'")
    return torch.device("cuda" if has_cuda and model.device != "cpu" else "cpu")


def choose_partial_dtype(model: ModelParams, device: torch.device, clock: Clock | None = None) -> torch.dtype:
    """Return the dtype that partials are computed in: bfloat16 if asked for, or if "auto" measures it to be faster.

    Without a clock "auto" is float32. Takes a few milliseconds.
    """
    if model.partial_dtype != "auto":
        return torch.bfloat16 if model.partial_dtype == "bfloat16" else torch.float32
    if clock is None or not has_bfloat16_units(device):
        return torch.float32
    return torch.bfloat16 if is_bfloat16_faster(device, clock) else torch.float32


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 arithmetic of its own; asked first, since a probe on a busy machine can err."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in _CPU_BFLOAT16)


@torch.inference_mode()
def is_bfloat16_faster(device: torch.device, clock: Clock) -> bool:
    """Whether a bfloat16 matrix product is clearly faster than a float32 one on `device`."""
    bfloat16_s, float32_s = 1.0, 0.0
    for shape in _PROBE_SHAPES:
        float32_s = _product_s(torch.float32, shape, device, clock)
        bfloat16_s = _product_s(torch.bfloat16, shape, device, clock)
        if bfloat16_s > _GIVE_UP_FACTOR * float32_s + _NOISE_S:
            return False
    return bfloat16_s * _MIN_SPEED_UP < float32_s


def _product_s(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device, clock: Clock) -> float:
    rows, inputs, outputs = shape
    x = torch.ones(rows, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    times = []
    for _ in range(_PROBE_REPEATS):
        synchronize(device)
        started = clock()
        torch.nn.functional.linear(x, weight)
        synchronize(device)
        times.append(clock() - started)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
