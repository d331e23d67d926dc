"""What Phi-4-multimodal is computed in. Its weights are held once, so partials and finals have the same arithmetic."""

from __future__ import annotations

import torch

from pipeline.errors import ModelError
from pipeline.models.weights import ModelParams

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def phi4_dtype(model: ModelParams, device: torch.device) -> torch.dtype:
    """Return what `model.final_dtype` asks for; "auto" is bfloat16 on cuda and float32 elsewhere.

    Raises:
        ModelError: if that is another arithmetic, or partials are asked for in another than finals.
    """
    final: str = model.final_dtype
    partial: str = model.partial_dtype
    if final == "auto":
        final = "bfloat16" if device.type == "cuda" else "float32"
    if final not in _DTYPES:
        raise ModelError(
            f"model.final_dtype is {final!r}, but Phi-4-multimodal is computed in float32 or bfloat16: set it to one "
            "of these"
        )
    if partial not in ("auto", final):
        raise ModelError(
            f"model.partial_dtype is {partial!r} and finals are computed in {final}, but Phi-4-multimodal's weights "
            "are held once: set partial_dtype to 'auto'"
        )
    return _DTYPES[final]
