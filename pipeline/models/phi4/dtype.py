"""In which arithmetic Phi-4-multimodal computes."""

from __future__ import annotations

import torch

from pipeline.errors import ModelError
from pipeline.models.weights import ModelParams


def phi4_dtype(model: ModelParams, device: torch.device) -> torch.dtype:
    """Return the dtype of all its parts: of `final_dtype`, where "auto" is bfloat16 on CUDA and float32 on a CPU.

    Partials have the same one, as weights are held once.

    Raises:
        ModelError: if int8 is asked for, or partials are to be computed in another dtype than finals.
    """
    if model.final_dtype == "int8":
        raise ModelError("model.final_dtype is 'int8', which Phi-4-multimodal has not: use 'auto'")
    final = model.final_dtype
    if final == "auto":
        final = "bfloat16" if device.type == "cuda" else "float32"
    if model.partial_dtype not in ("auto", final):
        raise ModelError(
            f"model.partial_dtype is {model.partial_dtype!r} and finals are in {final!r}: Phi-4-multimodal holds its "
            "weights once, so set model.partial_dtype to 'auto'"
        )
    return torch.float32 if final == "float32" else torch.bfloat16
