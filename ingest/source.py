"""What every source of live media looks like to a session: ordered items and an end.

A source is an async context manager and an async iterator. Entering it opens the media (`info` is known then), leaving
it releases everything; the iteration ends when the media ends and raises when the media turns out to be unusable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.params import Params
from pipeline.vision.crop_layout import MAX_CROPS

MIN_RATE_HZ = 8_000
MAX_RATE_HZ = 192_000
MAX_CHANNELS = 8
MAX_FRAME_LEAD_MS = 15_000
"""A frame comes at most this much before the sound of its time: whoever waits for that sound must not wait for ever."""


class ChannelMode(StrEnum):
    """What becomes of several channels."""

    MIX = "mix"  # one channel of utterances for all of them
    SPLIT = "split"  # each channel has its own utterances


class AudioParams(Params):
    """How sound is brought to 16 kHz, and what is refused."""

    channels: ChannelMode = Field(
        default=ChannelMode.MIX, description="mix channels into one, or transcribe each (split)"
    )
    max_nan_share: float = Field(
        default=0.01, ge=0.0, le=1.0, description="share of NaN and infinite samples above which a stream is refused"
    )
    min_gap_ms: int = Field(
        default=200, ge=20, le=10_000, description="a jump of the timestamps above this is lost sound"
    )
    max_gap_ms: int = Field(default=600_000, ge=1_000, le=86_400_000, description="a jump above this ends the stream")


class VideoParams(Params):
    """Which frames of a video are taken, and the crops whose size they are brought to, so that nobody resizes them."""

    sample_interval_ms: int = Field(
        default=500, ge=40, le=60_000, description="media time between two frames that are taken, at least"
    )
    crop_size: int = Field(default=448, ge=16, le=1_024, description="side of the vision encoder's crops in pixels")
    patch_size: int = Field(default=14, ge=1, le=1_024, description="side of a patch of such a crop in pixels")
    max_crops: int = Field(default=6, ge=1, le=MAX_CROPS, description="crops of a frame beside the one of the whole")
    max_pixels: int = Field(
        default=33_554_432, ge=256, le=1 << 28, description="pixels of a coded frame above which a source is refused"
    )

    @property
    def max_frame_pixels(self) -> int:
        """Pixels of the largest frame that can come out of this: a full grid of crops."""
        return self.max_crops * self.crop_size * self.crop_size


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known of a source when it has been opened.

    `num_channels` is what its blocks have. Without sound `codec` is "none" and what is native is 0. `width_px` and
    `height_px` are the video's own, as it is coded; 0 without video, or when nobody asked for it.
    """

    num_channels: int
    native_rate_hz: int
    native_channels: int
    duration_s: float | None
    container: str
    codec: str
    has_video: bool = False
    width_px: int = 0
    height_px: int = 0


@dataclass(frozen=True, slots=True)
class AudioBlock:
    """Sound that follows what came before: int16[num_channels, n] at 16 kHz, n at least 1."""

    samples: NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class SourceGap:
    """Sound that is missing here: `num_samples` at 16 kHz, at least 1."""

    num_samples: int
    reason: str


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """What was to be seen from `start_sample` of the media clock on: RGB, uint8[height, width, 3].

    It comes before the sound block that ends behind it, or up to a second later; never more than `MAX_FRAME_LEAD_MS`
    before the sound of its time.
    """

    start_sample: int
    pixels: NDArray[np.uint8]


SourceItem = AudioBlock | SourceGap | VideoFrame


class Source(Protocol):
    """A live source.

    Raises (from `__aenter__` and while iterating):
        SourceNotFound: there is nothing at the location.
        MediaError: it cannot be read or is not usable sound; one sentence says what and why.
    """

    @property
    def info(self) -> SourceInfo:
        """What was found; known from `__aenter__` on."""
        ...

    @property
    def num_nonfinite(self) -> int | None:
        """How many samples were NaN or infinite and became zero; None until the source was heard to its end."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[SourceItem]: ...
