"""What is done to log-mel features in training so that few voices stand for many. Seeded by a torch.Generator (CPU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_STRETCHES = (0.85, 1.18)
_MAX_SHIFT_BANDS = 4
_MAX_MASK_BANDS = 12
_MAX_MASK_STEPS = 20
_MAX_LEVEL = 1.5
_MIN_STEPS = 40


def draw_uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Return a number from `low` to `high`."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def draw_integer(generator: torch.Generator, low: int, high: int) -> int:
    """Return an integer from `low` to `high`, both possible."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def stretch_time(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Return float32[steps * factor, mels], interpolated; not shorter than 40 steps, or than it was if that is less."""
    num_steps = max(min(_MIN_STEPS, len(features)), int(len(features) * factor))
    return F.interpolate(features.T[None], size=num_steps, mode="linear", align_corners=False)[0].T.contiguous()


def shift_bands(features: torch.Tensor, num_bands: int) -> torch.Tensor:
    """Return float32[steps, mels], moved `num_bands` up (negative: down); the outermost band fills what is free."""
    mels = features.shape[1]
    return features[:, (torch.arange(mels) - num_bands).clamp(0, mels - 1).to(features.device)]


def mask_bands(features: torch.Tensor, first: int, num_bands: int) -> torch.Tensor:
    """Return float32[steps, mels] with the mean of all in `num_bands` bands from `first`."""
    masked = features.clone()
    masked[:, first : first + num_bands] = features.mean()
    return masked


def mask_steps(features: torch.Tensor, first: int, num_steps: int) -> torch.Tensor:
    """Return float32[steps, mels] with the mean of all in `num_steps` steps from `first`."""
    masked = features.clone()
    masked[first : first + num_steps] = features.mean()
    return masked


def augment(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one drawn variant of log-mel features.

    Half of all are stretched in time by 0.85 to 1.18, half are moved by up to 4 bands; up to 12 bands and, in half of
    all, up to 20 steps (never more than a tenth) are masked; the level moves by up to 1.5 (natural logarithm of power).

    Args:
        features: float[steps, mels], at least one step and 13 mels; not changed.
        generator: on the CPU; the same state gives the same variant.

    Returns:
        float32[other steps, mels].
    """
    variant = features.float()
    if draw_uniform(generator, 0, 1) < 0.5:
        variant = stretch_time(variant, draw_uniform(generator, *_STRETCHES))
    if draw_uniform(generator, 0, 1) < 0.5:
        variant = shift_bands(variant, draw_integer(generator, -_MAX_SHIFT_BANDS, _MAX_SHIFT_BANDS))
    steps, mels = variant.shape
    num_bands = draw_integer(generator, 0, _MAX_MASK_BANDS)
    variant = mask_bands(variant, draw_integer(generator, 0, mels - num_bands), num_bands)
    if draw_uniform(generator, 0, 1) < 0.5:
        num_steps = draw_integer(generator, 0, min(_MAX_MASK_STEPS, steps // 10))
        variant = mask_steps(variant, draw_integer(generator, 0, steps - num_steps), num_steps)
    return variant + draw_uniform(generator, -_MAX_LEVEL, _MAX_LEVEL)
