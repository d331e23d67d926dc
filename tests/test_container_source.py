from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from ingest.container import ContainerSource, Pace
from ingest.processes import DecoderProcess, DecoderProcesses
from ingest.source import AudioBlock, AudioParams, ChannelMode, SourceGap, SourceItem
from pipeline.errors import MediaError, SourceNotFound
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ
from tests.media import read_pcm, write_pcm

ROOT = Path(__file__).parent.parent
FORMAT_PCM, FORMAT_FLOAT = 1, 3


async def play(path: Path, params: AudioParams | None = None) -> list[SourceItem]:
    async with ContainerSource(path, params, Pace.FAST) as source:
        return [item async for item in source]


def sound_of(items: list[SourceItem]) -> NDArray[np.int16]:
    return np.concatenate([item.samples for item in items if isinstance(item, AudioBlock)], axis=1)


def riff(path: Path, *, tag: int, channels: int, rate_hz: int, bits: int, data: bytes) -> Path:
    """Write a WAV file with any header."""
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * align, align, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def encoded(path: Path, codec: str, parts: list[tuple[float, NDArray[np.int16]]], rate_hz: int = 48_000) -> Path:
    """Encode each (start in seconds, int16[n]) with its timestamps."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate_hz, layout="mono")
        for start_s, samples in parts:
            for first in range(0, len(samples), 960):
                piece = samples[first : first + 960]
                frame = av.AudioFrame.from_ndarray(piece[np.newaxis], format="s16", layout="mono")
                frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
                frame.pts = round(start_s * rate_hz) + first
                container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def tone(seconds: float, rate_hz: int = 48_000, hz: float = 440.0) -> NDArray[np.int16]:
    return (8_000 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.int16)


def picture_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        track = container.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), index * 50, np.uint8), format="rgb24")
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def make_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def broken_flac(path: Path) -> Path:
    """Write a FLAC file with a whole header and noise where the sound should be."""
    encoded(path, "flac", [(0, tone(1))])
    data = path.read_bytes()
    return make_bytes(path, data[:100] + np.random.default_rng(0).bytes(len(data) - 100))


def playlist(path: Path) -> Path:
    write_pcm(path.with_name("other.wav"), tone(1, 16_000))
    return make_bytes(path, b"ffconcat version 1.0\nfile other.wav\n")


def hls(path: Path) -> Path:
    write_pcm(path.with_name("other.wav"), tone(1, 16_000))
    lines = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n"
    return make_bytes(path, lines.encode())


def mostly_nan(path: Path) -> Path:
    samples = np.zeros(16_000, "<f4")
    samples[1_000:] = np.nan
    return riff(path, tag=FORMAT_FLOAT, channels=1, rate_hz=16_000, bits=32, data=samples.tobytes())


BAD_INPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder": (make_folder, "is a directory"),
    "pipe": (make_fifo, "is not a regular file"),
    "empty.wav": (lambda path: make_bytes(path, b""), "not a media file that can be read"),
    "noise.wav": (lambda path: make_bytes(path, np.random.default_rng(0).bytes(5_000)), "not a media file"),
    "header.wav": (lambda path: make_bytes(path, b"RIFF\x24\0\0\0WAVEfmt \x10\0"), "not a media file"),
    "broken.flac": (broken_flac, "no sound can be decoded: the audio track is empty or damaged"),
    "video.mp4": (picture_only, "no audio track: the file holds video"),
    "none.wav": (lambda p: riff(p, tag=1, channels=1, rate_hz=16_000, bits=16, data=b""), "the audio track is empty"),
    "slow.wav": (lambda p: riff(p, tag=1, channels=1, rate_hz=1, bits=16, data=bytes(2_000)), "sample rate is 1 Hz"),
    "wide.wav": (lambda p: riff(p, tag=1, channels=64, rate_hz=16_000, bits=16, data=bytes(128_000)), "64 channels"),
    "nan.wav": (mostly_nan, "94% of the samples so far are NaN"),
    "codec.wav": (
        lambda p: riff(p, tag=0x1234, channels=1, rate_hz=16_000, bits=16, data=bytes(2_000)),
        "codec that this FFmpeg has no decoder for",
    ),
    "playlist.wav": (playlist, "not a media file"),
    "playlist.m3u8": (hls, "not a media file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
async def test_bad_input_is_refused_in_one_line_that_says_what_and_why(name: str, tmp_path: Path) -> None:
    make, reason = BAD_INPUTS[name]
    path = make(tmp_path / name)
    with pytest.raises(MediaError) as caught:
        await play(path)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert reason in message
    assert "\n" not in message


async def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"nowhere\.wav: no such file"):
        await play(tmp_path / "nowhere.wav")


async def test_addresses_are_refused_without_repeating_their_password() -> None:
    with pytest.raises(MediaError, match="rtsp addresses cannot be played") as caught:
        await play("rtsp://user:secret@camera/1")  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


async def test_a_wav_file_comes_out_as_it_is(speech: Path) -> None:
    async with ContainerSource(speech, pace=Pace.FAST) as source:
        info = source.info
        items = [item async for item in source]
    samples = read_pcm(speech)
    assert (info.num_channels, info.native_rate_hz, info.native_channels) == (1, 16_000, 1)
    assert (info.container, info.codec) == ("wav", "pcm_s16le")
    assert info.duration_s == pytest.approx(len(samples) / SAMPLE_RATE_HZ)
    assert np.array_equal(sound_of(items)[0], samples)
    assert all(isinstance(item, AudioBlock) and item.samples.shape[1] <= CHUNK_SAMPLES for item in items)
    assert source.num_nonfinite == 0


async def test_channels_can_be_kept_apart(media: Path) -> None:
    split = await play(media / "two_voices.wav", AudioParams(channels=ChannelMode.SPLIT))
    assert np.array_equal(sound_of(split), read_pcm(media / "two_voices.wav"))
    mixed = sound_of(await play(media / "two_voices.wav"))
    assert mixed.shape[0] == 1
    expected = read_pcm(media / "two_voices.wav").astype(np.float64).mean(axis=0)
    assert np.abs(mixed[0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp3", "mp3"), ("a.m4a", "aac"), ("a.ogg", "libopus"), ("a.flac", "flac"), ("a.mka", "pcm_s16le")],
)
async def test_compressed_files_keep_their_length(name: str, codec: str, tmp_path: Path) -> None:
    path = encoded(tmp_path / name, codec, [(0, tone(2))])
    samples = sound_of(await play(path))[0].astype(np.float64)
    assert abs(len(samples) - 2 * SAMPLE_RATE_HZ) < 0.08 * SAMPLE_RATE_HZ
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(np.argmax(spectrum) * SAMPLE_RATE_HZ / len(samples) - 440) < 2


async def test_a_jump_of_the_timestamps_is_a_gap_of_that_length(tmp_path: Path) -> None:
    path = encoded(tmp_path / "jump.mka", "pcm_s16le", [(0, tone(1)), (2.5, tone(1))])
    items = await play(path)
    (gap,) = [item for item in items if isinstance(item, SourceGap)]
    assert abs(gap.num_samples - 1.5 * SAMPLE_RATE_HZ) <= 16  # Matroska counts in milliseconds
    before = items[: items.index(gap)]
    assert abs(sound_of(before).shape[1] - SAMPLE_RATE_HZ) <= 1
    assert abs(sound_of(items).shape[1] - 2 * SAMPLE_RATE_HZ) <= 2


async def test_small_jitter_of_the_timestamps_is_no_gap(tmp_path: Path) -> None:
    path = encoded(tmp_path / "jitter.mka", "pcm_s16le", [(0, tone(0.5)), (0.6, tone(0.5)), (1.1, tone(0.5))])
    items = await play(path)
    assert all(isinstance(item, AudioBlock) for item in items)
    assert abs(sound_of(items).shape[1] - 1.5 * SAMPLE_RATE_HZ) <= 2


async def test_a_late_first_timestamp_is_no_gap(tmp_path: Path) -> None:
    path = encoded(tmp_path / "late.mka", "pcm_s16le", [(7, tone(0.5))])
    assert all(isinstance(item, AudioBlock) for item in await play(path))


async def test_a_jump_without_end_is_refused(tmp_path: Path) -> None:
    path = encoded(tmp_path / "leap.mka", "pcm_s16le", [(0, tone(0.5)), (86_400, tone(0.5))])
    with pytest.raises(MediaError, match="timestamps jump by 86400 s, over the limit of 600 s"):
        await play(path)


class Unruly(DecoderProcesses):
    """Processes that keep to no limit of gaps but the largest there is."""

    async def open(self, request: bytes) -> DecoderProcess:
        asked = json.loads(request)
        asked["params"]["max_gap_ms"] = 86_400_000
        return await super().open(json.dumps(asked).encode())


async def test_a_gap_that_the_process_should_have_refused_ends_the_stream(tmp_path: Path) -> None:
    path = encoded(tmp_path / "leap.mka", "pcm_s16le", [(0, tone(0.5)), (3.5, tone(0.5)), (8, tone(0.5))])
    async with (
        Unruly() as processes,
        ContainerSource(path, AudioParams(max_gap_ms=3_000), Pace.FAST, processes) as source,
    ):
        items = []
        with pytest.raises(MediaError, match=r"nonsense: a gap of 4 s, over the limit of 3 s"):
            async for item in source:
                items.append(item)
        with pytest.raises(StopAsyncIteration):
            await anext(source)
    assert [item.num_samples for item in items if isinstance(item, SourceGap)] == [48_000]


async def test_damage_in_the_middle_loses_only_what_was_damaged(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(-3_000, 3_000, 4 * 48_000, np.int16)
    path = encoded(tmp_path / "hurt.flac", "flac", [(0, noise)])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(data)
    items = await play(path)
    heard = sound_of(items).shape[1] + sum(item.num_samples for item in items if isinstance(item, SourceGap))
    assert 3 * SAMPLE_RATE_HZ < heard <= 4 * SAMPLE_RATE_HZ + 2


async def test_blocks_end_where_chunks_end_also_behind_a_gap(tmp_path: Path) -> None:
    path = encoded(tmp_path / "jump.mka", "pcm_s16le", [(0, tone(1)), (2.5, tone(1))])
    items = await play(path)
    position = 0
    for item, following in pairwise(items):
        position += item.samples.shape[1] if isinstance(item, AudioBlock) else item.num_samples
        if isinstance(item, AudioBlock) and isinstance(following, AudioBlock):
            assert position % CHUNK_SAMPLES == 0
    assert len(items) <= 2 + (position + sound_of(items[-1:]).shape[1]) // CHUNK_SAMPLES


async def test_in_real_time_no_block_comes_before_it_could_have_been_heard(tmp_path: Path) -> None:
    path = encoded(tmp_path / "short.mka", "pcm_s16le", [(0, tone(0.5)), (1.0, tone(0.5))])
    loop = asyncio.get_running_loop()
    async with ContainerSource(path, pace=Pace.REALTIME) as source:
        started = loop.time()
        heard_s, late_s = 0.0, []
        async for item in source:
            heard_s += (item.samples.shape[1] if isinstance(item, AudioBlock) else item.num_samples) / SAMPLE_RATE_HZ
            late_s.append(loop.time() - started - heard_s)
    assert heard_s == pytest.approx(1.5, abs=0.01)
    assert min(late_s) > -0.005
    assert sorted(late_s)[len(late_s) // 2] < 0.2, "the schedule is not kept"


async def test_the_death_of_the_decoder_ends_the_stream_with_an_error(speech: Path) -> None:
    async with ContainerSource(speech, pace=Pace.FAST) as source:
        assert isinstance(await anext(source), AudioBlock)
        assert source.worker_pid is not None
        os.kill(source.worker_pid, signal.SIGKILL)
        with pytest.raises(MediaError, match=r"ended in the middle of the media \(killed by signal 9\)"):
            while True:
                source_item = await anext(source)
                assert isinstance(source_item, AudioBlock)
        with pytest.raises(StopAsyncIteration):
            await anext(source)


async def test_a_decoder_that_does_not_go_on_ends_the_stream_with_an_error(speech: Path) -> None:
    async with ContainerSource(speech, pace=Pace.FAST, message_timeout_s=0.2) as source:
        assert source.worker_pid is not None
        os.kill(source.worker_pid, signal.SIGSTOP)
        with pytest.raises(MediaError, match="has given nothing for"):
            async for item in source:  # what it has written before counts
                assert isinstance(item, AudioBlock)
        with pytest.raises(StopAsyncIteration):
            await anext(source)
    assert source.worker_pid is None


async def test_waiting_until_sound_is_due_is_not_waiting_for_the_decoder(tmp_path: Path) -> None:
    path = encoded(tmp_path / "short.mka", "pcm_s16le", [(0, tone(0.5)), (1.5, tone(0.5))])
    async with ContainerSource(path, pace=Pace.REALTIME, message_timeout_s=0.5) as source:
        heard_s = [
            (item.samples.shape[1] if isinstance(item, AudioBlock) else item.num_samples) / SAMPLE_RATE_HZ
            async for item in source
        ]
    assert max(heard_s) > 0.5
    assert sum(heard_s) == pytest.approx(2.0, abs=0.01)


async def test_leaving_early_ends_the_decoder(speech: Path) -> None:
    async with ContainerSource(speech) as source:
        pid = source.worker_pid
        await anext(source)
    assert source.worker_pid is None
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_waiting_for_a_block_can_be_cancelled(speech: Path) -> None:
    async with ContainerSource(speech) as source:
        await anext(source)
        waiting = asyncio.ensure_future(anext(source))
        await asyncio.wait({waiting}, timeout=0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()


async def test_the_decoder_is_confined_and_knows_no_secrets(speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURTITLE_REDIS_PASSWORD", "hunter2")
    async with ContainerSource(speech) as source:
        proc = Path(f"/proc/{source.worker_pid}")
        limits = {line[:25].strip(): line[26:46].strip() for line in (proc / "limits").read_text().splitlines()}
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        command = (proc / "cmdline").read_text()
        if os.geteuid() == 0:
            assert status["Uid"].split() == ["65534"] * 4
            assert b"hunter2" not in (proc / "environ").read_bytes()
    assert limits["Max open files"] == limits["Max core file size"] == limits["Max file size"] == "0"
    assert int(limits["Max address space"]) <= 2 << 30
    assert status["NoNewPrivs"] == "1"
    assert speech.name not in command


ORPHAN = """
import asyncio, sys
from ingest.container import ContainerSource
async def main():
    async with ContainerSource(sys.argv[1]) as source:
        await anext(source)
        print(source.worker_pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_the_decoder_dies_with_its_parent(speech: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(speech)], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        worker = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.wait()
        assert select.select([worker], [], [], 10)[0], "the decoder outlived its parent"
    finally:
        os.close(worker)


@pytest.mark.parametrize(
    ("module", "banned"),
    [("ingest.zygote", ["torch", "ray", "redis", "asyncio"]), ("ingest.container", ["av", "torch", "ray"])],
)
def test_neither_side_imports_what_belongs_to_another(module: str, banned: list[str]) -> None:
    code = f"import {module}, sys; sys.exit(', '.join(set({banned}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.strip() == ""


async def test_a_source_is_opened_once_and_before_it_is_asked(speech: Path) -> None:
    source = ContainerSource(speech)
    with pytest.raises(RuntimeError, match="async with"):
        _ = source.info
    with pytest.raises(RuntimeError, match="async with"):
        await anext(source)
    async with source:
        pass
    with pytest.raises(RuntimeError, match="make a new one"):
        await source.__aenter__()
