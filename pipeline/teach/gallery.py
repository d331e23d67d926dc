"""Pictures to learn from: drawn by number, each looked at a few times and then never again."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.models.phi4.config import VisionConfig
from pipeline.models.phi4.crops import PictureCrops, cut_crops
from pipeline.teach.pictures import draw_picture
from pipeline.teach.world import Scene, draw_scene
from pipeline.vision.crop_layout import plan_live_crops

MAX_CROPS = 6
"""Crops of a picture beside the one of the whole, as `VisionParams` has them."""

SIZES_PX = ((112, 112), (224, 112), (224, 224), (320, 240), (336, 189), (640, 360))
"""Widths and heights of pictures, from small to large."""
NUM_SMALL = 3

_NUM_OPEN, _NEW_EACH_STEP = 150, 0.6  # pictures of one size that are there at a time: each is seen about four times
_NUM_SMALLEST_OPEN, _SMALLEST_NEW_EACH_STEP = 600, 8.0  # the same where all of a step's have the smallest size
_NUM_KEPT = len(SIZES_PX) * _NUM_OPEN


def show(scene: Scene, size_px: tuple[int, int], config: VisionConfig, rng: random.Random) -> PictureCrops:
    """Return a picture of `scene`, made smaller and cut as a live frame is."""
    width_px, height_px = size_px
    pixels = torch.from_numpy(draw_picture(scene, width_px, height_px, rng))
    layout = plan_live_crops(width_px, height_px, config.crop_size, config.patch_size, MAX_CROPS)
    if layout.width_px < width_px:
        smaller = (layout.height_px, layout.width_px)
        resized = F.interpolate(pixels.permute(2, 0, 1)[None], smaller, mode="bilinear", antialias=True)
        pixels = resized[0].permute(1, 2, 0).contiguous()
    return cut_crops(pixels, config, MAX_CROPS)


@dataclass(frozen=True, slots=True)
class Hung:
    """A picture, and what it shows; its pixels are float16."""

    scene: Scene
    crops: PictureCrops


class Gallery:
    """Pictures of scenes, none of which is held out. Which ones there are depends on seed and step alone."""

    def __init__(self, config: VisionConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._kept: OrderedDict[tuple[int, int, int], Hung] = OrderedDict()

    def draw_smallest(self, number: int, rng: random.Random) -> tuple[Scene, PictureCrops]:
        """Return one of the smallest pictures that are there at step `number`, without its grid, which is the whole."""
        index = int(number * _SMALLEST_NEW_EACH_STEP) + rng.randrange(_NUM_SMALLEST_OPEN)
        scene, crops = self._take((*SIZES_PX[0], index))
        return scene, PictureCrops(crops.layout, crops.pixels[:1], crops.mask[:1])

    def draw(self, number: int, size_px: tuple[int, int], rng: random.Random) -> tuple[Scene, PictureCrops]:
        """Return one of the pictures of that size that are there at step `number`."""
        return self._take((*size_px, int(number * _NEW_EACH_STEP) + rng.randrange(_NUM_OPEN)))

    def _take(self, key: tuple[int, int, int]) -> tuple[Scene, PictureCrops]:
        found = self._kept.pop(key, None)
        if found is None:
            own = random.Random(f"{self._seed}/picture/{key}")  # noqa: S311 - repeatable on purpose
            scene = draw_scene(own, held_out=False)
            crops = show(scene, key[:2], self._config, own)
            found = Hung(scene, PictureCrops(crops.layout, crops.pixels.half(), crops.mask))
            if len(self._kept) >= _NUM_KEPT:
                self._kept.popitem(last=False)
        self._kept[key] = found
        crops = found.crops
        return found.scene, PictureCrops(crops.layout, crops.pixels.float(), crops.mask)
