"""Linear layers whose rows do not depend on their neighbours.

A matrix product may round a row differently when other rows are computed with it: BLAS picks another kernel, hence
another order of summation, for each shape. Finals must be the same alone and in a batch (docs/architecture.md), so
`pack_linear` gives a layer whose rows are bit-identical whatever else is in the batch. Measured with torch 2.13, AVX2,
float32:

- oneDNN with weights packed beforehand: the same bits for every number of rows, and faster than plain `F.linear`, since
  nothing is packed again at every call (512 x 51,865: one row 8 ms, four 8 against 21 ms, sixteen 9 against 24 ms);
- MKL behind plain `F.linear`: the same bits for multiples of 4 rows only.

So oneDNN is used where it is there and a probe at load finds its rows identical, and products in blocks of one fixed
shape else.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ROWS = 16
_PROBE_ROWS = (1, 2, 3, 5, 8, 17, 33)
_MAX_PROBE_ROWS = 64
# oneDNN packs weights for about so many rows; packed for 1, they would use another kernel for a lone row.
_PACKED_FOR_ROWS = 16


_probed: dict[tuple[int, int], bool] = {}  # the answer depends on the machine and the shape, not on the weights


class Linear(Protocol):
    """y = x W' + b."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[m, outputs] for `x` float32[m, inputs], each row as if it were alone."""
        ...


class PackedLinear:
    """A linear layer by oneDNN with packed weights (CPU)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[m, outputs] for contiguous `x` float32[m, inputs]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return result


class BlockedLinear:
    """A linear layer by `F.linear` in blocks of one fixed shape, the last one padded (any device)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[m, outputs] for `x` float32[m, inputs]."""
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % _BLOCK_ROWS))
        blocks = [F.linear(block, self._weight, self._bias) for block in torch.split(padded, _BLOCK_ROWS)]
        return torch.cat(blocks)[:num_rows]


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return a row-independent linear layer of `weight` float32[outputs, inputs] and `bias` float32[outputs]."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        try:
            packed = PackedLinear(weight, bias)
            shape = (weight.shape[0], weight.shape[1])
            if shape not in _probed:
                _probed[shape] = are_rows_independent(packed, weight.shape[1])
            if _probed[shape]:
                return packed
        except (AttributeError, RuntimeError):
            # The operators belong to builds with oneDNN on x86; a build without them has the other way.
            pass
    return BlockedLinear(weight, bias)


def are_rows_independent(linear: Linear, num_inputs: int) -> bool:
    """Whether the bits of a row are the same for all probed numbers of rows, places and neighbours."""
    rows = torch.randn(_MAX_PROBE_ROWS, num_inputs, generator=torch.Generator().manual_seed(0))
    whole = linear(rows)
    return all(
        torch.equal(linear(rows[:count].contiguous()), whole[:count])
        and torch.equal(linear(rows[-count:].contiguous()), whole[-count:])
        for count in _PROBE_ROWS
    )
