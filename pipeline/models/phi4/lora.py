"""Low-rank adapters, chosen row by row within one batch.

Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685: y = x W' + (alpha / rank) x A' B'. The product with W is
shared by all rows; the rest is computed only for the rows that want it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.linear import Linear, LinearFactory


class Adapter(enum.Enum):
    """What a request's linear layers have beside their own weights.

    A request with a picture has VISION, also when it has sound; one with sound alone has SPEECH.
    """

    NONE = "none"
    SPEECH = "speech"
    VISION = "vision"


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """An adapter's folder: its tensors, and `lora_alpha` of its configuration.

    Names are those of the native folder below `model.`: `layers.0.self_attn.qkv_proj.lora_A.weight` [rank, inputs] and
    `lora_B.weight` [outputs, rank], for each of `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj`.
    """

    tensors: Mapping[str, Tensor]
    alpha: float


@dataclass(frozen=True, slots=True)
class AdapterTokens:
    """The tokens of a pass that want `adapter`: int64[m], or None for all of them."""

    adapter: Adapter
    index: Tensor | None


class AdaptedLinear:
    """A linear layer with an adapter for some of its rows, perhaps a different one for others.

    Args:
        tensors: of the base, `name`.weight among them; all are cast to `dtype` on `device`.
        name: of the layer, below `model.`.
        shape: outputs and inputs.
        adapters: may be none; each has this layer.
        pack: makes the products; if its rows do not depend on their neighbours, neither do this layer's.

    Raises:
        ModelError: if a tensor is missing or of another shape.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: str,
        shape: tuple[int, int],
        *,
        adapters: Mapping[Adapter, LoraWeights],
        pack: LinearFactory,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._base = pack(take_tensor(tensors, f"{name}.weight", shape).to(device, dtype), None)
        self._low_rank: dict[Adapter, tuple[Linear, Linear]] = {}
        for adapter, weights in adapters.items():
            first = weights.tensors.get(f"{name}.lora_A.weight")
            rank = 1 if first is None else len(first)  # a missing one is refused in the next line
            down = take_tensor(weights.tensors, f"{name}.lora_A.weight", (rank, shape[1]))
            up = take_tensor(weights.tensors, f"{name}.lora_B.weight", (shape[0], rank))
            scaled = up.to(device, dtype) * (weights.alpha / rank)
            self._low_rank[adapter] = pack(down.to(device, dtype), None), pack(scaled, None)

    def __call__(self, x: Tensor, adapted: tuple[AdapterTokens, ...]) -> Tensor:
        """Return [n, outputs] for `x` [n, inputs]; the tokens of each of `adapted` with its adapter."""
        result = self._base(x)
        for tokens in adapted:
            down, up = self._low_rank[tokens.adapter]
            if tokens.index is None:
                result += up(down(x))
            else:
                result.index_add_(0, tokens.index, up(down(x[tokens.index])))
        return result


def take_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return tensor `name`.

    Raises:
        ModelError: if it is missing or of another shape.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise ModelError(f"{name} is {found}, expected {list(shape)}: the weights are not those of this configuration")
    return tensor
