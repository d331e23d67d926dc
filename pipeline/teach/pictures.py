"""Pictures and clips of the world's scenes, drawn with numpy alone.

A picture is four cells, two of them left and two right. Each element of the scene has one, the shape one on its side;
how large an element is and where in its cell, its shade, the floor's brightness and the noise are drawn. Elements are
50 to 56 pixels wide and digits 42 to 47 high, in any picture: a digit spans several of the 14-pixel patches. None lies
across the edge of two crops, as long as the picture is not made smaller and its cells have room beside it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.items import Frame
from pipeline.teach.grammar import SIDES
from pipeline.teach.world import MAX_ELEMENTS, Scene, draw_element
from pipeline.timebase import SAMPLES_PER_MS

MIN_SIDE_PX = 112
"""Below, four elements have no room."""

MIN_ELEMENT_PX, MAX_ELEMENT_PX = 50, 56
_TRIES_ON_SHEET = 100
EDGE_PX = 168
"""Crops have their edges at multiples of this: an encoder that sees one crop at a time reads no digit that is cut."""
MAX_SHIFT_PX = 2
"""How far a clip's camera moves."""

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]
_Region = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.bool_]]

_SHADES: Mapping[str, Colour] = {
    "red": (205, 35, 35),
    "green": (30, 150, 50),
    "blue": (35, 65, 205),
    "yellow": (235, 205, 25),
}
_DARK: Colour = (28, 28, 32)
_WHITE: Colour = (235, 235, 230)
_LINE: Colour = (245, 215, 20)
_FILL: Colour = (150, 40, 140)
_LIT: Colour = (255, 235, 200)
_WOOD: Colour = (150, 100, 60)
_CLOTHES: tuple[Colour, ...] = ((50, 50, 60), (70, 45, 40), (30, 60, 70))
_SKIN: tuple[Colour, ...] = ((225, 185, 155), (150, 105, 75), (95, 65, 50))

_CELLS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Column and row."""

_DIGIT_LEFT, _DIGIT_WIDTH, _DIGIT_TOP, _DIGIT_BOTTOM, _STROKE = 0.19, 0.62, 0.08, 0.92, 0.16
# Segments of a digit: top, upper left, upper right, middle, lower left, lower right, bottom.
_SEGMENTS = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)


@dataclass(frozen=True, slots=True)
class Place:
    """A rectangle of a picture, in pixels from its top left corner."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def middle_x(self) -> float:
        """Middle between left and right."""
        return (self.left + self.right) / 2

    @property
    def middle_y(self) -> float:
        """Middle between top and bottom."""
        return (self.top + self.bottom) / 2

    def scaled(self, x: float, y: float) -> Place:
        """Return where it is in a picture resized by these factors."""
        return Place(self.left * x, self.top * y, self.right * x, self.bottom * y)


@dataclass(frozen=True, slots=True)
class _Box:
    """A square of `side` pixels with its top left corner at (x, y), and what is drawn into it."""

    pixels: Pixels
    x: float
    y: float
    side: float

    def place(self, left: float, top: float, right: float, bottom: float) -> Place:
        """Return where a rectangle is; its edges as shares of the side."""
        x, y, side = self.x, self.y, self.side
        return Place(x + left * side, y + top * side, x + right * side, y + bottom * side)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle; its edges as shares of the side."""
        x, y = self.x, self.y
        rows = slice(max(0, round(y + top * self.side)), max(0, round(y + bottom * self.side)))
        columns = slice(max(0, round(x + left * self.side)), max(0, round(x + right * self.side)))
        self.pixels[rows, columns] = colour

    def where(self, is_inside: _Region, colour: Colour) -> None:
        """Fill what is inside; the function gets x and y as shares of the side, shaped [1, n] and [n, 1]."""
        top, left = max(0, round(self.y)), max(0, round(self.x))
        part = self.pixels[top : round(self.y + self.side), left : round(self.x + self.side)]
        ys = (np.arange(part.shape[0])[:, None] + 0.5) / self.side
        xs = (np.arange(part.shape[1])[None] + 0.5) / self.side
        part[is_inside(xs, ys)] = colour


def draw_picture(scene: Scene, width_px: int, height_px: int, rng: random.Random) -> Pixels:
    """Return a picture of `scene`: uint8[height_px, width_px, 3], RGB.

    Raises:
        ValueError: if a side is below 112, or the scene has more than 4 elements.
    """
    return draw_picture_and_places(scene, width_px, height_px, rng)[0]


def draw_picture_and_places(
    scene: Scene, width_px: int, height_px: int, rng: random.Random
) -> tuple[Pixels, dict[str, Place]]:
    """Return what `draw_picture` returns, and where things are: elements by name, of a display its digit.

    Raises:
        ValueError: as `draw_picture`.
    """
    return _draw(scene, width_px, height_px, look=rng.getrandbits(64), noise=rng.getrandbits(64))


def draw_sheet(side_px: int, rng: random.Random) -> tuple[Pixels, list[tuple[Scene, dict[str, Place]]]]:
    """Return a square picture as full of elements as it can be, and each of them as a scene of its own with its places.

    Nobody describes that: it is to learn from what single things look like, wherever they are.

    Raises:
        ValueError: if the side is below 112.
    """
    _check_size(side_px, side_px)
    pixels = _floor(side_px, side_px, rng.getrandbits(64))
    boxes: list[_Box] = []
    for _ in range(_TRIES_ON_SHEET):
        side = rng.uniform(MIN_ELEMENT_PX, MAX_ELEMENT_PX)
        x, y = rng.uniform(0, side_px - side), rng.uniform(0, side_px - side)
        if all(max(abs(x - box.x), abs(y - box.y)) >= max(side, box.side) for box in boxes):
            boxes.append(_Box(pixels, x, y, side))
    found: list[tuple[Scene, dict[str, Place]]] = []
    for box in boxes:
        scene = draw_element(rng, SIDES[box.x + box.side / 2 > side_px / 2])
        [name] = scene.elements
        _DRAWN[name](box, scene, rng)
        found.append((scene, _places(box, name)))
    return _with_noise(pixels, rng.getrandbits(64)), found


def draw_clip(
    scenes: Sequence[Scene],
    width_px: int,
    height_px: int,
    rng: random.Random,
    *,
    hold_ms: int = 4_000,
    interval_ms: int = 500,
) -> Iterator[Frame]:
    """Yield a frame each `interval_ms`: each scene is held for `hold_ms`, seen by a camera that is never quite still.

    All of a clip is in one light, and what is there stays where it is, unless a shape that changes its side takes its
    place. The scenes have the same elements, as those of `draw_scene_change` have.

    Raises:
        ValueError: as `draw_picture`; or if a time is below 1.
    """
    if min(hold_ms, interval_ms) < 1:
        raise ValueError(f"a scene of {hold_ms} ms, a frame each {interval_ms} ms: both must be 1 or more")
    look = rng.getrandbits(64)
    for time_ms in range(0, hold_ms * len(scenes), interval_ms):
        shift = rng.randint(-MAX_SHIFT_PX, MAX_SHIFT_PX), rng.randint(-MAX_SHIFT_PX, MAX_SHIFT_PX)
        noise = rng.getrandbits(64)
        pixels, _ = _draw(scenes[time_ms // hold_ms], width_px, height_px, look=look, noise=noise, shift=shift)
        yield Frame(time_ms * SAMPLES_PER_MS, pixels)


def _draw(
    scene: Scene, width_px: int, height_px: int, *, look: int, noise: int, shift: tuple[int, int] = (0, 0)
) -> tuple[Pixels, dict[str, Place]]:
    """Return a picture of `scene` and its places: `look` decides what a clip keeps, `noise` what it does not."""
    _check_size(width_px, height_px)
    if len(scene.elements) > MAX_ELEMENTS:
        raise ValueError(f"a scene of {len(scene.elements)} elements: a picture has room for {MAX_ELEMENTS}")
    pixels = _floor(width_px, height_px, look)
    places: dict[str, Place] = {}
    for name, (column, row) in _cells(scene, look).items():
        rng = _rng(look, name)
        width, height = width_px / 2, height_px / 2
        side = rng.uniform(MIN_ELEMENT_PX, min(MAX_ELEMENT_PX, width, height))
        x = _draw_start(column * width, (column + 1) * width, side, rng) + shift[0]
        y = _draw_start(row * height, (row + 1) * height, side, rng) + shift[1]
        box = _Box(pixels, min(max(0.0, x), width_px - side), min(max(0.0, y), height_px - side), side)
        _DRAWN[name](box, scene, rng)
        places |= _places(box, name)
    return _with_noise(pixels, noise), places


def _draw_start(low: float, high: float, side: float, rng: random.Random) -> float:
    """Return where between `low` and `high` an element of `side` begins: beside the edges of crops, if it has room."""
    edges = [edge for edge in range(EDGE_PX, int(high) + 1, EDGE_PX) if low < edge < high]
    rooms = [(start, end - side) for start, end in itertools.pairwise((low, *edges, high)) if end - start >= side]
    rooms = rooms or [(low, high - side)]
    [(start, last)] = rng.choices(rooms, [last - start + 1.0 for start, last in rooms])
    return rng.uniform(start, last)


def _check_size(width_px: int, height_px: int) -> None:
    if min(width_px, height_px) < MIN_SIDE_PX:
        raise ValueError(f"a picture of {width_px} x {height_px} pixels: give {MIN_SIDE_PX} or more on either side")


def _with_noise(pixels: Pixels, seed: int) -> Pixels:
    generator = np.random.default_rng(seed)
    noisy = pixels + generator.integers(-6, 7, pixels.shape, dtype=np.int16)
    picture: Pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    return picture


def _places(box: _Box, name: str) -> dict[str, Place]:
    """Return where the element `name` is; of a display, its digit."""
    if name == "display":
        return {name: box.place(_DIGIT_LEFT, _DIGIT_TOP, _DIGIT_LEFT + _DIGIT_WIDTH, _DIGIT_BOTTOM)}
    return {name: box.place(0.0, 0.0, 1.0, 1.0)}


def _rng(look: int, name: str) -> random.Random:
    """Return the generator of one thing, so that it looks the same whatever else there is."""
    return random.Random(f"{look} {name}")  # noqa: S311 - seeded pictures, no secrets


def _cells(scene: Scene, look: int) -> dict[str, tuple[int, int]]:
    """Return the cell of each element. A shape on the other side changes places with whatever is there."""
    rng = _rng(look, "cells")
    row = rng.randrange(2)
    others = rng.sample([cell for cell in _CELLS if cell != (0, row)], 3)
    if scene.shape is None:
        others.append((0, row))
    cells = dict(zip((name for name in scene.elements if name != "shape"), others, strict=False))
    if scene.shape is not None:
        here, there = ((0, row), (1, row)) if scene.shape.side == "left" else ((1, row), (0, row))
        cells = {name: there if cell == here else cell for name, cell in cells.items()}
        cells["shape"] = here
    return cells


def _floor(width_px: int, height_px: int, look: int) -> Pixels:
    """Return a grey room: a wall and, from somewhere in the middle on, a floor that is darker."""
    rng = _rng(look, "floor")
    brightness, tint = rng.uniform(95, 185), [rng.uniform(-8, 8) for _ in range(3)]
    shades = np.full((height_px, 1, 1), brightness)
    shades[int(height_px * rng.uniform(0.4, 0.7)) :] -= rng.uniform(5, 25)
    shades = shades + np.linspace(-rng.uniform(0, 10), rng.uniform(0, 10), width_px)[None, :, None]
    pixels: Pixels = np.clip(shades + np.array(tint), 0, 255).astype(np.uint8)
    return pixels


def _shaded(colour: Colour, rng: random.Random, spread: int = 15) -> Colour:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def _draw_shape(box: _Box, scene: Scene, rng: random.Random) -> None:
    if scene.shape is None:
        return
    colour = _shaded(_SHADES[scene.shape.colour], rng)
    if scene.shape.kind == "square":
        box.rectangle(0.08, 0.08, 0.92, 0.92, colour)
    elif scene.shape.kind == "circle":
        box.where(lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.47**2, colour)
    else:
        box.where(lambda x, y: (y > 0.05) & (y < 0.95) & (np.abs(x - 0.5) < (y - 0.05) * 0.54), colour)


def _draw_display(box: _Box, scene: Scene, rng: random.Random) -> None:
    """Draw a dark panel, and on it a digit of seven segments, 0.84 of the box high."""
    if scene.display is None:
        return
    box.rectangle(0.0, 0.0, 1.0, 1.0, _shaded(_DARK, rng))
    lit = _shaded(_LIT, rng)
    left, right, stroke = _DIGIT_LEFT, _DIGIT_LEFT + _DIGIT_WIDTH, _STROKE
    top, middle, bottom = _DIGIT_TOP, 0.5, _DIGIT_BOTTOM
    edges = (
        (left, top, right, top + stroke),
        (left, top, left + stroke, middle),
        (right - stroke, top, right, middle),
        (left, middle - stroke / 2, right, middle + stroke / 2),
        (left, middle, left + stroke, bottom),
        (right - stroke, middle, right, bottom),
        (left, bottom - stroke, right, bottom),
    )
    for edge, is_lit in zip(edges, _SEGMENTS[scene.display], strict=True):
        if is_lit == "1":
            box.rectangle(*edge, lit)


def _draw_gauge(box: _Box, scene: Scene, rng: random.Random) -> None:
    """Draw a white tube with marks at its side, filled up to a level."""
    left = rng.uniform(0.05, 0.35)
    box.rectangle(left, 0.03, left + 0.4, 0.97, _DARK)
    box.rectangle(left + 0.06, 0.09, left + 0.34, 0.91, _WHITE)
    level = rng.uniform(0.12, 0.28)
    if scene.gauge == "high":
        level = 1 - level
    box.rectangle(left + 0.06, 0.91 - 0.82 * level, left + 0.34, 0.91, _shaded(_FILL, rng))
    for mark in range(5):
        y = 0.09 + 0.19 * mark
        box.rectangle(left + 0.42, y, left + 0.55, y + 0.04, _DARK)


def _draw_door(box: _Box, scene: Scene, rng: random.Random) -> None:
    """Draw a door in its frame: the leaf in front, or turned away at its hinges with the dark behind it."""
    left = rng.uniform(0.05, 0.35)
    leaf = _shaded(_WOOD, rng, 25)
    box.rectangle(left, 0.02, left + 0.6, 0.98, _WHITE)
    if scene.door == "open":
        box.rectangle(left + 0.05, 0.07, left + 0.55, 0.98, _DARK)
        box.rectangle(left + 0.05, 0.07, left + 0.15, 0.98, leaf)
    else:
        box.rectangle(left + 0.05, 0.07, left + 0.55, 0.98, leaf)
        box.rectangle(left + 0.44, 0.5, left + 0.51, 0.57, _DARK)


def _draw_person(box: _Box, scene: Scene, rng: random.Random) -> None:
    """Draw a yellow line around a part of the floor, and a person within it or beside it."""
    is_mirrored = rng.random() < 0.5
    left, right = (0.36, 1.0) if is_mirrored else (0.0, 0.64)
    line = _shaded(_LINE, rng, 10)
    for edge in (
        (left, 0.02, right, 0.08),
        (left, 0.92, right, 0.98),
        (left, 0.02, left + 0.06, 0.98),
        (right - 0.06, 0.02, right, 0.98),
    ):
        box.rectangle(*edge, line)
    centre = (left + right) / 2 + rng.uniform(-0.06, 0.06)
    if scene.person == "outside":
        centre = 0.15 if is_mirrored else 0.85
    top = rng.uniform(0.12, 0.2)
    skin, clothes = _shaded(rng.choice(_SKIN), rng), _shaded(rng.choice(_CLOTHES), rng)
    box.where(lambda x, y: (x - centre) ** 2 + (y - top - 0.1) ** 2 < 0.1**2, skin)
    box.rectangle(centre - 0.12, top + 0.21, centre + 0.12, top + 0.47, clothes)
    box.rectangle(centre - 0.1, top + 0.47, centre - 0.015, top + 0.7, clothes)
    box.rectangle(centre + 0.015, top + 0.47, centre + 0.1, top + 0.7, clothes)


_DRAWN: Mapping[str, Callable[[_Box, Scene, random.Random], None]] = {
    "shape": _draw_shape,
    "display": _draw_display,
    "gauge": _draw_gauge,
    "door": _draw_door,
    "person": _draw_person,
}
