"""From the frames of jobs to the embeddings that the decoder looks at (Phi-4-multimodal's SigLIP encoder).

What a crop gives never depends on what else is in the call, because a crop is always computed in one shape:

- on a CPU, and in float32, every crop runs alone. The 1,024 patches of one crop fill the machine: eight of the real
  size took 3.2 s one by one and 3.5 s in a batch (a layer on one core of 2 with AVX2, the same bits there);
- in bfloat16 on a GPU batches of `crops_per_batch` run, crops with padding and crops without apart, and a batch that is
  not full is filled up with its last crop.

A crop that was seen before (a tile of a picture in which something else changed) is not encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import MediaError
from pipeline.items import Failure, FailureKind, Frame, FrameSet, Picture, Pictures
from pipeline.models.device import Clock, choose_device, synchronize
from pipeline.models.phi4.checkpoint import load_config, load_part
from pipeline.models.phi4.crops import PictureGrid, lay_out
from pipeline.models.phi4.dtype import phi4_dtype
from pipeline.models.phi4.siglip import SiglipEncoder
from pipeline.models.tier import phi4_directory
from pipeline.models.weights import ModelParams
from pipeline.vision.crop_cache import CropCache
from pipeline.vision.crop_layout import CropLayout, plan_crops
from pipeline.vision.params import VisionParams

MAX_FRAMES = 16
"""Frames of one job."""

_NUM_PROBES = 2  # the first one also allocates

_Features = NDArray[np.float32]
_Plan = list[tuple[CropLayout, list[bytes]]]  # of each frame of a set: its crops by their digests


class FramesToEmbeddings:
    """The vision encoder stage. Between calls it keeps crops it has encoded, no matter whose; one thread uses it.

    Args:
        model: which checkpoint, on which device, in which arithmetic (`phi4_dtype`). Only the encoder's tensors are
            kept: what makes tokens of its features belongs to the decoder, as features are a third as wide.
        params: crops of a frame, of a batch, and kept.

    Raises:
        ModelError: if the checkpoint is no Phi-4-multimodal or cannot be used, or the arithmetic is not possible.
    """

    def __init__(self, model: ModelParams, params: VisionParams) -> None:
        device = choose_device(model)
        dtype = phi4_dtype(model, device)
        directory = phi4_directory(model)
        self.config = load_config(directory).vision
        self._encoder = SiglipEncoder(self.config, load_part(directory, "vision"), device, dtype)
        self._max_crops = params.max_crops
        self._batch_crops = params.crops_per_batch if device.type == "cuda" and dtype != torch.float32 else 1
        self._cache = CropCache(params.crops_kept)
        self._num_encoded = 0
        self._num_reused = 0

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda"."""
        return self._encoder.device.type

    @property
    def dtype(self) -> str:
        """What it computes in: "float32" or "bfloat16"."""
        return str(self._encoder.dtype).removeprefix("torch.")

    @property
    def max_crops(self) -> int:
        """Crops of a frame, at most, beside the one of the whole."""
        return self._max_crops

    @property
    def num_encoded(self) -> int:
        """Crops that were computed since it was loaded."""
        return self._num_encoded

    @property
    def num_reused(self) -> int:
        """Crops that were asked for and had been computed before, or stood in the same call twice."""
        return self._num_reused

    def encode(self, frame_sets: Sequence[FrameSet]) -> list[Pictures | Failure]:
        """Return one outcome for each of `frame_sets`, in their order.

        A set that cannot be encoded (no frames or too many, one that is not uint8[h, w, 3] or too thin) gets a
        `Failure` of kind FAILED and does not affect the others. Values are float32 whatever the arithmetic.
        """
        problems = [self._problem_of(frame_set) for frame_set in frame_sets]
        work = _Call(self._encoder, self._cache, self._batch_crops)
        plans: list[_Plan] = [
            [] if problem is not None else [work.take(self._lay_out(frame)) for frame in frame_set.frames]
            for frame_set, problem in zip(frame_sets, problems, strict=True)
        ]
        features = work.finish()
        self._num_encoded += work.num_encoded
        self._num_reused += work.num_asked - work.num_encoded
        return [
            _outcome(frame_set, plan, features)
            if problem is None
            else Failure(frame_set.key, None, FailureKind.FAILED, problem)
            for frame_set, plan, problem in zip(frame_sets, plans, problems, strict=True)
        ]

    def measure_crops_per_s(self, clock: Clock) -> float:
        """Return how many crops a second this machine encodes under the thread count that is set now."""
        side, size = self.config.crop_size // self.config.patch_size, self.config.crop_size
        pixels = torch.zeros(self._batch_crops, self.config.num_channels, size, size)
        mask = torch.ones(self._batch_crops, side, side, dtype=torch.bool)
        times = []
        for _ in range(_NUM_PROBES):
            started = clock()
            self._encoder(pixels, mask).to("cpu")
            times.append(clock() - started)
        return self._batch_crops / max(min(times), 1e-6)

    def _problem_of(self, frame_set: FrameSet) -> str | None:
        frames = frame_set.frames
        if not 1 <= len(frames) <= MAX_FRAMES:
            return f"there are {len(frames)} frames, expected 1 to {MAX_FRAMES}: send fewer at a time"
        for number, frame in enumerate(frames, start=1):
            pixels = frame.pixels
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
                return f"frame {number} is {pixels.dtype}{list(pixels.shape)}, expected uint8[height, width, 3]"
            height_px, width_px, _ = pixels.shape
            try:
                plan_crops(width_px, height_px, self.config.crop_size, self.config.patch_size, self._max_crops)
            except MediaError as exc:
                return f"frame {number}: {exc}"
        return None

    def _lay_out(self, frame: Frame) -> PictureGrid:
        # What came through shared memory cannot be written to, which torch takes only with a warning.
        pixels = np.require(frame.pixels, requirements=("C", "W"))
        return lay_out(torch.from_numpy(pixels), self.config, self._max_crops)


class _Call:
    """The crops of one call: those that were never seen are encoded as soon as there is a batch of them.

    On a GPU they are computed while the next ones are cut, since nothing waits for features before `finish`.
    """

    def __init__(self, encoder: SiglipEncoder, cache: CropCache, batch_crops: int) -> None:
        self.num_asked = 0
        self.num_encoded = 0
        self._encoder = encoder
        self._cache = cache
        self._batch_crops = batch_crops
        self._features: dict[bytes, _Features] = {}
        # By whether a crop has padding: each kind of batch has its own attention.
        self._waiting: dict[bool, dict[bytes, tuple[torch.Tensor, torch.Tensor]]] = {False: {}, True: {}}
        self._begun: dict[bytes, torch.Tensor] = {}

    def take(self, grid: PictureGrid) -> tuple[CropLayout, list[bytes]]:
        """Have the crops of `grid` encoded, and return by which digests `finish` has them, in their order."""
        digests = [grid.digest(index) for index in range(grid.layout.num_crops)]
        for index, digest in enumerate(digests):
            if self._is_known(digest):
                continue
            mask = grid.mask[index]
            waiting = self._waiting[not bool(mask.all())]
            waiting[digest] = grid.crop(index), mask
            self.num_encoded += 1
            if len(waiting) == self._batch_crops:
                self._begin(waiting)
        self.num_asked += len(digests)
        return grid.layout, digests

    def finish(self) -> dict[bytes, _Features]:
        """Return the features of all crops, [side / 2, side / 2, width]; nobody may write to them."""
        for waiting in self._waiting.values():
            if waiting:
                self._begin(waiting)
        synchronize(self._encoder.device)
        for digest, tensor in self._begun.items():
            # An array of its own, not a view of a batch; off pinned memory, of which there is not much.
            features: _Features = tensor.numpy().copy()
            self._features[digest] = features
            if np.isfinite(features).all():
                self._cache.put(digest, features)
        self._begun.clear()
        return self._features

    def _is_known(self, digest: bytes) -> bool:
        if digest in self._features or digest in self._begun or any(digest in few for few in self._waiting.values()):
            return True
        kept = self._cache.get(digest)
        if kept is not None:
            self._features[digest] = kept
        return kept is not None

    def _begin(self, waiting: dict[bytes, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Encode what waits as one batch; on a GPU, only have it begun."""
        digests, crops = list(waiting), list(waiting.values())
        waiting.clear()
        crops += crops[-1:] * (self._batch_crops - len(crops))
        pixels = torch.stack([pixels for pixels, _ in crops])
        if self._encoder.device.type == "cuda":
            pixels = pixels.pin_memory().to(self._encoder.device, non_blocking=True)
        values = self._encoder(pixels, torch.stack([mask for _, mask in crops]))
        self._begun.update(zip(digests, _fetch(values.float()), strict=False))


def _fetch(values: torch.Tensor) -> torch.Tensor:
    """Return `values` on the CPU; from a GPU they are there after the next synchronisation."""
    if values.device.type == "cpu":
        return values
    fetched = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return fetched.copy_(values, non_blocking=True)


def _outcome(frame_set: FrameSet, plan: _Plan, features: dict[bytes, _Features]) -> Pictures | Failure:
    pictures = tuple(Picture(layout, np.stack([features[digest] for digest in digests])) for layout, digests in plan)
    if not all(np.isfinite(picture.values).all() for picture in pictures):
        message = "the vision encoder gave values that are not finite"
        return Failure(frame_set.key, None, FailureKind.FAILED, message)
    return Pictures(frame_set.key, pictures)
