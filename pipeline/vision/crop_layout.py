"""How a picture is cut into the square crops that Phi-4-multimodal's vision encoder takes: plain Python, no pixels.

"Dynamic HD" (Phi-4-multimodal technical report, https://arxiv.org/abs/2503.01743, section 2.1; transformers'
`Phi4MultimodalImageProcessor` is the reference): a grid of crops near the picture's size, the picture resized into it
and padded at the right or below, and in front the whole as one crop of its own. A patch is a square of `patch_size`
pixels, one position of the encoder; 2 x 2 patches become one token. `plan_crops` decides and gives the exact number of
tokens before any pixel is touched; `pipeline.models.phi4.crops.cut_crops` does what it decided.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from pipeline.errors import MediaError

MAX_CROPS = 36
"""Crops of one picture in the model's fine-tuning, the one of the whole picture not counted."""

_MIN_SIDE_PX = 10


@dataclass(frozen=True, slots=True)
class CropLayout:
    """Where a picture lies in its grid: `columns` x `rows` crops, its pixels from the top left corner on.

    Args:
        columns: crops in a row of the grid.
        rows: rows of crops.
        width_px: the resized picture's; what is right of it in the grid is padding.
        height_px: the resized picture's; what is below it is padding.
        crop_size: pixels of a crop's side.
        patch_size: pixels of a patch's side.
    """

    columns: int
    rows: int
    width_px: int
    height_px: int
    crop_size: int
    patch_size: int

    @property
    def num_crops(self) -> int:
        """Crops of the grid and the one of the whole picture."""
        return self.columns * self.rows + 1

    @property
    def side_patches(self) -> int:
        """Patches along a crop's side."""
        return self.crop_size // self.patch_size

    @property
    def valid_columns(self) -> int:
        """Patches along the grid's width that show some of the picture."""
        padding_px = self.columns * self.crop_size - self.width_px
        return self.columns * self.side_patches - padding_px // self.patch_size

    @property
    def valid_rows(self) -> int:
        """Patches along the grid's height that show some of the picture."""
        padding_px = self.rows * self.crop_size - self.height_px
        return self.rows * self.side_patches - padding_px // self.patch_size

    @property
    def token_columns(self) -> int:
        """Tokens in a row of the picture, its separator not counted."""
        return math.ceil(self.valid_columns / 2)

    @property
    def token_rows(self) -> int:
        """Rows of tokens of the picture."""
        return math.ceil(self.valid_rows / 2)

    @property
    def num_tokens(self) -> int:
        """What the decoder sees: rows of the grid and of the whole, each with a separator, and one between both."""
        side = self.side_patches // 2
        return self.token_rows * (self.token_columns + 1) + 1 + side * (side + 1)


def plan_crops(
    width_px: int, height_px: int, crop_size: int, patch_size: int, max_crops: int = MAX_CROPS
) -> CropLayout:
    """Return how a picture of that size is cut into at most `max_crops` crops beside the one of the whole.

    Raises:
        MediaError: if the picture is so long and thin that less than 10 pixels of its short side would be left.
        ValueError: if a size or the number of crops is below 1.
    """
    if min(width_px, height_px, max_crops) < 1:
        raise ValueError(f"a picture of {width_px} x {height_px} pixels, at most {max_crops} crops: all must be >= 1")
    columns, rows = _grid(width_px, height_px, crop_size, max_crops)
    # The order of these products decides how halves of pixels round, so it is the reference's.
    width_ratio, height_ratio = crop_size * columns / width_px, crop_size * rows / height_px
    if width_ratio < height_ratio:
        resized = crop_size * columns, int(height_px * width_ratio)
    else:
        resized = int(width_px * height_ratio), crop_size * rows
    if min(resized) < _MIN_SIDE_PX:
        raise MediaError(
            f"a picture of {width_px} x {height_px} pixels would be resized to {resized[0]} x {resized[1]}; the model "
            f"needs {_MIN_SIDE_PX} on either side: cut it into shorter pieces"
        )
    return CropLayout(columns, rows, *resized, crop_size, patch_size)


def _grid(width_px: int, height_px: int, crop_size: int, max_crops: int) -> tuple[int, int]:
    """Return columns and rows: what covers the picture, else the allowed shape that is nearest to the picture's."""
    columns, rows = math.ceil(width_px / crop_size), math.ceil(height_px / crop_size)
    if columns * rows <= max_crops:
        return columns, rows
    aspect = width_px / height_px
    best, least_difference = (1, 1), math.inf
    for shape in _shapes(max_crops):
        difference = abs(aspect - shape[0] / shape[1])
        # Of equally near shapes a larger one, unless more than half of it would be invented by enlarging.
        is_worth_it = width_px * height_px > 0.5 * crop_size * crop_size * shape[0] * shape[1]
        if difference < least_difference or (difference == least_difference and is_worth_it):
            best, least_difference = shape, difference
    return best


@functools.cache
def _shapes(max_crops: int) -> tuple[tuple[int, int], ...]:
    """Return all (columns, rows) of at most `max_crops` crops, from few crops to many.

    The order of those with equally many is free: between two of them there is always a shape nearer to both.
    """
    shapes = [(columns, rows) for columns in range(1, max_crops + 1) for rows in range(1, max_crops // columns + 1)]
    return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


def plan_live_crops(width_px: int, height_px: int, crop_size: int, patch_size: int, max_crops: int) -> CropLayout:
    """Return how a live frame is cut into at most `max_crops` crops: made smaller first, if its own grid has more.

    `plan_crops` alone would take the allowed grid whose shape is nearest to the picture's, however coarse: of 1920 x
    1080 pixels and 6 crops 2 x 1 (796 x 448 pixels). Made smaller first it keeps 3 x 2 (1344 x 756). A frame of the
    layout's size is laid out in the same way again, without being resized.

    Raises:
        MediaError: as `plan_crops`.
        ValueError: as `plan_crops`.
    """
    scale = 1.0
    if math.ceil(width_px / crop_size) * math.ceil(height_px / crop_size) > max_crops:
        scale = max(
            min(crop_size * columns / width_px, crop_size * (max_crops // columns) / height_px)
            for columns in range(1, max_crops + 1)
        )
    smaller_px = max(1, int(width_px * scale)), max(1, int(height_px * scale))
    try:
        return plan_crops(*smaller_px, crop_size, patch_size, max_crops)
    except MediaError as exc:
        raise MediaError(
            f"a picture of {width_px} x {height_px} pixels is too long and thin for {max_crops} crops of {crop_size} "
            "pixels: cut it into shorter pieces"
        ) from exc
