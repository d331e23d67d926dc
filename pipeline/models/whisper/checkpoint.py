"""Whisper checkpoints of every layout, under one set of names.

`load_checkpoint` gives the tensors of the encoder or of the decoder as float32, named as in transformers'
`WhisperModel` (`encoder.layers.0.self_attn.q_proj.weight`, ...), whether they come from a Hugging Face checkpoint or
from a CTranslate2 binary. The names and shapes that a config implies are checked against what is there; any difference
is refused. The output projection of Whisper is the token embedding, so it has no tensor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import ModelError
from pipeline.models.tensors import find_problems
from pipeline.models.weights import ModelFiles, ModelParams, check_hashes, locate_model, read_json
from pipeline.models.whisper.ct2 import Ct2Binary

Part = Literal["encoder", "decoder"]

# OpenAI's multilingual vocabularies have 51,865 tokens (large-v3: 51,866), the English-only ones 51,864.
_MIN_MULTILINGUAL_VOCAB = 51_865
_CT2_GELU = 3


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    """Dimensions of one Whisper model, and the token lists that belong to its checkpoint.

    `alignment_heads` are the (decoder layer, head) pairs whose cross-attention follows the words in time.
    """

    num_mels: int
    width: int
    encoder_layers: int
    encoder_heads: int
    encoder_ffn: int
    decoder_layers: int
    decoder_heads: int
    decoder_ffn: int
    vocab_size: int
    max_source_positions: int
    max_target_positions: int
    alignment_heads: tuple[tuple[int, int], ...]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    is_multilingual: bool


@dataclass(frozen=True, slots=True)
class WhisperCheckpoint:
    """One part of a model: its config and its float32 tensors by canonical name."""

    config: WhisperConfig
    tensors: dict[str, torch.Tensor]


def load_checkpoint(model: ModelParams, part: Part) -> WhisperCheckpoint:
    """Locate, check and read the `part` of Whisper model `model`; the other part's tensors are not read.

    Raises:
        WeightsHashError: if a pinned file is not the right one.
        ModelError: if the model is missing, is not a Whisper checkpoint, or has missing, extra or mis-shaped tensors.
    """
    files = locate_model(model.name, model.revision)
    check_hashes(files)
    if files.layout == "ctranslate2":
        return _load_ct2(files, part)
    return _load_huggingface(files, part)


def expected_shapes(config: WhisperConfig, part: Part) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of `part`, by canonical name."""
    width = config.width
    shapes: dict[str, tuple[int, ...]] = {}
    if part == "encoder":
        shapes["encoder.conv1.weight"] = (width, config.num_mels, 3)
        shapes["encoder.conv1.bias"] = (width,)
        shapes["encoder.conv2.weight"] = (width, width, 3)
        shapes["encoder.conv2.bias"] = (width,)
        shapes["encoder.embed_positions.weight"] = (config.max_source_positions, width)
        num_layers, ffn = config.encoder_layers, config.encoder_ffn
    else:
        shapes["decoder.embed_tokens.weight"] = (config.vocab_size, width)
        shapes["decoder.embed_positions.weight"] = (config.max_target_positions, width)
        num_layers, ffn = config.decoder_layers, config.decoder_ffn
    attentions = ("self_attn",) if part == "encoder" else ("self_attn", "encoder_attn")
    for index in range(num_layers):
        layer = f"{part}.layers.{index}"
        for attention in attentions:
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes[f"{layer}.{attention}.{projection}.weight"] = (width, width)
                if projection != "k_proj":
                    shapes[f"{layer}.{attention}.{projection}.bias"] = (width,)
            shapes |= _norm_shapes(f"{layer}.{attention}_layer_norm", width)
        shapes |= _norm_shapes(f"{layer}.final_layer_norm", width)
        shapes[f"{layer}.fc1.weight"], shapes[f"{layer}.fc1.bias"] = (ffn, width), (ffn,)
        shapes[f"{layer}.fc2.weight"], shapes[f"{layer}.fc2.bias"] = (width, ffn), (width,)
    return shapes | _norm_shapes(f"{part}.layer_norm", width)


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _check_names(label: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    if problems := find_problems(found, expected):
        raise ModelError(f"the tensors of {label} are not those of its config; {'; '.join(problems)}")


# Hugging Face


def _load_huggingface(files: ModelFiles, part: Part) -> WhisperCheckpoint:
    config = _huggingface_config(files)
    expected = expected_shapes(config, part)
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path in files.weights:
        try:
            with safe_open(str(path), framework="pt") as shard:
                for stored_name in shard.keys():  # noqa: SIM118 - not a dict: it cannot be iterated
                    name = stored_name.removeprefix("model.")
                    if not name.startswith(f"{part}."):
                        continue
                    if name in shapes:
                        raise ModelError(f"tensor {name} occurs twice in {files.directory}")
                    shapes[name] = tuple(shard.get_slice(stored_name).get_shape())
                    if shapes[name] == expected.get(name):
                        tensors[name] = _as_float32(name, shard.get_tensor(stored_name))
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"cannot read {path}: {exc}. Fetch the checkpoint again") from exc
    _check_names(files.name, shapes, expected)
    return WhisperCheckpoint(config, tensors)


def _as_float32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in {torch.float32, torch.float16, torch.bfloat16}:
        raise ModelError(f"tensor {name} is {tensor.dtype}; only float32, float16 and bfloat16 weights are supported")
    return tensor.to(torch.float32)


def _huggingface_config(files: ModelFiles) -> WhisperConfig:
    values = read_json(files.config)
    fixed = {
        "model_type": "whisper",
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
    }
    for key, wanted in fixed.items():
        if values.get(key, wanted) != wanted or (key == "model_type" and key not in values):
            raise ModelError(f"{files.config}: {key} is {values.get(key)!r}, only {wanted!r} is supported")
    generation = read_json(files.generation_config) if files.generation_config is not None else {}
    lists = {key: generation.get(key, values.get(key)) for key in ("suppress_tokens", "begin_suppress_tokens")}
    heads = generation.get("alignment_heads", values.get("alignment_heads"))
    vocab_size = _dimension(values, "vocab_size", files.config)
    return _checked(
        WhisperConfig(
            num_mels=_dimension(values, "num_mel_bins", files.config),
            width=_dimension(values, "d_model", files.config),
            encoder_layers=_dimension(values, "encoder_layers", files.config),
            encoder_heads=_dimension(values, "encoder_attention_heads", files.config),
            encoder_ffn=_dimension(values, "encoder_ffn_dim", files.config),
            decoder_layers=_dimension(values, "decoder_layers", files.config),
            decoder_heads=_dimension(values, "decoder_attention_heads", files.config),
            decoder_ffn=_dimension(values, "decoder_ffn_dim", files.config),
            vocab_size=vocab_size,
            max_source_positions=_dimension(values, "max_source_positions", files.config),
            max_target_positions=_dimension(values, "max_target_positions", files.config),
            alignment_heads=_pairs(heads, files.config),
            suppress_tokens=_tokens(lists["suppress_tokens"], files.config),
            begin_suppress_tokens=_tokens(lists["begin_suppress_tokens"], files.config),
            is_multilingual=generation.get("is_multilingual", vocab_size >= _MIN_MULTILINGUAL_VOCAB) is True,
        ),
        files.name,
    )


# CTranslate2

# What the layers of the CTranslate2 spec are called in transformers. A fused linear layer has one name per part.
_CT2_LAYER: dict[str, tuple[str, ...]] = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_CT2_TOP: dict[str, str] = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
_CT2_ENDING = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def _load_ct2(files: ModelFiles, part: Part) -> WhisperCheckpoint:
    binary = Ct2Binary.open(files.weights)
    if (binary.spec_name, binary.spec_revision) != ("WhisperSpec", 3):
        raise ModelError(
            f"{files.name} is {binary.spec_name!r} revision {binary.spec_revision}, expected 'WhisperSpec' revision 3"
        )
    config = _ct2_config(files, binary)
    tensors: dict[str, torch.Tensor] = {}
    for name, variable in binary.variables.items():
        if not name.startswith(f"{part}/") or not variable.shape:
            continue  # rank 0: settings, read by _ct2_config
        if not variable.dtype.is_floating_point:
            raise ModelError(
                f"{files.name}: {name} is {variable.dtype}; quantised models are not supported, use float16"
            )
        tensors |= _canonical(name, binary.tensor(name))
    for name in [name for name in tensors if name.endswith("k_proj.bias")]:
        if tensors.pop(name).any():
            raise ModelError(f"{files.name}: {name} is not zero, but Whisper's keys have no bias")
    _check_names(
        files.name, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected_shapes(config, part)
    )
    return WhisperCheckpoint(config, tensors)


def _canonical(ct2_name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors, by canonical name, that CTranslate2 keeps as variable `ct2_name`."""
    part, rest = ct2_name.split("/", 1)
    if rest in _CT2_TOP:
        return {f"{part}.{_CT2_TOP[rest]}": tensor}
    layer, _, inner = rest.partition("/")
    module, _, ending = inner.rpartition("/")
    index = layer.removeprefix("layer_")
    targets = _CT2_LAYER.get(module, ())
    if not index.isdigit() or ending not in _CT2_ENDING or not targets or len(tensor) % len(targets):
        return {ct2_name: tensor}  # unknown: told as unexpected by the check of names
    pieces = tensor.chunk(len(targets))
    return {
        f"{part}.layers.{index}.{target}.{_CT2_ENDING[ending]}": piece.contiguous()
        for target, piece in zip(targets, pieces, strict=True)
    }


def _ct2_config(files: ModelFiles, binary: Ct2Binary) -> WhisperConfig:
    values = read_json(files.config)
    _check_setting(files, binary, "decoder/pre_norm", 1)
    _check_setting(files, binary, "decoder/activation", _CT2_GELU)
    _check_setting(files, binary, "decoder/scale_embeddings", 0)
    if binary.aliases.get("decoder/projection/weight") != "decoder/embeddings/weight":
        raise ModelError(f"{files.name}: the output projection is not the token embedding; this is not supported")
    width, num_mels, _ = _shape(files, binary, "encoder/conv1/weight", 3)
    vocab_size, _ = _shape(files, binary, "decoder/embeddings/weight", 2)
    return _checked(
        WhisperConfig(
            num_mels=num_mels,
            width=width,
            encoder_layers=_count_layers(binary, "encoder"),
            encoder_heads=int(binary.scalar("encoder/num_heads")),
            encoder_ffn=_shape(files, binary, "encoder/layer_0/ffn/linear_0/weight", 2)[0],
            decoder_layers=_count_layers(binary, "decoder"),
            decoder_heads=int(binary.scalar("decoder/num_heads")),
            decoder_ffn=_shape(files, binary, "decoder/layer_0/ffn/linear_0/weight", 2)[0],
            vocab_size=vocab_size,
            max_source_positions=_shape(files, binary, "encoder/position_encodings/encodings", 2)[0],
            max_target_positions=_shape(files, binary, "decoder/position_encodings/encodings", 2)[0],
            alignment_heads=_pairs(values.get("alignment_heads"), files.config),
            suppress_tokens=_tokens(values.get("suppress_ids"), files.config),
            begin_suppress_tokens=_tokens(values.get("suppress_ids_begin"), files.config),
            is_multilingual=vocab_size >= _MIN_MULTILINGUAL_VOCAB,
        ),
        files.name,
    )


def _check_setting(files: ModelFiles, binary: Ct2Binary, name: str, wanted: int) -> None:
    value = binary.scalar(name)
    if value != wanted:
        raise ModelError(f"{files.name}: {name} is {value}, only {wanted} is supported")


def _shape(files: ModelFiles, binary: Ct2Binary, name: str, rank: int) -> tuple[int, ...]:
    variable = binary.variables.get(name)
    if variable is None or len(variable.shape) != rank:
        found = "missing" if variable is None else f"of shape {list(variable.shape)}"
        raise ModelError(f"{files.name}: {name} is {found}, expected {rank} dimensions")
    return variable.shape


def _count_layers(binary: Ct2Binary, part: Part) -> int:
    return len(
        {name.split("/")[1] for name in binary.variables if name.startswith(f"{part}/layer_") and name.count("/") > 2}
    )


# Values of JSON files: anybody can have written them


def _checked(config: WhisperConfig, label: str) -> WhisperConfig:
    for heads in (config.encoder_heads, config.decoder_heads):
        if heads < 1 or config.width % heads:
            raise ModelError(f"{label}: width {config.width} cannot be divided among {heads} attention heads")
    heads_found = config.alignment_heads or tuple(
        (layer, head)
        for layer in range(config.decoder_layers // 2, config.decoder_layers)
        for head in range(config.decoder_heads)
    )  # OpenAI's default for models without a list: all heads of the upper half
    for layer, head in heads_found:
        if layer >= config.decoder_layers or head >= config.decoder_heads:
            raise ModelError(f"{label}: alignment head ({layer}, {head}) does not exist")
    for token in (*config.suppress_tokens, *config.begin_suppress_tokens):
        if token >= config.vocab_size:
            raise ModelError(f"{label}: suppressed token {token} is not in the vocabulary of {config.vocab_size}")
    return replace(config, alignment_heads=heads_found)


def _dimension(values: dict[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000:
        raise ModelError(f"{path}: {key} is {value!r}, expected a whole number from 1 to 1,000,000")
    return value


def _tokens(value: object, path: Path) -> tuple[int, ...]:
    return tuple(token for token in _whole_numbers(value if value is not None else [], path) if token >= 0)


def _pairs(value: object, path: Path) -> tuple[tuple[int, int], ...]:
    pairs = value if isinstance(value, list) else []
    numbers = [tuple(_whole_numbers(pair, path)) for pair in pairs]
    if any(len(pair) != 2 or min(pair) < 0 for pair in numbers):
        raise ModelError(f"{path}: alignment_heads has an entry that is not a pair of layer and head")
    return tuple((pair[0], pair[1]) for pair in numbers)


def _whole_numbers(value: object, path: Path) -> Iterator[int]:
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise ModelError(f"{path}: {str(value)[:80]!r} is not a list of whole numbers")
    return iter(value)
