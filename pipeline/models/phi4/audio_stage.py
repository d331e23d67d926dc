"""From snapshots of utterances (and the sound of jobs) to embeddings: Phi-4-multimodal's audio encoder as a stage.

Sound is encoded as it is: no silence is put behind it, and none is needed. What comes out are the encoder's tokens,
one in 80 ms, not yet projected: which projection a request needs is known to the decoder.

Token k belongs to samples `1280 * k` to `1280 * (k + 1)`. A snapshot of n whole chunks of 80 ms has n tokens. What lies
behind the last whole chunk has a token of its own from 400 samples (25 ms, one feature window) on; less is heard by the
token before, but for its last 159 samples at most. Sound shorter than 400 samples is filled up with zeros to one window
and has one token.

Finals run one by one, at shapes that are theirs alone: a batch would change their last bits (2e-6 in float32). Partials
of a call run together. Features are float32; they are rounded to the encoder's dtype before their mean and variance are
normalised, as the reference does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.audio.encoder_window import PiecewiseCost
from pipeline.items import Embeddings, Failure, FailureKind, Snapshot
from pipeline.models.device import Clock, choose_device, synchronize
from pipeline.models.phi4.audio_features import WINDOW_SAMPLES, AudioFeatures, num_steps
from pipeline.models.phi4.checkpoint import load_config, load_part
from pipeline.models.phi4.config import AudioConfig, Phi4Config
from pipeline.models.phi4.conformer import ConformerEncoder, num_tokens
from pipeline.models.phi4.dtype import phi4_dtype
from pipeline.models.tier import phi4_directory
from pipeline.models.weights import ModelParams
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ

MAX_TOKENS = 22_500
"""Half an hour, the longest sound that the model is published for."""
MAX_SAMPLES = MAX_TOKENS * CHUNK_SAMPLES

_FULL_SCALE = 32_768.0
_NUM_PROBES = 2  # the first one also allocates
_PROBE_S = {"cpu": 4, "cuda": 40}
_LEAST_MS_PER_SECOND = 1e-3
# Attention reaches two thirds of the speed of the linear layers.
_ATTENTION_WEIGHT = 1.5


def num_tokens_of(num_samples: int) -> int:
    """Return how many tokens sound of `num_samples` has; at least one."""
    return num_tokens(num_steps(max(num_samples, WINDOW_SAMPLES)))


class Phi4UtterancesToEmbeddings:
    """The audio encoder stage of the phi4 tier. It keeps nothing between calls; several threads may use it at once.

    Torch's thread count is the caller's own business: results of one final are the same bits only under the same count.

    Args:
        model: which checkpoint, on which device, in which arithmetic. Of its tensors only the encoder's are read.

    Raises:
        ModelError: if the checkpoint or the arithmetic cannot be used.
    """

    def __init__(self, model: ModelParams) -> None:
        self._device = choose_device(model)
        self._dtype = phi4_dtype(model, self._device)
        directory = phi4_directory(model)
        self.config: Phi4Config = load_config(directory)
        self._features = AudioFeatures(self.config.audio.num_mels, self._device)
        self._encoder = ConformerEncoder(self.config.audio, load_part(directory, "audio"), self._device, self._dtype)

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda"."""
        return self._device.type

    @property
    def partial_dtype(self) -> str:
        """The arithmetic of partials: "float32" or "bfloat16", that of finals."""
        return self.final_dtype

    @property
    def final_dtype(self) -> str:
        """The arithmetic of finals: "float32" or "bfloat16"."""
        return str(self._dtype).removeprefix("torch.")

    def encode(self, snapshots: Sequence[Snapshot]) -> list[Embeddings | Failure]:
        """Return one outcome for each of `snapshots`, in their order.

        A snapshot that cannot be encoded (no samples, more than half an hour, not int16) gets a `Failure` of kind
        FAILED and does not affect the others. Embeddings are float32[`num_tokens_of(samples)`, width of the encoder]
        whatever the arithmetic; from a GPU they lie in pinned memory.
        """
        outcomes: list[Embeddings | Failure | None] = [None] * len(snapshots)
        groups: list[list[int]] = []
        partials: list[int] = []
        for index, snapshot in enumerate(snapshots):
            problem = _problem_of(snapshot.samples)
            if problem is not None:
                outcomes[index] = Failure(snapshot.key, None, FailureKind.FAILED, problem)
            elif snapshot.is_final:
                groups.append([index])
            else:
                partials.append(index)
        for group in (*groups, partials):
            for index, outcome in zip(group, self._encode_together([snapshots[i] for i in group]), strict=True):
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def measure_cost(self, clock: Clock, *, is_final: bool) -> PiecewiseCost:
        """Return what partials (or finals, which compute the same) cost under the thread count that is set now.

        Two lengths are measured; what lies between them is laid to the operations.
        """
        del is_final
        probe_s = _PROBE_S[self._device.type]
        shortest_ms = self._measure_ms(CHUNK_SAMPLES, clock)
        longer_ms = self._measure_ms(probe_s * SAMPLE_RATE_HZ, clock)
        flop_per_second, flop_per_second_squared = _flop(self.config.audio)
        probe_flop = (flop_per_second + flop_per_second_squared * probe_s) * probe_s
        ms_per_flop = max(0.0, longer_ms - shortest_ms) / probe_flop
        return PiecewiseCost(
            piece_samples=self.config.audio.window_tokens * CHUNK_SAMPLES,
            max_samples=MAX_SAMPLES,
            ms_per_snapshot=shortest_ms,
            ms_per_second=max(_LEAST_MS_PER_SECOND, ms_per_flop * flop_per_second),
            ms_per_second_squared=ms_per_flop * flop_per_second_squared,
        )

    def _measure_ms(self, num_samples: int, clock: Clock) -> float:
        times = []
        for _ in range(_NUM_PROBES):
            synchronize(self._device)
            started = clock()
            self._run([np.zeros(num_samples, dtype=np.int16)])
            times.append(clock() - started)
        return 1e3 * max(min(times), 1e-6)

    def _encode_together(self, snapshots: Sequence[Snapshot]) -> list[Embeddings | Failure]:
        values = self._run([snapshot.samples for snapshot in snapshots]) if snapshots else []
        return [
            Embeddings(snapshot.key, tokens, len(snapshot.samples))
            if np.isfinite(tokens).all()
            else Failure(snapshot.key, None, FailureKind.FAILED, "the encoder gave values that are not finite")
            for snapshot, tokens in zip(snapshots, values, strict=True)
        ]

    @torch.inference_mode()
    def _run(self, sounds: Sequence[NDArray[np.int16]]) -> list[NDArray[np.float32]]:
        """Return float32[tokens, width] for each sound."""
        tokens = self._encoder([self._features(self._send(samples)) for samples in sounds])
        fetched = [self._fetch(each) for each in tokens]
        synchronize(self._device)
        return [each.numpy() for each in fetched]

    def _send(self, samples: NDArray[np.int16]) -> Tensor:
        """Return samples on the device, float32 within -1..1, at least one feature window of them."""
        # A copy in memory of our own: arrays that came from another process may be read only.
        is_cuda = self._device.type == "cuda"
        held = torch.zeros(max(len(samples), WINDOW_SAMPLES), dtype=torch.int16, pin_memory=is_cuda)
        held.numpy()[: len(samples)] = samples
        return held.to(self._device, non_blocking=True).to(torch.float32) / _FULL_SCALE

    def _fetch(self, tokens: Tensor) -> Tensor:
        """Return tokens as float32 in this machine's memory, complete once the device was waited for."""
        if self._device.type == "cpu":
            return tokens.to(torch.float32).contiguous()
        held = torch.empty(tokens.shape, dtype=torch.float32, pin_memory=True)
        return held.copy_(tokens.to(torch.float32), non_blocking=True)


def _problem_of(samples: NDArray[np.int16]) -> str | None:
    if samples.dtype != np.int16 or samples.ndim != 1:
        return f"the samples are {samples.dtype}{list(samples.shape)}, expected int16[n]"
    if not 1 <= len(samples) <= MAX_SAMPLES:
        return f"sound of {len(samples)} samples cannot be encoded; 1 to {MAX_SAMPLES} (30 minutes) can"
    return None


def _flop(config: AudioConfig) -> tuple[float, float]:
    """Return the operations of one second of sound, and those that go with the square of the seconds in a window."""
    tokens_per_s = SAMPLE_RATE_HZ / CHUNK_SAMPLES
    width, channels, mels = config.width, config.conv_channels, config.num_mels
    # Two convolutions of kernel 1 after a half and a quarter of the mels, at two steps and at one.
    subsampling = channels * channels * (2 * mels / 4 + mels / 8) + channels * mels / 8 * width
    feed_forward = 2 * 3 * width * config.ffn
    convolution = width * (2 * config.pointwise_channels + config.depthwise_channels)
    convolution += config.depthwise_channels * config.pointwise_channels
    linear = config.num_blocks * (feed_forward + convolution + 4 * width * width)
    attention = config.num_blocks * 2 * width * _ATTENTION_WEIGHT
    return 2 * tokens_per_s * (subsampling + linear), 2 * tokens_per_s**2 * attention
