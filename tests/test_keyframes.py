"""Keyframes: which frames are looked at, and which of their tiles carry new pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.items import Frame
from pipeline.timebase import ms_to_samples
from pipeline.vision.crop_layout import plan_crops
from pipeline.vision.frames_to_keyframes import BLOCK_PX, FramesToKeyframes, Keyframe
from pipeline.vision.params import SceneParams

Pixels = NDArray[np.uint8]

CROP = 64
HEIGHT, WIDTH = 112, 192  # two rows of three tiles, the lower ones not whole
PARAMS = SceneParams(sample_interval_ms=500, min_interval_ms=2_000, max_interval_ms=20_000)
LUMA = np.array([0.299, 0.587, 0.114])


def textured(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """A picture with large and small features and a grey value between 40 and 180."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 150, (height // 8 + 1, width // 8 + 1, 3))
    fine = generator.integers(0, 30, (height, width, 3))
    return (coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width] + fine).astype(np.uint8)


def noisy(pixels: Pixels, generator: np.random.Generator, sigma: float = 3.0) -> Pixels:
    return np.clip(np.rint(pixels + generator.normal(0.0, sigma, pixels.shape)), 0, 255).astype(np.uint8)


def with_object(pixels: Pixels, x: int, y: int, side: int = 24, value: int = 250) -> Pixels:
    changed = pixels.copy()
    changed[y : y + side, x : x + side] = value
    return changed


def at(ms: int, pixels: Pixels) -> Frame:
    return Frame(ms_to_samples(ms), pixels)


def pushed(track: FramesToKeyframes, frames: list[Frame]) -> list[Keyframe]:
    return [keyframe for frame in frames if (keyframe := track.push(frame)) is not None]


def tiles_of(pixels: Pixels, crop: int = CROP) -> dict[tuple[int, int], Pixels]:
    height, width, _ = pixels.shape
    return {
        (row, column): pixels[row * crop : (row + 1) * crop, column * crop : (column + 1) * crop]
        for row in range(-(-height // crop))
        for column in range(-(-width // crop))
    }


def greatest_difference(one: Pixels, other: Pixels, crop: int = CROP) -> float:
    """The greatest difference of the mean luma of a block, by other code than the stage's: what a keyframe may hide."""
    greatest = 0.0
    for tile, counterpart in zip(tiles_of(one, crop).values(), tiles_of(other, crop).values(), strict=True):
        lumas = [(pixels.astype(np.float64) @ LUMA) / 255 for pixels in (tile, counterpart)]
        num_rows, num_columns = (max(1, side // BLOCK_PX) for side in tile.shape[:2])
        for row in range(num_rows):
            for column in range(num_columns):
                block = tuple(
                    slice(index * side // count, (index + 1) * side // count)
                    for index, count, side in zip((row, column), (num_rows, num_columns), tile.shape[:2], strict=True)
                )
                greatest = max(greatest, abs(float(lumas[0][block].mean() - lumas[1][block].mean())))
    return greatest


def test_the_first_frame_is_one_and_frames_like_it_are_none_until_the_interval_is_over() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    still = textured()
    keyframes = pushed(track, [at(ms, still) for ms in range(0, 41_000, 500)])
    assert [(keyframe.frame.start_sample, keyframe.reason) for keyframe in keyframes] == [
        (0, "first"),
        (ms_to_samples(20_000), "interval"),
        (ms_to_samples(40_000), "interval"),
    ]
    assert [keyframe.changed_share for keyframe in keyframes] == [1.0, 0.0, 0.0]
    assert all(keyframe.changed_tiles.shape == (2, 3) and keyframe.changed_tiles.all() for keyframe in keyframes)


def test_what_changed_shortly_after_a_keyframe_is_found_once_it_may_be() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    still, changed = textured(), with_object(textured(), 10, 10)
    frames = [at(0, still), *(at(ms, changed) for ms in range(500, 6_000, 500))]
    keyframes = pushed(track, frames)
    assert [(keyframe.frame.start_sample, keyframe.reason) for keyframe in keyframes] == [
        (0, "first"),
        (ms_to_samples(2_000), "changed"),
    ]


def test_what_is_gone_again_by_then_is_not() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    still = textured()
    assert len(pushed(track, [at(0, still), at(1_000, with_object(still, 10, 10)), at(2_000, still)])) == 1


def test_tiles_that_did_not_change_carry_the_pixels_of_the_keyframe_before() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    generator = np.random.default_rng(1)
    first = noisy(textured(), generator)
    moved = with_object(noisy(textured(), generator), 70, 5)  # in the tile in the middle above
    before, after = pushed(track, [at(0, first), at(2_000, moved)])
    assert before.frame.pixels is first
    assert after.changed_tiles.tolist() == [[False, True, False], [False, False, False]]
    assert after.changed_share == pytest.approx(CROP * CROP / (HEIGHT * WIDTH))
    new, old = tiles_of(moved), tiles_of(first)
    for place, tile in tiles_of(after.frame.pixels).items():
        assert np.array_equal(tile, (new if after.changed_tiles[place] else old)[place])


def test_frames_given_are_never_written_to() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    pictures = [textured(), with_object(textured(), 70, 5), with_object(textured(), 5, 70)]
    for picture in pictures:
        picture.setflags(write=False)
    assert len(pushed(track, [at(2_000 * number, picture) for number, picture in enumerate(pictures)])) == 3


def test_small_differences_that_add_up_are_found_because_frames_are_compared_with_what_was_sent() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    frames = []
    for step in range(36):  # by half a grey value a frame, 9 seconds until it is above the threshold of 15.3
        drifting = textured()
        drifting[:32, :32] = np.clip(drifting[:32, :32] + step * 0.5, 0, 255)
        frames.append(at(500 * step, drifting))
    keyframes = pushed(track, frames)
    assert [keyframe.reason for keyframe in keyframes] == ["first", "changed"]
    assert keyframes[1].frame.start_sample == ms_to_samples(500 * 32)  # a fraction of a grey value is cut off
    assert np.argwhere(keyframes[1].changed_tiles).tolist() == [[0, 0]]


def test_all_tiles_are_taken_anew_when_that_was_last_done_long_ago() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    generator = np.random.default_rng(2)
    # Something changes every three seconds, so that no keyframe is due for its age.
    frames = [
        at(ms, with_object(noisy(textured(), generator), 70 + 20 * (ms // 3_000 % 2), 5))
        for ms in range(0, 45_000, 3_000)
    ]
    keyframes = pushed(track, frames)
    assert {keyframe.reason for keyframe in keyframes[1:]} == {"changed"}
    whole_ms = [keyframe.frame.start_sample // 16 for keyframe in keyframes if keyframe.changed_tiles.all()]
    assert whole_ms == [0, 21_000, 42_000]


def test_the_noise_of_a_camera_makes_no_keyframes() -> None:
    layout = plan_crops(640, 360, 224, 14)
    still = textured(3, layout.height_px, layout.width_px)
    generator = np.random.default_rng(3)
    track = FramesToKeyframes(PARAMS, 224)
    keyframes = pushed(track, [at(ms, noisy(still, generator)) for ms in range(0, 19_999, 500)])
    assert [keyframe.reason for keyframe in keyframes] == ["first"]


@pytest.mark.parametrize("offset_px", [0, 3, 8, 15])
def test_a_small_object_that_moves_in_front_of_a_noisy_camera_makes_keyframes(offset_px: int) -> None:
    layout = plan_crops(640, 360, 224, 14)
    still = textured(4, layout.height_px, layout.width_px)
    generator = np.random.default_rng(4)
    track = FramesToKeyframes(PARAMS, 224)
    frames = [
        at(ms, with_object(noisy(still, generator), offset_px + ms // 40, 100 + offset_px, side=16))
        for ms in range(0, 10_000, 500)
    ]
    keyframes = pushed(track, frames)
    assert [keyframe.frame.start_sample // 16 for keyframe in keyframes] == [0, 2_000, 4_000, 6_000, 8_000]
    for before, after in pairwise(keyframes):
        places = {
            (int(100 + offset_px) // 224, (offset_px + keyframe.frame.start_sample // 16 // 40) // 224)
            for keyframe in (before, after)
        }
        assert places <= {(row, column) for row, column in np.argwhere(after.changed_tiles).tolist()}
        assert after.changed_tiles.sum() <= 2 * len(places)


LIGHTS = {
    "a lamp that flickers": lambda pixels, step: pixels * (1.0 + 0.25 * (step % 2)),
    "an exposure that drifts": lambda pixels, step: pixels * (1.0 + 0.02 * step),
    "an exposure that falls": lambda pixels, step: pixels * (1.0 - 0.02 * step),
    "haze": lambda pixels, step: pixels + 1.5 * step,
    "a lamp so bright that the camera saturates": lambda pixels, step: pixels * (1.0 + 0.4 * (step % 2)) + 20,
}


@pytest.mark.parametrize("light", LIGHTS.values(), ids=LIGHTS.keys())
def test_light_that_changes_on_all_there_is_makes_no_keyframes(light) -> None:  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(5)
    track = FramesToKeyframes(PARAMS, CROP)
    still = textured(5)
    frames = [
        at(1_000 * step, noisy(np.clip(light(still, step), 0, 255).astype(np.uint8), generator)) for step in range(20)
    ]
    assert [keyframe.reason for keyframe in pushed(track, frames)] == ["first"]


@pytest.mark.parametrize("light", [lambda pixels: pixels + 40.0, lambda pixels: pixels * 1.3], ids=["haze", "lamp"])
def test_light_is_no_change_of_dark_and_bright_parts_either(light) -> None:  # type: ignore[no-untyped-def]
    track = FramesToKeyframes(PARAMS, CROP)
    still = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
    still[:, 64:128], still[:, 128:] = 90, 180
    assert len(pushed(track, [at(0, still), at(2_000, np.rint(light(still)).astype(np.uint8))])) == 1


@pytest.mark.parametrize(("brightness", "left_of_it"), [(50, 0.0), (200, 0.55)], ids=["dim", "bright"])
def test_a_room_whose_lights_go_out_or_dim_by_a_lot_has_changed(brightness: int, left_of_it: float) -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    room = np.full((HEIGHT, WIDTH, 3), brightness, np.uint8)
    room[:, :80] = brightness // 2
    darker = (room * left_of_it).astype(np.uint8)
    assert [keyframe.reason for keyframe in pushed(track, [at(0, room), at(2_000, darker)])] == ["first", "changed"]


def test_under_a_lamp_that_flickers_what_moves_is_still_found_and_no_old_brightness_stays_beside_it() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    bright = np.clip(textured() * 1.4, 0, 255).astype(np.uint8)
    _, found = pushed(track, [at(0, textured()), at(2_000, bright), at(3_000, with_object(bright, 70, 5, value=0))])
    assert found.frame.start_sample == ms_to_samples(3_000)
    assert found.changed_share == pytest.approx(CROP * CROP / (HEIGHT * WIDTH))  # what moved, not what was lit
    assert found.changed_tiles.all()


@pytest.mark.parametrize("value", [0, 255])
def test_a_camera_that_is_covered_or_blinded_and_lights_that_go_out_are_changes(value: int) -> None:
    for picture in (textured(), np.full((HEIGHT, WIDTH, 3), 120, np.uint8)):
        track = FramesToKeyframes(PARAMS, CROP)
        found = pushed(track, [at(0, picture), at(2_000, np.full_like(picture, value))])
        assert [keyframe.reason for keyframe in found] == ["first", "changed"]
        assert found[1].changed_share == 1.0


def test_a_plain_thing_that_fills_most_of_a_plain_picture_is_a_change_and_no_light() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    wall = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    van = wall.copy()
    van[:, :140] = 160
    assert len(pushed(track, [at(0, wall), at(2_000, van)])) == 2


def test_a_frame_of_another_size_is_a_change_of_everything() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    wide = np.full((60, 200, 3), 90, np.uint8)
    same = np.full((60, 200, 3), 90, np.uint8)
    found = pushed(track, [at(0, textured()), at(1_000, wide), at(2_000, wide), at(4_000, same)])
    assert [(keyframe.reason, keyframe.changed_share) for keyframe in found] == [("first", 1.0), ("changed", 1.0)]
    assert found[1].frame.pixels is wide
    assert found[1].changed_tiles.shape == (1, 4)


def test_a_change_of_too_little_of_the_area_is_none() -> None:
    params = PARAMS.model_copy(update={"min_changed_share": 0.5})
    one_tile, most = with_object(textured(), 70, 5), textured(9)
    found = pushed(FramesToKeyframes(params, CROP), [at(0, textured()), at(2_000, one_tile), at(4_000, most)])
    assert [(keyframe.frame.start_sample // 16, keyframe.reason) for keyframe in found] == [
        (0, "first"),
        (4_000, "changed"),
    ]


def test_without_crops_the_whole_frame_is_one_tile() -> None:
    changed = with_object(textured(), 70, 5)
    _, found = pushed(FramesToKeyframes(PARAMS), [at(0, textured()), at(2_000, changed)])
    assert found.changed_tiles.tolist() == [[True]]
    assert found.changed_share == 1.0
    assert found.frame.pixels is changed


def test_one_frame_of_each_sampling_interval_is_compared() -> None:
    track = FramesToKeyframes(PARAMS, CROP)
    still, changed = textured(), with_object(textured(), 70, 5)
    frames = [at(0, still), at(2_000, still), at(2_040, changed), at(2_480, changed), at(2_520, changed)]
    assert [keyframe.frame.start_sample // 16 for keyframe in pushed(track, frames)] == [0, 2_520]


def test_a_crop_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_size=0 must be at least 1 pixel"):
        FramesToKeyframes(PARAMS, 0)


@st.composite
def videos(draw: st.DrawFn) -> tuple[list[Frame], int]:
    """Frames of one size at rising times: objects come and go, light changes, the sensor is noisy; and a crop size."""
    height, width = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    generator = np.random.default_rng(draw(st.integers(0, 1_000)))
    still = textured(draw(st.integers(0, 1_000)), height, width)
    frames, ms = [], draw(st.integers(0, 5_000))
    for _ in range(draw(st.integers(1, 14))):
        picture = still
        if draw(st.booleans()):
            x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            picture = with_object(picture, x, y, draw(st.integers(1, 40)), draw(st.integers(0, 255)))
        lit = np.clip(picture * draw(st.sampled_from([1.0, 1.0, 0.5, 0.9, 1.3])), 0, 255).astype(np.uint8)
        frames.append(at(ms, noisy(lit, generator, draw(st.sampled_from([0.0, 3.0, 12.0])))))
        ms += draw(st.sampled_from([1, 40, 400, 500, 1_000, 2_000, 2_500, 7_000, 30_000]))
    return frames, draw(st.sampled_from([1, 7, 16, 28, 40, 64, 100]))


@given(videos())
@settings(max_examples=150, deadline=None)
def test_whatever_is_shown_keyframes_keep_their_distances_and_hide_nothing(video: tuple[list[Frame], int]) -> None:
    frames, crop = video
    track = FramesToKeyframes(PARAMS, crop)
    sent: Keyframe | None = None
    whole_sample = 0
    for frame in frames:
        keyframe = track.push(frame)
        if sent is None:
            assert keyframe is not None
            assert keyframe.reason == "first"
        else:
            elapsed_ms = (frame.start_sample - sent.frame.start_sample) // 16
            assert keyframe is None or elapsed_ms >= PARAMS.min_interval_ms
            assert keyframe is not None or elapsed_ms < PARAMS.max_interval_ms
        if keyframe is None:
            continue
        assert keyframe.frame.start_sample == frame.start_sample
        assert greatest_difference(keyframe.frame.pixels, frame.pixels, crop) <= PARAMS.tile_threshold + 1e-5
        assert 0.0 <= keyframe.changed_share <= 1.0
        new = tiles_of(frame.pixels, crop)
        for place, tile in tiles_of(keyframe.frame.pixels, crop).items():
            if keyframe.changed_tiles[place]:
                assert np.array_equal(tile, new[place])
            else:
                assert sent is not None
                assert np.array_equal(tile, tiles_of(sent.frame.pixels, crop)[place])
        if keyframe.changed_tiles.all():
            whole_sample = frame.start_sample
        assert frame.start_sample - whole_sample < ms_to_samples(PARAMS.max_interval_ms)
        sent = keyframe


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 100), st.lists(st.integers(1, 30_000), max_size=10))
@example(height=1, width=1, seed=0, steps_ms=[2_000])
@settings(max_examples=80, deadline=None)
def test_frames_that_are_all_the_same_never_count_as_changed(
    height: int, width: int, seed: int, steps_ms: list[int]
) -> None:
    track = FramesToKeyframes(PARAMS, 28)
    times_ms = [0, *np.cumsum(steps_ms).tolist()]
    found = pushed(track, [at(ms, textured(seed, height, width)) for ms in times_ms])
    assert {keyframe.reason for keyframe in found[1:]} <= {"interval"}
    assert {keyframe.changed_share for keyframe in found[1:]} <= {0.0}


@given(videos())
@settings(max_examples=30, deadline=None)
def test_the_same_frames_give_the_same_keyframes(video: tuple[list[Frame], int]) -> None:
    frames, crop = video
    once, again = (pushed(FramesToKeyframes(PARAMS, crop), frames) for _ in range(2))
    assert [(keyframe.reason, keyframe.changed_share) for keyframe in once] == [
        (keyframe.reason, keyframe.changed_share) for keyframe in again
    ]
    assert all(np.array_equal(a.frame.pixels, b.frame.pixels) for a, b in zip(once, again, strict=True))
