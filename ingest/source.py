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

MIN_RATE_HZ = 8_000
MAX_RATE_HZ = 192_000
MAX_CHANNELS = 8


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


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known of a source when it has been opened. `num_channels` is what its blocks have."""

    num_channels: int
    native_rate_hz: int
    native_channels: int
    duration_s: float | None
    container: str
    codec: str


@dataclass(frozen=True, slots=True)
class AudioBlock:
    """Sound that follows what came before: int16[num_channels, n] at 16 kHz, n at least 1."""

    samples: NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class SourceGap:
    """Sound that is missing here: `num_samples` at 16 kHz, at least 1."""

    num_samples: int
    reason: str


SourceItem = AudioBlock | SourceGap


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

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[SourceItem]: ...
