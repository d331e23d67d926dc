"""From snapshots of utterances to the embeddings that the decoder listens to (Whisper's encoder).

The window of a snapshot is its samples and some seconds of silence (`EncoderParams`), never a padded 30 s. No window is
ever padded to the length of another, so nothing needs a mask and a snapshot's embeddings cannot depend on what else is
in the call:

- on a CPU every window runs alone, at the shape it always has: the same bits in a batch and alone. A batch would gain
  nothing there: the products of one 3 s window already fill the core;
- on a GPU the partials whose windows are equally long run together; finals run alone, in float32 always.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.audio.encoder_window import EncoderCost, EncoderParams
from pipeline.errors import ModelError
from pipeline.items import Embeddings, Failure, FailureKind, Snapshot
from pipeline.models.device import Clock, check_final_arithmetic, choose_device, choose_partial_arithmetic, synchronize
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import WhisperCheckpoint, WhisperConfig, load_checkpoint
from pipeline.models.whisper.encoder import POSITION_SAMPLES, WhisperEncoder
from pipeline.models.whisper.log_mel import FFT_SAMPLES, LogMel
from pipeline.timebase import SAMPLE_RATE_HZ

__all__ = ["EncoderCost", "EncoderParams", "UtterancesToEmbeddings"]

_FULL_SCALE = 32_768.0
_NUM_PROBES = 2  # the first one also allocates
# Attention reaches two thirds of the speed of the linear layers (measured at 12 s).
_ATTENTION_WEIGHT = 1.5


class UtterancesToEmbeddings:
    """The audio encoder stage. It keeps nothing between calls; several threads may use it at once.

    Torch's thread count is the caller's own business: the stage neither reads nor sets it, but results of one snapshot
    are the same bits only under the same count.

    Args:
        model: which checkpoint, on which device, and the arithmetic of partials.
        params: the window.
        clock: seconds, to measure at load which arithmetic partials get; without it they are float32 unless the model
            parameters say otherwise.
        checkpoint: the encoder's tensors, if they are loaded already.

    Raises:
        WeightsHashError: if a weight file is not the pinned one.
        ModelError: if the checkpoint cannot be used, or the window is longer than what it takes.
    """

    def __init__(
        self,
        model: ModelParams,
        params: EncoderParams,
        *,
        clock: Clock | None = None,
        checkpoint: WhisperCheckpoint | None = None,
    ) -> None:
        checkpoint = checkpoint if checkpoint is not None else load_checkpoint(model, "encoder")
        self.config: WhisperConfig = checkpoint.config
        self._params = params
        _check_window(params, self.config)
        self._device = choose_device(model)
        self._log_mel = LogMel(self.config.num_mels, self._device)
        final_arithmetic = check_final_arithmetic(model, self._device)
        arithmetic = choose_partial_arithmetic(model, self._device, clock)
        self._final_encoder = WhisperEncoder(checkpoint, self._device, final_arithmetic)
        self._partial_encoder = (
            self._final_encoder
            if arithmetic == final_arithmetic
            else WhisperEncoder(checkpoint, self._device, arithmetic)
        )

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda"."""
        return self._device.type

    @property
    def partial_dtype(self) -> str:
        """The arithmetic of partials: "float32", "bfloat16" or "int8"."""
        return self._partial_encoder.arithmetic

    @property
    def final_dtype(self) -> str:
        """The arithmetic of finals: "float32", or "int8" if that is asked for."""
        return self._final_encoder.arithmetic

    def encode(self, snapshots: Sequence[Snapshot]) -> list[Embeddings | Failure]:
        """Return one outcome for each of `snapshots`, in their order.

        A snapshot that cannot be encoded (no samples, too many, not int16) gets a `Failure` of kind FAILED and does not
        affect the others. Embeddings are float32[window / 320, width] whatever the arithmetic.
        """
        outcomes: list[Embeddings | Failure | None] = [None] * len(snapshots)
        groups: list[list[int]] = []
        partials_of_length: dict[int, list[int]] = {}
        for index, snapshot in enumerate(snapshots):
            problem = self._problem_of(snapshot)
            if problem is not None:
                outcomes[index] = Failure(snapshot.key, None, FailureKind.FAILED, problem)
            elif snapshot.is_final or self._device.type == "cpu":
                groups.append([index])
            else:
                partials_of_length.setdefault(self._params.window_samples(len(snapshot.samples)), []).append(index)
        for group in (*groups, *partials_of_length.values()):
            for index, outcome in zip(group, self._encode_equal([snapshots[i] for i in group]), strict=True):
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def measure_cost(self, clock: Clock, *, is_final: bool) -> EncoderCost:
        """Return what partials (or finals) cost on this machine under the thread count that is set now."""
        encoder = self._final_encoder if is_final else self._partial_encoder
        flop_per_second, flop_per_second_squared = _flop(self.config)
        shortest = np.zeros(1, dtype=np.int16)
        seconds = self._params.window_samples(1) / SAMPLE_RATE_HZ
        times = []
        for _ in range(_NUM_PROBES):
            synchronize(self._device)
            started = clock()
            self._run(encoder, [shortest])
            times.append(clock() - started)
        elapsed_s = max(min(times), 1e-6)
        flop_per_s = (flop_per_second + flop_per_second_squared * seconds) * seconds / elapsed_s
        return EncoderCost(
            params=self._params,
            ms_per_window=1.0,
            ms_per_second=1e3 * flop_per_second / flop_per_s,
            ms_per_second_squared=1e3 * flop_per_second_squared / flop_per_s,
        )

    def _problem_of(self, snapshot: Snapshot) -> str | None:
        samples = snapshot.samples
        if samples.dtype != np.int16 or samples.ndim != 1:
            return f"the samples are {samples.dtype}{list(samples.shape)}, expected int16[n]"
        try:
            self._params.window_samples(len(samples))
        except ValueError as exc:
            return str(exc)
        return None

    def _encode_equal(self, snapshots: Sequence[Snapshot]) -> list[Embeddings | Failure]:
        """Encode snapshots of one window length and one kind (partial or final) together."""
        encoder = self._final_encoder if snapshots[0].is_final else self._partial_encoder
        values = self._run(encoder, [snapshot.samples for snapshot in snapshots])
        return [
            Embeddings(snapshot.key, row, len(snapshot.samples))
            if np.isfinite(row).all()
            else Failure(snapshot.key, None, FailureKind.FAILED, "the encoder gave values that are not finite")
            for snapshot, row in zip(snapshots, values, strict=True)
        ]

    @torch.inference_mode()
    def _run(self, encoder: WhisperEncoder, utterances: Sequence[NDArray[np.int16]]) -> NDArray[np.float32]:
        """Return float32[utterances, positions, width]; all utterances have the same window."""
        windows = np.zeros((len(utterances), self._params.window_samples(len(utterances[0]))), dtype=np.float32)
        for row, samples in zip(windows, utterances, strict=True):
            row[: len(samples)] = samples
        windows /= _FULL_SCALE
        features = self._log_mel(torch.from_numpy(windows).to(self._device))
        values: NDArray[np.float32] = encoder(features).to("cpu", torch.float32).numpy()
        return values


def _check_window(params: EncoderParams, config: WhisperConfig) -> None:
    longest_ms = config.max_source_positions * POSITION_SAMPLES * 1_000 // SAMPLE_RATE_HZ
    if params.max_window_ms > longest_ms:
        raise ModelError(
            f"max_window_ms is {params.max_window_ms}, the model takes windows of at most {longest_ms} ms: lower it"
        )
    shortest = params.window_samples(1)
    if shortest < FFT_SAMPLES:
        raise ModelError(f"silence_ms and window_step_ms give windows of {shortest} samples, fewer than {FFT_SAMPLES}")


def _flop(config: WhisperConfig) -> tuple[float, float]:
    """Return the operations of one second of sound, and those that go with the square of the seconds."""
    positions_per_s = SAMPLE_RATE_HZ / POSITION_SAMPLES
    width, layers = config.width, config.encoder_layers
    convolutions = 2.0 * 3 * width * (2 * config.num_mels + width)
    linear = 2.0 * layers * (4 * width * width + 2 * width * config.encoder_ffn)
    attention = 2.0 * layers * 2 * width * _ATTENTION_WEIGHT
    return positions_per_s * (convolutions + linear), positions_per_s**2 * attention
