"""A picture cut into the square crops that Phi-4-multimodal's vision encoder takes.

"Dynamic HD" (Phi-4-multimodal technical report, https://arxiv.org/abs/2503.01743, section 2.1; transformers'
`Phi4MultimodalImageProcessor` is the reference, here without torchvision): a grid of crops near the picture's size, the
picture resized into it and padded at the right or below in white, and in front the whole as one crop of its own. A
patch is a square of `patch_size` pixels, one position of the encoder; 2 x 2 patches become one token.

`plan_crops` decides in plain Python and gives the exact number of tokens before any pixel is touched; `lay_out` does
what it decided, still in bytes; each crop is made of those by itself, so that one which was seen before need not be.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.models.phi4.config import VisionConfig
from pipeline.vision.crop_layout import MAX_CROPS, CropLayout, plan_crops

_WHITE = 255
_DIGEST_BYTES = 32
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


@dataclass(frozen=True, slots=True)
class PictureGrid:
    """One picture in its grid, of which crops are made one by one: number 0 is the whole, then the grid row by row.

    Args:
        layout: where the picture lies in it.
        pixels: uint8[3, layout.rows * crop_size, layout.columns * crop_size], resized and padded.
        mask: bool[num_crops, side_patches, side_patches], True where a patch shows some of the picture.
    """

    layout: CropLayout
    pixels: torch.Tensor
    mask: torch.Tensor

    def crop(self, index: int) -> torch.Tensor:
        """Return crop `index`, float32[3, crop_size, crop_size], -1 to 1 (the whole's can overshoot a little)."""
        if index:
            return _normalise(self._tile(index))
        # The whole is made of the grid, padding included, and without antialiasing: so the model was trained.
        size = (self.layout.crop_size, self.layout.crop_size)
        grid = _normalise(self.pixels)[None]
        return F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=False)[0]

    def digest(self, index: int) -> bytes:
        """Return what is the same for two crops, of any pictures, if they are: pixels and mask, bit for bit.

        BLAKE2b of the bytes that the crop is made of, so nothing is resized to know it. The whole of a grid of one crop
        is that crop (bicubic without a change of size).
        """
        layout = self.layout
        is_tile = index > 0 or layout.columns * layout.rows == 1
        source = self._tile(max(index, 1)) if is_tile else self.pixels
        shape = "tile" if is_tile else f"{layout.columns}x{layout.rows}"
        state = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=shape.encode())
        state.update(source.contiguous().numpy().data)
        state.update(self.mask[index].numpy().data)
        return state.digest()

    def _tile(self, index: int) -> torch.Tensor:
        size = self.layout.crop_size
        row, column = divmod(index - 1, self.layout.columns)
        return self.pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]


def lay_out(picture: torch.Tensor, config: VisionConfig, max_crops: int = MAX_CROPS) -> PictureGrid:
    """Return one RGB picture, resized and padded into its grid.

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
    size = layout.crop_size
    resized = F.interpolate(
        picture.permute(2, 0, 1)[None].contiguous(),
        size=(layout.height_px, layout.width_px),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )[0]
    right, below = layout.columns * size - layout.width_px, layout.rows * size - layout.height_px
    return PictureGrid(layout, F.pad(resized, (0, right, 0, below), value=_WHITE), _mask(layout))


def cut_crops(picture: torch.Tensor, config: VisionConfig, max_crops: int = MAX_CROPS) -> PictureCrops:
    """Return all crops of one RGB picture. Arguments and errors are those of `lay_out`."""
    grid = lay_out(picture, config, max_crops)
    return PictureCrops(grid.layout, torch.stack([grid.crop(i) for i in range(grid.layout.num_crops)]), grid.mask)


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() - _HALF_RANGE) / _HALF_RANGE


def _mask(layout: CropLayout) -> torch.Tensor:
    side = layout.side_patches
    is_valid_row = torch.arange(layout.rows * side) < layout.valid_rows
    is_valid_column = torch.arange(layout.columns * side) < layout.valid_columns
    grid = is_valid_row[:, None] & is_valid_column
    crops = grid.view(layout.rows, side, layout.columns, side).transpose(1, 2).reshape(-1, side, side)
    return torch.cat([torch.ones(1, side, side, dtype=torch.bool), crops])
