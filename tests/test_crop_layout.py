"""How live frames are laid out: within the crops allowed, as fine as they allow, and once only."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import MediaError
from pipeline.vision.crop_layout import CropLayout, plan_crops, plan_live_crops

CROP, PATCH = 448, 14
sides_px = st.integers(20, 8_000)


def live(width_px: int, height_px: int, max_crops: int) -> CropLayout:
    try:
        return plan_live_crops(width_px, height_px, CROP, PATCH, max_crops)
    except MediaError:
        assume(False)
        raise


@given(width_px=sides_px, height_px=sides_px, max_crops=st.integers(1, 36))
def test_a_frame_of_the_layouts_size_is_laid_out_in_the_same_way(width_px: int, height_px: int, max_crops: int) -> None:
    layout = live(width_px, height_px, max_crops)
    assert layout.columns * layout.rows <= max_crops
    assert plan_crops(layout.width_px, layout.height_px, CROP, PATCH, max_crops) == layout
    assert live(layout.width_px, layout.height_px, max_crops) == layout


@given(width_px=sides_px, height_px=sides_px, max_crops=st.integers(1, 36))
def test_a_live_frame_is_never_coarser_than_the_reference_would_have_it(
    width_px: int, height_px: int, max_crops: int
) -> None:
    layout = live(width_px, height_px, max_crops)
    if math.ceil(width_px / CROP) * math.ceil(height_px / CROP) <= max_crops:
        assert layout == plan_crops(width_px, height_px, CROP, PATCH, max_crops)
        return
    reference = plan_crops(width_px, height_px, CROP, PATCH, max_crops)
    # A pixel is lost where sides are rounded.
    assert layout.width_px >= reference.width_px - 1
    assert layout.height_px >= reference.height_px - 1


@pytest.mark.parametrize(
    ("size_px", "expected"),
    [
        ((1_920, 1_080), (3, 2, 1_344, 756)),
        ((3_840, 2_160), (3, 2, 1_344, 756)),
        ((1_080, 1_920), (2, 3, 756, 1_344)),
        ((4_000, 3_000), (3, 2, 1_194, 896)),
        ((640, 480), (2, 2, 896, 672)),
    ],
)
def test_sizes_of_cameras(size_px: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    layout = plan_live_crops(*size_px, CROP, PATCH, 6)
    assert (layout.columns, layout.rows, layout.width_px, layout.height_px) == expected


def test_a_refusal_names_the_size_that_the_picture_has() -> None:
    with pytest.raises(MediaError, match="a picture of 8000 x 20 pixels"):
        plan_live_crops(8_000, 20, CROP, PATCH, 6)
