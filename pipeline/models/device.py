"""Which device and which arithmetic a model uses on this machine, decided by short probes at load."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.errors import ModelError
from pipeline.models.linear import Arithmetic, are_int8_sums_exact, reduced_linear
from pipeline.models.weights import ModelParams

Clock = Callable[[], float]
"""Seconds on any steady clock (`time.perf_counter`), handed in by who owns one: only the arithmetic of partials and
cost estimates depend on it."""

# As `torch.cpu.get_capabilities` names them, on x86 and on ARM.
_CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16")
_CPU_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "avx10_2", "i8mm")
# Rows, inputs, outputs. From tiny upwards: without instructions of its own a product can take 150 times as long as in
# float32, so a slow machine is found out before a product that matters is tried.
_PROBE_SHAPES = ((8, 32, 32), (32, 128, 128), (128, 256, 256), (256, 512, 2_048))
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


def choose_partial_arithmetic(model: ModelParams, device: torch.device, clock: Clock | None = None) -> Arithmetic:
    """Return what partials are computed in: what is asked for, or what "auto" finds to be fastest.

    Int8 (on a CPU) and bfloat16 are measured where there are instructions for them; without a clock "auto" is float32.
    Takes some 50 ms.

    Raises:
        ModelError: if int8 is asked for, and the device is no CPU or the CPU has no instructions for it.
    """
    if model.partial_dtype == "int8":
        _check_int8("partial_dtype", device, instead="auto")
    if model.partial_dtype != "auto":
        return model.partial_dtype
    if clock is None:
        return "float32"
    possible: dict[Arithmetic, bool] = {"int8": has_int8_units(device), "bfloat16": has_bfloat16_units(device)}
    speed_ups = {name: measure_speed_up(name, device, clock) for name, has_units in possible.items() if has_units}
    fastest = max(speed_ups, key=lambda name: speed_ups[name], default=None)
    return fastest if fastest is not None and speed_ups[fastest] >= _MIN_SPEED_UP else "float32"


def check_final_arithmetic(model: ModelParams, device: torch.device) -> Arithmetic:
    """Return what finals of the edge tier are computed in: "auto" is float32.

    Raises:
        ModelError: if bfloat16 is asked for, in which a final would depend on its neighbours; or int8, and the device
            is no CPU or the CPU has no instructions for it.
    """
    if model.final_dtype == "bfloat16":
        raise ModelError(
            "model.final_dtype is 'bfloat16', which is for Phi-4-multimodal: finals of Whisper are exact, use 'float32'"
        )
    if model.final_dtype == "int8":
        _check_int8("final_dtype", device, instead="float32")
    return "int8" if model.final_dtype == "int8" else "float32"


def _check_int8(name: str, device: torch.device, *, instead: str) -> None:
    if device.type != "cpu":
        raise ModelError(f"model.{name} is 'int8', which is for CPUs, not for {device.type}: use '{instead}'")
    if not has_int8_units(device):
        raise ModelError(
            f"model.{name} is 'int8', for which this processor has no instructions (VNNI, AMX or i8mm), or oneDNN may "
            f"not use them: sums would overflow; use '{instead}'"
        )


def has_int8_units(device: torch.device) -> bool:
    """Whether the processor multiplies 8-bit integers into 32-bit sums, and oneDNN uses that.

    The processor is asked first, as for bfloat16. Its answer is not enough: `ONEDNN_MAX_CPU_ISA` may be lower.
    """
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in _CPU_INT8) and are_int8_sums_exact()


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 arithmetic of its own; asked first, since a probe on a busy machine can err."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in _CPU_BFLOAT16)


@torch.inference_mode()
def measure_speed_up(arithmetic: Arithmetic, device: torch.device, clock: Clock) -> float:
    """Return how many times faster linear layers in `arithmetic` are than in float32 on `device`; 0 if far slower."""
    reduced_s, float32_s = 1.0, 0.0
    for shape in _PROBE_SHAPES:
        float32_s = _product_s("float32", shape, device, clock)
        reduced_s = _product_s(arithmetic, shape, device, clock)
        if reduced_s > _GIVE_UP_FACTOR * float32_s + _NOISE_S:
            return 0.0
    return float32_s / reduced_s


def _product_s(arithmetic: Arithmetic, shape: tuple[int, int, int], device: torch.device, clock: Clock) -> float:
    rows, inputs, outputs = shape
    x = torch.ones(rows, inputs, device=device)
    layer = reduced_linear(arithmetic)(torch.ones(outputs, inputs, device=device), None)
    times = []
    for _ in range(_PROBE_REPEATS):
        synchronize(device)
        started = clock()
        layer(x)
        synchronize(device)
        times.append(clock() - started)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
