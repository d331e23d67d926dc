"""Phi-4-multimodal checkpoints in both layouts, against the state dict of transformers' native class."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalVisionConfig,
)

from pipeline.errors import ModelError
from pipeline.models.phi4 import checkpoint
from pipeline.models.phi4.checkpoint import load_adapter, load_config, load_decoder, load_part
from pipeline.models.phi4.config import Phi4Config, read_config
from pipeline.models.phi4.conformer import AudioProjection
from pipeline.models.phi4.decoder import Phi4Decoder
from pipeline.models.phi4.keys import (
    ADAPTERS,
    HEAD_KEY,
    PARTS,
    PREFIXES,
    Part,
    adapter_shapes,
    expected_shapes,
    native_config,
    native_key,
    original_key,
    unused_shapes,
)
from pipeline.models.phi4.siglip import VisionProjection
from pipeline.models.phi4.tiny import Layout, make_tiny

FACTORS = {"short_factor": [1.0] * 48, "long_factor": [1.0 + index for index in range(48)]}
PUBLISHED: dict[str, Any] = {
    "model_type": "phi4mm",
    "architectures": ["Phi4MMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM"},
    "attention_bias": False,
    "audio_processor": {
        "config": {
            "activation": "swish",
            "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
            "attention_dim": 1_024,
            "attention_heads": 16,
            "batch_norm": False,
            "bias_in_glu": True,
            "causal": True,
            "chunk_size": -1,
            "cnn_layer_norm": True,
            "conv_activation": "swish",
            "conv_glu_type": "swish",
            "depthwise_multiplier": 1,
            "depthwise_seperable_out_channel": 1_024,
            "dropout_rate": 0.0,
            "encoder_embedding_config": {"input_size": 80},
            "ext_pw_kernel_size": 1,
            "ext_pw_out_channel": 1_024,
            "input_layer": "nemo_conv",
            "input_size": 80,
            "kernel_size": 3,
            "left_chunk": 18,
            "linear_units": 1_536,
            "nemo_conv_settings": {"conv_channels": 1_024},
            "num_blocks": 24,
            "relative_attention_bias_args": {"t5_bias_max_distance": 500, "type": "t5"},
            "time_reduction": 8,
        },
        "name": "cascades",
    },
    "bos_token_id": 199_999,
    "embd_layer": {
        "audio_embd_layer": {"compression_rate": 8, "downsample_rate": 1, "projection_cls": "mlp"},
        "embedding_cls": "image_audio",
        "image_embd_layer": {
            "crop_size": 448,
            "hd_transform_order": "sub_glb",
            "image_token_compression_cls": "avg_pool_2d",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
    },
    "eos_token_id": 199_999,
    "hidden_act": "silu",
    "hidden_size": 3_072,
    "intermediate_size": 8_192,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4_096,
    "pad_token_id": 199_999,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "longrope", **FACTORS},
    "rope_theta": 10_000.0,
    "sliding_window": 262_144,
    "speech_lora": {"dp": 0.01, "lora_alpha": 640, "r": 320},
    "tie_word_embeddings": True,
    "vision_lora": {"dp": 0.0, "lora_alpha": 512, "r": 256},
    "vocab_size": 200_064,
}
"""The published model's `config.json`, written down from its keys; the long factors are made up."""


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("native"), seed=1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("original"), seed=1, layout="original")


@pytest.fixture(scope="module")
def real_reference() -> Phi4MultimodalForCausalLM:
    """The real model without weights."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 32.0, **FACTORS}
    config = Phi4MultimodalConfig(
        num_attention_heads=24,
        tie_word_embeddings=True,
        rope_parameters={**rope, "original_max_position_embeddings": 4_096},
        sliding_window=262_144,
        audio_config=Phi4MultimodalAudioConfig(bias_max_distance=500),
        vision_config=Phi4MultimodalVisionConfig(),
    )
    with torch.device("meta"):
        return Phi4MultimodalForCausalLM(config)


def whole(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor that any part computes with, by native key."""
    return {
        name if name == HEAD_KEY else PREFIXES[part] + name: tensor
        for part in PARTS
        for name, tensor in load_part(directory, part).items()
    }


def num_weights(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> int:
    return sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(prefix))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "model-*") -> None:
    """Apply `change` to the tensors of every file of that name; the one file that has the tensor changes."""
    for path in directory.glob(f"{name}.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


@pytest.mark.parametrize("is_tied", [True, False])
def test_transformers_loads_the_tiny_checkpoint_and_holds_the_same_tensors(tmp_path: Path, is_tied: bool) -> None:
    make_tiny(tmp_path, seed=3, has_tied_embeddings=is_tied)
    reference, info = Phi4MultimodalForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    state = reference.state_dict()
    ours = whole(tmp_path)
    unused = unused_shapes(load_config(tmp_path))
    assert ours.keys() | unused.keys() == state.keys()
    assert (HEAD_KEY in ours) is not is_tied
    for key, tensor in ours.items():
        assert torch.equal(tensor, state[key]), key
    assert read_config(reference.config.to_dict()) == load_config(tmp_path)


@pytest.mark.parametrize("is_tied", [True, False])
def test_both_layouts_give_the_same_parts(tmp_path: Path, is_tied: bool) -> None:
    layouts: tuple[Layout, ...] = ("native", "original")
    ours, theirs = (
        make_tiny(tmp_path / layout, seed=3, layout=layout, has_tied_embeddings=is_tied) for layout in layouts
    )
    assert load_config(ours) == load_config(theirs)
    expected, found = whole(ours), whole(theirs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    for name in ADAPTERS:
        ours_adapter, theirs_adapter = load_adapter(ours, name), load_adapter(theirs, name)
        assert (ours_adapter.rank, ours_adapter.alpha) == (theirs_adapter.rank, theirs_adapter.alpha)
        assert ours_adapter.tensors.keys() == theirs_adapter.tensors.keys()
        for key, tensor in ours_adapter.tensors.items():
            assert torch.equal(tensor, theirs_adapter.tensors[key]), key


def test_a_seed_makes_one_checkpoint_and_another_seed_another(native: Path, tmp_path: Path) -> None:
    again, other = make_tiny(tmp_path / "again", seed=1), make_tiny(tmp_path / "other", seed=2)
    first, second, third = (load_part(path, "audio") for path in (native, again, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], third[key]) for key in first)


def test_the_tiny_tokenizer_knows_the_placeholders_and_every_text(native: Path) -> None:
    tokenizer = Tokenizer.from_file(str(native / "tokenizer.json"))
    config = load_config(native)
    assert tokenizer.token_to_id("<|endoftext10|>") == config.vision.placeholder_token
    assert tokenizer.token_to_id("<|endoftext11|>") == config.audio.placeholder_token
    assert {tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|end|>")} == set(config.end_tokens)
    assert tokenizer.get_vocab_size() == config.decoder.vocab_size
    text = "Grüße, 世界! <\n>"
    assert tokenizer.decode(tokenizer.encode(f"<|user|>{text}<|end|>").ids) == text


def test_the_parts_of_the_real_model_have_its_keys_shapes_and_numbers_of_weights(
    real_reference: Phi4MultimodalForCausalLM,
) -> None:
    config = read_config(real_reference.config.to_dict())
    parts = [expected_shapes(config, part) for part in PARTS]
    claims = [key for shapes in [*parts, unused_shapes(config)] for key in shapes]
    assert len(claims) == len(set(claims))
    state = {key: tuple(tensor.shape) for key, tensor in real_reference.state_dict().items()}
    assert {key: shape for shapes in [*parts, unused_shapes(config)] for key, shape in shapes.items()} == state
    audio, vision, decoder = parts
    num_normalisers = 160  # buffers, which do not count as parameters
    assert num_weights(audio) == num_weights(audio, PREFIXES["audio"]) == 441_238_144 + num_normalisers
    unused, num_unused = unused_shapes(config), num_weights(unused_shapes(config), PREFIXES["vision"])
    assert num_unused == 30_480_160
    assert num_weights(vision) == num_weights(vision, PREFIXES["vision"]) == 428_565_440 - num_unused
    assert unused.keys() - {HEAD_KEY} == {key for key in unused if key.startswith(PREFIXES["vision"])}
    num_projecting = (num_weights(decoder, A), num_weights(decoder, V))
    assert num_projecting == (25_178_112, 12_984_576)
    assert num_weights(decoder, "model.embed_tokens.") == 614_596_608
    assert num_weights(decoder) == 614_596_608 + 3_221_425_152 + sum(num_projecting)
    total = sum(map(num_weights, parts)) + num_unused - num_normalisers
    assert total == 4_743_988_032
    assert num_weights(adapter_shapes(config, 320)) == 461_373_440
    assert num_weights(adapter_shapes(config, 256)) == 369_098_752
    # 2,047 tensors are in the published files; the tied projection is in none.
    assert len(state) - 1 + 2 * len(adapter_shapes(config, 1)) == 2_047


def test_the_published_configuration_says_the_same_as_the_native_one(
    real_reference: Phi4MultimodalForCausalLM,
) -> None:
    native = native_config(PUBLISHED)
    expected = read_config(real_reference.config.to_dict())
    assert read_config(native) == expected
    assert read_config(Phi4MultimodalConfig.from_dict(native).to_dict()) == expected


A = "model.embed_tokens_extend.audio_embed."
V = "model.embed_tokens_extend.image_embed."
RENAMED = [
    (
        f"{A}encoder.encoders.7.feed_forward_in.net.0.linear.bias",
        f"{A}encoder.encoders.7.feed_forward_in.gate_up_proj.bias",
    ),
    (
        f"{A}encoder.encoders.7.feed_forward_out.net.2.weight",
        f"{A}encoder.encoders.7.feed_forward_out.down_proj.weight",
    ),
    (f"{A}encoder.encoders.7.self_attn.linear_k.weight", f"{A}encoder.encoders.7.self_attn.k_proj.weight"),
    (f"{A}encoder.encoders.7.self_attn.linear_out.bias", f"{A}encoder.encoders.7.self_attn.o_proj.bias"),
    (f"{V}img_projection.0.weight", f"{V}img_projection_up.weight"),
    (f"{V}img_projection.2.bias", f"{V}img_projection_down.bias"),
    (f"{V}glb_GN", f"{V}global_img_feature_extensor"),
    (f"{V}sub_GN", f"{V}sub_img_feature_extensor"),
    (f"{A}audio_projection.speech.0.weight", f"{A}up_proj_for_speech.weight"),
    (f"{A}audio_projection.speech.2.weight", f"{A}down_proj_for_speech.weight"),
    (f"{A}audio_projection.vision.0.weight", f"{A}up_proj_for_vision_speech.weight"),
    (f"{A}audio_projection.vision.2.weight", f"{A}down_proj_for_vision_speech.weight"),
    ("model.layers.3.self_attn.qkv_proj.base_layer.weight", "model.layers.3.self_attn.qkv_proj.weight"),
    ("model.layers.3.input_layernorm.weight", "model.layers.3.input_layernorm.weight"),
    (f"{V}img_processor.encoder.layers.3.self_attn.q_proj.weight",) * 2,
]


@pytest.mark.parametrize(("stored", "key"), RENAMED)
def test_a_key_of_the_original_layout_has_a_native_name_and_back(stored: str, key: str) -> None:
    assert native_key(stored) == (None, key)
    assert original_key(key, {"model.layers.3.self_attn.qkv_proj"}) == stored


def test_adapters_lie_among_the_tensors_of_the_original_layout() -> None:
    layer = "model.layers.3.mlp.down_proj"
    assert native_key(f"{layer}.lora_A.speech.weight") == ("speech", f"{layer}.lora_A.weight")
    assert native_key(f"{layer}.lora_B.vision.weight") == ("vision", f"{layer}.lora_B.weight")


@pytest.mark.parametrize("layout", ["native", "original"])
@pytest.mark.parametrize("part", PARTS)
def test_only_the_tensors_of_the_part_are_read(
    native: Path, original: Path, layout: Layout, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = native if layout == "native" else original
    read: list[str] = []

    class Counting:
        def __init__(self, path: str, framework: str) -> None:
            self._real = safe_open(path, framework=framework)

        def __enter__(self) -> Any:
            self._shard = self._real.__enter__()
            return self

        def __exit__(self, *exc: object) -> None:
            self._real.__exit__(*exc)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._shard, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(native_key(name)[1] if layout == "original" else name)
            return self._shard.get_tensor(name)

    safe_open = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Counting)
    load_part(directory, part)
    assert sorted(read) == sorted(expected_shapes(load_config(directory), part))


@pytest.mark.parametrize("part", PARTS)
def test_what_the_other_parts_hold_changes_nothing(native: Path, tmp_path: Path, part: Part) -> None:
    directory = make_tiny(tmp_path, seed=1)
    own = expected_shapes(load_config(directory), part)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors.keys() - own.keys():
            tensors[key] = torch.full_like(tensors[key], math.nan)

    rewrite(directory, spoil)
    expected, found = load_part(native, part), load_part(directory, part)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("layout", ["native", "original"])
def test_what_leads_into_the_decoder_is_loaded_with_it(native: Path, original: Path, layout: Layout) -> None:
    directory = native if layout == "native" else original
    tensors, every = load_decoder(directory), load_part(directory, "decoder")
    config = load_config(directory)
    Phi4Decoder(config.decoder, tensors.language, {}, num_slots=1, max_tokens=8, device=torch.device("cpu"))
    AudioProjection(config, tensors.audio_projection)
    VisionProjection(config.vision, tensors.image_projection)
    assert len(tensors.audio_projection) == 2 * 2 * 2
    assert len(tensors.image_projection) == 2 * 2 + 2
    assert len(tensors.language) + 8 + 6 == len(every)
    assert not any("extend" in key for key in tensors.language)


def test_the_native_adapter_may_carry_the_prefix_of_peft(native: Path, tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, seed=1)

    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[f"base_model.model.{key}"] = tensors.pop(key)

    rewrite(directory / "speech-lora", prefix, "adapter_model")
    adapter, expected = load_adapter(directory, "speech"), load_adapter(native, "speech")
    assert (adapter.rank, adapter.alpha, adapter.scale) == (5, 10.0, 2.0)
    assert adapter.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(adapter.tensors[key], expected.tensors[key]) for key in adapter.tensors)


def test_the_tensors_of_an_adapter_have_the_shapes_of_their_projection(native: Path) -> None:
    tensors = load_adapter(native, "vision").tensors
    weights = load_part(native, "decoder")
    for key in (key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")):
        change = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        assert change.shape == weights[f"{key}.weight"].shape
    assert len(tensors) == 2 * 4 * load_config(native).decoder.num_layers


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM, None), r"missing: model\.norm\.weight"),
        (
            lambda tensors: NORM in tensors and tensors.update({NORM: torch.ones(65)}),
            r"mis-shaped: model\.norm\.weight is \[65\], expected \[64\]",
        ),
        (
            lambda tensors: NORM in tensors and tensors.update({"model.extra.weight": torch.ones(1)}),
            r"unexpected: model\.extra\.weight",
        ),
        (
            lambda tensors: NORM in tensors and tensors.update({NORM: torch.ones(64, dtype=torch.int8)}),
            r"of the wrong type: model\.norm\.weight is I8",
        ),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    make_tiny(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_part(tmp_path, "decoder")


def test_a_part_loads_from_a_checkpoint_that_lacks_another(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(NORM, None))
    assert load_part(tmp_path, "vision")


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({NORM: torch.ones(64)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight occurs twice"):
        load_part(tmp_path, "decoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 6}, r"mis-shaped: model\.layers\.0\.mlp\.down_proj\.lora_A\.weight is \[5, 96\], expected \[6, 96\]"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"rank_pattern": {"qkv_proj": 8}}, "rank_pattern is set"),
    ],
)
def test_an_adapter_whose_settings_are_not_computed_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = make_tiny(tmp_path) / "speech-lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load_adapter(tmp_path, "speech")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("attention_bias",), True, "attention_bias is True; only False"),
        (("audio_processor",), None, "audio_processor is NoneType"),
        (("audio_processor", "config", "input_layer"), "conv2d", "input_layer is 'conv2d'"),
        (("embd_layer", "image_embd_layer", "hd_transform_order"), "glb_sub", "hd_transform_order is 'glb_sub'"),
        (("audio_processor", "config", "attention_dim"), None, "audio_config.hidden_size is None"),
    ],
)
def test_an_original_configuration_that_is_not_computed_is_refused(
    path: tuple[str, ...], value: object, message: str
) -> None:
    raw = json.loads(json.dumps(PUBLISHED))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelError, match=message):
        read_config(native_config(raw))


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_part(tmp_path, "audio")
    make_tiny(tmp_path)
    (tmp_path / "speech-lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load_adapter(tmp_path, "speech")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ModelError, match="model-00002-of-00003"):
        load_part(tmp_path, "audio")


def test_the_end_tokens_of_the_generation_settings_count(original: Path) -> None:
    config: Phi4Config = load_config(original)
    assert len(config.end_tokens) == 2
    assert json.loads((original / "config.json").read_text())["eos_token_id"] == config.end_tokens[0]
