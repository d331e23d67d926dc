"""Questions and summaries on request: what is asked, about which media, and what came of it.

The media is opened as a stream's is, in a process of its own (`ingest/container.py`), and only as much of it as the
models take. A request is one job under a name made for it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from actors.door import check_task
from actors.stages import EyesInfo, Stages
from ingest.container import ContainerSource, Pace
from ingest.processes import DecoderProcesses
from ingest.source import AudioBlock, AudioParams, ChannelMode, SourceGap, VideoFrame, VideoParams
from pipeline.errors import CapacityExceeded, ConfigError, MediaError, ServiceError, StageError
from pipeline.items import Failure, FailureKind, Frame, Job, JobKey, Task, TaskKind
from pipeline.params import Params
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ

MAX_PICTURES = 4
MAX_QUESTION_S = 60
"""Sound that a question may have, or be."""
MAX_SUMMARY_S = 30 * 60
MAX_REQUESTS = 8
"""Requests that are being answered; more are refused. Each holds its sound and pictures, a minute of 16 kHz is 2 MB."""

_MAX_PATH_CHARS = 4_096
_MAX_TEXT_CHARS = 200_000
_PICTURE_WITHIN_S = 10
"""Sound that may come before the first picture of a file; one that has none need not be heard to its end."""
_SAMPLE_INTERVAL_MS = 500


class AskSpec(Params):
    """A question. It is typed, or spoken in `sound`; a typed one may be about `sound`."""

    question: str = Field(default="", max_length=4_000, description="what is asked; empty: it is spoken in `sound`")
    sound: str | None = Field(
        default=None,
        min_length=1,
        max_length=_MAX_PATH_CHARS,
        repr=False,
        description="path of a media file with the spoken question, or what a typed one is about; up to a minute",
    )
    pictures: tuple[str, ...] = Field(
        default=(),
        max_length=MAX_PICTURES,
        repr=False,
        description="paths of pictures that the question is about; of a video, its first one",
    )
    stream_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="a live stream: the question is about what it shows",
    )


class SummariseSpec(Params):
    """What is to be summarised: the speech of a media file, or a text."""

    source: str | None = Field(
        default=None,
        min_length=1,
        max_length=_MAX_PATH_CHARS,
        repr=False,
        description="path of a media file, of which half an hour can be summarised",
    )
    text: str | None = Field(default=None, min_length=1, max_length=_MAX_TEXT_CHARS, repr=False, description="a text")


class StreamQuestion(Params):
    """A question about what a stream shows now."""

    question: str = Field(min_length=1, max_length=4_000, description="what is asked")


class Answer(Params):
    """What the models say."""

    text: str
    language: str = Field(description="language of the text, ISO 639-1")
    tier: str = Field(description="which models answered")
    guard: str | None = Field(default=None, description="the guard that cut or emptied the text, if one fired")


class Questions:
    """Answers requests over `stages`. Belongs to their event loop.

    Sound that does not fit a slot of the decoder, of `slot_tokens`, is refused before it is encoded: live captions
    would wait for the encoder meanwhile.
    """

    def __init__(
        self, stages: Stages, audio: AudioParams, processes: DecoderProcesses, *, slot_tokens: int | None = None
    ) -> None:
        self._stages = stages
        self._slot_s = None if slot_tokens is None else slot_tokens * CHUNK_SAMPLES // SAMPLE_RATE_HZ
        self._audio = audio.model_copy(update={"channels": ChannelMode.MIX})
        self._processes = processes
        self._num_requests = 0

    async def answer(self, spec: AskSpec, shown: Frame | None = None) -> Answer:
        """Answer a question; `shown` is what its stream shows, if it names one.

        Raises:
            CapacityExceeded: if as many requests as allowed are being answered.
            ConfigError: if the models do not answer questions, or this one is about nothing.
            MediaError: if a picture or the sound cannot be read, or is too long.
            ServiceError: if the models did not get to it.
            StageError: if they have no answer.
        """
        check_task(TaskKind.ANSWER, self._stages.info)
        question = spec.question.strip()
        if not question and spec.sound is None:
            raise ConfigError("nothing is asked: give a question, or sound in which it is spoken")
        if spec.sound is None and not spec.pictures and spec.stream_id is None:
            raise ConfigError(
                "the question is about nothing to look at or hear: give a picture, sound or a live stream"
            )
        if spec.stream_id is not None and len(spec.pictures) == MAX_PICTURES:
            raise ConfigError(f"what the stream shows counts too: give at most {MAX_PICTURES - 1} pictures beside it")
        if spec.stream_id is not None and shown is None:
            raise MediaError(
                f"stream {spec.stream_id!r} has shown nothing yet: its video is looked at from its start on only if it "
                "is started with scenes"
            )
        async with self._admitted():
            frames = [] if shown is None else [shown]
            for path in spec.pictures:
                frames.append(await self._read_picture(path))
            samples = None if spec.sound is None else await self._read_sound(spec.sound, MAX_QUESTION_S)
            return await self._do(TaskKind.ANSWER, "ask", question, tuple(frames), samples)

    async def summarise(self, spec: SummariseSpec) -> Answer:
        """Summarise a text, or the speech of a media file.

        Raises: as `answer`.
        """
        check_task(TaskKind.SUMMARISE, self._stages.info)
        if (spec.source is None) == (spec.text is None):
            raise ConfigError("give either a source or a text to be summarised")
        text = (spec.text or "").strip()
        if spec.source is None and not text:
            raise ConfigError("the text to be summarised is empty")
        async with self._admitted():
            samples = None if spec.source is None else await self._read_sound(spec.source, MAX_SUMMARY_S)
            return await self._do(TaskKind.SUMMARISE, "summarise", text, (), samples)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self._num_requests >= MAX_REQUESTS:
            raise CapacityExceeded(f"{self._num_requests} questions are being answered: try again later")
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def _do(
        self, kind: TaskKind, prefix: str, text: str, frames: tuple[Frame, ...], samples: NDArray[np.int16] | None
    ) -> Answer:
        key = JobKey(f"{prefix}-{secrets.token_hex(8)}", kind, 1)
        outcome = await self._stages.submit_job(Job(key, Task(kind), text, frames, samples))
        if isinstance(outcome, Failure):
            if outcome.kind is FailureKind.UNAVAILABLE:
                raise ServiceError(f"no answer: {outcome.message}")
            raise StageError(f"no answer: {outcome.message}")
        return Answer(
            text=outcome.text.strip(), language=outcome.language, tier=self._stages.info.tier, guard=outcome.guard
        )

    async def _read_picture(self, path: str) -> Frame:
        eyes = self._stages.info.eyes
        if eyes is None:
            raise ConfigError(
                f"tier {self._stages.info.tier} ({self._stages.info.model}) has no eyes: ask without pictures"
            )
        num_samples = 0
        video = video_params(eyes, _SAMPLE_INTERVAL_MS)
        async with ContainerSource(path, self._audio, Pace.FAST, self._processes, video=video) as source:
            async for item in source:
                if isinstance(item, VideoFrame):
                    return Frame(0, item.pixels)
                num_samples += _num_samples_of(item)
                if num_samples > _PICTURE_WITHIN_S * SAMPLE_RATE_HZ:
                    break
        raise MediaError(f"{PurePath(path).name} shows no picture: give a picture file, or a video")

    async def _read_sound(self, path: str, max_s: int) -> NDArray[np.int16]:
        """Return all sound of a file, int16[n] at 16 kHz.

        Raises:
            MediaError: if it cannot be read, has none, more than `max_s` seconds or more than a slot holds.
        """
        way_out = "give a shorter piece"
        if self._slot_s is not None and self._slot_s < max_s:
            max_s, way_out = self._slot_s, f"{way_out}, or raise decoder.slot_tokens (12.5 a second)"
        too_long = MediaError(f"{PurePath(path).name} has more than {_spoken(max_s)} of sound: {way_out}")
        blocks: list[NDArray[np.int16]] = []
        num_samples = 0
        async with ContainerSource(path, self._audio, Pace.FAST, self._processes) as source:
            if (source.info.duration_s or 0.0) > max_s + 1:
                raise too_long
            async for item in source:
                if isinstance(item, VideoFrame):
                    continue
                num_samples += _num_samples_of(item)
                # Before a gap becomes samples.
                if num_samples > max_s * SAMPLE_RATE_HZ:
                    raise too_long
                blocks.append(item.samples[0] if isinstance(item, AudioBlock) else np.zeros(item.num_samples, np.int16))
        if not num_samples:
            raise MediaError(f"{PurePath(path).name} has no sound")
        return np.concatenate(blocks)


def video_params(eyes: EyesInfo, sample_interval_ms: int) -> VideoParams:
    """Return which frames a source gives, and how large, so that `eyes` need not resize them."""
    return VideoParams(
        sample_interval_ms=sample_interval_ms,
        crop_size=eyes.crop_size,
        patch_size=eyes.patch_size,
        max_crops=eyes.max_crops,
    )


def _num_samples_of(item: AudioBlock | SourceGap) -> int:
    return item.samples.shape[1] if isinstance(item, AudioBlock) else item.num_samples


def _spoken(seconds: int) -> str:
    return f"{seconds // 60} minutes" if seconds >= 120 else f"{seconds} seconds"
