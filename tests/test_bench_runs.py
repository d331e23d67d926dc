from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from actors.bench.accuracy import (
    AccuracyOptions,
    AccuracyReport,
    FileResult,
    LiveCounts,
    load_models,
    run_accuracy,
)
from actors.bench.live import LiveOptions, find_utterances, measure_live
from actors.bench.media import Clip, JoinParams, read_samples, write_wav
from actors.bench.offline import OfflineWhisper
from actors.bench.processes import watch_processes
from actors.bench.wer import WordErrors, count_errors
from actors.settings import Settings
from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.errors import MediaError
from pipeline.models.weights import ModelParams
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples
from tests.models import needs_int8
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCE = "Good morning, and welcome to the factory."


@pytest.fixture(scope="module")
def sentence(speech: Path) -> Clip:
    """The first sentence of the project's speech, about three seconds."""
    samples = read_samples(speech)
    end_ms = find_utterances(samples, VadParams())[1].last_speech_ms + 300
    return Clip("sentence.wav", "en", SENTENCE, samples[: ms_to_samples(end_ms)])


@pytest.fixture
def folder(tmp_path: Path, sentence: Clip) -> Path:
    write_wav(tmp_path / sentence.name, sentence.samples)
    entry = {"file": sentence.name, "language": "en", "text": sentence.text}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]), encoding="utf-8")
    return tmp_path


def shown(report: object) -> str:
    output = io.StringIO()
    Console(file=output, width=160).print(report)
    return output.getvalue()


def test_accuracy_compares_live_and_offline_over_files_and_joined_streams(folder: Path) -> None:
    told: list[str] = []
    options = AccuracyOptions(folder, language="given", join=JoinParams(min_seconds=3), num_joined=1)
    report = run_accuracy(options, lambda what, _done, _total: told.append(what))
    figures = json.loads(json.dumps(report.to_json()))
    assert [row["file"] for row in figures["files"]] == ["sentence.wav"]
    assert figures["live_wer"] <= 0.15
    assert figures["offline_wer"] <= 0.15
    assert re.fullmatch(r"partials in (float32|bfloat16|int8), finals in float32", figures["arithmetic"])
    assert figures["joined"][0]["num_words"] >= figures["num_words"]
    assert figures["live"]["num_finals"] >= 2
    assert figures["live"]["num_errors"] == 0
    assert 0 < figures["live"]["num_passes"] < figures["live"]["num_tokens"]
    assert told == ["loading models", "sentence.wav", "joined-1 (pauses)"]
    assert "sentence.wav" in shown(report)


@needs_int8
def test_accuracy_is_that_of_the_arithmetic_that_a_service_chooses(tmp_path: Path) -> None:
    model = ModelParams(name=str(save_tiny(tmp_path)), device="cpu")
    models = load_models(Settings(model=model))
    assert models.encoder.partial_dtype == models.engine.partial_dtype
    assert models.engine.partial_dtype in {"int8", "bfloat16"}
    assert models.encoder.final_dtype == models.engine.final_dtype == "float32"


async def test_live_plays_streams_through_the_service_and_loses_nothing(folder: Path) -> None:
    options = LiveOptions(folder / "sentence.wav", num_streams=2, settings=Settings(runtime="local"))
    report = await measure_live(options)
    figures = json.loads(json.dumps(report.to_json()))
    assert figures["streams"] == 2
    assert re.fullmatch(r"partials in \w+, finals in float32|encoder: .*; decoder: .*", figures["arithmetic"])
    assert figures["finals_lost"] == 0
    assert figures["num_finals"] == 2
    assert figures["num_streams_failed"] == 0
    assert figures["wer"] <= 0.15
    assert figures["cpu_s_per_audio_s"] > 0
    for name in ("first_word_ms", "emission_lag_ms", "commit_lag_ms", "finalisation_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p95"] < 60_000, name
    assert set(figures["cadence_ms"]) == {"p50", "p95", "mean", "num"}
    assert "finalisation" in shown(report)


def test_figures_in_all_are_over_english_recordings_only() -> None:
    def row(name: str, language: str, live: WordErrors, offline: WordErrors) -> FileResult:
        return FileResult(name, language, 1.0, live, offline, (), (), (language,), language, LiveCounts())

    ten = WordErrors(num_reference_words=10)
    report = AccuracyReport(
        model="m",
        arithmetic="partials in int8, finals in float32",
        language="auto",
        files=(
            row("a", "en", WordErrors(1, 0, 0, 10), ten),
            row("b", "en", WordErrors(0, 1, 1, 30), WordErrors(1, 0, 0, 30)),
            row("c", "de", WordErrors(9, 0, 0, 10), ten),
        ),
        joined=(row("j", "en", WordErrors(0, 5, 0, 50), ten),),
    )
    figures = report.to_json()
    assert (figures["live_wer"], figures["offline_wer"]) == (0.075, 0.025)
    assert (figures["joined_live_wer"], figures["joined_offline_wer"]) == (0.1, 0.0)
    assert "+5.00 points" in shown(report)


def test_accuracy_without_english_recordings_says_so(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(1_600, np.int16))
    (tmp_path / "manifest.json").write_text('[{"file": "a.wav", "language": "de", "text": "ja"}]', encoding="utf-8")
    with pytest.raises(MediaError, match="no English recording"):
        run_accuracy(AccuracyOptions(tmp_path))


def test_every_utterance_is_found_with_its_first_and_last_speech(speech: Path) -> None:
    samples = read_samples(speech)
    utterances = find_utterances(samples, VadParams())
    times = [utterances[number] for number in range(1, len(utterances) + 1)]
    assert len(times) >= 5
    assert all(time.onset_ms < time.last_speech_ms for time in times)
    assert all(a.last_speech_ms <= b.onset_ms for a, b in pairwise(times))
    assert find_utterances(np.zeros(16_000, np.int16), VadParams()) == {}


def test_long_sound_is_transcribed_in_windows_that_lose_nothing_between(speech: Path) -> None:
    result = OfflineWhisper(ModelParams()).transcribe(read_samples(speech)[: 31 * SAMPLE_RATE_HZ], None)
    assert result.num_windows >= 2
    assert result.language == "en"
    said = " ".join(speech.with_suffix(".txt").read_text(encoding="utf-8").split()[:70])
    assert count_errors(said, result.text, "en").num_deletions <= 10


async def test_the_time_of_child_processes_is_counted() -> None:
    program = "import time\nwhile time.process_time() < 0.8: pass"
    async with watch_processes([]) as nobody, watch_processes([os.getpid()]) as usage:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=subprocess.DEVNULL)
        await child.wait()
    assert usage.cpu_s >= 0.25
    assert usage.peak_private_bytes > 0
    assert nobody.cpu_s == 0.0
