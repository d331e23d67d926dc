"""A picture cut into the square crops that Phi-4-multimodal's vision encoder takes.

"Dynamic HD" (Phi-4-multimodal technical report, https://arxiv.org/abs/2503.01743, section 2.1; transformers'
`Phi4MultimodalImageProcessor` is the reference, here without torchvision): a grid of crops near the picture's size, the
picture resized into it and padded at the right or below in white, and in front the whole as one crop of its own. A
patch is a square of `patch_size` pixels, one position of the encoder; 2 x 2 patches become one token.

`plan_crops` decides in plain Python and gives the exact number of tokens before any pixel is touched; `cut_crops` does
what it decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.models.phi4.config import VisionConfig
from pipeline.vision.crop_layout import MAX_CROPS, CropLayout, plan_crops

_WHITE = 255
_HALF_RANGE = 127.5


@dataclass(frozen=True, slots=True)
class PictureCrops:
    """One picture, cut: the whole first, then the grid row by row.

    Args:
        layout: where the picture lies in it.
        pixels: float32[num_crops, 3, crop_size, crop_size], -1 to 1 (the whole's can overshoot a little).
        mask: bool[num_crops, side_patches, side_patches], True where a patch shows some of the picture.
    """

    layout: CropLayout
    pixels: torch.Tensor
    mask: torch.Tensor


def cut_crops(picture: torch.Tensor, config: VisionConfig, max_crops: int = MAX_CROPS) -> PictureCrops:
    """Return the crops of one RGB picture.

    Args:
        picture: uint8[height_px, width_px, 3], on the CPU, where torch resizes bytes as the reference does.
        config: the encoder's.
        max_crops: as in `plan_crops`; a token costs time, so a live caller asks for fewer.

    Raises:
        MediaError: as `plan_crops` does.
        ValueError: if the picture is of another shape or dtype, or empty.
    """
    if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[2] != 3:
        raise ValueError(f"the picture is {picture.dtype}{list(picture.shape)}, expected uint8[height, width, 3]")
    height_px, width_px, _ = picture.shape
    layout = plan_crops(width_px, height_px, config.crop_size, config.patch_size, max_crops)
    size, rows, columns = layout.crop_size, layout.rows, layout.columns
    resized = F.interpolate(
        picture.permute(2, 0, 1)[None].contiguous(),
        size=(layout.height_px, layout.width_px),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    padded = F.pad(resized, (0, columns * size - layout.width_px, 0, rows * size - layout.height_px), value=_WHITE)
    grid = (padded.float() - _HALF_RANGE) / _HALF_RANGE
    # The whole is made of the grid, padding included, and without antialiasing: so the model was trained.
    whole = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False, antialias=False)
    crops = grid.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
    return PictureCrops(layout, torch.cat([whole, crops]), _mask(layout))


def _mask(layout: CropLayout) -> torch.Tensor:
    side = layout.side_patches
    is_valid_row = torch.arange(layout.rows * side) < layout.valid_rows
    is_valid_column = torch.arange(layout.columns * side) < layout.valid_columns
    grid = is_valid_row[:, None] & is_valid_column
    crops = grid.view(layout.rows, side, layout.columns, side).transpose(1, 2).reshape(-1, side, side)
    return torch.cat([torch.ones(1, side, side, dtype=torch.bool), crops])
