"""The video of one file: packets in, the frames that are taken out. Imports PyAV: for processes that decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ingest.source import AudioParams, VideoFrame, VideoParams
from ingest.tracks import MAX_BAD_PACKETS, reason_of
from pipeline.errors import MediaError
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples
from pipeline.vision.crop_layout import plan_live_crops

_MAX_LEAD_S = 5.0
_MIN_SPARED_FRAMES = 8
"""Frames that nothing else refers to are not decoded where so many frames come for each one that is taken."""

SampleOf = Callable[[Fraction], int | None]
"""The media time of a timestamp of the file; None while it is not known."""


class SilentClock:
    """The media clock of a file without sound: it is 0 at the first frame and goes on with the frames' timestamps.

    As with sound, time only goes forward: a jump back begins a new count.
    """

    def __init__(self, params: AudioParams) -> None:
        self._params = params
        self._zero_s: Fraction | None = None
        self._last_sample = 0

    def sample_of(self, time_s: Fraction) -> int:
        """Return the media time of the next frame.

        Raises:
            MediaError: if it jumps by more than `max_gap_ms`.
        """
        if self._zero_s is None:
            self._zero_s = time_s
        sample = round((time_s - self._zero_s) * SAMPLE_RATE_HZ)
        jump = sample - self._last_sample
        if jump < -ms_to_samples(self._params.min_gap_ms):
            self._zero_s += Fraction(jump, SAMPLE_RATE_HZ)
            return self._last_sample
        if jump > ms_to_samples(self._params.max_gap_ms):
            raise MediaError(
                f"the timestamps jump by {jump / SAMPLE_RATE_HZ:.0f} s, over the limit of "
                f"{self._params.max_gap_ms / 1_000:.0f} s: repair the file or raise audio.max_gap_ms"
            )
        self._last_sample = max(sample, self._last_sample)
        return self._last_sample


class Video:
    """The frames of a track that are taken: decoded, upright, with square pixels, as large as their crops.

    Args:
        track: what is decoded; nobody else may use its decoder.
        params: see `VideoParams`.
    """

    def __init__(self, track: VideoStream, params: VideoParams) -> None:
        self.track = track
        self.seen_sample = 0
        """Media time of the latest frame that was seen, taken or not."""
        self.has_seen = False
        self._params = params
        self._interval = ms_to_samples(params.sample_interval_ms)
        self._due_sample = 0
        self._num_bad = 0
        self._last_error = ""
        self._reformatter = VideoReformatter()
        context = track.codec_context
        context.thread_count = 1  # each thread would hold frames of its own, and the cores are others' too
        context.options = {"max_pixels": str(params.max_pixels)}  # frames may change their size at any time
        rate_hz = float(track.average_rate or 0)
        if rate_hz * params.sample_interval_ms / 1_000 >= _MIN_SPARED_FRAMES:
            context.skip_frame = "NONREF"
        self._is_intra_only = context.codec.intra_only
        self._frame_s = 1 / rate_hz if rate_hz > 0 else 1.0
        self.lead_s = min(_MAX_LEAD_S, (context.reorder_depth + 2) * self._frame_s)
        """How much later than its packet a frame may come out of the decoder, about."""

    @property
    def end_sample(self) -> int:
        """Media time at which the latest frame that was seen ends."""
        return self.seen_sample + round(min(self._frame_s, _MAX_LEAD_S) * SAMPLE_RATE_HZ)

    def push(self, packet: av.Packet[VideoStream] | None, sample_of: SampleOf) -> Iterator[VideoFrame]:
        """Take the next packet, or None at the end, and yield what is taken; a damaged packet is passed over.

        Raises:
            MediaError: nothing can be decoded, or nothing any more; or no crops can be made of such frames.
        """
        if packet is not None and self._can_skip(packet, sample_of):
            return
        try:
            for picture in self.track.codec_context.decode(packet):
                yield from self._taken(picture, sample_of)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            self._num_bad, self._last_error = self._num_bad + 1, reason_of(error)
            if self._num_bad >= MAX_BAD_PACKETS:
                raise MediaError(
                    f"{self._num_bad} packets of video in a row cannot be decoded: {self._last_error}"
                ) from error
        if packet is None and not self.has_seen:
            reason = self._last_error or "it is empty or damaged"
            raise MediaError(f"no picture of the video track can be decoded: {reason}")

    def _can_skip(self, packet: av.Packet[VideoStream], sample_of: SampleOf) -> bool:
        """Whether nobody needs the frame of `packet`: it is not due, and no other frame is made from it."""
        if not self._is_intra_only or not self.has_seen or packet.pts is None or packet.time_base is None:
            return False
        sample = sample_of(packet.pts * packet.time_base)
        if sample is None or sample >= self._due_sample:
            return False
        self.seen_sample = max(sample, self.seen_sample)
        return True

    def _taken(self, picture: av.VideoFrame, sample_of: SampleOf) -> Iterator[VideoFrame]:
        time_base = picture.time_base or self.track.time_base  # what a decoder gives at the end has none
        if picture.is_corrupt or picture.pts is None or time_base is None:
            return
        sample = sample_of(picture.pts * time_base)
        if sample is None:
            self._num_bad = 0
            return
        sample = max(0, sample)
        if sample >= self._due_sample:
            pixels = self._pixels(picture)
            self._due_sample = sample + self._interval
            self._note(sample)
            yield VideoFrame(sample, pixels)
        else:
            self._note(sample)

    def _note(self, sample: int) -> None:
        self._num_bad, self.has_seen = 0, True
        self.seen_sample = max(sample, self.seen_sample)

    def _pixels(self, picture: av.VideoFrame) -> NDArray[np.uint8]:
        """Return uint8[height, width, 3]: scaled once, then turned."""
        num_quarter_turns = round(picture.rotation / 90) % 4  # counterclockwise
        is_on_its_side = num_quarter_turns % 2 == 1
        sides_px = self._display_size(picture)
        width_px, height_px = reversed(sides_px) if is_on_its_side else sides_px
        params = self._params
        layout = plan_live_crops(width_px, height_px, params.crop_size, params.patch_size, params.max_crops)
        scaled_px = (layout.width_px, layout.height_px)
        width_px, height_px = reversed(scaled_px) if is_on_its_side else scaled_px
        scaled = self._reformatter.reformat(
            picture,
            width_px,
            height_px,
            "rgb24",
            interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
            threads=1,
        )
        pixels = scaled.to_ndarray().astype(np.uint8, copy=False)
        return np.ascontiguousarray(np.rot90(pixels, num_quarter_turns))

    def _display_size(self, picture: av.VideoFrame) -> tuple[int, int]:
        """Return width and height in square pixels; nothing is made smaller by that."""
        aspect = self.track.sample_aspect_ratio
        if not aspect or aspect < 0:
            return picture.width, picture.height
        if aspect > 1:
            return round(picture.width * aspect), picture.height
        return picture.width, round(picture.height / aspect)
