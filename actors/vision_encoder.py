"""The VisionEncoder stage: frames in, pictures out. A plain class; `actors/app.py` makes a Serve deployment of it.

This module imports no torch, so that processes that only deploy the stage do not pay for it (3 s).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.owned_thread import OwnedThread, encode_isolated
from actors.stages import EyesInfo
from actors.threads import choose_num_threads
from pipeline.items import Failure, FrameSet, Pictures
from pipeline.models.weights import ModelParams
from pipeline.vision.params import VisionParams

if TYPE_CHECKING:
    from pipeline.vision.frames_to_embeddings import FramesToEmbeddings

_MAX_CALL_S = 300.0  # on a laptop a crop of the real model takes seconds


@dataclass(frozen=True, slots=True)
class VisionEncoderInfo:
    """What a vision encoder replica is, and how fast (measured at load)."""

    device: str
    dtype: str
    num_threads: int
    crops_per_s: float
    eyes: EyesInfo


class VisionEncoder:
    """Holds the encoder's weights and the thread that computes with them."""

    def __init__(self, model: ModelParams, params: VisionParams) -> None:
        """Load the weights (this blocks for seconds).

        Raises:
            ModelError: if the model cannot be loaded, or has no eyes.
        """
        self._thread = OwnedThread("vision encoder", _MAX_CALL_S)
        self._encoder, self._info = self._thread.load(lambda: _load(model, params))

    async def encode(self, frame_sets: list[FrameSet]) -> list[Pictures | Failure]:
        """Return the pictures (or the failure) of each set, in the same order."""
        return await self._thread.run(self._encode_isolated, frame_sets)

    def info(self) -> VisionEncoderInfo:
        """Return what this replica is."""
        return self._info

    def check_health(self) -> None:
        """Return when all is well.

        Raises:
            StageUnavailable: if encoding failed several times in a row, or hangs.
        """
        self._thread.check_health()

    async def aclose(self) -> None:
        """End the thread after what it is doing; one that hangs is left behind. Idempotent."""
        await self._thread.aclose()

    def _encode_isolated(self, frame_sets: list[FrameSet]) -> list[Pictures | Failure | Exception]:
        return encode_isolated(self._encoder.encode, frame_sets)


def _load(model: ModelParams, params: VisionParams) -> tuple[FramesToEmbeddings, VisionEncoderInfo]:
    # Torch is imported here, in the thread that will use it: see the module's docstring.
    import torch  # noqa: PLC0415

    from pipeline.vision.frames_to_embeddings import FramesToEmbeddings  # noqa: PLC0415

    num_threads = choose_num_threads(model.encoder_threads, "encoder")
    torch.set_num_threads(num_threads)
    encoder = FramesToEmbeddings(model, params)
    info = VisionEncoderInfo(
        device=encoder.device,
        dtype=encoder.dtype,
        num_threads=num_threads,
        crops_per_s=encoder.measure_crops_per_s(time.perf_counter),
        eyes=EyesInfo(encoder.config.crop_size, encoder.config.patch_size, encoder.max_crops),
    )
    return encoder, info
