"""Dimensions of Phi-4-multimodal checkpoints against transformers' own configuration class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import Phi4MultimodalAudioConfig, Phi4MultimodalConfig, Phi4MultimodalVisionConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.errors import ModelError
from pipeline.models.phi4.config import attention_factor, read_config

ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "factor": 32.0,
    "original_max_position_embeddings": 4_096,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0 + index for index in range(48)],
}


@pytest.fixture
def raw() -> dict[str, Any]:
    """The real model's configuration as its native `config.json` has it."""
    config = Phi4MultimodalConfig(
        num_attention_heads=24,
        tie_word_embeddings=True,
        rope_parameters=copy.deepcopy(ROPE),
        sliding_window=262_144,
        audio_config=Phi4MultimodalAudioConfig(bias_max_distance=500),
        vision_config=Phi4MultimodalVisionConfig(),
    )
    return dict(config.to_dict())


def test_the_real_model_is_read(raw: dict[str, Any]) -> None:
    config = read_config(raw)
    assert (config.audio.width, config.audio.num_blocks, config.audio.bias_max_distance) == (1_024, 24, 500)
    assert (config.audio.placeholder_token, config.vision.placeholder_token) == (200_011, 200_010)
    assert (config.vision.num_layers, config.vision.num_used_layers) == (27, 26)
    assert (config.decoder.head_width, config.decoder.num_kv_heads) == (128, 8)
    assert len(config.decoder.rope.long_factors) == 48
    assert config.decoder.rope.original_max_positions == 4_096
    assert config.decoder.has_tied_embeddings
    assert config.end_tokens == (199_999, 200_020)


def test_the_scale_of_the_rotary_positions_may_be_told_or_left_out(raw: dict[str, Any]) -> None:
    expected = read_config(raw)
    rope = raw["rope_parameters"]
    reference = ROPE_INIT_FUNCTIONS["longrope"](Phi4MultimodalConfig.from_dict(raw))[1]
    assert attention_factor(expected.decoder.rope) == pytest.approx(reference, rel=1e-12)
    rope["attention_factor"] = reference
    assert read_config(raw) == expected
    del rope["factor"], rope["attention_factor"]
    assert read_config(raw) == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "phi4mm", "model_type is 'phi4mm'"),
        (("audio_config",), None, "audio_config is NoneType"),
        (("audio_config", "num_blocks"), 0, "audio_config.num_blocks is 0"),
        (("audio_config", "chunk_size"), 18, "audio_config.chunk_size is 18; only -1"),
        (("vision_config", "feature_layer"), -40, "feature_layer is -40"),
        (("vision_config", "layer_norm_eps"), "small", "layer_norm_eps is 'small'"),
        (("rope_parameters", "rope_type"), "yarn", "rope_type is 'yarn'"),
        (("rope_parameters", "long_factor"), [1.0] * 47, "long_factor must be 48 numbers"),
        (("rope_parameters", "factor"), 16.0, r"rope_parameters.factor is 16.0; only 32 is"),
        (("rope_parameters", "attention_factor"), 1.0, r"attention_factor is 1.0; only 1.19024 is"),
        (("rope_parameters", "original_max_position_embeddings"), 1, "is 1, expected 2 or more"),
        (("rope_parameters", "original_max_position_embeddings"), "many", "is 'many', expected a positive"),
        (("eos_token_id",), "end", "eos_token_id is 'end'"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_its_name(
    raw: dict[str, Any], path: tuple[str, ...], value: object, message: str
) -> None:
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelError, match=message):
        read_config(raw)
