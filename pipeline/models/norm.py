"""Layer normalisation, as encoders and decoders of several models have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalises the last axis; `weight` and `bias` are [width]."""

    weight: Tensor
    bias: Tensor
    eps: float = _EPS

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., width] for `x` [..., width]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def read_norm(tensors: Mapping[str, Tensor], name: str, device: torch.device | None = None) -> Norm:
    """Return the norm that is called `name` in a checkpoint, on `device`, or where its tensors are."""
    return Norm(tensors[f"{name}.weight"].to(device=device), tensors[f"{name}.bias"].to(device=device))
