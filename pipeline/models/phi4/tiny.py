"""A random Phi-4-multimodal checkpoint of some 200,000 weights: everything of the real one but its size and sense."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from pipeline.errors import ModelError
from pipeline.models.phi4.config import read_config
from pipeline.models.phi4.keys import (
    ADAPTERS,
    ORIGINAL_MODEL_TYPE,
    PARTS,
    AdapterName,
    Shapes,
    adapter_shapes,
    expected_shapes,
    original_key,
    unused_shapes,
)
from pipeline.models.weights import ADAPTER_FILES, read_json

Layout = Literal["native", "original"]

_NUM_BYTES = 256
# Behind the bytes, in this order.
_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|endoftext10|>", "<|endoftext11|>"),
)
_TOKEN = {name: _NUM_BYTES + index for index, name in enumerate(_SPECIAL_TOKENS)}
_SHARDS = tuple(f"model-{index:05d}-of-00003.safetensors" for index in (1, 2, 3))
_FOLDERS = frozenset(f"{name}-lora" for name in ADAPTERS)
_FILES = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}) | {
    *_SHARDS,
    *ADAPTER_FILES,
}
_ADAPTER_SETTINGS: dict[AdapterName, dict[str, Any]] = {
    "speech": {"r": 5, "lora_alpha": 10},
    "vision": {"r": 4, "lora_alpha": 8},
}
_TARGETS = r"model\.layers\.\d+\.((self_attn\.(qkv|o)_proj)|(mlp\.(gate_up|down)_proj))"

_AUDIO: dict[str, Any] = {
    "model_type": "phi4_multimodal_audio",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_blocks": 3,
    "num_attention_heads": 4,
    "input_size": 80,
    "nemo_conv_channels": 16,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "kernel_size": 3,
    "bias_max_distance": 500,
    "audio_token_id": _TOKEN["<|endoftext11|>"],
}
_VISION: dict[str, Any] = {
    "model_type": "phi4_multimodal_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 56,
    "crop_size": 56,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "image_token_id": _TOKEN["<|endoftext10|>"],
}
_DECODER: dict[str, Any] = {
    "vocab_size": _NUM_BYTES + len(_SPECIAL_TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8_192,
    "original_max_position_embeddings": 256,
    "sliding_window": None,
    "bos_token_id": _TOKEN["<|endoftext|>"],
    "pad_token_id": _TOKEN["<|endoftext|>"],
}
_ROPE: dict[str, Any] = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
_FACTORS: dict[str, list[float]] = {"short_factor": [1.0] * 6, "long_factor": [1.0 + index for index in range(6)]}
_ENDS = [_TOKEN["<|endoftext|>"], _TOKEN["<|end|>"]]


def make_tiny(directory: Path, seed: int = 0, layout: Layout = "native", *, has_tied_embeddings: bool = True) -> Path:
    """Write a random checkpoint with both adapters and a byte-level tokenizer into `directory`, and return that.

    One seed gives the same float32 tensors in both layouts. Values are spread so that mixing two tensors up shows:
    no bias is zero, no norm is one, and no activation dies away.
    """
    native = native_tiny_config(has_tied_embeddings=has_tied_embeddings)
    config = read_config(native)
    shapes: Shapes = {key: shape for part in PARTS for key, shape in expected_shapes(config, part).items()}
    shapes |= {key: shape for key, shape in unused_shapes(config).items() if key not in shapes}
    if has_tied_embeddings:
        # As published: the projection that is the embedding is not stored a second time.
        del shapes["lm_head.weight"]
    generator = torch.Generator().manual_seed(seed)
    tensors = _random_tensors(shapes, generator)
    adapters = {
        name: _random_tensors(adapter_shapes(config, _ADAPTER_SETTINGS[name]["r"]), generator) for name in ADAPTERS
    }
    directory.mkdir(parents=True, exist_ok=True)
    if layout == "native":
        for name in ADAPTERS:
            save_adapter(directory / f"{name}-lora", _ADAPTER_SETTINGS[name], adapters[name])
    else:
        adapted = {key.rpartition(".lora_")[0] for key in adapters["speech"]}
        tensors = {original_key(key, adapted): tensor for key, tensor in tensors.items()}
        for name in ADAPTERS:
            for key, tensor in adapters[name].items():
                tensors[f"{key.removesuffix('.weight')}.{name}.weight"] = tensor
    _save_shards(directory, tensors)
    write_json(directory / "config.json", native if layout == "native" else _original_config(native))
    generation = {"bos_token_id": _DECODER["bos_token_id"], "eos_token_id": _ENDS, "pad_token_id": _ENDS[0]}
    write_json(directory / "generation_config.json", generation)
    _tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """What was written: every file, and how many weights they hold, the adapters' too."""

    paths: tuple[Path, ...]
    num_parameters: int


def write_tiny_checkpoint(directory: Path, seed: int = 0, layout: Layout = "native") -> TinyCheckpoint:
    """Write a tiny checkpoint into a new or empty directory, or in place of another one that was written so.

    Raises:
        ModelError: if the directory holds anything else, or cannot be written.
    """
    try:
        _make_room(directory)
        make_tiny(directory, seed, layout)
    except OSError as exc:
        raise ModelError(f"cannot write {exc.filename or directory}: {exc.strerror or exc}") from exc
    paths = tuple(sorted(path for path in directory.rglob("*") if path.is_file()))
    num_parameters = sum(count for path in paths if path.suffix == ".safetensors" for count in _sizes_in(path))
    return TinyCheckpoint(paths, num_parameters)


def _make_room(directory: Path) -> None:
    """Remove a tiny checkpoint; refuse what is none."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory: give a new or an empty one")
    found = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    if not found:
        return
    config = read_json(directory / "config.json") if "config.json" in found else {}
    made = [native_tiny_config(has_tied_embeddings=is_tied) for is_tied in (True, False)]
    if found - _FILES - _FOLDERS or config not in [*made, *map(_original_config, made)]:
        raise ModelError(
            f"{directory} is not empty and holds no tiny checkpoint, or more than that: give a new or an empty "
            "directory; nothing was written"
        )
    for name in found & _FILES:
        (directory / name).unlink()
    for name in found & _FOLDERS:
        (directory / name).rmdir()


def _sizes_in(path: Path) -> Iterator[int]:
    with safe_open(str(path), framework="pt") as shard:
        for key in shard.keys():  # noqa: SIM118 - not a dict: it cannot be iterated
            yield math.prod(shard.get_slice(key).get_shape())


def native_tiny_config(*, has_tied_embeddings: bool = True) -> dict[str, Any]:
    """Return the native `config.json` of the tiny checkpoint."""
    rope = {"rope_type": "longrope", **_ROPE, "factor": 32.0, **_FACTORS}
    return {
        "model_type": "phi4_multimodal",
        "architectures": ["Phi4MultimodalForCausalLM"],
        **_DECODER,
        "tie_word_embeddings": has_tied_embeddings,
        "eos_token_id": _ENDS,
        "rope_parameters": {**rope, "original_max_position_embeddings": _DECODER["original_max_position_embeddings"]},
        "audio_config": _AUDIO,
        "vision_config": _VISION,
    }


def _original_config(native: Mapping[str, Any]) -> dict[str, Any]:
    audio = {key: _AUDIO[key] for key in ("num_blocks", "input_size", "ext_pw_out_channel", "kernel_size")}
    audio |= {
        "attention_dim": _AUDIO["hidden_size"],
        "attention_heads": _AUDIO["num_attention_heads"],
        "linear_units": _AUDIO["intermediate_size"],
        "depthwise_seperable_out_channel": _AUDIO["depthwise_separable_out_channel"],
        "nemo_conv_settings": {"conv_channels": _AUDIO["nemo_conv_channels"]},
        "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": _AUDIO["bias_max_distance"]},
        "input_layer": "nemo_conv",
        "audio_token_id": _AUDIO["audio_token_id"],
    }
    return {
        "model_type": ORIGINAL_MODEL_TYPE,
        **_DECODER,
        **_ROPE,
        "tie_word_embeddings": native["tie_word_embeddings"],
        "eos_token_id": _ENDS[0],  # as published: the other one is in generation_config.json only
        "rope_scaling": {"type": "longrope", **_FACTORS},
        "embd_layer": {
            "audio_embd_layer": {"downsample_rate": 1},
            "image_embd_layer": {"crop_size": _VISION["crop_size"], "hd_transform_order": "sub_glb"},
        },
        "audio_processor": {"config": audio, "name": "cascades"},
        "vision_config": _VISION,
        **{f"{name}_lora": settings for name, settings in _ADAPTER_SETTINGS.items()},
    }


def _random_tensors(shapes: Shapes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, shape in shapes.items():
        center, spread = _distribution(key, shape)
        tensors[key] = center + spread * torch.randn(shape, generator=generator)
    return tensors


def _distribution(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a tensor's values."""
    if key.endswith("global_mean"):
        return 8.0, 0.5
    if key.endswith("global_invstd"):
        return 0.25, 0.02
    if key.endswith((".bias", "in_proj_bias", ".b1", ".b2")):
        return 0.0, 0.1
    if "norm" in key:
        return 1.0, 0.1
    if "bias_values" in key or "embed_tokens.weight" in key or key.endswith("extensor"):
        return 0.0, 0.5
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def save_adapter(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter of the native layout into `folder`; `settings` are its `r` and `lora_alpha`."""
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": _TARGETS, "bias": "none", **settings}
    write_json(folder / "adapter_config.json", config)


def _save_shards(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Deal the tensors out, so that every file has some of every part."""
    weight_map = {key: _SHARDS[index % len(_SHARDS)] for index, key in enumerate(tensors)}
    for name in _SHARDS:
        shard = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        save_file(shard, directory / name, metadata={"format": "pt"})
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": num_bytes}, "weight_map": weight_map},
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to the file at `path`."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> Tokenizer:
    """Return a tokenizer in which a token is a byte or one of the special tokens."""
    alphabet = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL_TOKENS])
    return tokenizer
