"""Attention of an encoder: every position of a window attends to every other, heads side by side."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(qkv: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Return what each position attends to, [windows, positions, width].

    Args:
        qkv: queries, keys and values behind each other, [windows, positions, 3 * width].
        num_heads: heads that share the width evenly.
        mask: bool, True for what is attended to, or numbers that are added; broadcast to [windows, heads, positions,
            positions]. None: everything is attended to.
    """
    num_windows, num_positions, _ = qkv.shape
    heads = qkv.view(num_windows, num_positions, 3, num_heads, -1)
    query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [windows, heads, positions, width / heads]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).reshape(num_windows, num_positions, -1)
