"""Put a taught checkpoint into the package as phi4-nano, and pin its files.

    python scripts/pin_nano.py DIR        # DIR: what `surtitle models teach DIR` wrote

Only the files that are read go into pipeline/models/phi4_nano/, in place of those of an earlier checkpoint, and the
model card README.md if DIR has one. Their hashes go into pipeline/models/nano_pins.py; the card may be edited freely.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.errors import ModelError  # noqa: E402 - of this checkout, whatever is installed
from pipeline.models.inventory import verify_model  # noqa: E402
from pipeline.models.weights import sha256_of_file  # noqa: E402

FOLDER = ROOT / "pipeline" / "models" / "phi4_nano"
PINS = FOLDER.parent / "nano_pins.py"
CARD = "README.md"
MAX_BYTES = 20_000_000
"""Of all files: they are in the repository, and in every wheel."""

_HEADER = '"""SHA-256 and size in bytes of the files of phi4-nano. Written by scripts/pin_nano.py."""\n\n'
_INDEX = "model.safetensors.index.json"


def find_files(source: Path) -> list[str]:
    """Return the paths of what is read of the checkpoint in `source`, below it.

    Raises:
        ModelError: if it is not whole, another model, or too large for the package.
    """
    report = verify_model(str(source))
    if (report.tier, report.layout) != ("phi4", "native"):
        raise ModelError(f"{source} is of tier {report.tier} in {report.layout} layout, expected phi4 in native layout")
    names = {file.path.relative_to(source).as_posix() for file in report.files}
    if "tokenizer.json" not in names:
        raise ModelError(f"{source} has no tokenizer.json")
    if "model.safetensors" not in names:
        names.add(_INDEX)
    num_bytes = sum((source / name).stat().st_size for name in names)
    if num_bytes > MAX_BYTES:
        raise ModelError(f"{source} has {num_bytes} bytes: only {MAX_BYTES} go into the package")
    return sorted(names)


def pin(source: Path, folder: Path, pins: Path) -> list[str]:
    """Copy the checkpoint in `source` into `folder`, write its pins, and return the paths of what is pinned.

    Raises:
        ModelError: as `find_files`; nothing was changed then.
    """
    source = source.resolve()
    names = find_files(source)
    if source == folder.resolve():
        raise ModelError(f"{source} is the package's own folder: give the directory that was taught")
    card = next((path.read_bytes() for path in (source / CARD, folder / CARD) if path.is_file()), None)
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if card is not None:
        (folder / CARD).write_bytes(card)
    lines = [
        f'    "{name}": (\n'
        f'        "{sha256_of_file(folder / name)}",\n'
        f"        {(folder / name).stat().st_size:_},\n"
        "    ),\n"
        for name in names
    ]
    pins.write_text(f"{_HEADER}PINS: dict[str, tuple[str, int]] = {{\n{''.join(lines)}}}\n", encoding="utf-8")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description="Put a taught checkpoint into the package as phi4-nano.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory: Path = parser.parse_args(arguments).directory
    try:
        names = pin(directory, FOLDER, PINS)
    except ModelError as exc:
        print(f"pin_nano: {exc}", file=sys.stderr)
        return 1
    num_bytes = sum((FOLDER / name).stat().st_size for name in names)
    print(f"{FOLDER}: {len(names)} files, {num_bytes / 1e6:.1f} MB, pinned in {PINS.name}")
    if not (FOLDER / CARD).is_file():
        print(f"pin_nano: there is no model card yet: write {FOLDER / CARD}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
