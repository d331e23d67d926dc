"""The command line, end to end: real processes, real weights, a real embedded Redis."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import pytest

from actors.bench.wer import count_errors
from actors.cli.options import load
from pipeline.models.phi4.tiny import make_tiny
from tests.test_captions import CUE_SRT, CUE_VTT

SURTITLE = Path(sys.executable).parent / "surtitle"
TIMEOUT_S = 120
CAPTION = ("caption", "--runtime", "local")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environ(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SURTITLE_")}
    return {**kept, "XDG_DATA_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "200"}


def surtitle(environ: dict[str, str], *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(SURTITLE), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=TIMEOUT_S)


def start(environ: dict[str, str], *args: str | Path) -> subprocess.Popen[str]:
    command = [str(SURTITLE), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def records_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def said_of(records: list[dict[str, Any]], kind: str = "final") -> list[str]:
    return [record["text"] for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def captioned(environ: dict[str, str], speech: Path) -> subprocess.CompletedProcess[str]:
    """The demo speech, captioned as fast as possible to JSON lines, as stream `demo`."""
    return surtitle(environ, *CAPTION, speech, "--fast", "--format", "jsonl", "--stream-id", "demo", "--summary")


def test_speech_becomes_records_and_nothing_else_is_on_stdout(
    captioned: subprocess.CompletedProcess[str], speech: Path
) -> None:
    assert captioned.returncode == 0, captioned.stderr
    records = records_of(captioned.stdout)
    assert [records[0]["event"], records[-1]["event"]] == ["started", "ended"]
    assert len(said_of(records)) >= 8
    assert [record["sequence"] for record in records if record["kind"] == "final"] == list(
        range(1, len(said_of(records)) + 1)
    )
    assert [record["scope"] for record in records if record["kind"] == "summary"] == ["closing"]
    errors = count_errors(speech.with_suffix(".txt").read_text(), " ".join(said_of(records)), "en")
    assert errors.rate <= 0.05, said_of(records)


def test_the_end_says_how_quick_it_was_and_how_to_see_it_in_redis(
    captioned: subprocess.CompletedProcess[str], home: Path
) -> None:
    assert re.search(r"first text \d+\.\d s after the start", captioned.stderr)
    assert "surtitle watch demo" in captioned.stderr
    assert f"unix://{home}" in captioned.stderr
    assert "surtitle:{demo}:transcripts" in captioned.stderr


def test_watch_shows_an_ended_stream_again_from_redis(
    captioned: subprocess.CompletedProcess[str], environ: dict[str, str]
) -> None:
    watched = surtitle(environ, "watch", "demo", "--format", "jsonl")
    assert watched.returncode == 0, watched.stderr
    finals = [record for record in records_of(captioned.stdout) if record["kind"] == "final"]
    assert [record for record in records_of(watched.stdout) if record["kind"] == "final"] == finals
    assert "the stream ended at 00:" in watched.stderr


def test_watch_writes_text_and_caption_files(
    captioned: subprocess.CompletedProcess[str], environ: dict[str, str], tmp_path: Path
) -> None:
    said = said_of(records_of(captioned.stdout))
    text = surtitle(environ, "watch", "demo", "--format", "text").stdout.splitlines()
    assert [line.split("] ", 1)[1] for line in text if line.startswith("[")] == said
    assert all(re.match(r"\[\d\d:\d\d\.\d{3}\] ", line) for line in text if not line.startswith("summary"))

    written = surtitle(environ, "watch", "demo", "-o", tmp_path / "demo.vtt")
    assert written.stdout == ""
    header, *blocks = (tmp_path / "demo.vtt").read_text().rstrip("\n").split("\n\n")
    assert header == "WEBVTT"
    matches = [CUE_VTT.fullmatch(block) for block in blocks]
    assert " ".join(match[10].replace("\n", " ") for match in matches if match) == " ".join(said)

    srt = surtitle(environ, "watch", "demo", "--format", "srt").stdout.rstrip("\n").split("\n\n")
    assert all(CUE_SRT.fullmatch(block) for block in srt)
    assert len(srt) == len(blocks)


def test_watch_goes_on_behind_the_id_of_a_final(
    captioned: subprocess.CompletedProcess[str], environ: dict[str, str]
) -> None:
    said = said_of(records_of(captioned.stdout))
    watched = surtitle(environ, "watch", "demo", "--after", "3-1", "--format", "jsonl")
    assert said_of(records_of(watched.stdout)) == said[3:]


def test_streams_lists_what_redis_knows(captioned: subprocess.CompletedProcess[str], environ: dict[str, str]) -> None:
    num_finals = len(said_of(records_of(captioned.stdout)))
    assert re.search(rf"^demo +ended .* {num_finals} finals$", surtitle(environ, "streams").stdout, re.MULTILINE)
    listed = records_of(surtitle(environ, "streams", "--json").stdout)
    assert {"demo": "ended"}.items() <= {stream["stream_id"]: stream["state"] for stream in listed}.items()


def test_german_comes_with_its_english_below(environ: dict[str, str], media: Path) -> None:
    done = surtitle(environ, *CAPTION, media / "german.wav", "--fast", "--translate", "en", "--format", "text")
    assert done.returncode == 0, done.stderr
    german, english, *_ = done.stdout.splitlines()
    assert re.match(r"\[00:00\.\d{3}\] Guten Morgen", german)
    assert re.match(r"    en: Good morning", english)


def wait_for_partial(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        record: dict[str, Any] = json.loads(line)
        if record["kind"] == "partial":
            return record
    raise AssertionError("the stream ended without a partial")


def test_ctrl_c_makes_the_open_utterance_final_and_exits_with_0(environ: dict[str, str], media: Path) -> None:
    command = [
        str(SURTITLE),
        *CAPTION,
        str(media / "long.wav"),
        "--realtime",
        "--format",
        "jsonl",
        "--stream-id",
        "cut",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        partial = wait_for_partial(process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    records = records_of(stdout)
    final = next(record for record in records if record["kind"] == "final")
    assert (final["utterance"], final["close_reason"]) == (partial["utterance"], "end")
    assert final["text"]
    assert final["end_ms"] < 15_000
    assert records[-1]["event"] == "ended"


def test_a_reader_that_leaves_ends_the_stream_quietly(environ: dict[str, str], media: Path) -> None:
    command = [
        str(SURTITLE),
        *CAPTION,
        str(media / "long.wav"),
        "--realtime",
        "--format",
        "jsonl",
        "--stream-id",
        "left",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        wait_for_partial(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read()
        process.wait(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = """
import asyncio, os, signal
from actors.cli.interrupts import Interrupts
async def main():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        await interrupts.requested.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=TIMEOUT_S).returncode == 130


def make_empty(folder: Path) -> Path:
    path = folder / "empty.wav"
    path.write_bytes(b"")
    return path


def make_soundless(folder: Path) -> Path:
    path = folder / "soundless.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
    return path


@pytest.mark.parametrize("make", [make_empty, make_soundless])
def test_media_that_cannot_be_heard_exit_with_1_and_one_line(
    make: Any, environ: dict[str, str], tmp_path: Path
) -> None:
    path = make(tmp_path)
    done = surtitle(environ, *CAPTION, path, "--fast", "--format", "text")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("surtitle: ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("caption", "none.wav"), r"none\.wav: no such file"),
        (("caption", "/"), r"/ is a directory"),
        (("watch", "nobody"), r"no stream 'nobody' is in Redis"),
        (("watch", "demo", "--after", "yesterday"), r"'yesterday' is not a position"),
        (("config", "show", "--set", "vad.hangover_s=1"), r"did you mean hangover_ms \(milliseconds\)"),
        (("config", "check", "none.yaml"), r"none\.yaml does not exist"),
        (("streams", "--set", "redis.url=redis://127.0.0.1:1/0"), r"redis://127\.0\.0\.1:1/0"),
        (("models", "verify", "whisper-bas"), r"whisper-bas"),
        (("caption", __file__, "--model", "whisper-bas"), r"whisper-bas"),
        (("ask", "Why?", "--picture", "none.png"), r"none\.png: no such file"),
        (("ask", "Why?", "--picture", __file__, "--runtime", "local"), r"tier edge \(whisper-base\) cannot answer"),
        (("summarise", "--text", "none.txt"), r"none\.txt cannot be read: No such file"),
        (("summarise", "none.wav"), r"none\.wav: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_job_that_fails_exits_with_1_and_says_why_in_one_line(
    args: tuple[str, ...], said: str, captioned: subprocess.CompletedProcess[str], environ: dict[str, str]
) -> None:
    done = surtitle(environ, *args)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(said, line), line


@pytest.mark.parametrize(
    "args",
    [
        ("caption",),
        ("caption", __file__, "--nope"),
        ("caption", __file__, "--format", "doc"),
        ("caption", __file__, "--language", "klingonese"),
        ("caption", __file__, "--stream-id", "a b"),
        ("caption", __file__, "--format", "live", "-o", "x.txt"),
        ("ask", "Why?", *("--picture", __file__) * 5),
        ("ask",),
        ("ask", "Why?"),
        ("summarise",),
        ("summarise", "a.wav", "--text", "b.txt"),
        ("frobnicate",),
        ("bench", "live"),
    ],
    ids=lambda args: " ".join(args[-2:]),
)
def test_a_wrong_usage_exits_with_2(args: tuple[str, ...], environ: dict[str, str]) -> None:
    done = surtitle(environ, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny-phi4"))


def test_a_video_gives_scenes_too(environ: dict[str, str], media: Path, seeing_model: Path) -> None:
    done = surtitle(
        environ, *CAPTION, media / "demo.mp4", "--fast", "--scenes", "--model", seeing_model, "--format", "jsonl"
    )
    assert done.returncode == 0, done.stderr
    records = records_of(done.stdout)
    assert {"scene", "final", "health"} <= {record["kind"] for record in records}
    assert {record["tier"] for record in records if "tier" in record} == {"phi4"}


def test_questions_are_answered_on_stdout_alone(
    environ: dict[str, str], media: Path, seeing_model: Path, tmp_path: Path
) -> None:
    model = ("--model", seeing_model, "--runtime", "local")
    asked = ("ask", "What is it?", "--picture", media / "demo.mp4", *model)
    plain, as_json = surtitle(environ, *asked), surtitle(environ, *asked, "--json")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert json.loads(as_json.stdout).keys() == {"text", "language", "tier", "guard"}
    assert plain.stdout == json.loads(as_json.stdout)["text"] + "\n"
    (tmp_path / "story.txt").write_text("Once upon a time.", "utf-8")
    assert surtitle(environ, "summarise", "--text", tmp_path / "story.txt", *model).returncode == 0
    (tmp_path / "story.txt").write_bytes(b"\xff")
    refused = surtitle(environ, "summarise", "--text", tmp_path / "story.txt", *model)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is not UTF-8 text (byte 0)" in refused.stderr


def test_the_weights_are_verified(environ: dict[str, str]) -> None:
    done = surtitle(environ, "models", "verify")
    assert done.returncode == 0, done.stderr
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == {"ok"}
    assert "whisper-base\tinstalled" in surtitle(environ, "models", "list").stdout


def test_the_configuration_in_force_is_shown_with_its_origins(environ: dict[str, str]) -> None:
    shown = surtitle(
        {**environ, "SURTITLE_VAD__MODE": "1"}, "config", "show", "--config", "in-car", "--set", "runtime=ray"
    )
    assert re.search(r"^runtime: ray +# flag --set runtime$", shown.stdout, re.MULTILINE)
    assert re.search(r"^vad\.mode: 1 +# environment SURTITLE_VAD__MODE$", shown.stdout, re.MULTILINE)
    assert re.search(r"^snapshots\.cadence_ms: 320 +# .*in-car\.yaml:\d+$", shown.stdout, re.MULTILINE)
    assert re.search(r"^vad\.window_ms: 20 +# default$", shown.stdout, re.MULTILINE)
    assert surtitle(environ, "config", "check", "edge", "in-car").stdout == "edge: ok\nin-car: ok\n"


def test_a_model_given_by_flag_has_an_absolute_path_and_no_revision_of_another(seeing_model: Path) -> None:
    relative = os.path.relpath(seeing_model)
    model = load("phi4", None, None, relative).settings.model
    assert Path(model.name).is_absolute()
    assert Path(model.name).samefile(seeing_model)
    assert model.revision is None
    assert load("phi4", ["model.revision=v1"], None, "org/name").settings.model.revision == "v1"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, actors.cli; print([n for n in ('torch','ray','av','redis','pydantic','yaml') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
