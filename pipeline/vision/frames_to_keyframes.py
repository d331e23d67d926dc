"""Frames in, keyframes out: a frame is looked at when it differs enough from the one that was looked at last.

Brightness (Rec. 601 luma, https://www.itu.int/rec/R-REC-BT.601) is averaged over blocks of about 16 x 16 pixels, which
leaves little of a camera's noise, and blocks are compared with those of the last keyframe. A change of brightness of
the whole picture, as of a lamp or of the exposure, is taken out first. No clock: times are those of the frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.items import Frame
from pipeline.timebase import ms_to_samples
from pipeline.vision.params import SceneParams

BLOCK_PX = 16
"""Side of a block. A spot of this size is half in one of the blocks that it touches, at worst a quarter."""

MAX_GLOBAL_CHANGE = 0.25
"""What lies above this (1.0: black to white) is no drift: lights that go out, a slide that follows a blank one."""

_MAX_GAIN = 2.0
_MIN_LUMA_FOR_GAIN = 8.0 / 255.0  # below, a ratio of two brightnesses is noise
_LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32) / np.float32(255.0)

KeyframeReason = Literal["first", "changed", "interval"]


@dataclass(frozen=True, slots=True, eq=False)
class Keyframe:
    """A frame to be looked at, and why.

    `changed_share` is the share of the frame's area that lies in tiles in which something changed since the keyframe
    before, 0.0 to 1.0. `changed_tiles` is bool[rows, columns]: the tiles that carry pixels of this frame; the others
    carry those of the keyframe before, bit for bit.
    """

    frame: Frame
    reason: KeyframeReason
    changed_share: float
    changed_tiles: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """How one side of a frame is divided: pixels at which blocks and tiles begin, and the first block of each tile."""

    num_px: int
    blocks: NDArray[np.intp]
    tiles: NDArray[np.intp]
    tile_blocks: NDArray[np.intp]

    @classmethod
    def divide(cls, num_px: int, tile_px: int) -> _Axis:
        """Divide `num_px` pixels into tiles of `tile_px`, the last one shorter, and each tile evenly into blocks."""
        tiles = np.arange(0, num_px, tile_px)
        parts: list[NDArray[np.intp]] = []
        for start in tiles:
            length = min(tile_px, num_px - int(start))
            num_blocks = max(1, length // BLOCK_PX)
            parts.append(start + np.arange(num_blocks) * length // num_blocks)
        counts = [len(part) for part in parts]
        return cls(num_px, np.concatenate(parts), tiles, np.cumsum([0, *counts[:-1]]))

    def tile(self, index: int) -> slice:
        """Return the pixels of a tile."""
        is_last = index + 1 == len(self.tiles)
        return slice(int(self.tiles[index]), self.num_px if is_last else int(self.tiles[index + 1]))


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """The tiles and blocks of frames of one size."""

    rows: _Axis
    columns: _Axis

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], crop_size: int | None) -> _Grid:
        height_px, width_px, _ = pixels.shape
        return cls(
            _Axis.divide(height_px, crop_size or max(1, height_px)),
            _Axis.divide(width_px, crop_size or max(1, width_px)),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return len(self.rows.tiles), len(self.columns.tiles)

    def block_means(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean luma of each block, 0.0 to 1.0: float32[block rows, block columns]."""
        lines = pixels.reshape(self.rows.num_px, -1)
        edges = [*self.rows.blocks.tolist(), self.rows.num_px]
        # A block has fewer than 32 rows, so that 16 bits hold the sum; a loop is seven times as fast as reduceat here.
        sums = np.empty((len(edges) - 1, lines.shape[1]), np.uint16)
        for index, begin in enumerate(edges[:-1]):
            np.sum(lines[begin : edges[index + 1]], axis=0, dtype=np.uint16, out=sums[index])
        by_block = np.add.reduceat(sums.reshape(len(sums), -1, 3), self.columns.blocks, axis=1, dtype=np.uint32)
        heights, widths = np.diff(edges), np.diff([*self.columns.blocks, self.columns.num_px])
        means: NDArray[np.float32] = (by_block @ _LUMA_WEIGHTS / np.outer(heights, widths)).astype(np.float32)
        return means

    def tiles_with(self, blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the tiles that have one of `blocks` (bool[block rows, block columns]): bool[rows, columns]."""
        by_row = np.logical_or.reduceat(blocks, self.rows.tile_blocks, axis=0)
        found: NDArray[np.bool_] = np.logical_or.reduceat(by_row, self.columns.tile_blocks, axis=1)
        return found

    def share_of(self, tiles: NDArray[np.bool_]) -> float:
        """Return the share of the frame's area that lies in `tiles`."""
        heights = np.diff([*self.rows.tiles, self.rows.num_px])
        widths = np.diff([*self.columns.tiles, self.columns.num_px])
        return float(np.outer(heights, widths)[tiles].sum()) / (self.rows.num_px * self.columns.num_px)


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """The last keyframe, and what its blocks show."""

    frame: Frame
    grid: _Grid
    means: NDArray[np.float32]


class FramesToKeyframes:
    """The keyframes of one stream's video. Deterministic; holds one frame. A comparison takes about a millisecond.

    A frame is compared with the last keyframe, not with the last frame, so that what changes slowly is found too. It
    is one itself when it is the first, when something changed in tiles with `min_changed_share` of the area, or when
    the last one is `max_interval_ms` old; never within `min_interval_ms` of the last one (a change that lasts is found
    then), and only one frame of each `sample_interval_ms` of media time is compared. A frame of another size counts as
    changed everywhere. What differs in colour only, at the same brightness, is not seen.

    A tile is a crop of the vision encoder: `crop_size` pixels wide and high from the top left corner on, the last of a
    row or column smaller; None makes the whole frame one. In a keyframe, a tile whose blocks all lie within
    `tile_threshold` of the keyframe before carries that one's pixels, bit for bit: the vision encoder keeps what it
    made of a crop by the crop's content, and need not encode it again. What comes of the keyframe is then exactly what
    comes of these pixels. Differences do not add up: blocks are compared with what was sent, and a keyframe takes all
    tiles anew when that was last done `max_interval_ms` before. Tiles that only a lamp changed by more than the
    threshold make no keyframe but are new in the next one: no seam between old and new is worse than the threshold.

    Two things cannot be had from this: the crop of the whole picture changes with any tile, so it is encoded every
    time; and where the encoder has to resize the frame (its size is not that of `plan_crops`), or `crop_size` is not
    the encoder's, tiles are not crops and nothing is the same.
    """

    def __init__(self, params: SceneParams, crop_size: int | None = None) -> None:
        if crop_size is not None and crop_size < 1:
            raise ValueError(f"crop_size={crop_size} must be at least 1 pixel, or None for one tile")
        self._params = params
        self._crop_size = crop_size
        self._min_samples = ms_to_samples(params.min_interval_ms)
        self._max_samples = ms_to_samples(params.max_interval_ms)
        self._sample_interval_samples = ms_to_samples(params.sample_interval_ms)
        self._sent: _Sent | None = None
        self._whole_since_sample = 0  # when all tiles were last taken anew
        self._last_interval = -1  # the sampling interval in which a frame was last compared

    def push(self, frame: Frame) -> Keyframe | None:
        """Take the next frame, in order of time; return the keyframe that it makes, or None. `frame` is not changed.

        Its pixels may be kept and handed on as they are: nobody may write to them any more.
        """
        sent = self._sent
        if sent is None:
            return self._send_whole(frame, "first", 1.0)
        elapsed_samples = frame.start_sample - sent.frame.start_sample
        is_overdue = elapsed_samples >= self._max_samples
        interval = frame.start_sample // self._sample_interval_samples
        if elapsed_samples < self._min_samples or (interval == self._last_interval and not is_overdue):
            return None
        self._last_interval = interval
        if frame.pixels.shape != sent.frame.pixels.shape:
            return self._send_whole(frame, "changed", 1.0)
        means = sent.grid.block_means(frame.pixels)
        changed = sent.grid.tiles_with(_changed_blocks(sent.means, means, self._params.tile_threshold))
        share = sent.grid.share_of(changed)
        is_changed = bool(changed.any()) and share >= self._params.min_changed_share
        if not is_changed and not is_overdue:
            return None
        reason: KeyframeReason = "changed" if is_changed else "interval"
        if frame.start_sample - self._whole_since_sample >= self._max_samples:
            return self._send_whole(frame, reason, share)
        # Tiles that only the lamp changed, too: old pixels stand for none that differ by more than the threshold.
        stale = changed | sent.grid.tiles_with(np.abs(means - sent.means) > self._params.tile_threshold)
        composed = Frame(frame.start_sample, _compose(sent, frame.pixels, stale))
        return self._send(Keyframe(composed, reason, share, stale), sent.grid)

    def _send_whole(self, frame: Frame, reason: KeyframeReason, share: float) -> Keyframe:
        """Send `frame` with all its tiles as they are."""
        grid = _Grid.of(frame.pixels, self._crop_size)
        self._whole_since_sample = frame.start_sample
        return self._send(Keyframe(frame, reason, share, np.ones(grid.shape, np.bool_)), grid)

    def _send(self, keyframe: Keyframe, grid: _Grid) -> Keyframe:
        self._sent = _Sent(keyframe.frame, grid, grid.block_means(keyframe.frame.pixels))
        return keyframe


def _compose(sent: _Sent, pixels: NDArray[np.uint8], stale: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return `pixels` with those of the last keyframe in the tiles that are not `stale`."""
    if stale.all():
        return pixels
    composed = pixels.copy()
    for row, column in np.argwhere(~stale).tolist():
        place = sent.grid.rows.tile(row), sent.grid.columns.tile(column)
        composed[place] = sent.frame.pixels[place]
    return composed


def _changed_blocks(sent: NDArray[np.float32], seen: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Return the blocks that differ by more than `threshold`, whatever the whole picture's brightness did.

    Three explanations are tried: the brightness is what it was, it rose everywhere by the median difference (a fade,
    haze), or it was multiplied by the median ratio (a lamp, the exposure). The one that leaves the fewest blocks to
    explain counts. Medians, so that what moves in less than half of the picture has no part in them.
    """
    expected = [sent]
    offset = float(np.median(seen - sent))
    if 0.0 < abs(offset) <= MAX_GLOBAL_CHANGE:
        # Bright parts saturate. Dark ones are no darker than the haze that goes: where black is left, something went.
        expected.append(np.minimum(sent + np.float32(offset), 1.0))
    is_bright = sent >= _MIN_LUMA_FOR_GAIN
    if is_bright.any():
        gain = float(np.median(seen[is_bright] / sent[is_bright]))
        multiplied = np.minimum(sent * np.float32(gain), 1.0)
        is_drift = float(np.median(np.abs(multiplied - sent))) <= MAX_GLOBAL_CHANGE
        if 1.0 / _MAX_GAIN <= gain <= _MAX_GAIN and is_drift:
            expected.append(multiplied)
    candidates = [np.abs(seen - one) > threshold for one in expected]
    return min(candidates, key=np.count_nonzero)
