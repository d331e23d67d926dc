"""What can be in a picture, each thing by itself, and at which positions of the vision encoder it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.teach.grammar import COLOURS, DIGITS, SHAPES, SIDES
from pipeline.teach.pictures import Place
from pipeline.teach.world import Scene
from pipeline.vision.crop_layout import CropLayout

KINDS: tuple[tuple[str, ...], ...] = (
    *(SHAPES, COLOURS, SIDES, DIGITS),
    *(("high", "low"), ("open", "closed"), ("inside", "outside")),
)
"""Words of which a thing has one."""
THINGS: tuple[str, ...] = ("display", "gauge", "door", "person", *itertools.chain.from_iterable(KINDS))
"""The words for what can be at a position."""

_THING = {thing: index for index, thing in enumerate(THINGS)}
_POOLED = 2


def things_in(scene: Scene) -> dict[str, tuple[str, ...]]:
    """Return which of `THINGS` are at each place (of `pictures.draw_picture_and_places`) of a picture of `scene`."""
    found: dict[str, tuple[str, ...]] = {}
    if scene.shape is not None:
        found["shape"] = (scene.shape.kind, scene.shape.colour, scene.shape.side)
    if scene.display is not None:
        found["display"] = ("display", DIGITS[scene.display])
    for name in ("gauge", "door", "person"):
        state = getattr(scene, name)
        if state is not None:
            found[name] = (name, state)
    return found


def label_positions(placed: Sequence[tuple[Scene, Mapping[str, Place]]], layout: CropLayout, width_px: int) -> Tensor:
    """Return which things are at which position: bool[crops, side / 2, side / 2, things], the whole first.

    A thing is where the centre of a position lies in its place, and at the position of its own centre. In the whole of
    several crops digits are too small to be read, and one of several does not know on which side of the whole it is.

    Args:
        placed: what is in the picture, and where, in its pixels.
        layout: how the picture was resized and cut.
        width_px: width of the picture before that.
    """
    side, scale = layout.side_patches // _POOLED, layout.width_px / width_px
    whole = torch.zeros(side, side, len(THINGS), dtype=torch.bool)
    grid = torch.zeros(layout.rows * side, layout.columns * side, len(THINGS), dtype=torch.bool)
    is_small = layout.columns * layout.rows == 1
    for thing, place in _things_and_places(placed, scale):
        if is_small or thing not in DIGITS:
            _cover(whole[..., _THING[thing]], place.scaled(1 / layout.columns, 1 / layout.rows), layout)
        if is_small or thing not in SIDES:
            _cover(grid[..., _THING[thing]], place, layout)
    crops = grid.view(layout.rows, side, layout.columns, side, -1).transpose(1, 2).reshape(-1, *whole.shape)
    return torch.cat([whole[None], crops])


def _things_and_places(
    placed: Sequence[tuple[Scene, Mapping[str, Place]]], scale: float
) -> Iterator[tuple[str, Place]]:
    for scene, places in placed:
        for name, things in things_in(scene).items():
            for thing in things:
                yield thing, places[name].scaled(scale, scale)


def _cover(positions: Tensor, place: Place, layout: CropLayout) -> None:
    """Set those of `positions` [rows, columns] that are in `place`."""
    size_px = _POOLED * layout.patch_size
    rows, columns = positions.shape
    ys, xs = ((torch.arange(count) + 0.5) * size_px for count in (rows, columns))
    positions |= ((ys > place.top) & (ys < place.bottom))[:, None] & ((xs > place.left) & (xs < place.right))
    row, column = (int(middle // size_px) for middle in (place.middle_y, place.middle_x))
    positions[min(row, rows - 1), min(column, columns - 1)] = True
