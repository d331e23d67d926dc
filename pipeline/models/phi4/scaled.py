"""Random Phi-4-multimodal checkpoints of a chosen size, for measurements of speed: every part of the real one.

Proportions are the real model's where a processor can bear them: heads of 128 in groups of three, a conformer a third
and SigLIP three eighths as wide as the language model, adapters of a tenth of the width. The vocabulary is 4,096, since
200,064 would be most of a small model. Positions, crops, windows and the mel front end are those of the real one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from pipeline.models.phi4.config import Phi4Config, read_config
from pipeline.models.phi4.keys import ADAPTERS, PARTS, AdapterName, Shapes, adapter_shapes, expected_shapes
from pipeline.models.phi4.keys import unused_shapes as shapes_of_unused
from pipeline.models.phi4.tiny import save_adapter, write_json

_HEAD_WIDTH = 128
_SHARED_QUERIES = 3
GROUP_WIDTH = _HEAD_WIDTH * _SHARED_QUERIES
"""What the width of a scaled model is a multiple of."""
_ROTARY_SHARE = 0.75
_ORIGINAL_POSITIONS, _MAX_POSITIONS = 4_096, 131_072
_LARGEST_FACTOR = 47.77
_VOCABULARY = 4_096
# Text tokens are below the first of them, as in the real vocabulary.
_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|endoftext10|>", "<|endoftext11|>"),
    *("<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
)
_NUM_TEXT = _VOCABULARY - len(_SPECIAL_TOKENS)
_TOKEN = {name: _NUM_TEXT + index for index, name in enumerate(_SPECIAL_TOKENS)}
_ENDS = [_TOKEN["<|endoftext|>"], _TOKEN["<|end|>"]]
_PRINTABLE = [chr(code) for code in range(ord("!"), ord("~") + 1)]


@dataclass(frozen=True, slots=True)
class ScaledSize:
    """What a checkpoint of chosen size is told by; the widths of the other parts follow from the decoder's."""

    width: int = 768
    num_layers: int = 12
    num_blocks: int = 8
    num_vision_layers: int = 8


def scaled_config(size: ScaledSize) -> dict[str, Any]:
    """Return the native `config.json` of a model of `size`.

    Raises:
        ValueError: if the width is not a multiple of 384: three heads of 128.
    """
    if size.width % GROUP_WIDTH:
        raise ValueError(f"width is {size.width}, expected a multiple of {GROUP_WIDTH}")
    decoder = {
        "vocab_size": _VOCABULARY,
        "hidden_size": size.width,
        "intermediate_size": size.width * 8 // 3,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.width // _HEAD_WIDTH,
        "num_key_value_heads": size.width // GROUP_WIDTH,
    }
    audio_width, vision_width = size.width // 3, size.width * 3 // 8
    audio = {
        "hidden_size": audio_width,
        "intermediate_size": audio_width * 3 // 2,
        "num_blocks": size.num_blocks,
        "num_attention_heads": max(1, audio_width // 64),
        "nemo_conv_channels": audio_width,
        "ext_pw_out_channel": audio_width,
        "depthwise_separable_out_channel": audio_width,
        "audio_token_id": _TOKEN["<|endoftext11|>"],
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": vision_width * 15 // 4,
        "num_hidden_layers": size.num_vision_layers,
        "num_attention_heads": max(1, vision_width // 72),
        "image_token_id": _TOKEN["<|endoftext10|>"],
    }
    specials = {"bos_token_id": _ENDS[0], "eos_token_id": _ENDS, "pad_token_id": _ENDS[0]}
    return _native_config({**decoder, **specials}, audio, vision)


def real_config() -> dict[str, Any]:
    """Return the native `config.json` of microsoft/Phi-4-multimodal-instruct; its long factors are a smooth stand-in.

    The factors are read at run time from a real checkpoint; here they only have to be as many and as costly.
    """
    decoder = {
        "vocab_size": 200_064,
        "hidden_size": 3_072,
        "intermediate_size": 8_192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "bos_token_id": 199_999,
        "eos_token_id": [199_999, 200_020],
        "pad_token_id": 199_999,
    }
    audio = {
        "hidden_size": 1_024,
        "intermediate_size": 1_536,
        "num_blocks": 24,
        "num_attention_heads": 16,
        "nemo_conv_channels": 1_024,
        "ext_pw_out_channel": 1_024,
        "depthwise_separable_out_channel": 1_024,
        "audio_token_id": 200_011,
    }
    vision = {
        "hidden_size": 1_152,
        "intermediate_size": 4_304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_token_id": 200_010,
    }
    return _native_config(decoder, audio, vision)


def adapter_settings(config: Phi4Config) -> dict[AdapterName, dict[str, int]]:
    """Return rank and alpha of the adapters of a model with these dimensions: 320 and 256 of a width of 3,072."""
    speech, vision = config.decoder.width * 5 // 48, config.decoder.width // 12
    return {"speech": {"r": speech, "lora_alpha": 2 * speech}, "vision": {"r": vision, "lora_alpha": 2 * vision}}


def checkpoint_shapes(config: Phi4Config) -> Shapes:
    """Return the shape of every tensor of a checkpoint without its adapters, by native key."""
    shapes: Shapes = {key: shape for part in PARTS for key, shape in expected_shapes(config, part).items()}
    unused = shapes_of_unused(config)
    # As published: the projection that is the embedding is not stored a second time.
    return shapes | {key: shape for key, shape in unused.items() if key not in shapes and key != "lm_head.weight"}


def make_scaled(directory: Path, size: ScaledSize | None = None, seed: int = 0) -> int:
    """Write a random float32 checkpoint in the native layout, with both adapters and a tokenizer, into `directory`.

    Returns:
        How many parameters it has, adapters included.
    """
    native = scaled_config(size or ScaledSize())
    config = read_config(native)
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(checkpoint_shapes(config), generator)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = adapter_settings(config)
    for name in ADAPTERS:
        adapter = random_tensors(adapter_shapes(config, settings[name]["r"]), generator)
        num_parameters += sum(tensor.numel() for tensor in adapter.values())
        save_adapter(directory / f"{name}-lora", settings[name], adapter)
    write_json(directory / "config.json", native)
    specials = {"bos_token_id": _ENDS[0], "eos_token_id": _ENDS, "pad_token_id": _ENDS[0]}
    write_json(directory / "generation_config.json", specials)
    _tokenizer().save(str(directory / "tokenizer.json"))
    return num_parameters


def random_tensors(
    shapes: Shapes,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Return a random tensor for each of `shapes`, made on `device`, which must be the generator's."""
    tensors = {}
    for key, shape in shapes.items():
        center, spread = _distribution(key, shape)
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        tensors[key] = values.mul_(spread).add_(center)
    return tensors


def _distribution(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a tensor's values.

    A random model says one token for ever where the embedding it was fed outweighs what the layers add, since tied
    embeddings then give that token again; and the same to everybody where attention is spread evenly over a long
    prompt. So embeddings are small, and queries and keys large enough that attention chooses.
    """
    if key.endswith("global_mean"):
        return 8.0, 0.5
    if key.endswith("global_invstd"):
        return 0.25, 0.02
    if key.endswith((".bias", "in_proj_bias", ".b1", ".b2")):
        return 0.0, 0.1
    if "norm" in key:
        return 1.0, 0.1
    if "embed_tokens.weight" in key or "bias_values" in key or key.endswith("extensor"):
        return 0.0, 0.05 if "embed_tokens" in key else 0.5
    gain = 1.7 if "qkv_proj.weight" in key or "o_proj.weight" in key else 1.0
    return 0.0, (0.5 if ".lora_" in key else gain) / math.sqrt(math.prod(shape[1:]))


def _native_config(decoder: Mapping[str, Any], audio: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    num_factors = int(_HEAD_WIDTH * _ROTARY_SHARE) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": _ROTARY_SHARE,
        "factor": _MAX_POSITIONS / _ORIGINAL_POSITIONS,
        "original_max_position_embeddings": _ORIGINAL_POSITIONS,
        "short_factor": [1.0] * num_factors,
        "long_factor": [_LARGEST_FACTOR ** (index / (num_factors - 1)) for index in range(num_factors)],
    }
    return {
        "model_type": "phi4_multimodal",
        "architectures": ["Phi4MultimodalForCausalLM"],
        **decoder,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": _MAX_POSITIONS,
        "original_max_position_embeddings": _ORIGINAL_POSITIONS,
        "sliding_window": 2 * _MAX_POSITIONS,
        "tie_word_embeddings": True,
        "rope_parameters": rope,
        "audio_config": {
            "model_type": "phi4_multimodal_audio",
            "input_size": 80,
            "kernel_size": 3,
            "bias_max_distance": 500,
            **audio,
        },
        "vision_config": {
            "model_type": "phi4_multimodal_vision",
            "num_channels": 3,
            "image_size": 448,
            "crop_size": 448,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            **vision,
        },
    }


def _tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes and of pairs of printable characters, as many as there is room for."""
    alphabet = sorted(ByteLevel.alphabet())
    letters = sorted(_PRINTABLE, key=lambda character: (not character.islower(), character))
    pairs = [(first, second) for first in letters for second in letters][: _NUM_TEXT - len(alphabet)]
    words = [*alphabet, *(f"{first}{second}" for first, second in pairs)]
    tokenizer = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=pairs))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL_TOKENS])
    return tokenizer
