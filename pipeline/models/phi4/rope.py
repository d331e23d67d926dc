"""Rotary positions of Phi-4-mini: partial, with two sets of factors (LongRoPE).

Ding et al. 2024, "LongRoPE", https://arxiv.org/abs/2402.13753; transformers' `Phi4MultimodalRotaryEmbedding` and
`_compute_longrope_parameters` are the reference. Which factors a request has is settled when it is admitted and never
changes: keys in the memory are rotated already, and those of one set do not fit queries of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import StageError
from pipeline.models.phi4.config import RopeConfig, attention_factor


def needs_long_factors(rope: RopeConfig, num_prompt_tokens: int, max_new_tokens: int) -> bool:
    """Whether a request has the long factors, which it has from its first position to its last, or the short ones.

    Raises:
        StageError: if it starts within the original context and may end beyond it, or beyond the largest position.
    """
    num_tokens, limit = num_prompt_tokens + max_new_tokens, rope.original_max_positions
    if num_tokens > rope.max_positions:
        raise StageError(
            f"{num_prompt_tokens} tokens of prompt and {max_new_tokens} new ones are more than the model's "
            f"{rope.max_positions} positions: shorten one of them"
        )
    if num_prompt_tokens <= limit < num_tokens:
        raise StageError(
            f"{num_prompt_tokens} tokens of prompt and {max_new_tokens} new ones cross position {limit}, where the "
            f"model changes its rotary factors: ask for at most {limit - num_prompt_tokens} new ones"
        )
    return num_prompt_tokens > limit


class LongRope:
    """The frequencies of both sets of factors; cos and sin are scaled by one `attention_factor` at all lengths."""

    def __init__(self, rope: RopeConfig, head_width: int, device: torch.device) -> None:
        width = int(head_width * rope.rotary_share)
        powers = rope.theta ** (torch.arange(0, width, 2).float() / width)
        factors = torch.tensor([rope.short_factors, rope.long_factors])
        self._frequencies = (1.0 / (factors * powers)).to(device)  # [2, width / 2]
        self._scale = attention_factor(rope)

    def angles(self, positions: Sequence[int], are_long: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return scaled cos and sin, each `dtype`[n, 1, rotary width], of n positions with their sets of factors."""
        device = self._frequencies.device
        frequencies = self._frequencies[torch.tensor(are_long, dtype=torch.int64, device=device)]
        angles = torch.tensor(positions, dtype=torch.float32, device=device)[:, None] * frequencies
        both = torch.cat((angles, angles), -1).unsqueeze(1)
        return (both.cos() * self._scale).to(dtype), (both.sin() * self._scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` [n, heads, head width] with the first numbers of each head rotated; `cos`, `sin` from `angles`."""
    rotary_width = cos.shape[-1]
    turned, kept = x[..., :rotary_width], x[..., rotary_width:]
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, kept), -1)
