"""Models whose checkpoint is a directory of the package: phi4-nano, once it is taught."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from actors.cli.models import show_models, verify
from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.encoders import load_encoder
from pipeline.decode.loading import load_parts
from pipeline.decode.params import DecoderParams
from pipeline.errors import ModelError, WeightsHashError
from pipeline.models import weights
from pipeline.models.inventory import list_models, verify_model
from pipeline.models.known import KNOWN_MODELS, PHI4_NANO, ShippedModel
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.tier import layout_of_files, phi4_directory, tier_of
from pipeline.models.weights import ModelParams, check_hashes, locate_model, pull_model
from pipeline.vision.frames_to_embeddings import FramesToEmbeddings
from pipeline.vision.params import VisionParams

ROOT = Path(__file__).parent.parent
NANO = ModelParams(name="phi4-nano")
READ = {
    *("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"),
    *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    *weights.ADAPTER_FILES,
}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pin_nano", ROOT / "scripts" / "pin_nano.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pins_in(path: Path) -> dict[str, tuple[str, int]]:
    values: dict[str, dict[str, tuple[str, int]]] = {}
    exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), values)  # noqa: S102 - what the script wrote
    return values["PINS"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with what teaching leaves beside it."""
    directory = make_tiny(tmp_path_factory.mktemp("taught"))
    (directory / "state").mkdir()
    (directory / "state" / "corpus.npy").write_bytes(b"sound")
    (directory / "scores.json").write_text("{}")
    return directory


@pytest.fixture
def nano(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShippedModel:
    """phi4-nano as it is once a checkpoint is in the package: a tiny one, in a folder of its own."""
    _script().pin(taught, tmp_path / "phi4_nano", tmp_path / "nano_pins.py")
    known = ShippedModel("phi4-nano", "tiny", "Apache-2.0", tmp_path / "phi4_nano", _pins_in(tmp_path / "nano_pins.py"))
    monkeypatch.setitem(KNOWN_MODELS, known.name, known)
    return known


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if path.suffix == ".json":
        content += b" "  # it stays JSON: what is none is refused before it is compared
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_shipped_model_is_known_by_name_with_its_tier_and_layout(nano: ShippedModel) -> None:
    assert tier_of(NANO) == "phi4"
    assert layout_of_files(locate_model("phi4-nano")) == "native"
    assert phi4_directory(NANO) == nano.directory
    assert phi4_directory(ModelParams(name="phi4-nano", revision="v1")) == nano.directory
    assert pull_model("phi4-nano") == locate_model("phi4-nano")
    check_hashes(locate_model("phi4-nano"))
    assert load_encoder(NANO, EncoderParams(), None).device == "cpu"


def test_it_is_listed_and_every_file_is_verified(nano: ShippedModel, capsys: pytest.CaptureFixture[str]) -> None:
    info = {info.name: info for info in list_models()}["phi4-nano"]
    assert (info.is_installed, info.tier, info.layout, info.location) == (True, "phi4", "native", str(nano.directory))
    assert info.num_bytes == sum(path.stat().st_size for path in nano.directory.rglob("*.safetensors"))
    show_models()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phi4-nano\t")]
    assert line.endswith("tier phi4, native layout")
    assert verify("phi4-nano", None) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {Path(path).relative_to(nano.directory).as_posix() for *_, path in lines} == READ
    assert {state for state, *_ in lines} == {"ok"}


@pytest.mark.parametrize("name", sorted(READ))
def test_a_changed_file_is_refused_and_named(nano: ShippedModel, name: str) -> None:
    path = nano.directory / name
    flip_a_bit(path)
    with pytest.raises(WeightsHashError, match=re.escape(str(path))) as caught:
        check_hashes(locate_model("phi4-nano"))
    assert "git restore" in str(caught.value)
    with pytest.raises(WeightsHashError, match=re.escape(str(path))):
        phi4_directory(NANO)
    report = verify_model("phi4-nano")
    assert [file.path for file in report.files if file.is_ok is False] == [path]


def test_no_stage_loads_a_changed_file(nano: ShippedModel) -> None:
    flip_a_bit(nano.directory / "vision-lora" / "adapter_model.safetensors")
    for load in (
        lambda: load_encoder(NANO, EncoderParams(), None),
        lambda: FramesToEmbeddings(NANO, VisionParams()),
        lambda: load_parts(NANO, DecoderParams()),
    ):
        with pytest.raises(WeightsHashError, match="vision-lora"):
            load()


def test_a_file_that_would_be_read_in_the_place_of_a_pinned_one_is_refused(nano: ShippedModel) -> None:
    (nano.directory / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(WeightsHashError, match=r"model\.safetensors is not one of the pinned files"):
        locate_model("phi4-nano")


def test_a_missing_file_is_named_and_the_model_not_installed(nano: ShippedModel) -> None:
    (nano.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks .*tokenizer\.json.*git restore"):
        locate_model("phi4-nano")
    assert not next(info for info in list_models() if info.name == "phi4-nano").is_installed


def test_the_model_of_this_package_is_whole_or_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if PHI4_NANO.pins:
        check_hashes(locate_model("phi4-nano"))
        files = [path for path in PHI4_NANO.directory.rglob("*") if path.is_file()]
        assert {path.relative_to(PHI4_NANO.directory).as_posix() for path in files} == {*PHI4_NANO.pins, "README.md"}
        assert sum(path.stat().st_size for path in files) < 20e6
    monkeypatch.delitem(KNOWN_MODELS, "phi4-nano", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "phi4-nano" not in {info.name for info in list_models()}
    with pytest.raises(ModelError, match=r"surtitle models teach OUT.*--model OUT.*pin_nano\.py OUT"):
        locate_model("phi4-nano")


def test_pinning_copies_what_is_read_in_place_of_what_was_there(taught: Path, tmp_path: Path) -> None:
    folder, pins = tmp_path / "phi4_nano", tmp_path / "nano_pins.py"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"of an earlier checkpoint")
    (folder / "README.md").write_text("the card")
    assert set(_script().pin(taught, folder, pins)) == READ
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert found.keys() == {*READ, "README.md"}
    assert found["README.md"].read_text() == "the card"
    assert _pins_in(pins) == {
        name: (weights.sha256_of_file(taught / name), (taught / name).stat().st_size) for name in READ
    }
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(pins)],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("what", "problem"),
    [("original", "expected phi4 in native"), ("torn", "lacks speech-lora"), ("large", "bytes: only 20000000")],
)
def test_nothing_is_changed_by_a_checkpoint_that_cannot_be_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, problem: str
) -> None:
    source = make_tiny(tmp_path / "source", layout="original" if what == "original" else "native")
    if what == "torn":
        (source / "speech-lora" / "adapter_model.safetensors").unlink()
    if what == "large":
        with (source / "tokenizer.json").open("a") as file:
            file.write(" " * 20_000_000)
    folder = tmp_path / "phi4_nano"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=problem):
        _script().pin(source, folder, tmp_path / "nano_pins.py")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not (tmp_path / "nano_pins.py").exists()


def test_a_checkout_with_a_pinned_checkpoint_knows_it(taught: Path, tmp_path: Path) -> None:
    """The script and the command line as they are run, in a copy of the package."""
    checkout = tmp_path / "checkout"
    for name in ("pipeline", "actors", "ingest", "configs", "scripts"):
        skipped = shutil.ignore_patterns("__pycache__", "phi4_nano")
        shutil.copytree(ROOT / name, checkout / name, ignore=skipped)
    environ = {**os.environ, "PYTHONPATH": str(checkout)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=checkout, env=environ, capture_output=True, text=True, check=False, timeout=60
        )

    pinned = run("scripts/pin_nano.py", str(taught))
    assert pinned.returncode == 0, pinned.stderr
    assert "there is no model card yet" in pinned.stderr
    run_cli = "from actors.cli import main; main()"
    listed = run("-c", run_cli, "models", "list")
    assert f"\n    {checkout}/pipeline/models/phi4_nano\n" in listed.stdout, listed.stderr
    assert run("-c", run_cli, "models", "verify", "phi4-nano").returncode == 0
    flip_a_bit(checkout / "pipeline" / "models" / "phi4_nano" / "model-00001-of-00003.safetensors")
    refused = run("-c", run_cli, "caption", "scripts/pin_nano.py", "--model", "phi4-nano", "--runtime", "local")
    assert refused.returncode == 1
    assert "is not the pinned file of model 'phi4-nano'" in refused.stderr
