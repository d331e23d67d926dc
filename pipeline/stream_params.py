"""What can be asked of one stream."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.params import Params
from pipeline.text.skipped_speech import SkippedSpeechParams
from pipeline.text.transcripts_to_summaries import SummaryParams
from pipeline.vision.params import SceneParams

AUTO = "auto"

NUM_OPENING_SNAPSHOTS = 6
"""An utterance's first partials come at the minimum cadence and go before others, but no more of them than this: one of
noise, of which nothing is ever shown, costs what speech costs."""


class SnapshotParams(Params):
    """When an open utterance is sent to be transcribed."""

    cadence_ms: int = Field(
        default=640, ge=160, le=5_000, description="new sound between two partials of an utterance, by samples"
    )
    min_cadence_ms: int = Field(
        default=320, ge=160, le=5_000, description="the same in live streams while the stages are idle"
    )
    max_cadence_ms: int = Field(
        default=2_000, ge=160, le=10_000, description="the same in live streams while the stages are busy"
    )
    min_speech_ms: int = Field(default=480, ge=320, le=5_000, description="no partial before this much speech")
    window_ms: int = Field(
        default=2_000,
        ge=1_000,
        le=30_000,
        description="sound that a partial looks at, at least; what lies before it and is stable is not heard again",
    )
    prefetches_finals: bool = Field(
        default=True,
        description="begin a final in a pause before it is long enough to end the utterance, in live streams",
    )
    keep_language_after_ms: int = Field(
        default=3_000, ge=0, le=30_000, description="partials longer than this keep the language detected before"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.min_cadence_ms <= self.cadence_ms <= self.max_cadence_ms:
            raise ValueError(
                f"cadence_ms={self.cadence_ms} must lie between min_cadence_ms={self.min_cadence_ms} and "
                f"max_cadence_ms={self.max_cadence_ms}: change the bound as well"
            )
        return self


class CaptionParams(Params):
    """What is asked of the decoder for each utterance."""

    language: str = Field(default=AUTO, description="ISO 639-1 code of the speech, or auto: detected per utterance")
    languages: tuple[str, ...] = Field(default=(), description="the only languages that auto may choose; empty: all")
    translate_to: tuple[str, ...] = Field(default=(), description="languages every final is translated to")
    has_partials: bool = Field(default=True, description="publish revisable partials while somebody speaks")

    @field_validator("translate_to")
    @classmethod
    def _are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"each language once, got {list(value)}")
        return value


class StreamParams(Params):
    """All parameters of one stream."""

    vad: VadParams = VadParams()
    snapshots: SnapshotParams = SnapshotParams()
    captions: CaptionParams = CaptionParams()
    skipped_speech: SkippedSpeechParams = SkippedSpeechParams()
    summary: SummaryParams | None = Field(default=None, description="null: no summaries")
    scenes: SceneParams | None = Field(default=None, description="null: the video of the stream is not looked at")
