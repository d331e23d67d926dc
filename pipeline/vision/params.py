"""What can be asked of the eyes of the service."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.params import Params
from pipeline.vision.crop_layout import MAX_CROPS


class SceneParams(Params):
    """When a frame of a stream's video is looked at: it differs enough from the last one, or that was long ago."""

    sample_interval_ms: int = Field(
        default=500, ge=40, le=60_000, description="media time between two frames that are compared"
    )
    min_interval_ms: int = Field(
        default=2_000, ge=100, le=3_600_000, description="media time between two keyframes, at least"
    )
    max_interval_ms: int = Field(
        default=60_000, ge=1_000, le=86_400_000, description="a frame is a keyframe after this, whatever it shows"
    )
    tile_threshold: float = Field(
        default=0.06,
        gt=0.0,
        le=1.0,
        description="difference of brightness (1.0: black to white) in some part of a tile that makes it a changed one",
    )
    min_changed_share: float = Field(
        default=0.02, ge=0.0, le=1.0, description="share of the frame's area in changed tiles that makes a keyframe"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.sample_interval_ms <= self.min_interval_ms <= self.max_interval_ms:
            raise ValueError(
                f"min_interval_ms={self.min_interval_ms} must lie between sample_interval_ms="
                f"{self.sample_interval_ms} and max_interval_ms={self.max_interval_ms}: change the bound as well"
            )
        return self


class VisionParams(Params):
    """The vision encoder."""

    max_crops: int = Field(
        default=6,
        ge=1,
        le=MAX_CROPS,
        description="crops of a live frame beside the one of the whole, 256 tokens each",
    )
    crops_per_batch: int = Field(default=16, ge=1, le=256, description="crops encoded together, of all streams")
    crops_kept: int = Field(
        default=64, ge=0, le=4_096, description="encoded crops kept for tiles that come again unchanged; 1.2 MB each"
    )
