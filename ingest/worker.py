"""The process that decodes one source: `python -m ingest.worker`, started by `ingest.container`.

It reads one JSON object from stdin (`location`, `params`, `parent_pid`) and writes messages of `ingest.wire` to stdout
until the media ends. Locations are not in the arguments, which every user of the machine may read.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import stat
import sys
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
            frames = track.codec_context.decode(packet)
        except (av.FFmpegError, ValueError) as error:
            num_bad, last_error = num_bad + 1, _reason(error)
            if num_bad >= _MAX_BAD_PACKETS:
                raise MediaError(f"{num_bad} packets in a row cannot be decoded: {last_error}") from error
            continue
        for frame in frames:
            if frame.samples:
                num_bad, has_sound = 0, True
                yield frame
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
        self._expected_s: Fraction | None = None

    def gap_before(self, frame: av.AudioFrame) -> int:
        """Return how many samples at 16 kHz are missing in front of `frame`, or 0, and count the frame in.

        Raises:
            MediaError: if the jump is over `max_gap_ms`.
        """
        if frame.pts is None or frame.time_base is None:
            begins_s = self._expected_s or Fraction(0)
        else:
            begins_s = frame.pts * frame.time_base
        expected_s = begins_s if self._expected_s is None else self._expected_s
        jump_s = begins_s - expected_s
        threshold_s = Fraction(self._params.min_gap_ms, 1_000)
        if abs(jump_s) <= threshold_s:
            begins_s = expected_s
        self._expected_s = begins_s + Fraction(frame.samples, frame.sample_rate)
        if jump_s <= threshold_s:
            return 0
        if jump_s > Fraction(self._params.max_gap_ms, 1_000):
            raise MediaError(
                f"the timestamps jump by {float(jump_s):.0f} s, over the limit of "
                f"{self._params.max_gap_ms / 1_000:.0f} s: repair the file or raise audio.max_gap_ms"
            )
        return round(jump_s * SAMPLE_RATE_HZ)


def blocks(samples: NDArray[np.int16]) -> Iterator[AudioBlock]:
    """Cut int16[channels, n] into blocks of at most 80 ms."""
    for start in range(0, samples.shape[1], MAX_BLOCK_SAMPLES):
        yield AudioBlock(samples[:, start : start + MAX_BLOCK_SAMPLES])


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
            normalizer, timeline = Normalizer(params), Timeline(params)
            num_samples = 0
            for frame in decode(container, track):
                check_form(frame.sample_rate, frame.layout.nb_channels)
                gap_samples = timeline.gap_before(frame)
                if gap_samples:
                    yield from blocks(normalizer.flush())
                    yield SourceGap(gap_samples, "timestamps of the source jump")
                for block in blocks(normalizer.push(frame)):
                    num_samples += block.samples.shape[1]
                    yield block
            for block in blocks(normalizer.flush()):
                num_samples += block.samples.shape[1]
                yield block
            if num_samples == 0:
                raise MediaError("no sound can be decoded: the audio track is empty or damaged")
            yield Ended(normalizer.num_nonfinite)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def run(location: str, params: AudioParams, parent_pid: int, out: BinaryIO) -> None:
    """Write all messages; what goes wrong with the media becomes the last of them."""

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
    except BrokenPipeError:
        raise
    except Exception as error:  # whatever hostile media brings about ends this stream, and the parent is told
        fail(FailureKind.MEDIA, f"decoding failed: {type(error).__name__}: {_reason(error)}")
    out.flush()


def import_all_of_av() -> None:
    """Import what PyAV would import when it first needs it: confined, this process cannot open a module's file."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name != "av.__main__":
            importlib.import_module(module.name)


def main() -> None:
    """Serve one source."""
    import_all_of_av()
    av.logging.set_level(av.logging.PANIC)  # its lines name files and addresses
    out = sys.stdout.buffer
    request = json.load(sys.stdin)
    try:
        run(request["location"], AudioParams.model_validate(request["params"]), request["parent_pid"], out)
    except BrokenPipeError:
        os._exit(0)  # the parent has left: there is nobody to tell, and a second flush would fail too


if __name__ == "__main__":
    main()
