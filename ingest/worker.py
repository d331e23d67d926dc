"""What the process that decodes one source does; it is a copy of `ingest.zygote`.

It reads one JSON object (`location`, `params`, `video`) from its socket and writes messages of `ingest.wire` to it
until the media ends. Locations are not in the arguments, which every user of the machine may read.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import socket
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import av.logging
from av.audio.stream import AudioStream
from av.container import InputContainer

from ingest.confine import confine
from ingest.sound import Sound
from ingest.source import (
    MAX_FRAME_LEAD_MS,
    AudioBlock,
    AudioParams,
    SourceGap,
    SourceItem,
    VideoFrame,
    VideoParams,
)
from ingest.tracks import (
    AnyPacket,
    Packets,
    describe,
    kinds_of,
    open_container,
    reason_of,
    select_audio,
    select_video,
)
from ingest.video import SilentClock, Video
from ingest.wire import MAX_BLOCK_SAMPLES, Ended, Failed, FailureKind, Message, Opened, encode
from pipeline.errors import MediaError, SourceNotFound
from pipeline.timebase import ms_to_samples

_MAX_HELD_FRAMES = 4
"""Frames that wait for the sound before them; they are large, so more of them go before their turn."""

_MAX_LEAD_SAMPLES = ms_to_samples(MAX_FRAME_LEAD_MS - 5_000)


def open_file(location: str) -> BinaryIO:
    """Open the file at `location`.

    Raises:
        SourceNotFound: there is none.
        MediaError: it is not a regular file, or may not be read.
    """
    path = Path(location)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise MediaError(f"is {kind}: name a media file")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFound("no such file: check the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"cannot be opened: {reason}") from error


class Playback:
    """What is heard and seen of an open file, in order.

    Args:
        container: the file.
        params: how to normalise, and what to refuse.
        video_params: which frames to take; None: sound only.

    Raises:
        MediaError: it holds nothing that can be used.
    """

    def __init__(self, container: InputContainer, params: AudioParams, video_params: VideoParams | None) -> None:
        track = select_audio(container)
        self._video = None if video_params is None else _select(container, video_params, has_sound=track is not None)
        if track is None and self._video is None:
            missing = "audio track" if video_params is None else "audio or video track"
            raise MediaError(f"no {missing}: the file holds {kinds_of(container)}")
        self._is_silent = track is None
        self._sound = Sound(track, params)
        self._sample_of = SilentClock(params).sample_of if track is None else self._sound.sample_of
        video_track = None if self._video is None else self._video.track
        self.info = describe(container, track, video_track, params)
        self._packets = Packets(container, track, video_track, 0.0 if self._video is None else self._video.lead_s)
        self._position = 0  # behind all sound and gaps that were given out
        self._frames: deque[VideoFrame] = deque()  # seen already, to be shown with the sound of their time
        self._has_sound_ended = track is None

    @property
    def num_nonfinite(self) -> int:
        """How many samples were NaN or infinite."""
        return self._sound.num_nonfinite

    def items(self) -> Iterator[SourceItem]:
        """Yield everything.

        Raises:
            MediaError: the file cannot be used to its end; what came before was given out.
        """
        try:
            for track, packet in self._packets:
                if isinstance(track, AudioStream):
                    yield from self._hear(packet)
                else:
                    yield from self._see(packet)
            if self._is_silent and self._video is not None:
                yield from self._be_silent(max(self._video.end_sample, MAX_BLOCK_SAMPLES))
        except Exception:
            yield from self._in_time(self._sound.flush())  # the media may break off, but all that was heard counts
            raise
        yield from self._in_time(self._sound.flush())

    def _hear(self, packet: AnyPacket | None) -> Iterator[SourceItem]:
        yield from self._in_time(self._sound.push(packet))
        self._packets.is_sound_first = not self._sound.has_begun
        if packet is None:
            self._has_sound_ended = True
            yield from self._show(0)

    def _see(self, packet: AnyPacket | None) -> Iterator[SourceItem]:
        video = self._video
        if video is None:
            return
        try:
            for frame in video.push(packet, self._sample_of):
                self._frames.append(frame)
                yield from self._show(0 if self._has_sound_ended else _MAX_HELD_FRAMES)
        except MediaError:
            if self._is_silent:
                raise
            self._video = None  # what can be heard goes on without it
            self._packets.drop(video.track)
        if self._is_silent:
            yield from self._be_silent(video.seen_sample)

    def _in_time(self, heard: Iterator[AudioBlock | SourceGap]) -> Iterator[SourceItem]:
        """Yield what is heard, and before each item the frames that lie before its end."""
        for item in heard:
            end_sample = self._position + (item.samples.shape[1] if isinstance(item, AudioBlock) else item.num_samples)
            while self._frames and self._frames[0].start_sample < end_sample:
                yield self._frames.popleft()
            yield item
            self._position = end_sample

    def _show(self, num_kept: int) -> Iterator[SourceItem]:
        """Yield frames until `num_kept` are left, and silence before them where there is no sound any more.

        Sound that is missing so far may come late in the file; but the frames do not wait for it.
        """
        lead = 0 if self._has_sound_ended else _MAX_LEAD_SAMPLES
        while len(self._frames) > num_kept:
            yield from self._be_silent(self._frames[0].start_sample - lead)
            if len(self._frames) > num_kept:  # the silence may have brought it out
                yield self._frames.popleft()

    def _be_silent(self, end_sample: int) -> Iterator[SourceItem]:
        yield from self._in_time(self._sound.push_silence(end_sample))


def _select(container: InputContainer, params: VideoParams, *, has_sound: bool) -> Video | None:
    """Return the video; None if there is none, or none that can be used while there is something to hear."""
    try:
        track = select_video(container, params)
    except MediaError:
        if has_sound:
            return None
        raise
    return None if track is None else Video(track, params)


def messages(
    location: str, params: AudioParams, parent_pid: int, video: VideoParams | None = None
) -> Iterator[Message]:
    """Yield everything there is to say about the source, in order.

    Raises:
        MediaError: it cannot be used, or not to its end.
    """
    with open_file(location) as file:
        confine(parent_pid)
        with open_container(file, video) as container:
            playback = Playback(container, params, video)
            yield Opened(playback.info)
            yield from playback.items()
            yield Ended(playback.num_nonfinite)


def run(location: str, params: AudioParams, parent_pid: int, out: BinaryIO, video: VideoParams | None = None) -> None:
    """Write all messages; what goes wrong with the media becomes the last of them.

    Raises:
        ConnectionError: if nobody reads them any more.
    """

    def fail(kind: FailureKind, reason: object) -> None:
        out.write(encode(Failed(kind, f"{Path(location).name}: {reason}")))

    try:
        for message in messages(location, params, parent_pid, video):
            out.write(encode(message))
            out.flush()
    except SourceNotFound as error:
        fail(FailureKind.NOT_FOUND, error)
    except MediaError as error:
        fail(FailureKind.MEDIA, error)
    except MemoryError:
        fail(FailureKind.MEDIA, "decoding needs more memory than a source may take")
    except ConnectionError:
        raise
    except Exception as error:  # whatever hostile media brings about ends this stream, and the parent is told
        fail(FailureKind.MEDIA, f"decoding failed: {type(error).__name__}: {reason_of(error)}")
    out.flush()


def prepare() -> None:
    """Import what PyAV would import when it first needs it: confined, a process cannot open a module's file."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name != "av.__main__":
            importlib.import_module(module.name)
    av.logging.set_level(av.logging.PANIC)  # its lines name files and addresses


def serve(connection: socket.socket, parent_pid: int) -> None:
    """Serve the one source that is asked for on `connection`, and die with `parent_pid`."""
    with connection.makefile("rb") as asking:
        asked = asking.read()
    if not asked:
        return  # the parent has changed its mind
    request = json.loads(asked)
    out = connection.makefile("wb")
    with contextlib.suppress(ConnectionError):  # the parent has left: there is nobody to tell
        asked_video = request.get("video")
        video = None if asked_video is None else VideoParams.model_validate(asked_video)
        run(request["location"], AudioParams.model_validate(request["params"]), parent_pid, out, video)
