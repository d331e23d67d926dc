"""Linear layers whose rows do not depend on their neighbours.

A matrix product may round a row differently when other rows are computed with it: BLAS picks another kernel, hence
another order of summation, for each shape. Finals must be the same alone and in a batch (docs/architecture.md), so
`pack_linear` gives a layer whose rows are bit-identical whatever else is in the batch. Measured with torch 2.13, AVX2,
float32:

- oneDNN with weights packed beforehand: the same bits for every number of rows, and faster than plain `F.linear`, since
  nothing is packed again at every call (512 x 51,865: one row 8 ms, four 8 against 21 ms, sixteen 9 against 24 ms).
  With AVX-512 a lone row of 2,048 inputs has other bits than several: it is padded to two;
- MKL behind plain `F.linear`: the same bits for multiples of 4 rows only.

So oneDNN is used where it is there and a probe at load finds its rows identical, and products in blocks of one fixed
shape else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ROWS = 16
_MIN_ROWS = (1, 2, 4)
_PROBE_ROWS = (1, 2, 3, 5, 8, 17, 33)
_MAX_PROBE_ROWS = 64
# oneDNN packs weights for about so many rows; packed for 1, they would use another kernel for a lone row.
_PACKED_FOR_ROWS = 16
_INT8_MAX = 127.0
_MIN_SCALE = 1e-8  # a row of zeros stays zeros
_BYTE_ZERO = 128
_PACKED_OUTPUTS, _PACKED_INPUTS = 4_096, 1_024


_probed: dict[tuple[int, int], int | None] = {}  # the answer depends on the machine and the shape, not on the weights


Arithmetic = Literal["float32", "bfloat16", "int8"]
"""What matrix products are computed in."""


class Linear(Protocol):
    """y = x W' + b."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[m, outputs] for `x` float32[m, inputs], each row as if it were alone."""
        ...


LinearFactory = Callable[[Tensor, Tensor | None], Linear]
"""Makes a layer of weight float32[outputs, inputs] and bias float32[outputs] or None."""


class PlainLinear:
    """A linear layer by `F.linear`, in the dtype of its weight (any device)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., outputs] for `x` [..., inputs]."""
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A linear layer by oneDNN with packed weights (CPU). Fewer rows than `min_rows` are padded to so many."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, min_rows: int = 1) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias
        self._min_rows = min_rows

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[..., outputs] for contiguous `x` float32[..., inputs]."""
        num_rows = x.shape[-2]
        padded = F.pad(x, (0, 0, 0, self._min_rows - num_rows)) if num_rows < self._min_rows else x
        result: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self._weight, self._bias, "none", [], "")
        return result[..., :num_rows, :] if num_rows < self._min_rows else result


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


class Int8Linear:
    """A linear layer in integers: weights by output, inputs by row, both symmetric in -127..127 (CPU).

    The scale of a row is its own largest magnitude, found anew for every call (dynamic quantisation as in CTranslate2,
    or LLM.int8() without outliers apart: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339). Sums of integers are
    exact, so a row's bits do not depend on what else is in the product. That holds where `are_int8_sums_exact`: without
    instructions for it oneDNN adds pairs of products in 16 bits, which stop at the largest number.

    Large layers have packed weights (oneDNN): a quarter to two thirds of the time for few rows; small ones are quicker
    without.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._scale = weight.abs().amax(1).clamp_min_(_MIN_SCALE).div_(_INT8_MAX)
        self._bias = torch.zeros(weight.shape[0]) if bias is None else bias
        integers = (weight / self._scale[:, None]).round_().to(torch.int8)
        self._is_packed = weight.shape[0] >= _PACKED_OUTPUTS or weight.shape[1] >= _PACKED_INPUTS
        self._no_offsets = torch.zeros(weight.shape[0], dtype=torch.int64)
        self._weight = torch.ops.onednn.qlinear_prepack(integers, None) if self._is_packed else integers.t()

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[..., outputs] for `x` float32[..., inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(-1, keepdim=True).clamp_min_(_MIN_SCALE).div_(_INT8_MAX)
        scaled = rows / scale
        sums = self._multiply_packed(scaled) if self._is_packed else self._multiply(scaled)
        return torch.addcmul(self._bias, sums, scale).view(*x.shape[:-1], -1)

    def _multiply(self, scaled: Tensor) -> Tensor:
        return torch._int_mm(scaled.round_().to(torch.int8), self._weight).float().mul_(self._scale)

    def _multiply_packed(self, scaled: Tensor) -> Tensor:
        # The kernel wants bytes from 0 on: 128 is its zero. Adding a half rounds, as what follows cuts off.
        rows = scaled.add_(_BYTE_ZERO + 0.5).to(torch.uint8)
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, _BYTE_ZERO, self._weight, self._scale, self._no_offsets, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return sums


class BFloat16Linear:
    """A linear layer in bfloat16 with float32 input and output."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.to(torch.bfloat16)
        self._bias = None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32[..., outputs] for `x` float32[..., inputs]."""
        return F.linear(x.to(torch.bfloat16), self._weight, self._bias).float()


def reduced_linear(arithmetic: Arithmetic) -> LinearFactory:
    """Return what makes linear layers in `arithmetic`, float32 outside: for partials, not for finals."""
    factories: dict[Arithmetic, LinearFactory] = {
        "float32": fast_linear,
        "bfloat16": BFloat16Linear,
        "int8": Int8Linear,
    }
    return factories[arithmetic]


def fast_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return the fastest linear layer of `weight` [outputs, inputs] in its own dtype, for products of one shape."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        try:
            return PackedLinear(weight, bias)
        except (AttributeError, RuntimeError):
            # As in `pack_linear`: a build without oneDNN.
            pass
    return PlainLinear(weight, bias)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return a row-independent linear layer of `weight` float32[outputs, inputs] and `bias` float32[outputs]."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        shape = (weight.shape[0], weight.shape[1])
        try:
            if shape not in _probed:
                _probed[shape] = _find_min_rows(weight)
            min_rows = _probed[shape]
            if min_rows is not None:
                return PackedLinear(weight, bias, min_rows=min_rows)
        except (AttributeError, RuntimeError):
            # The operators belong to builds with oneDNN on x86; a build without them has the other way.
            pass
    return BlockedLinear(weight, bias)


def are_int8_sums_exact() -> bool:
    """Whether `Int8Linear` gives right sums on this machine, of the largest numbers too; False if it cannot run."""
    for num_inputs in (32, _PACKED_INPUTS):  # of either kind of layer
        for num_rows in (1, _BLOCK_ROWS):
            try:
                sums = Int8Linear(torch.ones(32, num_inputs), None)(torch.ones(num_rows, num_inputs))
            except (AttributeError, RuntimeError):
                return False  # a build without oneDNN
            if not torch.allclose(sums, torch.full_like(sums, num_inputs)):
                return False
    return True


def _find_min_rows(weight: Tensor) -> int | None:
    """Return from how many rows on oneDNN gives a row the same bits for any number of them; None if from none."""
    for min_rows in _MIN_ROWS:
        if are_rows_independent(PackedLinear(weight, None, min_rows=min_rows), weight.shape[1]):
            return min_rows
    return None


def are_rows_independent(linear: Linear, num_inputs: int) -> bool:
    """Whether the bits of a row are the same for all probed numbers of rows, places and neighbours."""
    rows = torch.randn(_MAX_PROBE_ROWS, num_inputs, generator=torch.Generator().manual_seed(0))
    whole = linear(rows)
    return all(
        torch.equal(linear(rows[:count].contiguous()), whole[:count])
        and torch.equal(linear(rows[-count:].contiguous()), whole[-count:])
        for count in _PROBE_ROWS
    )
