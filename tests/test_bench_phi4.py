"""`surtitle bench phi4`: both ways agree on a scaled checkpoint, a wrong decoder is found out, figures add up."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from actors.bench import phi4 as bench
from actors.bench.phi4 import Phi4Options, WatchedRunner, make_sound, run_phi4
from actors.bench.phi4_capacity import Load, Speeds, project
from actors.bench.phi4_generate import GeneratePhi4
from actors.bench.phi4_model import ModelOptions, run_phi4_model
from actors.cli.app import app
from pipeline.decode.runner import Row, RowResult
from pipeline.errors import ModelError
from pipeline.models.phi4.checkpoint import load_adapter, load_config, load_part
from pipeline.models.phi4.config import read_config
from pipeline.models.phi4.keys import adapter_shapes
from pipeline.models.phi4.scaled import (
    ScaledSize,
    adapter_settings,
    checkpoint_shapes,
    make_scaled,
    real_config,
    scaled_config,
)
from pipeline.models.phi4.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ScaledSize(width=384, num_layers=2, num_blocks=1, num_vision_layers=2)
PAGE = Path(__file__).parents[1] / "docs" / "capacity.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    make_scaled(folder, SMALL)
    return folder


def small(**changes: Any) -> Phi4Options:
    return Phi4Options(**{
        "num_requests": 3, "seconds": 0.6, "num_repeats": 1, "max_new_tokens": 10, "num_threads": 1, "size": SMALL,
        **changes,
    })  # fmt: skip


# The checkpoint


def test_a_scaled_checkpoint_loads_part_by_part(folder: Path) -> None:
    config = load_config(folder)
    assert config.decoder.width == 384
    for part in ("audio", "vision", "decoder"):
        assert load_part(folder, part)
    assert [load_adapter(folder, name).rank for name in ("speech", "vision")] == [40, 32]
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode("Transcribe the audio clip into text.")
    assert len(tokens) < 36, "there are tokens of two characters"
    assert tokenizer.decode(tokens) == "Transcribe the audio clip into text."


def count(config: dict[str, Any]) -> int:
    dimensions = read_config(config)
    shapes = [checkpoint_shapes(dimensions)]
    shapes += [adapter_shapes(dimensions, settings["r"]) for settings in adapter_settings(dimensions).values()]
    return sum(int(np.prod(shape)) for found in shapes for shape in found.values())


def test_the_default_size_has_more_than_100_million_parameters_most_of_them_in_the_language_model() -> None:
    assert count(scaled_config(ScaledSize())) > 100_000_000
    layers = count(scaled_config(ScaledSize())) - count(scaled_config(ScaledSize(num_layers=1)))
    assert layers > 0.6 * count(scaled_config(ScaledSize()))


def test_the_real_dimensions_give_the_published_number_of_parameters() -> None:
    # 5,574,460,224 without the two tables of the front end's mean and deviation, which are no parameters.
    assert count(real_config()) == 5_574_460_224 + 2 * 80


def test_a_width_that_is_no_whole_groups_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 384"):
        scaled_config(ScaledSize(width=640))


# Both ways


def test_both_ways_give_the_same_varied_tokens_and_the_figures_add_up() -> None:
    told: list[tuple[int, int]] = []
    report = run_phi4(small(), lambda _what, num_done, num_all: told.append((num_done, num_all)))
    assert told == [(done, len(told)) for done in range(len(told))]
    figures: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    assert figures["tokens_equal"] is True
    assert figures["differences"] == []
    assert figures["num_tokens"] == 30
    assert figures["num_different_tokens"] > 8
    assert figures["num_threads"] == torch.get_num_threads() == 1
    ways, stages = figures["ways"], figures["stages"]
    assert figures["speedup_vs_generate"] == pytest.approx(
        ways["generate"]["best_s"] / ways["engine"]["best_s"], rel=0.01
    )
    parts = [stages[f"{name}_s"] for name in ("encoder", "prefill", "decode", "other")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(ways["engine"]["best_s"], rel=0.01)
    # The token too many is decoded before it is dropped.
    assert stages["num_passes"] == 11
    output = io.StringIO()
    Console(file=output, width=200).print(report)
    for words in ("transformers' generate, one by one", "against generate", "the same tokens both ways"):
        assert words in output.getvalue()


def test_sounds_are_different_and_loud_enough() -> None:
    generator = np.random.default_rng(1)
    first, second = make_sound(8_000, generator), make_sound(8_000, generator)
    assert first.dtype == np.int16
    assert not np.array_equal(first, second)
    assert 5_000 < np.abs(first).max() < 12_000


class LeakyRunner(WatchedRunner):
    """Gives a row its neighbour's result: state leaks between requests."""

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        results = super().run(rows)
        return results[::-1] if {len(result.picks) for result in results} == {1} else results


def test_tokens_that_differ_fail_the_command_and_tell_where_and_how_sure_the_model_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "WatchedRunner", LeakyRunner)
    monkeypatch.setattr(bench, "Phi4Options", lambda *_args, **_options: small(num_requests=2))
    result = CliRunner().invoke(app, ["bench", "phi4", "--scaled", "--json", "--repeats", "1"])
    assert result.exit_code == 1
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens_equal"] is False
    assert figures["differences"][0]["margin"] > 0
    assert "tokens differ: request 1 differs from token" in result.stderr


class ForgetfulGenerate(GeneratePhi4):
    """Decodes every token from the beginning, without a cache."""

    def generate(self, *arguments: Any) -> tuple[int, ...]:
        self._options["use_cache"] = False
        return super().generate(*arguments)


def test_a_yardstick_that_does_other_work_is_refused(folder: Path) -> None:
    config, sound = load_config(folder), make_sound(8_000, np.random.default_rng(1))
    prompt = [7, *[config.audio.placeholder_token] * 6, 8, 9]
    assert len(GeneratePhi4(folder, []).generate_checked(sound, prompt, 4)) <= 4
    with pytest.raises(ModelError, match="expected 9 and then one at a time"):
        ForgetfulGenerate(folder, []).generate_checked(sound, prompt, 4)


# The command


def test_the_command_prints_json_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Phi4Options", lambda *_args, **_options: small(num_requests=2))
    result = CliRunner().invoke(app, ["bench", "phi4", "--scaled", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["mode"] == "scaled"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--scaled", "--random-weights"], ["--scaled", "--width", "400"]],
    ids=["neither", "both", "odd width"],
)
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", "phi4", *arguments]).exit_code == 2


# Parts on random weights


def test_parts_are_measured_and_projected() -> None:
    figures = json.loads(json.dumps(run_phi4_model(ModelOptions("cpu", 1, 1, SMALL)).to_json()))
    assert (figures["device"], figures["dtype"], figures["device_bytes"]) == ("cpu", "float32", None)
    assert set(figures["weight_bytes"]) == {"audio", "vision", "decoder", "adapter speech", "adapter vision"}
    assert sum(figures["weight_bytes"].values()) == 4 * figures["num_parameters"]
    assert figures["kv_bytes_per_token"] == 2 * 2 * 1 * 128 * 4, "two layers, one key head of 128, float32"
    assert set(figures["decode_tokens_per_s"]) == {"1", "8", "64"}
    assert figures["decode_tokens_per_s"]["64"] > figures["decode_tokens_per_s"]["1"]
    projection = figures["projection"]
    assert 0 < projection["num_streams_with_video"] < projection["num_streams"]


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="finds no CUDA device"):
        run_phi4_model(ModelOptions("cuda"))


def test_a_stream_costs_what_its_parts_do() -> None:
    load = Load(speech_share=1.0, cadence_s=1.0, utterance_s=1.0, window_s=4.0, num_instruction_tokens=0)
    assert load.snapshots_per_s == 2
    assert load.num_prompt_tokens == 50 + 18
    found = project(Speeds(0.001, 10.0, 6_800.0, 800.0), load, usable_share=0.5)
    assert (found.encoder_s, found.prefill_s, found.decode_s) == pytest.approx((0.008, 0.02, 0.01))
    assert found.num_streams == pytest.approx(0.5 / 0.038)
    assert found.scenes_s == pytest.approx((0.7 + 1_596 / 6_800 + 60 / 800) / 10)


def test_the_figures_of_the_page_are_those_of_its_script_and_near_the_projection() -> None:
    page = PAGE.read_text(encoding="utf-8")
    values: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(page.split("```python\n")[1].split("```")[0], values)  # noqa: S102 - the page's own script
    captions, streams = values["captions"], values["streams"]
    for label, options in {
        "as above": {},
        "speech all the time instead of 60 %": {"speech": 1.0},
        "a partial every 1.28 s": {"cadence": 1.28},
        "a partial every 320 ms": {"cadence": 0.32},
        "windows of 2.5 s instead of 5 s": {"window": 2.5},
        "windows of 10 s, utterances of 12 s": {"window": 10.0, "utterance": 12.0},
        "the base without the speech adapter": {"lora": 0.0},
    }.items():
        assert f"| {label} | {streams(captions(**options))} |" in page
    per_token, per_pick = values["LAYERS"] + values["SPEECH"], values["OUTPUT"]
    speeds = Speeds(
        encoder_s_per_audio_s=values["SECOND"] / values["COMPUTE"],
        crops_per_s=values["COMPUTE"] / values["CROP"],
        prefill_tokens_per_s=values["COMPUTE"] / per_token,
        decode_tokens_per_s=values["COMPUTE"] / (per_token + per_pick),
    )
    found = project(speeds)
    assert found.num_streams == pytest.approx(streams(captions()), rel=0.05)
    cost = captions() + values["scene"](7, 1_596) / 10
    assert found.num_streams_with_video == pytest.approx(streams(cost), rel=0.05)
