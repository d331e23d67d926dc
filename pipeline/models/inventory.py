"""Which models are on this machine, and whether their files are the right ones: for people, not for stages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.models.known import KNOWN_MODELS, KnownModel, ShippedModel
from pipeline.models.tier import Tier, layout_of_files, tier_of_files
from pipeline.models.weights import ADAPTER_FILES, ModelFiles, locate_model, read_json, sha256_of_files

_BLOB_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `surtitle models list`. `layout` is as `layout_of_files` tells it."""

    name: str
    description: str
    licence: str
    is_installed: bool
    location: str | None
    num_bytes: int
    tier: Tier
    layout: str


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of one file's check. `is_ok` is None when nothing is known that it could be checked against."""

    path: Path
    num_bytes: int
    sha256: str
    expected_sha256: str | None

    @property
    def is_ok(self) -> bool | None:
        """Whether the file is the expected one."""
        return None if self.expected_sha256 is None else self.sha256 == self.expected_sha256


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `surtitle models verify` prints."""

    name: str
    tier: Tier
    layout: str
    files: tuple[FileReport, ...]

    @property
    def is_ok(self) -> bool:
        """Whether no file is known to be wrong."""
        return all(file.is_ok is not False for file in self.files)


def list_models() -> list[ModelInfo]:
    """Return the known models, then the checkpoints in the hub's local cache that can be loaded."""
    infos = [_info_of_known(known) for known in KNOWN_MODELS.values()]
    for name in _cached_hub_ids():
        try:
            info = _info_of_cached(name)
        except ModelError:
            continue
        if info is not None:
            infos.append(info)
    return infos


def verify_model(name: str, revision: str | None = None) -> VerifyReport:
    """Hash every file of model `name`, those of its adapters too, and compare with what is known of it.

    Known models are compared with their pins, files in the hub's cache with the hash under which the hub stores them
    (large files only), files of a local directory with nothing.

    Raises:
        ModelError: if the model cannot be located or read, or lacks an adapter.
    """
    files = locate_model(name, revision)
    tier, layout = tier_of_files(files), layout_of_files(files)
    if tier == "phi4" and layout == "native":
        _check_adapters(files)
    paths = sorted({*files.paths, *files.pins})
    reports = []
    for path, digest in zip(paths, sha256_of_files(paths), strict=True):
        blob = path.resolve().name
        expected = files.pins.get(path) or (blob if path.is_symlink() and _BLOB_SHA256.fullmatch(blob) else None)
        reports.append(FileReport(path, path.stat().st_size, digest, expected))
    return VerifyReport(name, tier, layout, tuple(reports))


def _check_adapters(files: ModelFiles) -> None:
    """In the native layout adapters are nowhere else."""
    for file in ADAPTER_FILES:
        if files.directory / file not in files.adapters:
            raise ModelError(f"{files.directory} lacks {file}: fetch the checkpoint again")


def _info_of_known(known: KnownModel | ShippedModel) -> ModelInfo:
    try:
        location: str | None = str(locate_model(known.name).directory)
    except ModelError:
        location = None
    is_shipped = isinstance(known, ShippedModel)
    return ModelInfo(
        name=known.name,
        description=known.description,
        licence=known.licence,
        is_installed=location is not None,
        location=location,
        num_bytes=known.num_weight_bytes,
        tier="phi4" if is_shipped else "edge",
        layout="native" if is_shipped else "ctranslate2",
    )


def _info_of_cached(name: str) -> ModelInfo | None:
    """Return what is known of a checkpoint in the hub's cache; None if it is another kind of model."""
    files = locate_model(name)
    tier = tier_of_files(files)
    if tier == "edge" and read_json(files.config).get("model_type") != "whisper":
        return None
    return ModelInfo(
        name=name,
        description="from the hub's cache",
        licence="see its page",
        is_installed=True,
        location=str(files.directory),
        num_bytes=sum(path.stat().st_size for path in (*files.weights, *files.adapters)),
        tier=tier,
        layout=layout_of_files(files),
    )


def _cached_hub_ids() -> list[str]:
    from huggingface_hub import constants  # noqa: PLC0415 - takes 0.3 s; only listing needs it

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*"))
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]
