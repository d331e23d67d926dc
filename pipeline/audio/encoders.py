"""The audio encoder that goes with a checkpoint. This module imports no torch: the encoders are imported as needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.audio.encoder_window import EncoderParams, SnapshotCost
from pipeline.items import Embeddings, Failure, Snapshot
from pipeline.models.tier import tier_of
from pipeline.models.weights import ModelParams


class SnapshotEncoder(Protocol):
    """From snapshots to embeddings, whatever the model. It keeps nothing between calls; threads may share it."""

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda"."""
        ...

    @property
    def partial_dtype(self) -> str:
        """The arithmetic of partials: "float32", "bfloat16" or "int8"."""
        ...

    @property
    def final_dtype(self) -> str:
        """The arithmetic of finals."""
        ...

    def encode(self, snapshots: Sequence[Snapshot]) -> list[Embeddings | Failure]:
        """Return one outcome for each of `snapshots`, in their order; one that cannot be encoded fails alone."""
        ...

    def measure_cost(self, clock: Callable[[], float], *, is_final: bool) -> SnapshotCost:
        """Return what partials (or finals) cost on this machine under the thread count that is set now.

        `clock` tells seconds.
        """
        ...


def load_encoder(model: ModelParams, params: EncoderParams, clock: Callable[[], float] | None) -> SnapshotEncoder:
    """Return the encoder of the checkpoint that `model` names, loaded (this blocks for seconds).

    Args:
        model: which checkpoint, on which device, in which arithmetic.
        params: the window of Whisper's encoder; Phi-4-multimodal's takes sound as it is.
        clock: seconds, to measure which arithmetic Whisper's partials get; None: float32.

    Raises:
        WeightsHashError: if a weight file is not the pinned one.
        ModelError: if the checkpoint cannot be used.
    """
    if tier_of(model) == "phi4":
        from pipeline.models.phi4.audio_stage import Phi4UtterancesToEmbeddings  # noqa: PLC0415 - imports torch

        return Phi4UtterancesToEmbeddings(model)
    from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings  # noqa: PLC0415 - imports torch

    return UtterancesToEmbeddings(model, params, clock=clock)
