"""A media file as a live source: decoded in a process of its own, delivered in real time or as fast as it is taken.

Decoders are the largest attack surface of the service and crash on some files, so they run where a crash ends one
stream only (`ingest.worker`). The socket between the two holds back the decoder when nobody takes the sound.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from ingest.processes import DecoderProcess, DecoderProcesses
from ingest.source import (
    MAX_FRAME_LEAD_MS,
    AudioBlock,
    AudioParams,
    SourceGap,
    SourceInfo,
    SourceItem,
    VideoFrame,
    VideoParams,
)
from ingest.wire import Ended, Failed, FailureKind, Message, Opened, WireError, WireParser
from pipeline.errors import MediaError, SourceNotFound
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples

OPEN_TIMEOUT_S = 30.0
MESSAGE_TIMEOUT_S = 30.0
_READ_BYTES = 1 << 16


class Pace(StrEnum):
    """How fast a file is played."""

    REALTIME = "realtime"  # sound comes when it would have been spoken
    FAST = "fast"  # sound comes as fast as it is taken


class ContainerSource:
    """Plays the first audio track of a local media file, and shows its video on request.

    In real time a block is delivered when its last sample is due on a schedule that starts with the first block taken,
    so delays do not add up; whoever takes blocks late gets them at once until the schedule is reached again. A frame is
    delivered when its time has come. With video, a file without sound is played as silence, and still pictures open.

    Args:
        location: path of the file.
        params: how to normalise, and what to refuse.
        pace: see `Pace`.
        processes: where the process that decodes comes from; None: from a zygote of its own, which takes longer.
        message_timeout_s: how long that process may be waited for once the media is open. It runs ahead until the
            socket is full, so neither real time nor a gap nor a slow consumer keeps anybody waiting for it; what does
            is a demuxer that spins, or a disk that gives nothing.
        video: which frames to take, and how large; None: sound only, and a file without sound is refused.
    """

    def __init__(
        self,
        location: str | Path,
        params: AudioParams | None = None,
        pace: Pace = Pace.REALTIME,
        processes: DecoderProcesses | None = None,
        *,
        message_timeout_s: float = MESSAGE_TIMEOUT_S,
        video: VideoParams | None = None,
    ) -> None:
        self._location = str(location)
        self._params = params or AudioParams()
        self._video = video
        self._pace = pace
        self._processes = processes
        self._message_timeout_s = message_timeout_s
        self._process: DecoderProcess | None = None
        self._exits = AsyncExitStack()
        self._is_opened = False
        self._parser = WireParser(video.max_frame_pixels if video is not None else 0)
        self._messages: deque[Message] = deque()
        self._info: SourceInfo | None = None
        self._num_nonfinite: int | None = None
        self._has_ended = False
        self._starts_at: float | None = None
        self._position = 0

    @property
    def info(self) -> SourceInfo:
        """What was found.

        Raises:
            RuntimeError: before `__aenter__`.
        """
        if self._info is None:
            raise RuntimeError("the source is not open: use `async with`")
        return self._info

    @property
    def num_nonfinite(self) -> int | None:
        """How many samples were NaN or infinite and became zero; None until the end of the media."""
        return self._num_nonfinite

    @property
    def worker_pid(self) -> int | None:
        """The process that decodes, while there is one."""
        return self._process.pid if self._process is not None and self._process.is_running else None

    async def __aenter__(self) -> Self:
        """Open the file.

        Raises:
            SourceNotFound: there is no such file.
            MediaError: it cannot be read, or is not usable sound (or, if asked for, picture).
        """
        if self._is_opened:
            raise RuntimeError("a source is opened once: make a new one")
        self._is_opened = True
        if "://" in self._location:
            scheme = self._location.partition("://")[0]
            raise MediaError(f"{scheme} addresses cannot be played: name a local media file")
        try:
            await self._start_worker()
            self._info = await self._opening()
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the decoder process."""
        await self._exits.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SourceItem:
        """Return the next item when it is due.

        Raises:
            StopAsyncIteration: the media has ended.
            MediaError: it turned out to be unusable, or the decoder process died or does not go on.
        """
        if self._has_ended:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._message_timeout_s):
                item = await self._next_message()
        except TimeoutError as error:
            self._has_ended = True
            raise MediaError(
                f"the decoder process has given nothing for {self._message_timeout_s:.0f} s: the file is damaged, or "
                "read too slowly"
            ) from error
        except MediaError:
            self._has_ended = True
            raise
        match item:
            case AudioBlock(samples):
                self._position += samples.shape[1]
                await self._wait_until_due(self._position)
                return item
            case SourceGap(num_samples):
                self._position += num_samples
                await self._wait_until_due(self._position)
                return item
            case VideoFrame(start_sample):
                await self._wait_until_due(start_sample)
                return item
            case Ended(num_nonfinite):
                self._has_ended = True
                self._num_nonfinite = num_nonfinite
                raise StopAsyncIteration
            case _:
                self._has_ended = True
                raise MediaError(f"the decoder process sent nonsense: {type(item).__name__} in the middle")

    async def _opening(self) -> SourceInfo:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                first = await self._next_message()
        except TimeoutError as error:
            raise MediaError(f"the file could not be opened within {OPEN_TIMEOUT_S:.0f} s") from error
        if not isinstance(first, Opened):
            raise MediaError(f"the decoder process sent nonsense: {type(first).__name__} came first")
        return first.info

    async def _start_worker(self) -> None:
        processes = self._processes
        if processes is None:
            processes = await self._exits.enter_async_context(DecoderProcesses())
        request = {
            "location": self._location,
            "params": self._params.model_dump(mode="json"),
            "video": self._video.model_dump(mode="json") if self._video is not None else None,
        }
        self._process = await processes.open(json.dumps(request).encode())
        self._exits.push_async_callback(self._process.aclose)

    async def _next_message(self) -> Message:
        """Return the next message.

        Raises:
            MediaError: if it is a failure, a gap over the limit, a frame out of time or no message at all, or the
                process ended without saying so.
        """
        process = self._process
        if process is None:
            raise RuntimeError("the source is not open: use `async with`")
        while not self._messages:
            data = await process.read(_READ_BYTES)
            if not data:
                status = await process.wait()
                cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
                raise MediaError(f"the decoder process ended in the middle of the media ({cause})")
            try:
                self._messages.extend(self._parser.feed(data))
            except WireError as error:
                raise MediaError(f"the decoder process sent nonsense: {error}") from error
        message = self._messages.popleft()
        if isinstance(message, Failed):
            raise (SourceNotFound if message.kind is FailureKind.NOT_FOUND else MediaError)(message.message)
        if isinstance(message, SourceGap):
            self._check_gap(message.num_samples)
        if isinstance(message, VideoFrame):
            self._check_frame(message.start_sample)
        return message

    def _check_gap(self, num_samples: int) -> None:
        """Hold the process to the limit that it was told: every second of a gap becomes chunks here."""
        if num_samples > ms_to_samples(self._params.max_gap_ms):
            raise MediaError(
                f"the decoder process sent nonsense: a gap of {num_samples / SAMPLE_RATE_HZ:.0f} s, over the limit of "
                f"{self._params.max_gap_ms / 1_000:.0f} s"
            )

    def _check_frame(self, start_sample: int) -> None:
        """Hold the process to its order: in real time a frame is waited for, so its time must be near."""
        lead = start_sample - self._position
        if lead > ms_to_samples(MAX_FRAME_LEAD_MS):
            raise MediaError(
                f"the decoder process sent nonsense: a frame {lead / SAMPLE_RATE_HZ:.0f} s before its sound, over the "
                f"limit of {MAX_FRAME_LEAD_MS / 1_000:.0f} s"
            )

    async def _wait_until_due(self, end_sample: int) -> None:
        """In real time, wait until `end_sample` of the media clock has come."""
        if self._pace is not Pace.REALTIME:
            return
        now = asyncio.get_running_loop().time()
        if self._starts_at is None:
            self._starts_at = now
        wait_s = self._starts_at + end_sample / SAMPLE_RATE_HZ - now
        if wait_s > 0:
            await asyncio.sleep(wait_s)
