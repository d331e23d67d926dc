"""What the demonstration hears and sees: a report of the closed world, spoken, beside a clip of its scenes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from actors.speech_tools import run_speech_tool
from pipeline.teach.pictures import draw_clip
from pipeline.teach.speech import VOICES, Samples, Tool, speak
from pipeline.teach.world import (
    Question,
    Saying,
    Scene,
    draw_question,
    draw_report,
    draw_scene,
    draw_scene_change,
)
from pipeline.timebase import SAMPLE_RATE_HZ, SAMPLES_PER_MS

VOICE = next(voice for voice in VOICES if voice.name == "slt")

_NUM_SAYINGS = 14
_NUM_CAMERAS = 3
_LEAD_S = 0.4
_PAUSE_S = (0.7, 1.1)
_WIDTH_PX, _HEIGHT_PX, _FRAME_MS = 336, 190, 250
_FRAMES_HZ = 1_000 // _FRAME_MS
_BLOCK_SAMPLES = 4_096

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence, and when it is heard."""

    saying: Saying
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Shown:
    """A scene, and from when on it is seen."""

    scene: Scene
    start_ms: int


@dataclass(frozen=True, slots=True)
class Story:
    """All that is said, shown and asked: what is right."""

    said: tuple[Said, ...]
    shown: tuple[Shown, ...]
    question: Question

    def shown_at(self, time_ms: int) -> Shown:
        """Return what is seen at a media time."""
        return [shown for shown in self.shown if shown.start_ms <= max(0, time_ms)][-1]


@dataclass(frozen=True, slots=True)
class DemoMedia:
    """A story as files: a video with its sound, its last picture, and the question about that, asked aloud."""

    story: Story
    video: Path
    picture: Path
    question: Path


def make_demo_media(folder: Path, seed: int, tool: Tool = run_speech_tool) -> DemoMedia:
    """Draw a story by `seed` and write it into `folder`: 40 s of speech and video, lossless sound.

    Raises:
        MediaError: if flite is missing or fails.
        OSError: if a file cannot be written.
    """
    rng = random.Random(seed)  # noqa: S311 - a seeded story, no secrets
    generator = np.random.default_rng(seed)
    report = draw_report(rng, _NUM_SAYINGS, held_out=True)
    said: list[Said] = []
    parts = [_silence(_LEAD_S)]
    for saying in report.sayings:
        parts.append(speak(saying.text, VOICE, generator, tool))
        end = sum(map(len, parts))
        said.append(Said(saying, (end - len(parts[-1])) // SAMPLES_PER_MS, end // SAMPLES_PER_MS))
        parts.append(_silence(generator.uniform(*_PAUSE_S)))
    samples = np.concatenate(parts)
    scenes = _draw_scenes(rng)
    num_frames = -(-len(samples) // (_FRAME_MS * SAMPLES_PER_MS * len(scenes)))
    pictures = list(_draw_pictures(scenes, num_frames, rng))
    question = draw_question(rng, scenes[-1])
    shown = tuple(Shown(scene, index * num_frames * _FRAME_MS) for index, scene in enumerate(scenes))
    media = DemoMedia(
        Story(tuple(said), shown, question), folder / "demo.mkv", folder / "last-picture.png", folder / "question.wav"
    )
    folder.mkdir(parents=True, exist_ok=True)
    samples = np.pad(samples, (0, len(pictures) * _FRAME_MS * SAMPLES_PER_MS - len(samples)))
    _write_video(media.video, pictures, samples)
    _write_picture(media.picture, pictures[-1])
    _write_sound(media.question, speak(question.text, VOICE, generator, tool))
    return media


def _silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE_HZ), np.int16)


def _draw_scenes(rng: random.Random) -> list[Scene]:
    """Return what each camera shows, and what it shows when something has changed; the last one shows one scene."""
    scenes: list[Scene] = []
    for _ in range(_NUM_CAMERAS):
        scenes.append(draw_scene(rng, held_out=True))
        scenes.append(draw_scene_change(rng, scenes[-1]))
    return scenes[:-1]


def _draw_pictures(scenes: list[Scene], num_frames: int, rng: random.Random) -> Iterator[Pixels]:
    """Yield `num_frames` of each scene, by a camera that stands still: what changes is what is told."""
    for first in range(0, len(scenes), 2):
        for frame in draw_clip(scenes[first : first + 2], _WIDTH_PX, _HEIGHT_PX, rng, hold_ms=1, interval_ms=1):
            yield from itertools.repeat(frame.pixels, num_frames)


def _write_video(path: Path, pictures: list[Pixels], samples: Samples) -> None:
    """Write pictures as H.264 and int16[n] at 16 kHz as FLAC."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=_FRAMES_HZ, options={"crf": "20", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = _WIDTH_PX, _HEIGHT_PX, "yuv420p"
        video.codec_context.thread_count = 1
        sound = container.add_stream("flac", rate=SAMPLE_RATE_HZ, layout="mono")
        packets: list[av.Packet[Any]] = []
        for picture in pictures:
            packets += video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += video.encode(None)
        packets += _sound_packets(sound, samples)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)


def _write_sound(path: Path, samples: Samples) -> None:
    with av.open(str(path), "w") as container:
        for packet in _sound_packets(container.add_stream("pcm_s16le", rate=SAMPLE_RATE_HZ, layout="mono"), samples):
            container.mux(packet)


def _sound_packets(stream: av.AudioStream, samples: Samples) -> list[av.Packet[Any]]:
    packets: list[av.Packet[Any]] = []
    for start in range(0, len(samples), _BLOCK_SAMPLES):
        part = np.ascontiguousarray(samples[np.newaxis, start : start + _BLOCK_SAMPLES])
        block = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = SAMPLE_RATE_HZ, start, Fraction(1, SAMPLE_RATE_HZ)
        packets += stream.encode(block)
    return [*packets, *stream.encode(None)]


def _write_picture(path: Path, picture: Pixels) -> None:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = _WIDTH_PX, _HEIGHT_PX, "rgb24"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
