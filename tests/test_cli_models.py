"""`surtitle models` about checkpoints of the phi4 tier."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.models.phi4.checkpoint import load_config, load_part
from pipeline.models.phi4.keys import ADAPTERS, PARTS, adapter_shapes, expected_shapes, unused_shapes
from pipeline.models.phi4.tiny import Layout, make_tiny
from pipeline.models.weights import ADAPTER_FILES, locate_model

SURTITLE = Path(sys.executable).parent / "surtitle"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def models(*args: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [str(SURTITLE), "models", *map(str, args)]
    values = {**os.environ, "COLUMNS": "200", **environ}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=values, timeout=120)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def lines_of(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("layout", ["native", "original"])
def test_a_tiny_checkpoint_is_written_and_told(tmp_path: Path, layout: Layout) -> None:
    directory = tmp_path / "new" / "tiny"
    done = models("make-tiny", directory, "--layout", layout, "--seed", "7")
    assert done.returncode == 0, done.stderr
    expected = contents(make_tiny(tmp_path / "expected", seed=7, layout=layout))
    assert contents(directory) == expected
    assert {Path(path): int(size) for size, path in lines_of(done)} == {
        directory / name: len(content) for name, content in expected.items()
    }
    config = load_config(directory)
    shapes = [expected_shapes(config, part) for part in PARTS] + [unused_shapes(config)]
    shapes += [adapter_shapes(config, rank) for rank in (5, 4)]
    sizes = {(index, key): shape for index, each in enumerate(shapes) for key, shape in each.items()}
    del sizes[3, "lm_head.weight"]
    num_parameters = sum(_product(shape) for shape in sizes.values())
    (told,) = done.stderr.splitlines()
    assert f"tier phi4, {layout} layout, seed 7: {len(expected)} files, {num_parameters} random parameters" in told


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_a_tiny_checkpoint_may_be_written_anew_in_the_other_layout(tmp_path: Path) -> None:
    make_tiny(tmp_path / "tiny", seed=1, has_tied_embeddings=False)
    assert models("make-tiny", tmp_path / "tiny", "--layout", "original").returncode == 0
    assert contents(tmp_path / "tiny") == contents(make_tiny(tmp_path / "expected", layout="original"))
    assert not [
        tmp_path / "tiny" / f"{name}-lora" for name in ADAPTERS if (tmp_path / "tiny" / f"{name}-lora").exists()
    ]
    for part in PARTS:
        assert load_part(tmp_path / "tiny", part)


@pytest.mark.parametrize("what", ["a note", "a larger config", "a note beside it", "broken", "a file"])
def test_what_is_no_tiny_checkpoint_is_left_alone(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "there"
    if what == "a file":
        directory.write_text("mine")
    else:
        directory.mkdir()
    if what in ("a larger config", "a note beside it", "broken"):
        make_tiny(directory)
    if what in ("a note", "a note beside it"):
        (directory / "note.txt").write_text("mine")
    config = directory / "config.json"
    if what == "a larger config":
        config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 200_064}))
    if what == "broken":
        config.write_text("{")
    before = contents(tmp_path)
    done = models("make-tiny", directory)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"surtitle: {directory}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["native", "original"])
def test_every_file_is_hashed_those_of_adapters_too(tmp_path: Path, layout: Layout) -> None:
    expected = contents(make_tiny(tmp_path, layout=layout))
    del expected["model.safetensors.index.json"]
    done = models("verify", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"tier phi4, {layout} layout" in done.stderr
    told = {str(Path(path).relative_to(tmp_path)): digest for _, digest, _, path in lines_of(done)}
    assert told == {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}


def test_a_native_checkpoint_without_an_adapter_is_not_whole(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    (tmp_path / "vision-lora" / "adapter_model.safetensors").unlink()
    done = models("verify", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "lacks vision-lora/adapter_model.safetensors" in done.stderr
    # A process that needs no adapter still finds its files.
    assert len(locate_model(str(tmp_path)).adapters) == len(ADAPTER_FILES) - 1


@pytest.mark.parametrize("layout", ["native", "original"])
def test_a_checkpoint_of_the_hubs_cache_is_listed_with_tier_and_layout(tmp_path: Path, layout: Layout) -> None:
    folder = tmp_path / "models--org--tiny"
    make_tiny(folder / "snapshots" / COMMIT, layout=layout)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    done = models("list", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = {line[0]: line[-1] for line in lines_of(done) if len(line) > 1}
    assert told["org/tiny"].endswith(f"tier phi4, {layout} layout")
    assert told["whisper-base"].endswith("tier edge, ctranslate2 layout")
