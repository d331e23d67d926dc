"""Phi-4-multimodal's eyes: the SigLIP encoder over crops, and the tokens of a picture for the decoder.

A SigLIP vision transformer (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) whose positions and attention know
which patches of a crop are padding; transformers' `Phi4MultimodalVisionModel` and `Phi4MultimodalImageEmbedding` are
the reference, with one difference. Their attention runs causally whenever no patch of the batch is padding, by a
default meant for decoders (`is_causal`); the model was trained without, and so it is computed here: every patch attends
to every patch of its crop that shows some of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.errors import ModelError
from pipeline.models.attention import attend
from pipeline.models.linear import Linear, fast_linear
from pipeline.models.norm import Norm
from pipeline.models.phi4.config import VisionConfig
from pipeline.models.tensors import CheckedTensors
from pipeline.vision.crop_layout import CropLayout

_POOLED = 2
_BELOW_ONE = 1.0 - 1e-6


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Norm
    qkv: Linear  # [3 * width, width]
    attention_out: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear
    num_heads: int

    def __call__(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """Return [crops, patches, width]; `keys` bool[crops, 1, 1, patches] are those to attend to, None for all."""
        x = x + self.attention_out(attend(self.qkv(self.attention_norm(x)), self.num_heads, keys))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x)), approximate="tanh"))


class SiglipEncoder:
    """The vision encoder of one checkpoint up to the layer whose output is used. It holds weights only.

    Args:
        config: the encoder's dimensions.
        tensors: the native checkpoint's below `model.embed_tokens_extend.image_embed.img_processor.`; those of later
            layers, of the last norm and of the pooling head are not needed, and not read.
        device: where it computes.
        dtype: what it computes in.

    Raises:
        ModelError: if a tensor is missing or of another shape, or the dimensions do not fit each other.
    """

    def __init__(
        self,
        config: VisionConfig,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._side = _side_patches(config)
        weights, width, patch = CheckedTensors(tensors, self.device, dtype), config.width, config.patch_size
        name = "embeddings.patch_embedding"
        self._patch_weight = weights.take(f"{name}.weight", width, config.num_channels, patch, patch)
        self._patch_bias = weights.take(f"{name}.bias", width)
        self._positions = weights.take("embeddings.position_embedding.weight", self._side**2, width)
        self._buckets = _position_buckets(self._side).to(self.device)
        self._layers = [_layer(weights, config, index) for index in range(config.num_used_layers)]

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what is seen in crops of any pictures, 2 x 2 patches averaged.

        A crop's result does not depend on which others are in the batch, but for rounding.

        Args:
            pixels: [num_crops, channels, crop_size, crop_size], -1 to 1 (`PictureCrops.pixels`), of any float dtype.
            mask: bool[num_crops, side, side], True for patches that show some of the picture: a rectangle that begins
                in the top left corner.

        Returns:
            [num_crops, side / 2, side / 2, width] in the encoder's dtype, on its device.

        Raises:
            ValueError: if the shapes are not those, the mask is not boolean, or a crop has no patch to see.
        """
        self._check(pixels, mask)
        is_full = mask.flatten(1).all(1)
        mask = mask.to(self.device)
        x = self._embed(pixels.to(self.device, self.dtype), mask)
        # Two ways, so that a full crop is never computed with a mask because of its neighbours.
        features = torch.empty_like(x)
        for is_chosen, is_masked in ((is_full, False), (~is_full, True)):
            chosen = is_chosen.nonzero().squeeze(1).to(self.device)
            if len(chosen):
                keys = mask[chosen].flatten(1)[:, None, None, :] if is_masked else None
                features[chosen] = self._attend(x[chosen], keys)
        square = features.transpose(1, 2).reshape(len(x), -1, self._side, self._side)
        return F.avg_pool2d(square, _POOLED).permute(0, 2, 3, 1).contiguous()

    def _check(self, pixels: torch.Tensor, mask: torch.Tensor) -> None:
        size, side = self.config.crop_size, self._side
        if pixels.dim() != 4 or pixels.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixels have shape {list(pixels.shape)}, expected [crops, {self.config.num_channels}, {size}, {size}]"
            )
        if mask.dtype != torch.bool or mask.shape != (len(pixels), side, side):
            raise ValueError(
                f"the mask is {mask.dtype}{list(mask.shape)}, expected bool[{len(pixels)}, {side}, {side}]"
            )
        if not mask[:, 0, 0].all():
            raise ValueError("a crop's first patch is masked, but what is seen must begin there: drop empty crops")

    def _embed(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return patches with positions [crops, patches, width].

        The valid part of a crop is stretched over the table's whole square; padding has the first position.
        """
        patches = F.conv2d(pixels, self._patch_weight, self._patch_bias, stride=self.config.patch_size)
        rows = self._buckets[mask[:, :, 0].sum(1)]
        columns = self._buckets[mask[:, 0, :].sum(1)]
        positions = (rows[:, :, None] * self._side + columns[:, None, :]).masked_fill(~mask, 0)
        return patches.flatten(2).transpose(1, 2) + self._positions[positions.flatten(1)]

    def _attend(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        for layer in self._layers:
            x = layer(x, keys)
        return x


class VisionProjection:
    """Makes a picture's tokens of its crops: rows and separators, then two layers to the decoder's width.

    Args:
        config: the encoder's dimensions.
        tensors: the native checkpoint's below `model.embed_tokens_extend.image_embed.`.
        device: where it computes.
        dtype: what it computes in.

    Raises:
        ModelError: if a tensor is missing or of another shape, or the dimensions do not fit each other.
    """

    def __init__(
        self,
        config: VisionConfig,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._side = _side_patches(config) // _POOLED
        weights, width = CheckedTensors(tensors, self.device, dtype), config.width
        up = tensors.get("img_projection_up.weight")
        self.output_width = 0 if up is None else len(up)
        self._up = _linear(weights, "img_projection_up", self.output_width, width)
        self._down = _linear(weights, "img_projection_down", self.output_width, self.output_width)
        self._row_end = weights.take("sub_img_feature_extensor", 1, 1, 1, width)[0]
        self._grid_end = weights.take("global_img_feature_extensor", 1, 1, width)[0]

    @torch.inference_mode()
    def __call__(self, features: torch.Tensor, layout: CropLayout) -> torch.Tensor:
        """Return the decoder's tokens of one picture.

        Args:
            features: [layout.num_crops, side / 2, side / 2, width], the picture's of `SiglipEncoder`, the whole first.
            layout: how it was cut.

        Returns:
            [layout.num_tokens, output_width] in the projection's dtype, on its device: the grid row by row without
            what is padding, a separator, and the whole row by row.

        Raises:
            ValueError: if the shape is not that.
        """
        side, width = self._side, self.config.width
        if features.shape != (layout.num_crops, side, side, width):
            raise ValueError(
                f"features have shape {list(features.shape)}, expected {[layout.num_crops, side, side, width]}"
            )
        features = features.to(self.device, self.dtype)
        grid = features[1:].view(layout.rows, layout.columns, side, side, width).transpose(1, 2)
        grid = grid.reshape(layout.rows * side, layout.columns * side, width)
        seen = grid[: layout.token_rows, : layout.token_columns]
        tokens = torch.cat([self._with_row_ends(seen), self._grid_end, self._with_row_ends(features[0])])
        return self._down(F.gelu(self._up(tokens)))

    def _with_row_ends(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, self._row_end.expand(len(rows), 1, -1)], dim=1).flatten(0, 1)


def _side_patches(config: VisionConfig) -> int:
    """Return patches along a crop's side.

    Raises:
        ModelError: if crops are not whole pairs of patches, or the heads do not share the width evenly.
    """
    if config.crop_size % (config.patch_size * _POOLED):
        raise ModelError(
            f"vision crops of {config.crop_size} pixels are not made of pairs of patches of {config.patch_size}; only "
            "such are computed here"
        )
    if config.width % config.num_heads:
        raise ModelError(f"vision width {config.width} cannot be divided among {config.num_heads} attention heads")
    return config.crop_size // config.patch_size


def _position_buckets(side: int) -> torch.Tensor:
    """Return int64[side + 1, side]: for each number of valid patches in a line, the table's position of each patch.

    The expressions are the reference's, in float32 as there: they decide which side of a boundary a patch falls on.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    step = 1.0 / torch.arange(side + 1).clamp(min=1)
    places = (torch.arange(side, dtype=torch.float32) * step[:, None]).clamp(max=_BELOW_ONE)
    return torch.bucketize(places, boundaries, right=True)


def _linear(weights: CheckedTensors, name: str, outputs: int, inputs: int) -> Linear:
    return fast_linear(weights.take(f"{name}.weight", outputs, inputs), weights.take(f"{name}.bias", outputs))


def _norm(weights: CheckedTensors, name: str, width: int, eps: float) -> Norm:
    return Norm(weights.take(f"{name}.weight", width), weights.take(f"{name}.bias", width), eps)


def _layer(weights: CheckedTensors, config: VisionConfig, index: int) -> _Layer:
    name, width = f"encoder.layers.{index}", config.width
    attention = [f"{name}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    return _Layer(
        attention_norm=_norm(weights, f"{name}.layer_norm1", width, config.norm_eps),
        qkv=fast_linear(
            torch.cat([weights.take(f"{part}.weight", width, width) for part in attention]),
            torch.cat([weights.take(f"{part}.bias", width) for part in attention]),
        ),
        attention_out=_linear(weights, f"{name}.self_attn.out_proj", width, width),
        ffn_norm=_norm(weights, f"{name}.layer_norm2", width, config.norm_eps),
        fc1=_linear(weights, f"{name}.mlp.fc1", config.ffn, width),
        fc2=_linear(weights, f"{name}.mlp.fc2", width, config.ffn),
        num_heads=config.num_heads,
    )
