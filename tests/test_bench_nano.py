"""`surtitle bench phi4 --nano` on a checkpoint of the nano's shape that was taught nothing: figures, JSON, exit codes.

Its texts are noise, so guards are off where drafts are to be seen: a text that a guard has cut is no draft.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from actors import speech_tools
from actors.bench import nano as bench
from actors.bench.decode_report import SeriesResult
from actors.bench.nano import NanoOptions, in_one_breath, run_nano
from actors.bench.nano_report import DraftDifference, LiveDifference, NanoReport, SpokenSeries
from actors.bench.nano_streams import LIMITS, StreamOptions
from actors.cli.app import app
from actors.cli.options import load
from actors.settings import Settings
from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import DecoderParts
from pipeline.decode.runner import Pick, Row, RowResult
from pipeline.errors import MediaError, ModelError
from pipeline.models.phi4.runner import Phi4Runner, load_parts
from pipeline.models.phi4.tokenizer import END, Phi4Tokenizer
from pipeline.models.weights import ModelParams
from pipeline.teach.evaluate import Scores
from pipeline.teach.language import texts_of_world
from pipeline.teach.model import make_tokenizer, new_model, save_checkpoint
from pipeline.teach.world import is_held_out
from tests.models import NO_GUARDS
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = (
    *("wer_seen", "wer_held_out_voice", "wer_noise_10db", "translation_exact", "description_right"),
    *("spoken_question_right", "passes_with_drafts", "passes_without_drafts", "tokens_equal", "live_equals_offline"),
    "largest_streams",
)
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that hardly look back or listen, and that like to end: texts of a series resemble each other."""
    folder = tmp_path_factory.mktemp("nano") / "model"
    tokenizer = make_tokenizer(texts_of_world(random.Random(1), 100), "de")
    nano = new_model(tokenizer, seed=10)  # of eight that were tried, one whose texts have about twenty tokens
    with torch.no_grad():
        for name, parameter in nano.model.named_parameters():
            if "down_proj_for_speech" in name:
                parameter.mul_(0.001)
            elif name.startswith("model.layers.") and "o_proj" in name:
                parameter.mul_(0.03)
        nano.model.model.embed_tokens.weight[Phi4Tokenizer(tokenizer).special(END)] *= 2.5
    save_checkpoint(nano, folder)
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    loaded = load("phi4", [], None, str(folder)).settings
    guards = NO_GUARDS.model_copy(update={"max_tokens": MAX_TOKENS, "min_token_cap": MAX_TOKENS})
    short = {"max_description_tokens": MAX_TOKENS, "max_summary_tokens": MAX_TOKENS, "max_answer_tokens": MAX_TOKENS}
    decoder = loaded.decoder.model_copy(update={"guards": guards, "slot_tokens": 1_024, **short})
    return loaded.model_copy(update={"decoder": decoder})


@pytest.fixture(scope="module")
def report(settings: Settings) -> NanoReport:
    return run_nano(NanoOptions(settings, num_items=2, num_threads=1))


def scores(num_items: int = 4, wer_seen: float | None = 0.01) -> Scores:
    return Scores(num_items, wer_seen, 0.05, 0.02, 1.0, 1.0, 1.0, 0.75, 1.0, 0.5)


def made_up(**changes: Any) -> NanoReport:
    return NanoReport(**{
        "model": "m", "num_threads": 1, "seed": 1, "scores": scores(), "sweep": None,
        "live_differences": (), "draft_differences": (),
        "series": {3: SpokenSeries(2, 11.0, SeriesResult(7, 40, 10, 35, 4, 12))}, "seconds": 9.5, **changes,
    })  # fmt: skip


def shown(report: object) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(report)
    return output.getvalue()


# Figures


def test_all_figures_are_there_and_drafts_change_passes_and_no_token(report: NanoReport) -> None:
    figures = json.loads(json.dumps(report.to_json()))
    assert set(KEYS) <= set(figures)
    assert all(figures[key] is not None for key in KEYS if key != "largest_streams")
    assert (figures["num_items"], figures["dtype"], figures["device"], figures["largest_streams"]) == (
        2, "float32", "cpu", None,
    )  # fmt: skip
    assert figures["wer_seen"] > 0.5, "nobody taught it"
    assert figures["description_right"] == figures["spoken_question_right"] == 0
    assert figures["tokens_equal"] is True
    assert list(figures["series_by_sentences"]) == ["1", "2", "3"]
    for name, value in figures["series_by_sentences"]["3"].items():
        assert figures[name] == value
    assert figures["num_snapshots"] > 5 * figures["num_utterances"] == 5
    assert figures["passes_with_drafts"] < figures["passes_without_drafts"]
    assert figures["live_equals_offline"] == 1 - len(figures["live_differences"]) / 2


def test_the_same_seed_gives_the_same_figures_and_steps_are_told_in_order(
    settings: Settings, report: NanoReport
) -> None:
    told: list[tuple[int, int]] = []
    again = run_nano(
        NanoOptions(settings, num_items=2, num_threads=1),
        lambda _what, num_done, num_all: told.append((num_done, num_all)),
    )
    assert told == [(done, len(told)) for done in range(len(told))]
    assert {**again.to_json(), "seconds": 0} == {**report.to_json(), "seconds": 0}


def test_sentences_are_held_out_and_another_seed_has_others(settings: Settings) -> None:
    drawn = {seed: bench._Bench(NanoOptions(settings, 3, seed, 1), print) for seed in (1, 2)}
    texts = {seed: [one._draw_speech("live", k, 1)[0] for k in range(3)] for seed, one in drawn.items()}
    assert all(is_held_out(text) for found in texts.values() for text in found)
    assert texts[1] != texts[2]


def test_pauses_between_sentences_are_cut_to_a_breath_and_those_around_are_kept() -> None:
    sound, pause = np.array([5, 0, -3], np.int16), np.zeros(8_000, np.int16)
    samples = np.concatenate([pause, sound, pause, sound, pause[:4_800], sound, pause])
    cut = in_one_breath(samples)
    assert cut.tolist() == [*pause, *sound, *pause[:4_800], *sound, *pause[:4_800], *sound, *pause]
    assert not len(in_one_breath(pause[:0]))


def test_shares_and_aims_are_shown() -> None:
    differences = (LiveDifference("Belt three is hot.", "Belt is hot.", "Belt three is hot."),)
    report = made_up(live_differences=differences)
    assert report.live_equals_offline == 0.75
    assert report.longest.pass_ratio == 3.5
    text = shown(report)
    for words in ("1.0 %", "75.0 %", "3.50", "live 'Belt is hot.', offline 'Belt three is hot.'", "< 3.0 %"):
        assert words in text
    assert shown(made_up(scores=scores(wer_seen=None))), "a figure that is not there is no error"


def test_the_limits_of_streams_judge_finals_and_not_words_that_have_no_times() -> None:
    assert LIMITS.max_finalisation_p95_ms == 1_200
    assert not {"first_word", "emission_lag"} & set(LIMITS.judged)


# A decoder that is wrong is found out


class CarelessRunner(Phi4Runner):
    """Picks something else where a draft is verified."""

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        return [
            RowResult((Pick(7, -1.0), *result.picks[1:]), result.start) if len(result.picks) > 2 else result
            for result in super().run(rows)
        ]


def careless_parts(model: ModelParams, params: DecoderParams) -> DecoderParts:
    parts = load_parts(model, params)
    assert isinstance(parts.runner, Phi4Runner)
    parts.runner.__class__ = CarelessRunner
    return parts


def test_tokens_that_differ_fail_the_command_and_tell_where(
    folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load_parts", careless_parts)
    monkeypatch.setattr(bench, "NanoOptions", lambda *_args: NanoOptions(settings, num_items=1, num_threads=1))
    result = CliRunner().invoke(app, ["bench", "phi4", "--nano", "--model", str(folder), "--json"])
    assert result.exit_code == 1
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens_equal"] is False
    assert figures["differences"]
    assert "tokens differ: request 1 (" in result.stderr


def test_only_the_first_differences_are_told() -> None:
    report = made_up(draft_differences=tuple(DraftDifference(f"request {k}", k) for k in range(7)))
    assert report.told_differences()[0] == "request 0: with its draft it differs from token 1 on"
    assert report.told_differences()[5:] == ["and 2 more"]


# The command


def test_the_command_prints_json_last(folder: Path) -> None:
    arguments = ["--model", str(folder), "--items", "1", "--seed", "3", "--threads", "1", "--json"]
    result = CliRunner().invoke(app, ["bench", "phi4", "--nano", *arguments])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures["mode"], figures["seed"], figures["num_items"]) == ("nano", 3, 1)
    assert set(KEYS) <= set(figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nano", "--scaled"], "give one of"),
        (["--scaled", "--items", "3"], "--items needs --nano"),
        (["--random-weights", "--sweep"], "--sweep needs --nano"),
        (["--nano", "--max-streams", "3"], "--max-streams needs --sweep"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "phi4", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_missing_voices_are_told_before_anything_is_loaded(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bench, "Examiner", None)
    assert speech_tools.TOOLS == ("flite", "espeak-ng")
    with pytest.raises(MediaError, match="apt-get install flite espeak-ng"):
        run_nano(NanoOptions(settings))


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = ModelParams(name=str(save_tiny(tmp_path / "whisper")))
    with pytest.raises(ModelError, match="no Phi-4-multimodal checkpoint"):
        run_nano(NanoOptions(Settings(model=model)))


# Streams


def test_streams_are_played_with_speech_of_the_world(settings: Settings) -> None:
    model = settings.model.model_copy(update={"encoder_threads": 1, "decoder_threads": 1})
    options = NanoOptions(
        settings.model_copy(update={"runtime": "local", "model": model}),
        num_items=1,
        num_threads=1,
        streams=StreamOptions(
            max_streams=1,
            seconds=4.0,
            num_sentences=2,
            limits=LIMITS.model_copy(update={"max_finalisation_p95_ms": 60_000.0}),
        ),
    )
    report = run_nano(options)
    figures = json.loads(json.dumps(report.to_json()))
    assert figures["largest_streams"] == 1, figures["sweep"]
    assert "first word not judged, emission lag not judged" in shown(report)
    (played,) = figures["sweep"]["rounds"]
    assert played["num_finals"] > 0
    assert played["finals_lost"] == 0
    assert set(figures["sweep"]["largest_streams_by_limit"]) == set(LIMITS.judged)
