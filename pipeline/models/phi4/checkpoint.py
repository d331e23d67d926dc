"""Reading a Phi-4-multimodal checkpoint part by part, from safetensors in the native or in the original layout.

A process that computes one part reads that part's tensors and no others. What the whole checkpoint holds is known from
the headers of its files and compared with what its config implies; every difference is refused with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import ModelError
from pipeline.models.phi4.config import Phi4Config, read_config
from pipeline.models.phi4.keys import (
    AUDIO_PROJECTION_PREFIX,
    HEAD_KEY,
    IMAGE_PROJECTION_PREFIX,
    ORIGINAL_MODEL_TYPE,
    PARTS,
    PREFIXES,
    AdapterName,
    Part,
    Shapes,
    adapter_shapes,
    expected_shapes,
    native_config,
    native_key,
    unused_shapes,
)
from pipeline.models.phi4.lora import LoraWeights
from pipeline.models.tensors import find_problems, tell_some
from pipeline.models.weights import locate_model, read_json

_DTYPES = ("F32", "F16", "BF16")
_PEFT_PREFIX = "base_model.model."
# Settings of PEFT under which an adapter is more than two matrices and one scale.
_ADAPTER_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
}


def load_config(directory: Path) -> Phi4Config:
    """Return the dimensions of the checkpoint in `directory`.

    The end tokens come from `generation_config.json` where it has them: the original `config.json` lacks one.

    Raises:
        ModelError: if a file is missing or unreadable, or asks for what is not computed here.
    """
    raw = read_json(_config_path(directory))
    try:
        native = native_config(raw) if raw.get("model_type") == ORIGINAL_MODEL_TYPE else raw
        generation = directory / "generation_config.json"
        ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
        return read_config(native if ends is None else {**native, "eos_token_id": ends})
    except ModelError as exc:
        raise ModelError(f"{directory}: {exc}") from exc


def load_part(directory: Path, part: Part) -> dict[str, torch.Tensor]:
    """Return the tensors of `part`, as stored (float32, float16 or bfloat16), by native key below `PREFIXES[part]`.

    Those of "audio" are what `ConformerEncoder` takes, those of "vision" what `SiglipEncoder` takes; those of "decoder"
    come apart in `load_decoder`. The decoder's own `lm_head.weight`, if the embeddings are not tied, keeps that name.

    Raises:
        ModelError: naming the tensors that are missing from the part, mis-shaped or of another dtype in it, or that
            belong to no part; or if a file cannot be read.
    """
    config = load_config(directory)
    expected = expected_shapes(config, part)
    known = unused_shapes(config).keys() | {key for other in PARTS for key in expected_shapes(config, other)}
    places: dict[str, _Entry] = {}
    for entry in _entries(locate_model(str(directory.resolve())).weights, is_original=_is_original(directory)):
        if entry.adapter is not None:
            continue
        if entry.key in places:
            raise ModelError(f"{directory}: tensor {entry.key} occurs twice")
        places[entry.key] = entry
    _check(str(directory), places, expected, known)
    return {
        key if key == HEAD_KEY else key.removeprefix(PREFIXES[part]): tensor
        for key, tensor in _read(places[key] for key in expected)
    }


@dataclass(frozen=True, slots=True)
class DecoderTensors:
    """The tensors of the decoder's process, as stored, by what takes them."""

    language: dict[str, torch.Tensor]
    """Below `model.`, and `lm_head.weight` if the embeddings are not tied: `Phi4Decoder`, and `embed_tokens.weight`."""
    audio_projection: dict[str, torch.Tensor]
    """Below `model.embed_tokens_extend.audio_embed.`: `AudioProjection`."""
    image_projection: dict[str, torch.Tensor]
    """Below `model.embed_tokens_extend.image_embed.`, the separators too: `VisionProjection`."""


def load_decoder(directory: Path) -> DecoderTensors:
    """Return the tensors of the part "decoder", which has the projections of both encoders.

    Raises:
        ModelError: as `load_part`.
    """
    tensors = load_part(directory, "decoder")
    prefixes = (AUDIO_PROJECTION_PREFIX, IMAGE_PROJECTION_PREFIX)
    audio, image = (_below(tensors, prefix) for prefix in prefixes)
    language = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}
    return DecoderTensors(language, audio, image)


def load_adapter(directory: Path, name: AdapterName) -> LoraWeights:
    """Return adapter `name`, its tensors as stored, by native key below `model.`.

    In the native layout it lies in the folder `<name>-lora` (keys with or without PEFT's prefix); in the original one
    among the tensors of the model, and `<name>_lora` in `config.json` tells its rank.

    Raises:
        ModelError: if a file or a setting is missing, or naming the tensors that are missing, unexpected or mis-shaped.
    """
    config, is_original = load_config(directory), _is_original(directory)
    if is_original:
        settings = read_json(_config_path(directory)).get(f"{name}_lora")
        paths: Sequence[Path] = locate_model(str(directory.resolve())).weights
        where = f"{directory}, adapter {name!r}"
    else:
        folder = directory / f"{name}-lora"
        settings = read_json(folder / "adapter_config.json")
        paths, where = (folder / "adapter_model.safetensors",), str(folder)
    rank, alpha = _adapter_settings(settings, where)
    places: dict[str, _Entry] = {}
    for entry in _entries(paths, is_original=is_original):
        if is_original and entry.adapter != name:
            continue
        key = entry.key.removeprefix(_PEFT_PREFIX)
        if key in places:
            raise ModelError(f"{where}: tensor {key} occurs twice")
        places[key] = replace(entry, key=key)
    expected = adapter_shapes(config, rank)
    _check(where, places, expected, expected.keys())
    tensors = {key.removeprefix(PREFIXES["decoder"]): tensor for key, tensor in _read(places.values())}
    return LoraWeights(tensors, alpha)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a file's header tells of one tensor."""

    path: Path
    stored_key: str
    key: str
    adapter: AdapterName | None
    shape: tuple[int, ...]
    dtype: str


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _config_path(directory: Path) -> Path:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} is not a checkpoint: it has no config.json")
    return path


def _is_original(directory: Path) -> bool:
    return read_json(_config_path(directory)).get("model_type") == ORIGINAL_MODEL_TYPE


def _adapter_settings(settings: object, where: str) -> tuple[int, float]:
    if not isinstance(settings, dict):
        raise ModelError(f"{where}: its settings are {type(settings).__name__}, expected an object")
    for key, value in _ADAPTER_FIXED.items():
        if settings.get(key, value) != value:
            raise ModelError(f"{where}: {key} is {settings[key]!r}; only {value!r} is computed here")
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise ModelError(f"{where}: {key} is set; one rank and one alpha for all projections are computed here")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"{where}: r is {rank!r}, expected a positive whole number")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise ModelError(f"{where}: lora_alpha is {alpha!r}, expected a number above 0")
    return rank, float(alpha)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as exc:
        raise ModelError(f"cannot read {path}: {exc}. Fetch the checkpoint again") from exc


def _entries(paths: Iterable[Path], *, is_original: bool) -> Iterator[_Entry]:
    """Yield what the headers tell; no tensor is read."""
    for path in paths:
        with _opened(path) as shard:
            for stored in shard.keys():  # noqa: SIM118 - not a dict: it cannot be iterated
                view = shard.get_slice(stored)
                adapter, key = native_key(stored) if is_original else (None, stored)
                yield _Entry(path, stored, key, adapter, tuple(view.get_shape()), view.get_dtype())


def _read(entries: Iterable[_Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors with their native keys; every file is opened once."""
    by_path: dict[Path, list[_Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    for path, group in by_path.items():
        with _opened(path) as shard:
            for entry in group:
                yield entry.key, shard.get_tensor(entry.stored_key)


def _check(where: str, found: dict[str, _Entry], expected: Shapes, known: Iterable[str]) -> None:
    problems = find_problems({key: entry.shape for key, entry in found.items()}, expected, set(known))
    mistyped = [
        f"{key} is {found[key].dtype}, expected one of {_DTYPES}"
        for key in sorted(expected)
        if key in found and found[key].dtype not in _DTYPES
    ]
    if mistyped:
        problems.append(f"of the wrong type: {tell_some(mistyped)}")
    if problems:
        raise ModelError(f"the tensors of {where} are not those of its config; {'; '.join(problems)}")
