"""Tensors of a checkpoint by name: checked as a whole before they are read, and one by one as they are taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ModelError

Shape = tuple[int, ...]

_MAX_NAMES_TOLD = 6


@dataclass(frozen=True, slots=True)
class CheckedTensors:
    """Tensors below a prefix, moved and checked as they are taken."""

    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    def take(self, name: str, *shape: int) -> Tensor:
        """Return tensor `name` in the dtype, on the device.

        Raises:
            ModelError: if it is missing or of another shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise ModelError(
                f"tensor {name} is {found}, expected {list(shape)}: the weights are not those of this configuration; "
                "take a complete checkpoint in the native layout"
            )
        return tensor.detach().to(self.device, self.dtype)


def find_problems(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], known: Collection[str] | None = None
) -> list[str]:
    """Return what is wrong with the tensors `found`, a sentence for each kind of problem.

    `known` are the names that may be there; None: only those `expected`.
    """
    unexpected = found.keys() - set(expected if known is None else known)
    mis_shaped = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(unexpected),
        "mis-shaped": mis_shaped,
    }
    return [f"{what}: {tell_some(names)}" for what, names in problems.items() if names]


def tell_some(names: Sequence[str]) -> str:
    """Return the first of `names` and how many more there are."""
    told = ", ".join(names[:_MAX_NAMES_TOLD])
    return told if len(names) <= _MAX_NAMES_TOLD else f"{told} and {len(names) - _MAX_NAMES_TOLD} more"
