"""Low-rank adapters, chosen row by row within one batch.

Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685: y = x W' + (alpha / rank) x A' B'. The product with W is
shared by all rows; the rest is computed only for the rows that want it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.models.linear import Linear, LinearFactory
from pipeline.models.tensors import CheckedTensors


class Adapter(enum.Enum):
    """What a request's linear layers have beside their own weights.

    A request with a picture has VISION, also when it has sound; one with sound alone has SPEECH.
    """

    NONE = "none"
    SPEECH = "speech"
    VISION = "vision"


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter: its tensors, and `lora_alpha` of its configuration. A projection of x becomes W x + scale B (A x).

    Names are those of the native folder below `model.`: `layers.0.self_attn.qkv_proj.lora_A.weight` [rank, inputs] and
    `lora_B.weight` [outputs, rank], for each of `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj`.
    """

    tensors: Mapping[str, Tensor]
    alpha: float

    @property
    def rank(self) -> int:
        """Numbers between the two products; 0 without any tensor."""
        return next((len(tensor) for name, tensor in self.tensors.items() if ".lora_A." in name), 0)

    @property
    def scale(self) -> float:
        """What the adapter's share is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class AdapterTokens:
    """The tokens of a pass that want `adapter`: int64[m], or None for all of them."""

    adapter: Adapter
    index: Tensor | None


class AdaptedLinear:
    """A linear layer with an adapter for some of its rows, perhaps a different one for others.

    Args:
        weights: of the base, `name`.weight among them; those of the adapters get the same dtype and device.
        name: of the layer, below `model.`.
        shape: outputs and inputs.
        adapters: may be none; each has this layer.
        pack: makes the products; if its rows do not depend on their neighbours, neither do this layer's.

    Raises:
        ModelError: if a tensor is missing or of another shape.
    """

    def __init__(
        self,
        weights: CheckedTensors,
        name: str,
        shape: tuple[int, int],
        *,
        adapters: Mapping[Adapter, LoraWeights],
        pack: LinearFactory,
    ) -> None:
        self._base = pack(weights.take(f"{name}.weight", *shape), None)
        self._low_rank: dict[Adapter, tuple[Linear, Linear]] = {}
        for adapter, lora in adapters.items():
            own = replace(weights, tensors=lora.tensors)
            down = own.take(f"{name}.lora_A.weight", lora.rank, shape[1])
            up = own.take(f"{name}.lora_B.weight", shape[0], lora.rank)
            self._low_rank[adapter] = pack(down, None), pack(up * lora.scale, None)

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
