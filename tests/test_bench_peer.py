from __future__ import annotations

import asyncio
import io
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from actors.bench.latency import Received, UtteranceTimes, measure
from actors.bench.live import find_utterances
from actors.bench.media import read_samples, write_wav
from actors.bench.peer import PeerOptions, measure_peer
from actors.bench.peer_client import play
from actors.bench.peer_measure import (
    Spoken,
    SpokenWord,
    View,
    find_seconds_behind,
    match_beginning,
    measure_views,
    time_reference,
    view_records,
)
from actors.bench.peer_process import find_address, open_peer, split_command
from actors.bench.peer_protocols import Done, Shown, WhisperLiveKit
from actors.settings import Settings
from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.errors import ConfigError, ServiceError
from pipeline.models.known import WHISPER_BASE
from pipeline.models.weights import ModelParams, sha256_of_file
from pipeline.models.whisper.checkpoint import Part, load_checkpoint
from pipeline.records import ErrorRecord, FinalRecord, PartialRecord
from pipeline.timebase import ms_to_samples
from tests.test_bench_latency import ANCHOR_MS, CAT, TIMES, final, partial

pytestmark = pytest.mark.usefixtures("one_thread")

SERVER = Path(__file__).parent / "peer_server.py"
SENTENCE = "Good morning, and welcome to the factory."


# The measure: two utterances, "The cat sat down" from 1.0 to 3.0 s and "Yes sir" from 5.0 to 6.0 s.

UTTERANCES = {1: UtteranceTimes(1_000, 3_000), 2: UtteranceTimes(5_000, 6_000)}
SPOKEN = Spoken(
    "The cat sat down. Yes, sir.",
    "en",
    tuple(
        SpokenWord(unit, end_ms, utterance)
        for unit, end_ms, utterance in (
            ("the", 1_300, 1),
            ("cat", 1_800, 1),
            ("sat", 2_400, 1),
            ("down", 3_000, 1),
            ("yes", 5_400, 2),
            ("sir", 6_000, 2),
        )
    ),
    UTTERANCES,
)


def seen(*views: tuple[float, str, str]) -> list[View]:
    return [View(committed, tail, ANCHOR_MS + at_ms) for at_ms, committed, tail in views]


STORY = seen(
    (1_700, "", "A"),
    (2_300, "", "The cat"),
    (2_900, "The cat", "sat."),
    (3_400, "The cat sat", "down."),
    (6_200, "The cat sat down.", "Yes,"),
    (7_000, "The cat sat down. Yes,", "sir."),
    (8_000, "The cat sat down. Yes, sir.", ""),
)


def test_a_words_lag_is_from_its_end_to_the_first_view_that_has_it_at_its_place() -> None:
    assert measure_views(STORY, ANCHOR_MS, SPOKEN).emission_lag_ms == [1_000, 500, 500, 400, 800, 1_000]


def test_commit_lag_waits_for_the_committed_text() -> None:
    assert measure_views(STORY, ANCHOR_MS, SPOKEN).commit_lag_ms == [1_600, 1_100, 1_000, 3_200, 1_600, 2_000]


def test_first_word_latency_is_from_the_first_speech_of_an_utterance_to_its_first_right_word() -> None:
    assert measure_views(STORY, ANCHOR_MS, SPOKEN).first_word_ms == [1_300, 1_200]


def test_finalisation_is_from_the_last_speech_to_the_view_that_has_all_of_it_committed() -> None:
    result = measure_views(STORY, ANCHOR_MS, SPOKEN)
    assert result.finalisation_ms == [3_200, 2_000]
    assert (result.num_utterances, result.num_utterances_never_final) == (2, 0)
    assert (result.num_words, result.num_words_right, result.words.num_errors) == (6, 6, 0)


def test_an_utterance_whose_words_stay_in_the_buffer_is_never_final() -> None:
    result = measure_views(STORY[:-1], ANCHOR_MS, SPOKEN)
    assert result.finalisation_ms == [3_200]
    assert result.num_utterances_never_final == 1
    assert result.emission_lag_ms[-1] == 1_000
    assert len(result.commit_lag_ms) == 5


def test_an_utterance_is_not_final_before_those_in_front_of_it() -> None:
    views = seen((6_500, "The cat sat Yes, sir.", "down"), (9_000, "The cat sat down. Yes, sir.", ""))
    assert measure_views(views, ANCHOR_MS, SPOKEN).finalisation_ms == [6_000, 3_000]


def test_what_is_heard_wrongly_counts_as_an_error_and_has_no_time() -> None:
    views = seen((4_000, "The hat sat down.", ""), (7_000, "The hat sat down. Yes, sir.", ""))
    result = measure_views(views, ANCHOR_MS, SPOKEN)
    assert (result.words.num_substitutions, result.words.num_reference_words) == (1, 6)
    assert result.num_words_right == 5
    assert result.emission_lag_ms == [2_700, 1_600, 1_000, 1_600, 1_000]
    assert result.finalisation_ms == [1_000, 1_000]


def test_a_word_too_many_does_not_move_those_behind_it() -> None:
    views = seen(
        (2_500, "", "Oh the cat sat"), (4_000, "The cat sat down.", ""), (7_000, "The cat sat down. Yes sir", "")
    )
    assert measure_views(views, ANCHOR_MS, SPOKEN).emission_lag_ms[:4] == [1_200, 700, 100, 1_000]


def test_a_word_without_a_known_time_is_not_timed() -> None:
    words = tuple(SpokenWord(word.unit, None, None) if word.unit == "cat" else word for word in SPOKEN.words)
    result = measure_views(STORY, ANCHOR_MS, Spoken(SPOKEN.text, "en", words, UTTERANCES))
    assert result.emission_lag_ms == [1_000, 500, 400, 800, 1_000]
    assert result.num_words_right == 6


def test_a_system_that_shows_nothing_has_deletions_only() -> None:
    result = measure_views([], ANCHOR_MS, SPOKEN)
    assert (result.words.num_deletions, result.num_utterances_never_final) == (6, 2)
    assert result.emission_lag_ms == result.first_word_ms == result.finalisation_ms == []


def test_how_far_behind_is_from_the_last_word_shown_to_the_last_word_said() -> None:
    assert find_seconds_behind([], SPOKEN) == 6.0
    assert find_seconds_behind(STORY[:4], SPOKEN) == 3.0
    assert find_seconds_behind(STORY, SPOKEN) == 0.0


THREE_TURNS = tuple(
    SpokenWord(unit, 1_000 * place, 1) for place, unit in enumerate(("red", "green", "blue") * 3, start=1)
)
REPEATED = Spoken("red green blue " * 3, "en", THREE_TURNS, {1: UtteranceTimes(0, 9_000)})


def test_what_a_stream_left_behind_has_shown_is_the_beginning() -> None:
    views = seen((2_500, "red green", ""))
    assert find_seconds_behind(views, REPEATED) == 7.0
    assert measure_views(views, ANCHOR_MS, REPEATED, is_complete=False).emission_lag_ms == [1_500, 500]


def test_what_a_whole_stream_has_lost_in_the_middle_moves_nothing_behind_it() -> None:
    views = seen(
        (3_500, "red green blue", ""),
        (5_500, "red green blue red", ""),
        (10_000, "red green blue red red green blue", ""),
    )
    result = measure_views(views, ANCHOR_MS, REPEATED)
    assert result.words.num_deletions == 2
    assert result.num_words_right == 7
    assert result.emission_lag_ms == [2_500, 1_500, 500, 1_500, 3_000, 2_000, 1_000]


def test_the_reference_takes_its_times_from_finals_matched_by_edits() -> None:
    finals = [
        final("Yes!", [5_400], utterance=2),
        final("The cat set down.", [1_300, 1_800, 2_400, 3_000]),
    ]
    assert time_reference("The cat sat — down. Yes, sir.", "en", finals, UTTERANCES).words == (
        *SPOKEN.words[:5],
        SpokenWord("sir", None, None),
    )


def test_surtitles_records_give_the_same_figures_by_this_measure_as_by_its_own() -> None:
    ours = measure(CAT, ANCHOR_MS, TIMES)
    said = final("The cat sat down.", [1_300, 1_800, 2_400, 3_000])
    spoken = time_reference("The cat sat down.", "en", [said], TIMES)
    same = measure_views(view_records(CAT), ANCHOR_MS, spoken)
    assert same.first_word_ms == ours.first_word_ms
    assert same.emission_lag_ms == ours.emission_lag_ms
    assert same.commit_lag_ms == ours.commit_lag_ms
    assert same.finalisation_ms == ours.finalisation_ms


def test_records_are_seen_as_finals_in_order_and_the_partials_behind_them() -> None:
    lost = ErrorRecord(stream="s", start_ms=0, end_ms=1, utterance=9, sequence=9, task="transcribe", message="gone")

    def at(at_ms: float, record: PartialRecord | FinalRecord | ErrorRecord) -> Received:
        return Received(record, at_ms)

    views = view_records(
        [
            at(1, partial("The", 0)),
            at(2, partial("Yes", 0, utterance=2)),
            at(3, final("Yes.", [1], utterance=2)),
            at(4, lost),
            at(5, final("The cat.", [1, 2])),
            at(6, partial("The late", 0)),
            at(7, final("", [], utterance=3)),
        ]
    )
    assert views == [
        View("", "The", 1),
        View("", "The Yes", 2),
        View("Yes.", "The", 3),
        View("The cat. Yes.", "", 5),
        View("The cat. Yes.", "", 7),
    ]


@pytest.mark.parametrize(
    ("shown", "target", "pairs"),
    [
        ("", "a b", []),
        ("a b", "", []),
        ("a b", "a b c", [(0, 0), (1, 1)]),
        ("x a b", "a b c", [(1, 0), (2, 1)]),
        ("a c d", "a b c d", [(0, 0), (1, 2), (2, 3)]),
        ("a b d", "a b c d", [(0, 0), (1, 1)]),
        ("a x c", "a b c d", [(0, 0), (2, 2)]),
    ],
)
def test_what_is_shown_is_matched_with_a_beginning(shown: str, target: str, pairs: list[tuple[int, int]]) -> None:
    assert match_beginning(shown.split(), target.split()) == pairs


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_matches_are_equal_words_in_order(shown: list[str], target: list[str]) -> None:
    pairs = match_beginning(shown, target)
    assert all(shown[place] == target[other] for place, other in pairs)
    assert pairs == sorted(set(pairs))
    assert len({place for place, _ in pairs}) == len({other for _, other in pairs}) == len(pairs)
    assert match_beginning(shown, shown + target) == [(place, place) for place in range(len(shown))]


# The protocol.


def test_lines_are_committed_and_buffers_may_change() -> None:
    message = {
        "status": "active_transcription",
        "lines": [
            {"speaker": 1, "text": " The cat", "start": "0:00:00.00", "end": "0:00:01.00"},
            {"speaker": -2, "text": "", "start": "0:00:01.00", "end": "0:00:02.00"},
            {"speaker": 1, "text": " sat", "start": "0:00:02.00", "end": "0:00:03.00"},
        ],
        "buffer_diarization": " on",
        "buffer_transcription": " the mat",
        "remaining_time_transcription": 0.3,
    }
    assert WhisperLiveKit().read(json.dumps(message)) == Shown("The cat sat", "on  the mat")
    assert WhisperLiveKit().read('{"type": "ready_to_stop"}') == Done()
    assert WhisperLiveKit().read('{"type": "config", "useAudioWorklet": true, "mode": "full"}') is None
    assert WhisperLiveKit().end_of_sound == b""


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("no JSON", "does not speak"),
        ('{"lines": [1]}', r"lines\.0"),
        ('{"type": "config", "useAudioWorklet": false}', "--pcm-input"),
        ('{"type": "config", "useAudioWorklet": true, "mode": "diff"}', "mode=full"),
        ('{"status": "error", "error": "FFmpeg error"}', "FFmpeg error"),
    ],
)
def test_what_cannot_be_measured_is_an_error(message: str, said: str) -> None:
    with pytest.raises(ServiceError, match=said):
        WhisperLiveKit().read(message)


# The process.


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def command(tmp_path: Path, port: int) -> Callable[..., str]:
    """Makes the command line of a server with a script."""

    def make(**script: Any) -> str:
        path = tmp_path / "script of answers.json"
        path.write_text(json.dumps({"answers": [], **script}))
        return shlex.join([sys.executable, str(SERVER), str(port), str(path)])

    return make


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where a server tells its process ids."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)
        yield listening


def hear_pids(listener: socket.socket) -> list[int]:
    connection, _ = listener.accept()
    with connection:
        pids: list[int] = json.loads(b"".join(iter(lambda: connection.recv(1_024), b"")))
        return pids


def url_of(port: int) -> str:
    return f"ws://127.0.0.1:{port}/asr"


def gone(pids: list[int]) -> bool:
    """Wait until the processes have ended."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return not psutil.wait_procs(processes, timeout=20)[1]


async def test_a_peer_is_ended_with_its_children_also_when_the_block_fails(
    listener: socket.socket, port: int, command: Callable[..., str]
) -> None:
    words = split_command(command(notified_port=listener.getsockname()[1]))
    pids: list[int] = []

    async def use() -> None:
        async with open_peer(words, url_of(port), 60) as peer:
            played = await play(url_of(port), WhisperLiveKit(), np.zeros(160, np.int16), 30)
            assert played.end == "done"
            assert peer.is_running
            pids.extend(await asyncio.to_thread(hear_pids, listener))
            assert all(map(psutil.pid_exists, pids))
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        await use()
    assert len(pids) == 2
    assert gone(pids)


async def test_a_peer_that_ends_at_its_start_is_told_with_its_last_lines(port: int) -> None:
    words = [sys.executable, "-c", "import sys; print('loading'); sys.exit('no model in /models')"]
    with pytest.raises(ServiceError, match=r"did not start: the command exited with 1; .*no model in /models"):
        async with open_peer(words, url_of(port), 60):
            pass


async def test_a_peer_does_not_get_the_settings_of_surtitles_threads(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    show = (
        "import os, sys; sys.exit(' '.join(f'{k}={v}' for k, v in sorted(os.environ.items()) if k.startswith('OMP')))"
    )
    with pytest.raises(ServiceError, match=r"its last lines: OMP_NUM_THREADS=3$"):
        async with open_peer([sys.executable, "-c", show], url_of(port), 60):
            pass


async def test_a_peer_that_never_listens_is_given_up_and_ended(port: int) -> None:
    words = [sys.executable, "-c", "import signal; print('thinking', flush=True); signal.pause()"]
    with pytest.raises(ServiceError, match=r"does not accept connections on 127\.0\.0\.1:\d+ after 1 s"):
        async with open_peer(words, url_of(port), 1):
            pass
    assert not [child for child in psutil.Process().children() if "thinking" in " ".join(child.cmdline())]


async def test_a_peer_is_not_started_where_somebody_else_listens(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServiceError, match=r"listens on .* already"):
        async with open_peer(["/bin/false"], url_of(port), 5):
            pass


async def test_a_command_that_is_not_there_is_an_error(port: int) -> None:
    with pytest.raises(ServiceError, match="cannot start /no/such/peer"):
        async with open_peer(["/no/such/peer"], url_of(port), 5):
            pass


def test_commands_and_urls_are_checked() -> None:
    assert split_command("a 'b c' --d=\"e f\"") == ["a", "b c", "--d=e f"]
    assert find_address("ws://localhost:8000/asr") == ("localhost", 8_000)
    assert find_address("wss://example.org/asr") == ("example.org", 443)
    for wrong in ("'a", " "):
        with pytest.raises(ConfigError):
            split_command(wrong)
    for wrong in ("http://localhost:8000", "localhost:8000", "ws://", "ws://localhost:99999"):
        with pytest.raises(ConfigError):
            find_address(wrong)


# The client.


def says(committed: str, tail: str = "") -> dict[str, Any]:
    return {"lines": [{"text": committed, "speaker": 1}] if committed else [], "buffer_transcription": tail}


async def test_sound_is_played_in_real_time_and_what_is_shown_is_noted(port: int, command: Callable[..., str]) -> None:
    words = split_command(
        command(answers=[[1_600, says("", "The")], [3_200, says("", "The")], [4_800, says("The", "cat")]])
    )
    async with open_peer(words, url_of(port), 60):
        played = await play(url_of(port), WhisperLiveKit(), np.zeros(6_500, np.int16), 30)
    assert [(view.committed, view.tail) for view in played.views] == [("", "The"), ("The", "cat")]
    # A piece cannot be sent before its last sample was spoken.
    assert played.views[0].at_ms - played.start_ms >= 100
    assert played.views[1].at_ms - played.start_ms >= 300
    assert played.end == "done"
    assert played.end_ms - played.start_ms >= 406


async def test_a_stream_that_is_never_done_is_given_up_and_one_that_is_hung_up_is_told(
    port: int, command: Callable[..., str]
) -> None:
    words = split_command(command(answers=[[1, says("", "The")]], num_done=0, num_taken=1))
    async with open_peer(words, url_of(port), 60):
        late = await play(url_of(port), WhisperLiveKit(), np.zeros(1_600, np.int16), 0.5)
        refused = await play(url_of(port), WhisperLiveKit(), np.zeros(1_600, np.int16), 30)
    assert (late.end, len(late.views)) == ("behind", 1)
    assert (refused.end, refused.views) == ("closed", ())


async def test_a_peer_that_is_not_there_is_an_error(port: int) -> None:
    with pytest.raises(ServiceError, match="cannot open a stream"):
        await play(url_of(port), WhisperLiveKit(), np.zeros(160, np.int16), 5)


# The weights.


def test_surtitles_weights_are_written_as_other_systems_load_them(tmp_path: Path) -> None:
    script = SERVER.parent.parent / "scripts" / "peer_model.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "ct2").iterdir()} == {
        *("model.bin", "config.json", "tokenizer.json", "vocabulary.txt")
    }
    assert sha256_of_file(tmp_path / "ct2" / "model.bin") == WHISPER_BASE.weights_sha256
    parts: tuple[Part, ...] = ("encoder", "decoder")
    for part in parts:
        ours = load_checkpoint(ModelParams(), part).tensors
        theirs = load_checkpoint(ModelParams(name=str(tmp_path / "hf")), part).tensors
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# The whole.


@pytest.fixture
def sentence(speech: Path, tmp_path: Path) -> Path:
    """The first sentence of the project's speech, about three seconds."""
    samples = read_samples(speech)
    end_ms = find_utterances(samples, VadParams())[1].last_speech_ms + 300
    path = tmp_path / "sentence.wav"
    write_wav(path, samples[: ms_to_samples(end_ms)])
    path.with_suffix(".txt").write_text(SENTENCE)
    return path


ANSWERS = [[16_000, says("", "Good")], [32_000, says("Good morning", "and")], [0, says(SENTENCE)]]


async def test_both_systems_are_measured_on_the_same_sound(
    sentence: Path, port: int, command: Callable[..., str]
) -> None:
    # The last answer comes with the last sample.
    num_samples = len(read_samples(sentence))
    answers = [*ANSWERS[:2], [num_samples, ANSWERS[2][1]]]
    options = PeerOptions(
        command(answers=answers),
        url_of(port),
        sentence,
        seconds=1,
        num_streams=2,
        stagger_ms=200,
        settings=Settings(runtime="local"),
    )
    report = await measure_peer(options)
    figures = json.loads(json.dumps(report.to_json()))
    peer, surtitle = figures["peer"], figures["surtitle"]
    assert figures["streams"] == 2
    assert peer["ends"] == surtitle["ends"] == ["done", "done"]
    assert peer["wer"] == 0.0
    assert surtitle["wer"] <= 0.15
    for side in (peer, surtitle):
        assert side["num_words"] == 14
        assert side["num_utterances"] == 2
        assert side["num_utterances_never_final"] == 0
        assert side["cpu_s_per_audio_s"] > 0
        assert side["first_word_ms"]["num"] == side["finalisation_ms"]["num"] == 2
        assert 0 < side["finalisation_ms"]["p50"] < 60_000
    # "Good" was shown when a second had been played.
    onset_ms = find_utterances(read_samples(sentence), VadParams())[1].onset_ms
    assert peer["first_word_ms"]["p50"] >= 1_000 - onset_ms
    assert figures["ratios"]["finalisation_ms_p50"] > 0
    output = io.StringIO()
    Console(file=output, width=160).print(report)
    assert "peer / surtitle" in output.getvalue()
    assert "surtitle: streams 2 done" in output.getvalue()


def surtitle(*args: str) -> list[str]:
    return [str(Path(sys.executable).with_name("surtitle")), "bench", "peer", "--without-surtitle", *args]


def test_the_command_tells_of_a_peer_that_falls_behind(sentence: Path, port: int, command: Callable[..., str]) -> None:
    line = command(answers=[[16_000, says("", "Good")]], num_done=1)
    done = subprocess.run(
        surtitle("--cmd", line, "--url", url_of(port), "--media", str(sentence), "--seconds", "1", "--json"),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peer"]["ends"] == ["behind"]
    assert figures["peer"]["num_words_right"] == 1
    assert figures["peer"]["max_s_behind"] > 1
    assert figures["surtitle"] is None
    assert "behind" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_peer_and_its_children_first(
    sentence: Path, listener: socket.socket, port: int, command: Callable[..., str], number: signal.Signals
) -> None:
    line = command(notified_port=listener.getsockname()[1])
    process = subprocess.Popen(
        surtitle("--cmd", line, "--url", url_of(port), "--media", str(sentence)),
        stderr=subprocess.PIPE,
    )
    try:
        pids = hear_pids(listener)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert gone(pids)
