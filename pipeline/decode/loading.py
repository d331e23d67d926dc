"""Which decoder answers: read from the checkpoint that is named."""

from __future__ import annotations

from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import DecoderParts
from pipeline.models.device import Clock
from pipeline.models.tier import tier_of
from pipeline.models.weights import ModelParams


def load_parts(model: ModelParams, params: DecoderParams, clock: Clock | None = None) -> DecoderParts:
    """Read the decoder of `model` and its tokenizer; return them on the device that it asks for.

    With a `clock`, "auto" measures which arithmetic partials get.

    Raises:
        WeightsHashError: if a pinned file is not the right one.
        ModelError: if the checkpoint is missing or unusable.
    """
    # Each of them imports what only its own tier needs.
    if tier_of(model) == "phi4":
        from pipeline.models.phi4.runner import load_parts as load_phi4  # noqa: PLC0415

        return load_phi4(model, params)
    from pipeline.models.whisper.runner import load_parts as load_whisper  # noqa: PLC0415

    return load_whisper(model, params.scheduler.num_slots, clock)
