"""Pictures to learn from: drawn by number, each looked at a few times and then never again."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.phi4.config import VisionConfig
from pipeline.models.phi4.crops import PictureCrops, cut_crops
from pipeline.teach.pictures import Pixels, draw_picture_and_places, draw_sheet
from pipeline.teach.things import label_positions
from pipeline.teach.world import Scene, draw_scene
from pipeline.vision.crop_layout import plan_live_crops

MAX_CROPS = 6
"""Crops of a picture beside the one of the whole, as `VisionParams` has them."""

SIZES_PX = ((168, 168), (336, 168), (168, 336), (336, 189), (336, 336))
"""Widths and heights of pictures, from one crop to four."""
NUM_SMALL = 1

_NUM_OPEN, _NEW_EACH_STEP = 250, 0.8  # pictures of one size that are there at a time: to draw one is dear
_NUM_OPEN_SHEETS, _NEW_SHEETS_EACH_STEP = 800, 5
_NUM_KEPT = 2 * (len(SIZES_PX) * _NUM_OPEN + _NUM_OPEN_SHEETS)


def live_frame(pixels: Pixels, config: VisionConfig) -> Pixels:
    """Return a frame as the service looks at it: made smaller first, if its grid would have too many crops."""
    height_px, width_px, _ = pixels.shape
    layout = plan_live_crops(width_px, height_px, config.crop_size, config.patch_size, MAX_CROPS)
    if layout.width_px >= width_px:
        return pixels
    smaller = (layout.height_px, layout.width_px)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, smaller, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture, cut, and what is in it.

    Args:
        scene: what it shows.
        crops: its pixels; a gallery keeps them as float16.
        things: bool[crops, side / 2, side / 2, things], as `label_positions` returns it.
    """

    scene: Scene
    crops: PictureCrops
    things: Tensor


def show(scene: Scene, size_px: tuple[int, int], config: VisionConfig, rng: random.Random) -> Shown:
    """Return a picture of `scene`, made smaller and cut as a live frame is."""
    pixels, places = draw_picture_and_places(scene, *size_px, rng)
    crops = cut_crops(torch.from_numpy(live_frame(pixels, config)), config, MAX_CROPS)
    return Shown(scene, crops, label_positions([(scene, places)], crops.layout, size_px[0]))


def show_sheet(config: VisionConfig, rng: random.Random) -> Shown:
    """Return a sheet of things, one crop; what it shows is no scene."""
    pixels, placed = draw_sheet(config.crop_size, rng)
    cut = cut_crops(torch.from_numpy(pixels), config, MAX_CROPS)
    crops = PictureCrops(cut.layout, cut.pixels[1:], cut.mask[1:])
    return Shown(Scene(), crops, label_positions(placed, cut.layout, config.crop_size)[1:])


class Gallery:
    """Pictures of scenes, none of which is held out. Which ones there are depends on seed and step alone.

    Several threads may draw; of two that want a new one at the same time each draws the same.
    """

    def __init__(self, config: VisionConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._kept: OrderedDict[tuple[int, int, int, bool], Shown] = OrderedDict()
        self._lock = threading.Lock()

    def draw_sheet(self, number: int, rng: random.Random) -> Shown:
        """Return a sheet of things that is there at step `number`."""
        side_px = self._config.crop_size
        index = number * _NEW_SHEETS_EACH_STEP + rng.randrange(_NUM_OPEN_SHEETS)
        return self._take((side_px, side_px, index), is_sheet=True)

    def draw(self, number: int, size_px: tuple[int, int], rng: random.Random) -> Shown:
        """Return one of the pictures of that size that are there at step `number`."""
        return self._take((*size_px, int(number * _NEW_EACH_STEP) + rng.randrange(_NUM_OPEN)))

    def _take(self, size_and_index: tuple[int, int, int], *, is_sheet: bool = False) -> Shown:
        key = (*size_and_index, is_sheet)
        with self._lock:
            found = self._kept.pop(key, None)
        if found is None:
            own = random.Random(f"{self._seed}/picture/{key}")  # noqa: S311 - repeatable on purpose
            if is_sheet:
                shown = show_sheet(self._config, own)
            else:
                shown = show(draw_scene(own, held_out=False), key[:2], self._config, own)
            kept = PictureCrops(shown.crops.layout, shown.crops.pixels.half(), shown.crops.mask)
            found = replace(shown, crops=kept)
        with self._lock:
            if key not in self._kept and len(self._kept) >= _NUM_KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = found
        crops = found.crops
        return replace(found, crops=PictureCrops(crops.layout, crops.pixels.float(), crops.mask))
