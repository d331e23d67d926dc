from __future__ import annotations

import hashlib
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.models.known import KNOWN_MODELS, KnownModel, PinnedFile
from pipeline.models.weights import ModelParams, locate_model
from pipeline.models.whisper.checkpoint import Part, expected_shapes, load_checkpoint
from pipeline.models.whisper.ct2 import Ct2Binary
from tests.tiny_whisper import save_tiny, tiny_reference

PARTS: tuple[Part, ...] = ("encoder", "decoder")


def string(text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def binary_of(variables: dict[str, np.ndarray], aliases: dict[str, str], *, version: int = 6) -> bytes:
    """Write what CTranslate2's `Model.save` writes."""
    ids = {np.dtype("f4"): 0, np.dtype("i1"): 1, np.dtype("i2"): 2, np.dtype("i4"): 3, np.dtype("f2"): 4}
    out = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += [string(name), shape, struct.pack("<BI", ids[value.dtype], value.nbytes), value.tobytes()]
    out += [struct.pack("<I", len(aliases)), *(string(alias) + string(name) for alias, name in aliases.items())]
    return b"".join(out)


def small_binary() -> tuple[bytes, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    variables = {
        "a/float16": rng.standard_normal((3, 5)).astype(np.float16),
        "b/float32": rng.standard_normal((2, 2, 2)).astype(np.float32),
        "odd": np.arange(3, dtype=np.int8),  # what follows is not aligned
        "c/float32": rng.standard_normal(7).astype(np.float32),
        "scalar": np.array(8, dtype=np.int16),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    return binary_of(variables, {"again": "a/float16"}), variables


def read(*pieces: bytes) -> Ct2Binary:
    return Ct2Binary([memoryview(bytearray(piece)) for piece in pieces], "test.bin")


def test_a_binary_gives_back_what_was_written() -> None:
    data, variables = small_binary()
    binary = read(data)
    assert (binary.spec_name, binary.spec_revision, binary.aliases) == ("WhisperSpec", 3, {"again": "a/float16"})
    assert list(binary.variables) == list(variables)
    for name, value in variables.items():
        assert np.array_equal(binary.tensor(name).numpy(), value)
    assert binary.tensor("a/float16").dtype == torch.float32
    assert binary.scalar("scalar") == 8


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=4))
def test_it_does_not_matter_where_the_binary_is_cut_into_pieces(cuts: list[int]) -> None:
    data, variables = small_binary()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    binary = read(*(data[start:end] for start, end in itertools.pairwise(edges)))
    for name, value in variables.items():
        assert np.array_equal(binary.tensor(name).numpy(), value)


def test_every_truncation_is_a_model_error() -> None:
    data, _ = small_binary()
    for length in range(len(data)):
        with pytest.raises(ModelError, match=r"test\.bin"):
            read(data[:length])
    with pytest.raises(ModelError, match="1 bytes follow"):
        read(data + b"\0")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_corruption_is_a_model_error_or_changes_values_only(draw: st.DataObject) -> None:
    data, _ = small_binary()
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(data) - 1))
        patch = draw.draw(st.binary(min_size=1, max_size=4))
        damaged[at : at + len(patch)] = patch
    damaged = damaged[: len(data)]
    try:
        binary = read(bytes(damaged))
    except ModelError:
        return
    for name, variable in binary.variables.items():
        assert variable.offset + variable.num_bytes <= len(damaged)
        assert tuple(binary.tensor(name).shape) == variable.shape


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_model_error(noise: bytes, has_header: bool) -> None:
    header = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<I", 3) if has_header else b""
    with pytest.raises(ModelError):
        read(header + noise + b"\1")


def test_a_variable_cannot_claim_more_than_there_is() -> None:
    header = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<I", 3)
    huge = string("w") + struct.pack("<B2I", 2, 2**31, 2) + struct.pack("<BI", 1, 2**32 - 1)
    for body in (struct.pack("<I", 2**32 - 1), struct.pack("<I", 1) + huge):
        with pytest.raises(ModelError):
            read(header + body)


def test_another_version_is_refused() -> None:
    with pytest.raises(ModelError, match="version 5"):
        read(binary_of({}, {}, version=5))


@pytest.mark.parametrize("part", PARTS)
def test_whisper_base_has_every_tensor_of_its_part(part: Part) -> None:
    checkpoint = load_checkpoint(ModelParams(), part)
    config = checkpoint.config
    assert (config.width, config.num_mels, config.vocab_size) == (512, 80, 51_865)
    assert (config.encoder_layers, config.decoder_layers, config.encoder_heads) == (6, 6, 8)
    assert config.alignment_heads[0] == (3, 1)
    assert config.begin_suppress_tokens == (220, 50_257)
    assert config.is_multilingual
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    assert shapes == expected_shapes(config, part)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == torch.float32, name
        assert tensor.is_contiguous(), name
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize(
    ("dtype", "max_shard_size"), [("float32", "1GB"), ("float16", "1GB"), ("bfloat16", "1GB"), ("float32", "40KB")]
)
def test_a_hugging_face_directory_gives_the_same_tensors(tmp_path: Path, dtype: str, max_shard_size: str) -> None:
    save_tiny(tmp_path, max_shard_size=max_shard_size)
    stored: dict[str, torch.Tensor] = {}
    for path in locate_model(str(tmp_path)).weights:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
        save_file(tensors, path)
        stored |= tensors
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size != "1GB")
    loaded: dict[str, torch.Tensor] = {}
    for part in PARTS:
        checkpoint = load_checkpoint(ModelParams(name=str(tmp_path)), part)
        assert all(name.startswith(part) for name in checkpoint.tensors)
        assert checkpoint.config.alignment_heads == ((1, 0), (1, 3))
        assert checkpoint.config.suppress_tokens == (1, 2)
        loaded |= checkpoint.tensors
    expected = {
        name.removeprefix("model."): tensor.float() for name, tensor in stored.items() if "proj_out" not in name
    }
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def rewrite(directory: Path, change: str) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.encoder.layers.1.fc1.bias"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.encoder.layers.7.fc1.bias"] = torch.zeros(64)
    elif change == "mis-shaped":
        tensors[name] = torch.zeros(63)
    elif change == "int32":
        tensors[name] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, path)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mis-shaped", "int32"])
def test_wrong_tensors_are_named(tmp_path: Path, change: str) -> None:
    save_tiny(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=rf"{change}.*fc1\.bias|fc1\.bias.*{change}"):
        load_checkpoint(ModelParams(name=str(tmp_path)), "encoder")
    load_checkpoint(ModelParams(name=str(tmp_path)), "decoder")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "wav2vec2"),
        ("activation_function", "relu"),
        ("tie_word_embeddings", False),
        ("scale_embedding", True),
        ("d_model", "32"),
        ("d_model", None),
        ("encoder_layers", 0),
        ("encoder_layers", 10**9),
        ("encoder_attention_heads", 5),
        ("vocab_size", True),
    ],
)
def test_a_config_that_is_not_whispers_is_refused(tmp_path: Path, key: str, value: object) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=key if key != "encoder_attention_heads" else "5 attention heads"):
        load_checkpoint(ModelParams(name=str(tmp_path)), "encoder")


@pytest.mark.parametrize(
    "generation",
    [
        {"alignment_heads": [[9, 0]]},
        {"alignment_heads": [[1]]},
        {"alignment_heads": [[1, "a"]]},
        {"suppress_tokens": [10**6]},
        {"suppress_tokens": "all"},
    ],
)
def test_a_generation_config_that_does_not_fit_is_refused(tmp_path: Path, generation: dict[str, object]) -> None:
    save_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ModelError):
        load_checkpoint(ModelParams(name=str(tmp_path)), "decoder")


def test_without_alignment_heads_the_upper_half_is_used(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = load_checkpoint(ModelParams(name=str(tmp_path)), "decoder").config
    assert config.alignment_heads == ((1, 0), (1, 1), (1, 2), (1, 3))


@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_a_truncated_safetensors_file_is_a_model_error(tmp_path: Path, length: int) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_checkpoint(ModelParams(name=str(tmp_path)), "encoder")


def as_ct2(tensors: dict[str, torch.Tensor], num_heads: int) -> dict[str, np.ndarray]:
    """Name and fuse tensors as CTranslate2's Whisper converter does."""
    out: dict[str, np.ndarray] = {}

    def put(name: str, *parts: torch.Tensor) -> None:
        out[name] = torch.cat(parts).numpy().astype(np.float16)

    def put_norm(name: str, source: str) -> None:
        put(f"{name}/gamma", tensors[f"{source}.weight"])
        put(f"{name}/beta", tensors[f"{source}.bias"])

    def put_linear(name: str, *sources: str) -> None:
        weights = [tensors[f"{source}.weight"] for source in sources]
        put(f"{name}/weight", *weights)
        biases = zip(sources, weights, strict=True)
        put(f"{name}/bias", *(tensors.get(f"{source}.bias", torch.zeros(len(weight))) for source, weight in biases))

    for part in PARTS:
        out[f"{part}/num_heads"] = np.array(num_heads, dtype=np.int16)
        put(f"{part}/position_encodings/encodings", tensors[f"{part}.embed_positions.weight"])
        put_norm(f"{part}/layer_norm", f"{part}.layer_norm")
        for index in range(2):
            layer, source = f"{part}/layer_{index}", f"{part}.layers.{index}"
            put_norm(f"{layer}/self_attention/layer_norm", f"{source}.self_attn_layer_norm")
            put_linear(f"{layer}/self_attention/linear_0", *(f"{source}.self_attn.{p}_proj" for p in "qkv"))
            put_linear(f"{layer}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            if part == "decoder":
                put_norm(f"{layer}/attention/layer_norm", f"{source}.encoder_attn_layer_norm")
                put_linear(f"{layer}/attention/linear_0", f"{source}.encoder_attn.q_proj")
                put_linear(f"{layer}/attention/linear_1", *(f"{source}.encoder_attn.{p}_proj" for p in "kv"))
                put_linear(f"{layer}/attention/linear_2", f"{source}.encoder_attn.out_proj")
            put_norm(f"{layer}/ffn/layer_norm", f"{source}.final_layer_norm")
            put_linear(f"{layer}/ffn/linear_0", f"{source}.fc1")
            put_linear(f"{layer}/ffn/linear_1", f"{source}.fc2")
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}/weight", tensors[f"encoder.{name}.weight"])
        put(f"encoder/{name}/bias", tensors[f"encoder.{name}.bias"])
    put("decoder/embeddings/weight", tensors["decoder.embed_tokens.weight"])
    flags = {"decoder/pre_norm": 1, "decoder/activation": 3, "decoder/scale_embeddings": 0}
    return out | {name: np.array(value, dtype=np.int8) for name, value in flags.items()}


def install_ct2(directory: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> ModelParams:
    """Make `data` a known model, in three pieces, in a package of its own."""
    package = directory / "surtitle_test_model"
    package.mkdir()
    third = len(data) // 3 + 1
    contents = {f"model.bin.{i}": data[i * third : (i + 1) * third] for i in range(3)}
    contents |= {"config.json": b'{"alignment_heads": [[1, 2]], "suppress_ids": [1], "suppress_ids_begin": [2]}'}
    contents["tokenizer.json"] = b"{}"
    pins = {}
    for name, content in contents.items():
        (package / name).write_bytes(content)
        pins[name] = PinnedFile(package.name, name, hashlib.sha256(content).hexdigest(), len(content))
    weights = tuple(pins[f"model.bin.{i}"] for i in range(3))
    known = KnownModel(
        "tiny",
        "",
        "MIT",
        ("tiny",),
        weights,
        hashlib.sha256(data).hexdigest(),
        pins["config.json"],
        pins["tokenizer.json"],
    )
    monkeypatch.setitem(KNOWN_MODELS, "tiny", known)
    monkeypatch.syspath_prepend(str(directory))
    return ModelParams(name="tiny")


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def test_a_ctranslate2_binary_gives_the_tensors_that_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = {name: tensor.half().float() for name, tensor in tiny_reference().model.state_dict().items()}
    model = install_ct2(tmp_path, monkeypatch, binary_of(as_ct2(reference, 4), ALIASES))
    loaded: dict[str, torch.Tensor] = {}
    for part in PARTS:
        checkpoint = load_checkpoint(model, part)
        assert checkpoint.config.decoder_heads == 4
        assert checkpoint.config.alignment_heads == ((1, 2),)
        loaded |= checkpoint.tensors
    assert loaded.keys() == reference.keys()
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("encoder/layer_1/ffn/linear_0/weight", None, "missing: encoder.layers.1.fc1.weight"),
        ("encoder/layer_1/ffn/linear_0/weight_scale", np.ones(64, np.float32), "unexpected"),
        ("encoder/layer_1/ffn/linear_0/weight", np.ones((64, 31), np.float16), "mis-shaped"),
        ("encoder/layer_1/ffn/linear_0/weight", np.ones((64, 32), np.int8), "quantised"),
        ("encoder/layer_0/self_attention/linear_0/bias", np.ones(96, np.float16), "keys have no bias"),
        ("encoder/num_heads", np.array(3, np.int16), "3 attention heads"),
        ("encoder/num_heads", None, "encoder/num_heads"),
        ("decoder/pre_norm", np.array(0, np.int8), "decoder/pre_norm"),
        ("encoder/conv1/weight", np.ones((32, 80), np.float16), "encoder/conv1/weight"),
    ],
)
def test_a_ctranslate2_binary_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: np.ndarray | None, problem: str
) -> None:
    variables = as_ct2(dict(tiny_reference().model.state_dict()), 4)
    variables.pop(name, None)
    if value is not None:
        variables[name] = value
    model = install_ct2(tmp_path, monkeypatch, binary_of(variables, ALIASES))
    with pytest.raises(ModelError, match=problem):
        load_checkpoint(model, "encoder")


def test_an_untied_output_projection_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = as_ct2(dict(tiny_reference().model.state_dict()), 4)
    with pytest.raises(ModelError, match="output projection"):
        load_checkpoint(install_ct2(tmp_path, monkeypatch, binary_of(variables, {})), "decoder")
