from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path

import av
import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.bench.live import LiveOptions, find_utterances, measure_live, open_bench
from actors.bench.media import read_samples, write_wav
from actors.bench.plot import check_plotting, draw_sweep
from actors.bench.rounds import Patience
from actors.bench.search import LIMIT_NAMES, SweepLimits
from actors.bench.sweep import SweepOptions, SweepReport, SweepRound, figures_of, measure_sweep
from actors.cli.app import app
from actors.service_params import ServiceParams
from actors.settings import Settings
from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.errors import ConfigError, MediaError, ServiceError
from pipeline.models.weights import ModelParams
from pipeline.timebase import ms_to_samples
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = SweepLimits(
    max_finalisation_p95_ms=60_000, max_first_word_p95_ms=60_000, max_emission_lag_p95_ms=60_000, max_wer_points=1_000
)
"""For random weights on a busy machine: what a test says about the search must not depend on speed."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> LiveOptions:
    """The first sentence of the project's speech, about three seconds, through random weights in this process."""
    folder = tmp_path_factory.mktemp("sweep")
    samples = read_samples(speech)
    end_ms = find_utterances(samples, VadParams())[1].last_speech_ms + 300
    write_wav(folder / "sentence.wav", samples[: ms_to_samples(end_ms)])
    (folder / "sentence.txt").write_text("Good morning, and welcome to the factory.", encoding="utf-8")
    model = ModelParams(name=str(save_tiny(folder / "tiny", init_std=0.6)), encoder_threads=1, decoder_threads=1)
    return LiveOptions(folder / "sentence.wav", settings=Settings(runtime="local", model=model))


@pytest.fixture(scope="module")
def swept(options: LiveOptions) -> tuple[SweepReport, list[str]]:
    """One and two streams, both within limits that are wide enough for anything."""
    told: list[str] = []
    report = asyncio.run(measure_sweep(SweepOptions(options, max_streams=2, limits=WIDE), told.append))
    return report, told


def shown(report: object) -> str:
    output = io.StringIO()
    Console(file=output, width=160).print(report)
    return output.getvalue()


def test_a_sweep_plays_its_rounds_on_one_service(swept: tuple[SweepReport, list[str]]) -> None:
    report, told = swept
    figures = json.loads(json.dumps(report.to_json()))
    assert figures["largest_streams"] == 2
    assert set(figures["largest_streams_by_limit"]) == set(LIMIT_NAMES)
    assert set(figures["largest_streams_by_limit"].values()) == {2}
    assert figures["limits"]["max_finalisation_p95_ms"] == 60_000
    assert [(played["streams"], played["num_finals"]) for played in figures["rounds"]] == [(1, 1), (2, 2)]
    assert told.count("loading the models") == 1
    for played in figures["rounds"]:
        assert (played["is_good"], played["missed"], played["finals_lost"]) == (True, [], 0)
        assert played["cpu_s_per_audio_s"] > 0
        assert played["memory_mib_peak"] >= played["memory_mib_at_start"] > 0
        for name in ("first_word_ms", "emission_lag_ms", "finalisation_ms"):
            assert 0 < played[name]["p50"] <= played[name]["p95"] < 60_000, name
    table = shown(report)
    assert "largest number within all limits: 2" in table
    assert "first word" in table


def test_a_limit_that_one_stream_misses_is_told_and_the_others_are_not_hidden(options: LiveOptions) -> None:
    limits = WIDE.model_copy(update={"max_finalisation_p95_ms": 0.001})
    report = asyncio.run(measure_sweep(SweepOptions(options, max_streams=8, limits=limits)))
    assert report.largest_streams == 0
    assert [(played.num_streams, played.missed) for played in report.rounds] == [(1, ("finalisation",))]
    assert report.largest_streams_by_limit["finalisation"] == 0
    assert report.largest_streams_by_limit["first_word"] == 1
    (row,) = [line for line in shown(report).splitlines() if line.split()[:1] == ["1"]]
    assert row.rstrip().endswith(" finalisation")


def test_the_starts_of_a_round_lie_within_one_cycle(options: LiveOptions) -> None:
    async def play() -> list[float]:
        async with open_bench(options, 2) as bench:
            started_s = asyncio.get_running_loop().time()
            report = await bench.play(2, 1_500.0)
            lasted_s = asyncio.get_running_loop().time() - started_s
        assert {stream.ended_as for stream in report.streams} == {"ended"}
        return [lasted_s, report.seconds]

    lasted_s, sound_s = asyncio.run(play())
    assert lasted_s >= sound_s + 1.5


async def test_streams_that_are_not_over_in_time_are_ended_and_the_next_round_finds_the_service_fit(
    options: LiveOptions,
) -> None:
    impatient = LiveOptions(options.media, settings=options.settings, patience=Patience(max_delay_s=-1.0))
    async with open_bench(impatient, 2) as bench:
        late = await bench.play(2, 0.0)
        late_again = await bench.play(1, 0.0)
    assert (late.num_streams_late, late.num_streams_failed, late_again.num_streams_late) == (2, 0, 1)
    assert "in_time" in SweepRound(late, ("in_time",)).missed
    assert figures_of(late).num_finals_lost == 2
    with pytest.raises(ServiceError, match="2 streams were not over -1 s after their sound"):
        await measure_live(
            LiveOptions(options.media, num_streams=2, settings=options.settings, patience=impatient.patience)
        )


async def test_a_service_whose_streams_do_not_end_is_started_anew(options: LiveOptions) -> None:
    told: list[str] = []
    hasty = LiveOptions(options.media, settings=options.settings, patience=Patience(max_delay_s=-1.0, max_stop_s=0.0))
    async with open_bench(hasty, 1, told.append) as bench:
        reports = [await bench.play(1, 0.0), await bench.play(1, 0.0)]
    assert [report.num_streams_late for report in reports] == [1, 1]
    assert told.count("loading the models") == 2


async def test_a_stream_that_is_refused_makes_its_round_a_miss(options: LiveOptions) -> None:
    settings = options.settings.model_copy(update={"service": ServiceParams(max_streams=1)})
    async with open_bench(LiveOptions(options.media, settings=settings), 1) as bench:
        report = await bench.play(3, 0.0)
    assert report.num_streams_failed == 1
    (refused,) = [stream for stream in report.streams if stream.ended_as == "refused"]
    assert "service.max_streams is 2" in refused.failure  # one, and one to warm up
    assert report.latencies.num_finals_lost == 1


def test_media_without_speech_are_told_before_the_service_starts(tmp_path: Path, options: LiveOptions) -> None:
    write_wav(tmp_path / "silence.wav", read_samples(options.media)[:8_000] // 1_000)
    with pytest.raises(MediaError, match="holds no speech"):
        asyncio.run(measure_live(LiveOptions(tmp_path / "silence.wav", settings=options.settings)))


def test_a_drawing_of_the_rounds_is_a_png(swept: tuple[SweepReport, list[str]], tmp_path: Path) -> None:
    path = tmp_path / "sweep.png"
    check_plotting(path)
    draw_sweep(swept[0], path)
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert picture.shape[0] >= 300
    assert picture.shape[1] >= 800
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14), (214, 39, 40)} <= colours  # p50, p95 and their limit


def test_a_drawing_that_cannot_be_made_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'sweep\.pdf' does not end in \.png"):
        check_plotting(tmp_path / "sweep.pdf")
    with pytest.raises(ConfigError, match="its folder must be there"):
        check_plotting(tmp_path / "nowhere" / "sweep.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"-m pip install 'surtitle\[bench\]'"):
        check_plotting(tmp_path / "sweep.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-streams", "4"], "--max-streams needs --sweep"),
        (["--plot", "a.png"], "--plot needs --sweep"),
        (["--sweep", "--streams", "4"], "--streams does not go with --sweep"),
        (["--sweep", "--stagger-ms", "0"], "--stagger-ms does not go with --sweep"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "live", "--media", "a.wav", *arguments], terminal_width=200)
    assert result.exit_code == 2
    assert message in result.output
