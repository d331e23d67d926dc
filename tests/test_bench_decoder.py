"""`surtitle bench decoder` on a tiny checkpoint through all ways, on a decoder that is wrong, and on Whisper base."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from actors.bench import decode_requests
from actors.bench import decoder as bench
from actors.bench.decode_report import DecoderReport
from actors.bench.decode_requests import CADENCE_SAMPLES, Cut, choose_cuts, find_spoken_utterances, load_recordings
from actors.bench.decoder import DecoderOptions, run_decoder
from actors.bench.generate import GenerateWhisper
from actors.bench.media import write_wav
from actors.cli.app import app
from actors.settings import Settings
from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.decode.embeddings_to_hypotheses import DecoderParams, DecoderParts
from pipeline.decode.runner import Row, RowResult
from pipeline.decode.scheduler import SchedulerParams
from pipeline.errors import MediaError, ModelError
from pipeline.models.device import Clock
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.runner import WhisperRunner, load_parts
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ
from tests.media import SCRIPT, read_pcm
from tests.models import NO_GUARDS, needs_int8
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

EOT = 50_257
PROMPT = (50_258, 50_259, 50_359, 50_363)
WAYS = {"engine", "without_drafts", "one_by_one", "one_by_one_with_drafts", "generate"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    """A random checkpoint whose end-of-text is likely enough for some texts to end by themselves, others at the cap."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), seed=1, init_std=0.5)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.embed_tokens.weight"][EOT] *= 2.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelParams(name=str(folder), device="cpu", partial_dtype="float32", decoder_threads=1)


@pytest.fixture(scope="module")
def settings(tiny: ModelParams) -> Settings:
    guards = NO_GUARDS.model_copy(update={"max_tokens": 40})
    return Settings(model=tiny, decoder=DecoderParams(guards=guards, scheduler=SchedulerParams(num_slots=2)))


@pytest.fixture(scope="module")
def short(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two sentences of the demo."""
    path = tmp_path_factory.mktemp("short") / "short.wav"
    write_wav(path, read_pcm(speech)[: 8 * SAMPLE_RATE_HZ])
    return path


def shown(report: object) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(report)
    return output.getvalue()


# On the tiny checkpoint


@pytest.fixture(scope="module")
def figures(settings: Settings, short: Path) -> dict[str, Any]:
    told: list[tuple[int, int]] = []
    options = DecoderOptions(short, num_requests=7, num_repeats=2, settings=settings)
    report = run_decoder(options, lambda _what, num_done, num_all: told.append((num_done, num_all)))
    assert told == [(done, len(told)) for done in range(len(told))]
    for words in ("transformers' generate", "against generate", "passes with drafts", "the same tokens every way"):
        assert words in shown(report)
    values: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return values


def test_all_ways_give_the_same_tokens(figures: dict[str, Any]) -> None:
    assert figures["tokens_equal"] is True
    assert figures["differences"] == []
    assert set(figures["tokens_per_s"]) == set(figures["ways"]) == WAYS
    assert len({way["num_tokens"] for way in figures["ways"].values()}) == 1
    assert (figures["num_requests"], figures["num_utterances"]) == (7, 2)
    assert 0 < figures["num_guarded"] < 7, "there are texts that end by themselves and texts that are cut"
    assert figures["num_drafts"] > 0
    assert (figures["dtype"], figures["num_threads"], figures["reduced_precision"]) == ("float32", 1, None)


def test_passes_are_a_token_each_without_drafts_and_fewer_steps_in_batches(figures: dict[str, Any]) -> None:
    ways = figures["ways"]
    one_by_one = ways["one_by_one"]
    assert one_by_one["num_passes"] == one_by_one["num_steps"] >= 7
    assert ways["without_drafts"]["num_steps"] < one_by_one["num_steps"]
    assert all(len(way["seconds"]) == 2 and 0 < way["best_s"] <= way["median_s"] for way in ways.values())


def test_ratios_are_those_of_the_tokens_per_second(figures: dict[str, Any]) -> None:
    speed = figures["tokens_per_s"]
    assert figures["speedup_vs_generate"] == pytest.approx(speed["engine"] / speed["generate"], rel=0.01)
    assert figures["speedup_of_batching"] == pytest.approx(speed["without_drafts"] / speed["one_by_one"], rel=0.01)
    assert figures["speedup_of_drafts"] == pytest.approx(speed["engine"] / speed["without_drafts"], rel=0.01)
    assert figures["passes_with_drafts"] > 0
    assert figures["num_snapshots"] <= figures["passes_without_drafts"]
    assert 0 < figures["steps_with_drafts"] <= figures["passes_with_drafts"]


@pytest.fixture(scope="module")
def plain_tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    """A random checkpoint whose texts are long."""
    return ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("plain"), init_std=0.5)), device="cpu")


def random_states(seed: int, num_positions: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((num_positions, 32)).astype(np.float32)


def test_generate_sees_exactly_the_given_positions_and_stops_where_it_is_told(plain_tiny: ModelParams) -> None:
    generate = GenerateWhisper(plain_tiny, EOT)
    embeddings = random_states(3, 120)
    tokens = generate.generate_checked(embeddings, PROMPT, 30)
    assert len(set(tokens)) > 8
    assert all(token < EOT for token in tokens)
    assert tokens == generate.generate(embeddings, PROMPT, 30)
    assert tokens[:4] == generate.generate(embeddings, PROMPT, 4)
    behind = np.concatenate([embeddings, random_states(4, 60)])
    assert generate.generate_checked(behind, PROMPT, 30) != tokens


class PaddingGenerate(GenerateWhisper):
    """Pads the encoder states to 30 s, as Whisper's own front end does with sound."""

    def generate(self, embeddings: NDArray[np.float32], prompt: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        padded = np.pad(embeddings, ((0, 1_500 - len(embeddings)), (0, 0)))
        return super().generate(padded, prompt, max_new_tokens)


class ForgetfulGenerate(GenerateWhisper):
    """Decodes every token from the beginning, without a cache."""

    def generate(self, embeddings: NDArray[np.float32], prompt: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        self._network.generation_config.use_cache = False
        return super().generate(embeddings, prompt, max_new_tokens)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(PaddingGenerate, r"contexts of \[1500\] positions"), (ForgetfulGenerate, r"120, once in each of 2 layers")],
)
def test_a_yardstick_that_does_other_work_is_refused(
    plain_tiny: ModelParams, kind: type[GenerateWhisper], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        kind(plain_tiny, EOT).generate_checked(random_states(3, 120), PROMPT, 8)


# A decoder that is wrong is found out


class LeakyRunner(WhisperRunner):
    """Gives a row its neighbour's result when two of the same kind run together: state leaks between requests."""

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        results = super().run(rows)
        if len(rows) == 2 and [len(results[0].picks), len(results[1].picks)] == [1, 1]:
            return [RowResult(results[1].picks, results[0].start), RowResult(results[0].picks, results[1].start)]
        return results


def leaky_parts(model: ModelParams, num_slots: int, clock: Clock) -> DecoderParts:
    parts = load_parts(model, num_slots, clock)
    assert isinstance(parts.runner, WhisperRunner)
    parts.runner.__class__ = LeakyRunner
    return parts


def run_command(settings: Settings, *arguments: str) -> Any:
    guards = [f"decoder.guards.{key}={value}" for key, value in settings.decoder.guards.model_dump().items()]
    sets = [f"model.name={settings.model.name}", "model.device=cpu", "model.decoder_threads=1", *guards]
    flags = [part for text in sets for part in ("--set", text)]
    return CliRunner().invoke(app, ["bench", "decoder", "--json", "--repeats", "1", *arguments, *flags])


def test_the_command_prints_json_last_and_succeeds(settings: Settings, short: Path) -> None:
    result = run_command(settings, "--media", str(short), "--requests", "2")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["tokens_equal"] is True


def test_tokens_that_differ_are_a_failure_that_names_the_request(
    settings: Settings, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load_parts", leaky_parts)
    result = run_command(settings, "--media", str(short), "--requests", "2")
    assert result.exit_code == 1
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens_equal"] is False
    assert {item["way"] for item in figures["differences"]} >= {"without_drafts"}
    # Alone, no request has a neighbour.
    assert not {item["way"] for item in figures["differences"]} & {"generate", "one_by_one", "one_by_one_with_drafts"}
    assert "tokens differ: request 1 (" in result.stderr
    assert "utterance 1 of short.wav" in result.stderr


def run_two(settings: Settings, media: Path, **changes: object) -> DecoderReport:
    settings = settings.model_copy(update={"model": settings.model.model_copy(update=changes)})
    return run_decoder(DecoderOptions(media, num_requests=2, num_repeats=1, settings=settings))


def test_texts_that_are_others_in_reduced_precision_are_a_figure_and_no_failure(
    settings: Settings, short: Path
) -> None:
    report = run_two(settings, short, partial_dtype="bfloat16")
    figures = report.to_json()
    assert (figures["tokens_equal"], figures["dtype"]) == (True, "float32")
    reduced = figures["reduced_precision"]
    assert reduced["dtype"] == "bfloat16"
    assert reduced["tokens_per_s"] > 0
    num_others = round(2 * reduced["different_share"])
    assert f"in bfloat16 {num_others} of 2 texts are others" in shown(report)


@needs_int8
def test_by_itself_the_reduced_precision_is_what_a_service_would_choose(settings: Settings, short: Path) -> None:
    figures = run_two(settings, short, partial_dtype="auto").to_json()
    assert figures["reduced_precision"]["dtype"] in {"int8", "bfloat16"}
    assert (figures["tokens_equal"], figures["dtype"]) == (True, "float32")


def test_by_itself_the_decoder_has_all_cores(settings: Settings, short: Path) -> None:
    report = run_two(settings, short, decoder_threads=0)
    assert report.num_threads == torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_a_missing_transformers_is_told_with_the_command_that_brings_it(
    tiny: ModelParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without_transformers(name: str) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_transformers)
    with pytest.raises(ModelError, match=r"pip install -e '.\[bench\]'"):
        GenerateWhisper(tiny, EOT)


# Which requests


def test_requests_are_utterances_then_different_prefixes_at_chunk_boundaries(speech: Path) -> None:
    (clip,) = load_recordings(speech)
    utterances = find_spoken_utterances(clip, VadParams())
    num_whole = len(utterances)
    cuts = choose_cuts(utterances, num_whole + 20, seed=1)
    places = [(cut.utterance.number, cut.end_sample) for cut in cuts]
    assert len(set(places)) == num_whole + 20
    assert all(cut.end_sample == cut.utterance.end_sample for cut in cuts[:num_whole])
    for cut in cuts[num_whole:]:
        assert cut.end_sample % CHUNK_SAMPLES == 0
        assert cut.end_sample < cut.utterance.end_sample
        assert cut.previous is not None
        assert cut.end_sample - cut.previous.end_sample == CADENCE_SAMPLES
    assert places == [(cut.utterance.number, cut.end_sample) for cut in choose_cuts(utterances, num_whole + 20, seed=1)]
    other = choose_cuts(utterances, num_whole + 20, seed=2)
    assert places != [(cut.utterance.number, cut.end_sample) for cut in other]
    few = choose_cuts(utterances, 3, seed=1)
    assert len({cut.utterance.number for cut in few}) == 3


def test_too_few_different_requests_are_told(short: Path) -> None:
    (clip,) = load_recordings(short)
    utterances = find_spoken_utterances(clip, VadParams())
    with pytest.raises(MediaError, match=r"give \d+ different requests, 500 were asked for"):
        choose_cuts(utterances, 500, seed=1)


def test_a_series_ends_every_640_ms_of_speech_and_at_the_end(speech: Path) -> None:
    (clip,) = load_recordings(speech)
    for utterance in find_spoken_utterances(clip, VadParams()):
        *ends, last = utterance.series_ends()
        assert last == utterance.end_sample
        assert len(Cut(utterance, last).samples) == len(utterance.samples)
        assert CADENCE_SAMPLES <= ends[0] - utterance.onset_sample < CADENCE_SAMPLES + CHUNK_SAMPLES
        assert all(b - a == CADENCE_SAMPLES for a, b in pairwise(ends))
        assert ends[-1] < utterance.last_speech_sample <= ends[-1] + CADENCE_SAMPLES


def test_a_folder_gives_the_recordings_of_its_manifest(short: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(short.read_bytes())
    (tmp_path / "manifest.json").write_text('[{"file": "a.wav", "language": "de", "text": "x"}]', encoding="utf-8")
    (clip,) = load_recordings(tmp_path)
    assert find_spoken_utterances(clip, VadParams())[0].language == "de"


def test_without_media_the_demo_recording_is_made_where_there_is_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / "scripts"
    monkeypatch.setattr(decode_requests, "_CHECKOUT", tmp_path)
    with pytest.raises(MediaError, match="give --media FILE"):
        load_recordings(None)
    scripts.mkdir()
    (scripts / "make_media.py").write_bytes(SCRIPT.read_bytes())
    (clip,) = load_recordings(None)
    assert (clip.name, clip.language) == ("demo.wav", "en")
    assert clip.seconds > 30


# Whisper base and speech


def test_whisper_base_gives_the_same_tokens_every_way_in_fewer_passes_with_drafts(short: Path) -> None:
    settings = Settings(model=ModelParams(device="cpu", decoder_threads=1))
    figures = run_decoder(DecoderOptions(short, num_requests=2, num_repeats=1, settings=settings)).to_json()
    assert figures["tokens_equal"] is True
    assert figures["num_guarded"] == 0
    assert figures["ways"]["generate"]["num_tokens"] >= 15
    assert figures["passes_with_drafts"] * 1.5 < figures["passes_without_drafts"]
    assert figures["ways"]["engine"]["num_passes"] < figures["ways"]["without_drafts"]["num_passes"]
