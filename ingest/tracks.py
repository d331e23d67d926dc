"""What a media file holds, and its packets in the order of their times. Imports PyAV: for processes that decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ingest.normalize import check_form
from ingest.source import AudioParams, ChannelMode, SourceInfo, VideoParams
from pipeline.errors import MediaError

Track: TypeAlias = AudioStream | VideoStream
AnyPacket: TypeAlias = "av.Packet[Any]"

_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,"
    "mp3,mpeg,mpegts,nut,ogg,tta,voc,w64,wav,wv"
)
"""Demuxers that read one file and nothing else: playlists would open what they name."""

_PICTURES = "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,gif"
"""Demuxers of pictures, for those who want to see something."""

MAX_BAD_PACKETS = 100
"""So many packets in a row that cannot be decoded end the stream; fewer are a gap in the timestamps."""

_MAX_WAITING_BYTES = 64 << 20
_PACKET_COST_BYTES = 1_024  # an empty one takes memory too


def open_container(file: BinaryIO, video: VideoParams | None) -> InputContainer:
    """Find out what the file holds.

    Raises:
        MediaError: nothing that FFmpeg can read.
    """
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    limits: dict[str, str] = {}
    if video is not None:
        options["format_whitelist"] = f"{_FORMATS},{_PICTURES}"
        limits["max_pixels"] = str(video.max_pixels)  # finding out may take the decoding of a frame
    try:
        try:
            return av.open(file, "r", options=limits, container_options=options)
        except (OSError, ValueError):
            if video is None:
                raise
            # The name of a picture leads FFmpeg to a demuxer that would open files by itself, and may not be used.
            file.seek(0)
            return av.open(_Nameless(file), "r", options=limits, container_options=options)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise MediaError(f"not a media file that can be read: {reason_of(error)}") from error


class _Nameless:
    """What FFmpeg needs of a file, without its name: what is in it decides what it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def select_audio(container: InputContainer) -> AudioStream | None:
    """Return the audio track to hear; None if there is none.

    Raises:
        MediaError: there is no decoder for it, or its form cannot be used.
    """
    if not container.streams.audio:
        return None
    track = container.streams.audio[0]
    if track.codec_context is None:
        raise MediaError("the audio track uses a codec that this FFmpeg has no decoder for: convert it, e.g. to FLAC")
    if track.codec_context.sample_rate or track.codec_context.channels:
        check_form(track.codec_context.sample_rate, track.codec_context.channels)
    return track


def select_video(container: InputContainer, params: VideoParams) -> VideoStream | None:
    """Return the video track to look at; None if there is none. The picture on a record's cover is none.

    Raises:
        MediaError: there is no decoder for it, or its pictures are larger than `max_pixels`, which is known before any
            of them is decoded.
    """
    tracks = [track for track in container.streams.video if not track.disposition & Disposition.attached_pic]
    if not tracks:
        return None
    track = tracks[0]
    if track.codec_context is None:
        raise MediaError("the video track uses a codec that this FFmpeg has no decoder for: convert it, e.g. to H.264")
    width_px, height_px = track.codec_context.width, track.codec_context.height
    if not 0 < width_px * height_px <= params.max_pixels:
        size = f"{width_px} x {height_px}" if width_px * height_px else "unknown size"
        raise MediaError(
            f"its pictures are damaged or too large ({size}; the limit is {params.max_pixels} pixels): scale them down"
        )
    return track


def kinds_of(container: InputContainer) -> str:
    """Return what kinds of tracks there are, for a message."""
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def describe(
    container: InputContainer, sound: AudioStream | None, video: VideoStream | None, params: AudioParams
) -> SourceInfo:
    """Return what is known before anything is decoded."""
    duration_s: float | None = None
    main = sound or video
    if main is not None and main.duration is not None and main.time_base is not None:
        duration_s = float(main.duration * main.time_base)
    elif container.duration is not None:
        duration_s = container.duration / 1_000_000
    if duration_s is not None and duration_s < 0:
        duration_s = None
    channels = sound.codec_context.channels if sound is not None else 0
    return SourceInfo(
        num_channels=1 if params.channels is ChannelMode.MIX or sound is None else channels,
        native_rate_hz=sound.codec_context.sample_rate if sound is not None else 0,
        native_channels=channels,
        duration_s=duration_s,
        container=container.format.name,
        codec=sound.codec_context.name if sound is not None else "none",
        has_video=video is not None,
        width_px=video.codec_context.width if video is not None else 0,
        height_px=video.codec_context.height if video is not None else 0,
    )


@dataclass(slots=True)
class _Queue:
    """The packets of one track that wait, each with its time in the file in seconds."""

    track: Track
    lead_s: float
    waiting: deque[tuple[float, AnyPacket]] = field(default_factory=deque)
    last_s: float = 0.0

    def put(self, packet: AnyPacket) -> None:
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is not None and packet.time_base is not None:
            self.last_s = float(stamp * packet.time_base)
        self.waiting.append((self.last_s - self.lead_s, packet))


class Packets:
    """The packets of a sound and a video track by their times, wherever they lie in the file.

    A packet waits until the other track has one too, or is at its end; 64 MB of them wait at most, beyond that the
    order is the file's.

    Args:
        container: what they come from.
        sound: the track to hear, if any.
        video: the track to look at, if any.
        lead_s: how much earlier video is given out than sound of the same time: its decoder gives frames that late.
    """

    def __init__(
        self, container: InputContainer, sound: AudioStream | None, video: VideoStream | None, lead_s: float = 0.0
    ) -> None:
        self._container = container
        self._queues: dict[int, _Queue] = {}
        if sound is not None:
            self._queues[sound.index] = _Queue(sound, 0.0)
        if video is not None:
            self._queues[video.index] = _Queue(video, lead_s)
        self._num_bytes = 0
        self.is_sound_first = sound is not None
        """Whether sound goes before everything: until it has begun nobody knows the time of a frame."""

    def __iter__(self) -> Iterator[tuple[Track, AnyPacket | None]]:
        """Yield (track, packet that holds something), and (track, None) behind a track's last.

        Raises:
            MediaError: the file breaks off; what was read of it has been given out by then.
        """
        reading, is_at_end = self._read(), False
        broken: av.FFmpegError | None = None
        while True:
            try:
                while not is_at_end and self._wants_more():
                    is_at_end = not next(reading, False)
            except av.FFmpegError as error:
                is_at_end, broken = True, error
            if is_at_end and broken is None:
                for queue in [queue for queue in self._queues.values() if not queue.waiting]:
                    del self._queues[queue.track.index]
                    yield queue.track, None
            filled = [queue for queue in self._queues.values() if queue.waiting]
            if not filled:
                break
            queue = filled[0]
            if not (self.is_sound_first and isinstance(queue.track, AudioStream)):
                queue = min(filled, key=lambda queue: queue.waiting[0][0])
            _, packet = queue.waiting.popleft()
            self._num_bytes -= packet.size + _PACKET_COST_BYTES
            yield queue.track, packet
        if broken is not None:
            raise MediaError(f"the file breaks off: {reason_of(broken)}") from broken

    def drop(self, track: Track) -> None:
        """Give out nothing of `track` any more, not its end either."""
        queue = self._queues.pop(track.index, None)
        if queue is not None:
            self._num_bytes -= sum(packet.size + _PACKET_COST_BYTES for _, packet in queue.waiting)

    def _wants_more(self) -> bool:
        is_one_empty = any(not queue.waiting for queue in self._queues.values())
        return is_one_empty and self._num_bytes < _MAX_WAITING_BYTES

    def _read(self) -> Iterator[bool]:
        """Yield True for each packet that was read; it waits in its queue then."""
        for packet in self._container.demux(*(queue.track for queue in self._queues.values())):
            queue = self._queues.get(packet.stream.index)
            if queue is not None and packet.size:
                self._num_bytes += packet.size + _PACKET_COST_BYTES
                queue.put(packet)
            yield True


def reason_of(error: Exception) -> str:
    """Return what a library says in its error, one line."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
