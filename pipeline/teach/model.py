"""The model that is taught: its size, its tokenizer, how it begins, and how it is written down.

It is transformers' native `Phi4MultimodalForCausalLM`, small; nothing of it is defined a second time. What is written
is a checkpoint as any other, and is read by `pipeline.models.phi4.checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from pipeline.models.phi4.config import Phi4Config, read_config
from pipeline.models.phi4.keys import HEAD_KEY, AdapterName, adapter_shapes
from pipeline.models.phi4.languages import LANGUAGES
from pipeline.models.phi4.prompts import (
    BREVITY,
    CHAINED_TRANSLATION,
    DESCRIPTION,
    DESCRIPTIONS,
    SEPARATOR,
    SOUND_SUMMARY,
    TEXT_SUMMARY,
    TRANSCRIPTION,
    TRANSLATION,
)
from pipeline.models.phi4.tiny import save_adapter, write_json
from pipeline.models.phi4.tokenizer import (
    ASSISTANT,
    END,
    END_OF_TEXT,
    PICTURE,
    SOUND,
    SYSTEM,
    USER,
    Phi4Tokenizer,
)

MAX_TOKENS = 1_024
"""Tokens of the vocabulary, at most, with the special ones."""

_SPECIAL_TOKENS = (END_OF_TEXT, END, USER, ASSISTANT, SYSTEM, PICTURE, SOUND)
_INSTRUCTION_WEIGHT = 400
# Words with the space before them, digits one by one, marks, spaces; GPT-2's, but for the digits.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPECIAL_CHARACTERS = ".+*?()|[]{}^$\\"

_ROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
_ORIGINAL_POSITIONS, _MAX_POSITIONS, _LARGEST_FACTOR = 4_096, 131_072, 47.77
_WIDTH, _NUM_HEADS, _NUM_KV_HEADS = 192, 6, 2

_RANKS: dict[AdapterName, int] = {"speech": 24, "vision": 16}
_EMBEDDING_SPREAD = 0.05
_POSITION_SPREAD = 0.3  # of about what the patches have: what is where must not drown
_SEPARATOR_SPREAD = 0.02
_RECTIFIED_GAIN = 2.0


def instructions(language: str) -> tuple[str, ...]:
    """Return every instruction that the model is taught, with translations to `language` (ISO 639-1)."""
    name = LANGUAGES[language].name
    return (
        TRANSCRIPTION,
        TRANSLATION.format(language=name),
        CHAINED_TRANSLATION.format(language=name),
        SOUND_SUMMARY,
        TEXT_SUMMARY,
        DESCRIPTION + BREVITY,
        DESCRIPTIONS + BREVITY,
    )


def make_tokenizer(texts: Iterable[str], language: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `texts` and of all instructions, 1,024 tokens at most.

    An instruction is one piece, and so becomes one token: a prompt costs the decoder little more than what it is about.
    So is the separator of chained translations with the space before it, which is how it is drafted. All other text is
    cut at words; digits stand alone.
    """
    whole = (*sorted(instructions(language), key=len, reverse=True), f" {SEPARATOR}")
    pattern = "|".join([*map(_escape, whole), _PIECES])
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=MAX_TOKENS - len(_SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=None,
    )
    tokenizer.train_from_iterator([*texts, *(list(whole) * _INSTRUCTION_WEIGHT)], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL_TOKENS])
    return tokenizer


def _escape(text: str) -> str:
    return "".join(f"\\{character}" if character in _SPECIAL_CHARACTERS else character for character in text)


def nano_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the native `config.json` of the model that goes with `tokenizer`."""
    token = Phi4Tokenizer(tokenizer).special
    num_factors = int(_WIDTH // _NUM_HEADS * _ROPE["partial_rotary_factor"]) // 2
    factors = [round(_LARGEST_FACTOR ** (index / (num_factors - 1)), 6) for index in range(num_factors)]
    return {
        "model_type": "phi4_multimodal",
        "architectures": ["Phi4MultimodalForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": _WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": _NUM_HEADS,
        "num_key_value_heads": _NUM_KV_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": _MAX_POSITIONS,
        "original_max_position_embeddings": _ORIGINAL_POSITIONS,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": token(END_OF_TEXT),
        "pad_token_id": token(END_OF_TEXT),
        "eos_token_id": [token(END_OF_TEXT), token(END)],
        "rope_parameters": {
            **_ROPE,
            "factor": _MAX_POSITIONS / _ORIGINAL_POSITIONS,
            "original_max_position_embeddings": _ORIGINAL_POSITIONS,
            "short_factor": [1.0] * num_factors,
            "long_factor": factors,
        },
        "audio_config": {
            "model_type": "phi4_multimodal_audio",
            "hidden_size": 144,
            "intermediate_size": 288,
            "num_blocks": 4,
            "num_attention_heads": 4,
            "input_size": 80,
            "nemo_conv_channels": 48,
            "ext_pw_out_channel": 144,
            "depthwise_separable_out_channel": 144,
            "kernel_size": 3,
            "bias_max_distance": 500,
            "audio_token_id": token(SOUND),
        },
        "vision_config": {
            "model_type": "phi4_multimodal_vision",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_channels": 3,
            "image_size": 168,
            "crop_size": 168,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            "image_token_id": token(PICTURE),
        },
    }


class LowRank:
    """An adapter in teaching: `lora_A` and `lora_B` of every projection of the decoder, float32."""

    def __init__(self, config: Phi4Config, name: AdapterName, generator: torch.Generator) -> None:
        self.rank = _RANKS[name]
        self.settings = {"r": self.rank, "lora_alpha": 2 * self.rank}
        self.tensors: dict[str, nn.Parameter] = {}
        """By native key, as they are stored."""
        for key, shape in adapter_shapes(config, self.rank).items():
            # B is zero at first: the adapted model begins as the base.
            first = torch.randn(shape, generator=generator) / math.sqrt(shape[1]) if ".lora_A." in key else None
            self.tensors[key] = nn.Parameter(torch.zeros(shape) if first is None else first)

    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the adapted weights of `model.model`, by name: W + scale B A.

        At many tokens a step one product with the sum is cheaper than two small ones beside it.
        """
        scale = self.settings["lora_alpha"] / self.rank
        found = {}
        for key, down in self.tensors.items():
            if ".lora_A." not in key:
                continue
            layer = key.removesuffix(".lora_A.weight")
            base = model.get_parameter(f"{layer}.weight")
            up = self.tensors[f"{layer}.lora_B.weight"]
            found[f"{layer.removeprefix('model.')}.weight"] = torch.addmm(base, up, down, alpha=scale)
        return found


@dataclass(frozen=True, slots=True)
class Nano:
    """The model in teaching, with all that its checkpoint consists of."""

    native: dict[str, Any]
    config: Phi4Config
    tokenizer: Tokenizer
    model: Any
    """transformers' `Phi4MultimodalForCausalLM`, float32."""
    adapters: dict[AdapterName, LowRank]

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, those of the adapters behind the adapter's name; they share memory with the model."""
        tensors = {key: value for key, value in self.model.state_dict().items() if key != HEAD_KEY}
        for name, adapter in self.adapters.items():
            tensors |= {f"{name}:{key}": value.data for key, value in adapter.tensors.items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors that `state` returned."""
        with torch.no_grad():
            for key, tensor in self.state().items():
                tensor.copy_(tensors[key])


def new_model(tokenizer: Tokenizer, seed: int) -> Nano:
    """Return the model as it begins: every weight random by how many inputs it sums up, biases zero.

    With the initialisation that the classes have by themselves the model learns to speak and never to listen.
    """
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM  # noqa: PLC0415 - not in every installation

    native = nano_config(tokenizer)
    model: Any = Phi4MultimodalForCausalLM(Phi4MultimodalConfig.from_dict(native))
    model = model.float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            spread = _spread(name, parameter)
            if spread is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    for layer in model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        # Every patch sees every other; transformers 5.23 computes them causally (docs/phi4.md, trap 1).
        layer.self_attn.is_causal = False
    config = read_config(native)
    adapters: dict[AdapterName, LowRank] = {name: LowRank(config, name, generator) for name in _RANKS}
    return Nano(native, config, tokenizer, model, adapters)


def _spread(name: str, parameter: Tensor) -> float | None:
    """Return the standard deviation of a weight's first values; None for what stays as it is."""
    if "norm" in name:
        return None
    if name.endswith((".bias", "in_proj_bias", ".b1", ".b2")):
        return 0.0
    if "embed_tokens.weight" in name:
        return _EMBEDDING_SPREAD
    if name.endswith("position_embedding.weight"):
        return _POSITION_SPREAD
    if name.endswith(("bias_values.weight", "extensor")):
        return _SEPARATOR_SPREAD
    gain = _RECTIFIED_GAIN if "embed.conv" in name else 1.0
    return math.sqrt(gain / math.prod(parameter.shape[1:]))


def save_checkpoint(nano: Nano, directory: Path) -> None:
    """Write `nano` into `directory` in bfloat16, in the native layout, both adapters beside it.

    Raises:
        OSError: if it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: _rounded(value) for key, value in nano.model.state_dict().items() if key != HEAD_KEY}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for name, adapter in nano.adapters.items():
        rounded = {key: _rounded(value.data) for key, value in adapter.tensors.items()}
        save_adapter(directory / f"{name}-lora", adapter.settings, rounded)
    write_json(directory / "config.json", nano.native)
    specials = {key: nano.native[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", specials)
    nano.tokenizer.save(str(directory / "tokenizer.json"))


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.bfloat16).contiguous()
