"""Which tier a checkpoint is of, without torch and without its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.encoders import load_encoder
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.errors import ModelError
from pipeline.models.device import check_final_arithmetic
from pipeline.models.phi4.dtype import phi4_dtype
from pipeline.models.phi4.tiny import Layout, make_tiny
from pipeline.models.tier import layout_of_files, phi4_directory, tier_of
from pipeline.models.weights import ModelParams, locate_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("layout", ["native", "original"])
def test_both_layouts_are_of_the_phi4_tier(tmp_path: Path, layout: Layout) -> None:
    make_tiny(tmp_path, layout=layout)
    model = ModelParams(name=str(tmp_path))
    assert tier_of(model) == "phi4"
    assert layout_of_files(locate_model(model.name)) == layout
    assert phi4_directory(model) == tmp_path


def test_the_weights_are_not_read(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    assert tier_of(ModelParams(name=str(tmp_path))) == "phi4"


def test_whisper_is_of_the_edge_tier(tmp_path: Path) -> None:
    assert tier_of(ModelParams()) == "edge"
    assert isinstance(load_encoder(ModelParams(device="cpu"), EncoderParams(), None), UtterancesToEmbeddings)
    for name, content in (("config.json", {"model_type": "whisper"}), ("tokenizer.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "model.safetensors").touch()
    assert tier_of(ModelParams(name=str(tmp_path))) == "edge"
    with pytest.raises(ModelError, match="is no Phi-4-multimodal checkpoint: its model_type is 'whisper'"):
        phi4_directory(ModelParams(name=str(tmp_path)))


def test_a_checkpoint_that_is_not_there_has_no_tier(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        tier_of(ModelParams(name=str(tmp_path)))


def test_who_asks_pays_for_no_torch() -> None:
    code = (
        "import sys; from pipeline.models.tier import tier_of; from pipeline.models.weights import ModelParams;"
        "import pipeline.audio.encoders, actors.audio_encoder; tier_of(ModelParams()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ({"final_dtype": "auto"}, CPU, torch.float32),
        ({"final_dtype": "auto"}, CUDA, torch.bfloat16),
        ({"final_dtype": "bfloat16"}, CPU, torch.bfloat16),
        ({"final_dtype": "float32"}, CUDA, torch.float32),
        ({"final_dtype": "auto", "partial_dtype": "bfloat16"}, CUDA, torch.bfloat16),
    ],
)
def test_phi4_computes_all_in_the_dtype_of_finals(
    asked: dict[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    assert phi4_dtype(ModelParams.model_validate(asked), device) == dtype


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"final_dtype": "int8"}, r"final_dtype is 'int8'.*float32 or bfloat16"),
        ({"final_dtype": "float32", "partial_dtype": "bfloat16"}, "finals are computed in float32"),
        ({"final_dtype": "auto", "partial_dtype": "int8"}, "finals are computed in float32"),
    ],
)
def test_arithmetic_that_phi4_has_not_is_refused(asked: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        phi4_dtype(ModelParams.model_validate(asked), CPU)


def test_finals_of_whisper_are_exact() -> None:
    assert check_final_arithmetic(ModelParams(final_dtype="auto"), CUDA) == "float32"
    with pytest.raises(ModelError, match="finals of Whisper are exact"):
        check_final_arithmetic(ModelParams(final_dtype="bfloat16"), CPU)
