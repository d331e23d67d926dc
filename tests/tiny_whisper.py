"""Whisper checkpoints of a few thousand random weights, saved by transformers: what the tests load and compare with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from pipeline.models.weights import locate_model


def tiny_reference(seed: int = 0, **overrides: object) -> WhisperForConditionalGeneration:
    """Return a random model of width 32: two layers on each side, four heads, 80 mels, windows up to 30 s."""
    settings: dict[str, object] = {
        "vocab_size": 51_865,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 80,
        "max_source_positions": 1_500,
        "max_target_positions": 64,
        "attn_implementation": "eager",
        **overrides,
    }
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As made, biases are zero and norms are one, so that mixing two of them up would go unnoticed.
            if name.endswith("bias") or "layer_norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_tiny(directory: Path, seed: int = 0, *, max_shard_size: str = "1GB", **overrides: object) -> Path:
    """Save `tiny_reference` as a checkpoint directory with the tokenizer of whisper-base; return the directory."""
    tiny_reference(seed, **overrides).save_pretrained(directory, max_shard_size=max_shard_size)
    generation = {
        "alignment_heads": [[1, 0], [1, 3]],
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [220, 50_257],
    }
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = locate_model("whisper-base").tokenizer
    assert tokenizer is not None
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    return directory
