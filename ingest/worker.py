"""What the process that decodes one source does; it is a copy of `ingest.zygote`.

It reads one JSON object (`location`, `params`) from its socket and writes messages of `ingest.wire` to it until the
media ends. Locations are not in the arguments, which every user of the machine may read.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import socket
import stat
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import av.logging
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from ingest.confine import confine
from ingest.normalize import Normalizer, check_form
from ingest.source import AudioBlock, AudioParams, ChannelMode, SourceGap, SourceInfo
from ingest.wire import MAX_BLOCK_SAMPLES, Ended, Failed, FailureKind, Message, Opened, encode
from pipeline.errors import MediaError, SourceNotFound
from pipeline.timebase import SAMPLE_RATE_HZ

_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,"
    "mp3,mpeg,mpegts,nut,ogg,tta,voc,w64,wav,wv"
)
"""Demuxers that read one file and nothing else: playlists would open what they name."""

_MAX_BAD_PACKETS = 100
"""So many packets in a row that cannot be decoded end the stream; fewer are a gap in the timestamps."""


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


def open_container(file: BinaryIO) -> InputContainer:
    """Find out what the file holds.

    Raises:
        MediaError: nothing that FFmpeg can read.
    """
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        return av.open(file, "r", container_options=options)
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise MediaError(f"not a media file that can be read: {_reason(error)}") from error


def select_audio(container: InputContainer) -> AudioStream:
    """Return the audio track to hear.

    Raises:
        MediaError: there is none, no decoder for it, or its form cannot be used.
    """
    if not container.streams.audio:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise MediaError(f"no audio track: the file holds {kinds}")
    track = container.streams.audio[0]
    if track.codec_context is None:
        raise MediaError("the audio track uses a codec that this FFmpeg has no decoder for: convert it, e.g. to FLAC")
    if track.codec_context.sample_rate or track.codec_context.channels:
        check_form(track.codec_context.sample_rate, track.codec_context.channels)
    return track


def describe(container: InputContainer, track: AudioStream, params: AudioParams) -> SourceInfo:
    """Return what is known before anything is decoded."""
    duration_s: float | None = None
    if track.duration is not None and track.time_base is not None:
        duration_s = float(track.duration * track.time_base)
    elif container.duration is not None:
        duration_s = container.duration / 1_000_000
    if duration_s is not None and duration_s < 0:
        duration_s = None
    channels = track.codec_context.channels
    return SourceInfo(
        num_channels=1 if params.channels is ChannelMode.MIX else channels,
        native_rate_hz=track.codec_context.sample_rate,
        native_channels=channels,
        duration_s=duration_s,
        container=container.format.name,
        codec=track.codec_context.name,
    )


def decode(container: InputContainer, track: AudioStream) -> Iterator[av.AudioFrame]:
    """Yield decoded sound; damaged packets are passed over.

    Raises:
        MediaError: nothing can be decoded, or nothing any more.
    """
    num_bad, last_error, has_sound = 0, "", False
    for packet in _packets(container, track):
        try:
            decoded = track.codec_context.decode(packet)
        except (av.FFmpegError, ValueError) as error:
            num_bad, last_error = num_bad + 1, _reason(error)
            if num_bad >= _MAX_BAD_PACKETS:
                raise MediaError(f"{num_bad} packets in a row cannot be decoded: {last_error}") from error
            continue
        for sound in decoded:
            if sound.samples:
                num_bad, has_sound = 0, True
                yield sound
    if num_bad and not has_sound:
        raise MediaError(f"the audio track cannot be decoded: {last_error}")


def _packets(container: InputContainer, track: AudioStream) -> Iterator[av.Packet[AudioStream] | None]:
    """Yield the packets that hold something, then None, at which a decoder gives what it still has."""
    try:
        for packet in container.demux(track):
            if packet.size:
                yield packet
    except av.FFmpegError as error:
        raise MediaError(f"the file breaks off: {_reason(error)}") from error
    yield None


class Timeline:
    """Finds sound that is missing from the timestamps. Time only goes forward: a jump back begins a new count."""

    def __init__(self, params: AudioParams) -> None:
        self._params = params
        self._threshold_s = Fraction(params.min_gap_ms, 1_000)
        self._clearly_no_jump_s = params.min_gap_ms / 2_000
        self._began_s: Fraction | None = None
        self._num_samples = 0  # heard since then, at this rate
        self._rate_hz = 0

    def gap_before(self, sound: av.AudioFrame) -> int:
        """Return how many samples at 16 kHz are missing in front of `sound`, or 0, and count it in.

        Raises:
            MediaError: if the jump is over `max_gap_ms`.
        """
        if self._is_on_time(sound):
            self._num_samples += sound.samples
            return 0
        expected_s = self._expected_s()
        if sound.pts is None or sound.time_base is None:
            begins_s = expected_s or Fraction(0)
        else:
            begins_s = sound.pts * sound.time_base
        jump_s = begins_s - (begins_s if expected_s is None else expected_s)
        if expected_s is not None and abs(jump_s) <= self._threshold_s:
            begins_s = expected_s
        self._began_s, self._num_samples, self._rate_hz = begins_s, sound.samples, sound.sample_rate
        if jump_s <= self._threshold_s:
            return 0
        if jump_s > Fraction(self._params.max_gap_ms, 1_000):
            raise MediaError(
                f"the timestamps jump by {float(jump_s):.0f} s, over the limit of "
                f"{self._params.max_gap_ms / 1_000:.0f} s: repair the file or raise audio.max_gap_ms"
            )
        return round(jump_s * SAMPLE_RATE_HZ)

    def _is_on_time(self, sound: av.AudioFrame) -> bool:
        """Whether there is clearly no jump. Fractions are exact and slow, and nearly all sound is on time."""
        if self._began_s is None or sound.sample_rate != self._rate_hz:
            return False
        if sound.time is None:
            return True
        expected_s = float(self._began_s) + self._num_samples / self._rate_hz
        return abs(sound.time - expected_s) < self._clearly_no_jump_s

    def _expected_s(self) -> Fraction | None:
        return None if self._began_s is None else self._began_s + Fraction(self._num_samples, self._rate_hz)


class Blocks:
    """Collects sound into blocks that end where a chunk of the stream ends: what is less starts no work there."""

    def __init__(self) -> None:
        self.num_samples = 0  # of sound, given out or held
        self._held: list[NDArray[np.int16]] = []
        self._end_sample = 0  # media time behind all that was pushed and skipped

    def push(self, samples: NDArray[np.int16]) -> Iterator[AudioBlock]:
        """Take int16[channels, n] and yield the blocks that are complete."""
        while samples.shape[1]:
            part = samples[:, : MAX_BLOCK_SAMPLES - self._end_sample % MAX_BLOCK_SAMPLES]
            samples = samples[:, part.shape[1] :]
            self._held.append(part)
            self._end_sample += part.shape[1]
            self.num_samples += part.shape[1]
            if self._end_sample % MAX_BLOCK_SAMPLES == 0:
                yield from self.flush()

    def skip(self, num_samples: int) -> None:
        """Let time go on without sound. Flush first."""
        self._end_sample += num_samples

    def flush(self) -> Iterator[AudioBlock]:
        """Yield what is held, if anything."""
        held, self._held = self._held, []
        if held:
            yield AudioBlock(held[0] if len(held) == 1 else np.concatenate(held, axis=1))


def messages(location: str, params: AudioParams, parent_pid: int) -> Iterator[Message]:
    """Yield everything there is to say about the source, in order.

    Raises:
        MediaError: it cannot be used, or not to its end.
    """
    with open_file(location) as file:
        confine(parent_pid)
        with open_container(file) as container:
            track = select_audio(container)
            yield Opened(describe(container, track, params))
            normalizer, blocks = Normalizer(params), Blocks()
            try:
                yield from _sound(decode(container, track), normalizer, Timeline(params), blocks)
            except Exception:
                yield from blocks.flush()  # the media may break off, but all that was heard counts
                raise
            yield from blocks.flush()
            if blocks.num_samples == 0:
                raise MediaError("no sound can be decoded: the audio track is empty or damaged")
            yield Ended(normalizer.num_nonfinite)


def _sound(
    decoded: Iterator[av.AudioFrame], normalizer: Normalizer, timeline: Timeline, blocks: Blocks
) -> Iterator[AudioBlock | SourceGap]:
    for sound in decoded:
        check_form(sound.sample_rate, sound.layout.nb_channels)
        gap_samples = timeline.gap_before(sound)
        if gap_samples:
            yield from blocks.push(normalizer.flush())
            yield from blocks.flush()
            yield SourceGap(gap_samples, "timestamps of the source jump")
            blocks.skip(gap_samples)
        yield from blocks.push(normalizer.push(sound))
    yield from blocks.push(normalizer.flush())


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def run(location: str, params: AudioParams, parent_pid: int, out: BinaryIO) -> None:
    """Write all messages; what goes wrong with the media becomes the last of them.

    Raises:
        ConnectionError: if nobody reads them any more.
    """

    def fail(kind: FailureKind, reason: object) -> None:
        out.write(encode(Failed(kind, f"{Path(location).name}: {reason}")))

    try:
        for message in messages(location, params, parent_pid):
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
        fail(FailureKind.MEDIA, f"decoding failed: {type(error).__name__}: {_reason(error)}")
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
        run(request["location"], AudioParams.model_validate(request["params"]), parent_pid, out)
