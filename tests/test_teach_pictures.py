"""Pictures of the world: what a scene has can be seen in its picture, in any size that the model is taught with."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.models.phi4.config import VisionConfig
from pipeline.teach.gallery import SIZES_PX, show, show_sheet
from pipeline.teach.grammar import COLOURS, DIGITS, SHAPES, SIDES
from pipeline.teach.pictures import MIN_SIDE_PX, Place, draw_clip, draw_picture, draw_picture_and_places, draw_sheet
from pipeline.teach.things import THINGS, things_in
from pipeline.teach.world import Scene, Shape, draw_scene, draw_scene_change
from pipeline.vision.crop_layout import plan_crops

CROP, PATCH = 168, 14
VISION = VisionConfig(96, 192, 4, 3, 4, 3, CROP, PATCH, 1e-6, 5)
NOISE = 13
"""More than two pictures of one look can differ by noise."""

seeds = st.integers(0, 2**32)
widths_px, heights_px = st.integers(MIN_SIDE_PX, 448), st.integers(MIN_SIDE_PX, 336)
Pixels = NDArray[np.uint8]


def drawn(scene: Scene, width_px: int, height_px: int, seed: int) -> Pixels:
    return draw_picture(scene, width_px, height_px, random.Random(seed))


def difference(first: Pixels, second: Pixels) -> NDArray[np.bool_]:
    """Where they differ by more than noise."""
    return (np.abs(first.astype(int) - second) >= NOISE).any(axis=2)


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is set."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def lit(picture: Pixels) -> NDArray[np.bool_]:
    """Where the segments of a display are: brighter than any wall."""
    return picture.min(axis=2) > np.where(picture[..., 0] > 225, 165, 255)


def rectangle(place: Place) -> tuple[slice, slice]:
    """The rows and columns of all pixels of which a part is in `place`."""
    return slice(int(place.top), math.ceil(place.bottom)), slice(int(place.left), math.ceil(place.right))


@settings(max_examples=60)
@given(seed=seeds, width_px=widths_px, height_px=heights_px)
def test_a_picture_has_the_size_asked_for_and_depends_on_the_seed_alone(
    seed: int, width_px: int, height_px: int
) -> None:
    scene = draw_scene(random.Random(seed))
    picture = drawn(scene, width_px, height_px, seed)
    assert picture.shape == (height_px, width_px, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, drawn(scene, width_px, height_px, seed))
    assert not np.array_equal(picture, drawn(scene, width_px, height_px, seed + 1))


def test_sizes_give_one_crop_and_several() -> None:
    numbers = {
        plan_crops(width_px, height_px, CROP, PATCH).num_crops
        for width_px, height_px in ((112, 112), (224, 112), (448, 336))
    }
    assert numbers == {2, 3, 7}


@settings(max_examples=60)
@given(seed=seeds, width_px=widths_px, height_px=heights_px)
def test_a_change_of_the_scene_changes_the_picture(seed: int, width_px: int, height_px: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    changed = draw_scene_change(rng, scene)
    first, second = drawn(scene, width_px, height_px, seed), drawn(changed, width_px, height_px, seed)
    # The smallest change is one segment of a digit, 8 x 12 pixels.
    assert difference(first, second).sum() >= 30
    assert not difference(first, drawn(scene, width_px, height_px, seed)).any()


@settings(max_examples=60)
@given(
    seed=seeds,
    width_px=widths_px,
    height_px=heights_px,
    shape=st.builds(Shape, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.sampled_from(SIDES)),
)
def test_a_shape_is_on_its_side_in_its_colour_and_of_its_form(
    seed: int, width_px: int, height_px: int, shape: Shape
) -> None:
    scene = Scene(shape)
    mask = difference(drawn(scene, width_px, height_px, seed), drawn(Scene(), width_px, height_px, seed))
    left, top, right, bottom = box_of(mask)
    assert (right <= width_px / 2 + 1) if shape.side == "left" else (left >= width_px / 2 - 1)
    assert min(right - left, bottom - top) >= 40
    filled = mask.sum() / ((right - left) * (bottom - top))
    assert {"square": 0.97, "circle": 0.74, "triangle": 0.45}[shape.kind] < filled
    assert filled < {"square": 1.01, "circle": 0.84, "triangle": 0.56}[shape.kind]
    red, green, blue = (int(value) for value in np.median(drawn(scene, width_px, height_px, seed)[mask], axis=0))
    assert {
        "red": red > 2 * max(green, blue),
        "green": green > 2 * max(red, blue) - 40,
        "blue": blue > 2 * max(red, green) - 20,
        "yellow": min(red, green) > 2 * blue,
    }[shape.colour]


@settings(max_examples=60)
@given(seed=seeds, width_px=widths_px, height_px=heights_px)
def test_a_place_is_where_its_thing_is(seed: int, width_px: int, height_px: int) -> None:
    scene = draw_scene(random.Random(seed))
    picture, places = draw_picture_and_places(scene, width_px, height_px, random.Random(seed))
    assert np.array_equal(picture, drawn(scene, width_px, height_px, seed))
    assert set(things_in(scene)) == set(places)
    seen = difference(picture, drawn(Scene(), width_px, height_px, seed))
    for place in places.values():
        # At least an outline differs from the floor.
        assert seen[rectangle(place)].mean() > 0.1
        seen[rectangle(place)] = False
    # What is left is the panel around the digits.
    assert scene.display is not None or not seen.any()


@settings(max_examples=60)
@given(seed=seeds, width_px=widths_px, height_px=heights_px, digit=st.integers(0, 9))
def test_a_digit_is_lit_at_its_place(seed: int, width_px: int, height_px: int, digit: int) -> None:
    scene = Scene(display=digit)
    picture, places = draw_picture_and_places(scene, width_px, height_px, random.Random(seed))
    is_lit = lit(picture)
    for place in places.values():
        assert is_lit[rectangle(place)].any()
        is_lit[rectangle(place)] = False
    assert set(places) == {"display"}
    assert not is_lit.any()


@settings(max_examples=30)
@given(seed=seeds, size_px=st.sampled_from(SIZES_PX))
def test_no_thing_lies_across_the_edge_of_two_crops(seed: int, size_px: tuple[int, int]) -> None:
    _, places = draw_picture_and_places(draw_scene(random.Random(seed)), *size_px, random.Random(seed))
    for place in places.values():
        for first, last in ((place.left, place.right), (place.top, place.bottom)):
            assert first // CROP == math.ceil(last / CROP) - 1


@settings(max_examples=40)
@given(seed=seeds)
def test_a_sheet_is_full_of_things_and_each_is_seen(seed: int) -> None:
    picture, placed = draw_sheet(CROP, random.Random(seed))
    assert picture.shape == (CROP, CROP, 3)
    assert 1 <= len(placed) <= 9
    for scene, places in placed:
        assert set(places) == set(things_in(scene))
        for place in places.values():
            assert min(place.left, place.top) >= 0
            assert max(place.right, place.bottom) <= CROP
            # More than the floor's one grey and its noise.
            assert np.ptp(picture[rectangle(place)].astype(int), axis=(0, 1)).max() > 40
        if scene.shape is not None:
            assert (places["shape"].middle_x > CROP / 2) == (scene.shape.side == "right")
    shown = show_sheet(VISION, random.Random(seed))
    assert shown.things.shape[0] == len(shown.crops.pixels) == 1
    named = {THINGS.index(word) for scene, _ in placed for words in things_in(scene).values() for word in words}
    assert set(shown.things.flatten(0, 2).any(0).nonzero().flatten().tolist()) == named


@settings(max_examples=30)
@given(seed=seeds, size_px=st.sampled_from(SIZES_PX))
def test_every_thing_is_at_some_position_of_the_whole_and_of_the_crops(seed: int, size_px: tuple[int, int]) -> None:
    scene = draw_scene(random.Random(seed))
    shown = show(scene, size_px, VISION, random.Random(seed))
    side = VISION.crop_size // VISION.patch_size // 2
    assert shown.things.shape == (shown.crops.layout.num_crops, side, side, len(THINGS))
    there = {THINGS.index(thing) for things in things_in(scene).values() for thing in things}
    has_several = shown.crops.layout.num_crops > 2
    # In the whole of several crops digits are too small, and one of several does not know its side of the whole.
    unread = {THINGS.index(digit) for digit in DIGITS} if has_several else set()
    sides = {THINGS.index(thing) for thing in SIDES} if has_several else set()
    assert set(shown.things[0].any(0).any(0).nonzero().flatten().tolist()) == there - unread
    assert set(shown.things[1:].flatten(0, 2).any(0).nonzero().flatten().tolist()) == there - sides
    if scene.shape is not None:
        columns = shown.things[0][..., THINGS.index(scene.shape.side)].any(0).nonzero().flatten()
        layout = shown.crops.layout
        width = side * layout.width_px / (layout.columns * layout.crop_size)
        assert ((columns.float().mean().item() + 0.5) / width < 0.5) == (scene.shape.side == "left")


@settings(max_examples=60)
@given(seed=seeds, width_px=widths_px, height_px=heights_px)
def test_a_digit_is_at_least_40_pixels_high(seed: int, width_px: int, height_px: int) -> None:
    picture = drawn(Scene(display=8), width_px, height_px, seed)
    left, top, right, bottom = box_of(lit(picture))
    assert bottom - top >= 40
    assert right - left >= 29


def test_every_digit_has_a_picture_of_its_own() -> None:
    pictures = [drawn(Scene(display=digit), 112, 112, 5) for digit in range(10)]
    for index, picture in enumerate(pictures):
        assert all(difference(picture, other).sum() >= 30 for other in pictures[:index])


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_lights_the_segments_of_its_form(digit: int) -> None:
    # Of a single digit the places in the middle of each segment, as shares of the box of an 8 that looks the same.
    left, top, right, bottom = box_of(lit(drawn(Scene(display=8), 224, 224, 9)))
    mask = lit(drawn(Scene(display=digit), 224, 224, 9))
    places = {
        "top": (0.5, 0.06),
        "upper left": (0.1, 0.25),
        "upper right": (0.9, 0.25),
        "middle": (0.5, 0.5),
        "lower left": (0.1, 0.75),
        "lower right": (0.9, 0.75),
        "bottom": (0.5, 0.94),
    }
    dark = {
        0: {"middle"},
        1: {"top", "upper left", "middle", "lower left", "bottom"},
        2: {"upper left", "lower right"},
        3: {"upper left", "lower left"},
        4: {"top", "lower left", "bottom"},
        5: {"upper right", "lower left"},
        6: {"upper right"},
        7: {"upper left", "middle", "lower left", "bottom"},
        8: set(),
        9: {"lower left"},
    }
    seen = {
        name
        for name, (x, y) in places.items()
        if not mask[int(top + y * (bottom - top)), int(left + x * (right - left))]
    }
    assert seen == dark[digit]


@settings(max_examples=40)
@given(seed=seeds)
def test_a_person_is_within_the_line_or_beside_it(seed: int) -> None:
    nobody = drawn(Scene(), 112, 112, seed)
    inside, outside = (drawn(Scene(person=where), 112, 112, seed) for where in ("inside", "outside"))
    # Whoever moved is where the two pictures differ; the line is where they are alike and the empty room is not.
    moved = difference(inside, outside)
    line = box_of(difference(inside, nobody) & difference(outside, nobody) & ~moved)
    person_inside = box_of(moved & difference(inside, nobody) & ~difference(outside, nobody))
    person_outside = box_of(moved & difference(outside, nobody) & ~difference(inside, nobody))
    assert line[0] < person_inside[0]
    assert person_inside[2] < line[2]
    assert person_outside[2] <= line[0] or person_outside[0] >= line[2]


def test_a_gauge_is_filled_more_where_it_is_high() -> None:
    for seed in range(20):
        low, high = (drawn(Scene(gauge=level), 112, 112, seed).astype(int) for level in ("low", "high"))
        filled = [
            ((level[..., 0] > level[..., 1] + 60) & (level[..., 2] > level[..., 1] + 60)).sum() for level in (low, high)
        ]
        assert filled[1] > 2 * filled[0] > 0


@settings(max_examples=20)
@given(seed=seeds)
def test_a_clip_holds_a_scene_and_then_changes(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    changed = draw_scene_change(rng, scene)
    clip = list(draw_clip([scene, changed], 168, 112, random.Random(seed), hold_ms=1_000, interval_ms=250))
    again = draw_clip([scene, changed], 168, 112, random.Random(seed), hold_ms=1_000, interval_ms=250)
    assert [frame.start_sample for frame in clip] == [4_000 * index for index in range(8)]
    for frame, other in zip(clip, again, strict=True):
        assert np.array_equal(frame.pixels, other.pixels)
    assert not np.array_equal(clip[0].pixels, clip[1].pixels)


def test_a_camera_moves_less_than_a_scene_changes() -> None:
    before = Scene(door="open", gauge="low")
    clip = list(draw_clip([before, replace(before, door="closed")], 224, 168, random.Random(2), hold_ms=1_000))
    first, held, changed = (clip[index].pixels for index in (0, 1, 2))
    assert difference(first, changed).sum() > difference(first, held).sum() > 0


def test_a_shape_that_changes_its_side_changes_places() -> None:
    scene = Scene(Shape("circle", "red", "left"), 1, "low", "open")
    assert scene.shape is not None
    other = replace(scene, shape=replace(scene.shape, side="right"))
    first, second = (drawn(either, 224, 224, 4) for either in (scene, other))
    for picture, is_left in ((first, True), (second, False)):
        red = picture.astype(int)
        left, _, right, _ = box_of(red[..., 0] > 2 * np.maximum(red[..., 1], red[..., 2]) + 60)
        assert (right <= 113) == is_left
        assert (left >= 111) != is_left


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="112 or more"):
        drawn(Scene(door="open"), 111, 200, 0)
    everything = Scene(Shape("circle", "red", "left"), 1, "low", "open", "inside")
    with pytest.raises(ValueError, match="room for 4"):
        drawn(everything, 224, 224, 0)
    with pytest.raises(ValueError, match="1 or more"):
        list(draw_clip([everything], 224, 224, random.Random(0), interval_ms=0))
