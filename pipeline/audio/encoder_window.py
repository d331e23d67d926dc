"""How much sound the encoder looks at, and what that costs: policy in plain Python, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pydantic import Field, model_validator

from pipeline.params import Params
from pipeline.timebase import ms_to_samples


class EncoderParams(Params):
    """The window that Whisper's encoder gets for an utterance: its samples and some silence, not a padded 30 s.

    Phi-4-multimodal's encoder takes sound as it is, up to half an hour: none of this concerns it.
    """

    silence_ms: int = Field(
        default=2_000,
        ge=0,
        le=10_000,
        description="Whisper: least silence behind the utterance; with less, text is lost",
    )
    window_step_ms: int = Field(
        default=200, ge=40, le=10_000, multiple_of=20, description="Whisper: a window is rounded up to a multiple of it"
    )
    max_window_ms: int = Field(
        default=30_000,
        ge=1_000,
        le=30_000,
        multiple_of=20,
        description="Whisper: the longest window that the model takes",
    )

    @model_validator(mode="after")
    def _has_room_for_speech(self) -> EncoderParams:
        if self.silence_ms + self.window_step_ms > self.max_window_ms:
            raise ValueError(
                f"silence_ms {self.silence_ms} and window_step_ms {self.window_step_ms} leave no room for speech in "
                f"max_window_ms {self.max_window_ms}"
            )
        return self

    def window_samples(self, num_samples: int) -> int:
        """Return the window's length for an utterance of `num_samples`.

        Near the limit the silence gets shorter instead of the utterance.

        Raises:
            ValueError: if there are no samples, or more than the longest window holds.
        """
        longest = ms_to_samples(self.max_window_ms)
        if not 1 <= num_samples <= longest:
            raise ValueError(
                f"an utterance of {num_samples} samples cannot be encoded; the window takes 1 to {longest}"
            )
        step = ms_to_samples(self.window_step_ms)
        wanted = num_samples + ms_to_samples(self.silence_ms)
        return min(longest, -(-wanted // step) * step)


class SnapshotCost(Protocol):
    """What one kind of snapshot takes on one machine. It travels between processes, so it holds plain values."""

    def estimate_ms(self, num_samples: int) -> float:
        """Return the expected milliseconds for an utterance of `num_samples`; 0 if it cannot be encoded at all."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderCost:
    """What one kind of snapshot takes Whisper: a model of the encoder's operations, scaled by a measurement."""

    params: EncoderParams
    ms_per_window: float  # what a window costs whatever its length
    ms_per_second: float  # linear layers, convolutions, front end
    ms_per_second_squared: float  # attention

    def estimate_ms(self, num_samples: int) -> float:
        """Return the expected milliseconds for an utterance of `num_samples`; 0 if it cannot be encoded at all."""
        try:
            seconds = self.params.window_samples(num_samples) / ms_to_samples(1_000)
        except ValueError:
            return 0.0
        return self.ms_per_window + seconds * (self.ms_per_second + seconds * self.ms_per_second_squared)


@dataclass(frozen=True, slots=True)
class PiecewiseCost:
    """What a snapshot takes an encoder that cuts sound into pieces, each of which sees only itself (Phi-4-multimodal).

    Sound of one piece is computed at its own length; of longer sound the last piece is as long as the others.
    """

    piece_samples: int
    max_samples: int
    ms_per_snapshot: float  # what one costs whatever its length
    ms_per_second: float  # linear layers, convolutions, front end
    ms_per_second_squared: float  # attention within a piece

    def estimate_ms(self, num_samples: int) -> float:
        """Return the expected milliseconds for an utterance of `num_samples`; 0 if it cannot be encoded at all."""
        if not 1 <= num_samples <= self.max_samples:
            return 0.0
        num_pieces = -(-num_samples // self.piece_samples)
        seconds = min(num_samples, self.piece_samples) / ms_to_samples(1_000)
        piece_ms = seconds * (self.ms_per_second + seconds * self.ms_per_second_squared)
        return self.ms_per_snapshot + num_pieces * piece_ms


@dataclass(frozen=True, slots=True)
class EncoderCosts:
    """What snapshots take: partials and finals differ in arithmetic and in how many threads they have.

    It travels to the dispatcher, which keeps a call short with it; it decides nothing about results.
    """

    partial: SnapshotCost
    final: SnapshotCost

    def estimate_ms(self, num_samples: int, is_final: bool) -> float:
        """Return the expected milliseconds for an utterance of `num_samples`; 0 if it cannot be encoded at all."""
        return (self.final if is_final else self.partial).estimate_ms(num_samples)
