"""Which tier a checkpoint makes."""

from __future__ import annotations

from typing import Literal

from pipeline.models.weights import ModelParams, locate_model, read_json


def tier_of(model: ModelParams) -> Literal["edge", "phi4"]:
    """Return "phi4" for a checkpoint of Phi-4-multimodal, "edge" for any other."""
    files = locate_model(model.name, model.revision)
    is_phi4 = files.layout == "huggingface" and read_json(files.config).get("model_type") in (
        "phi4_multimodal",
        "phi4mm",
    )
    return "phi4" if is_phi4 else "edge"
