"""The messages that a decoding process writes to its parent.

A message is a header of five bytes (kind, then the payload's length, little-endian) and the payload. The parser takes
nothing on trust, since hostile media may have taken the process over: every length, count and kind is checked.

| kind | payload                                                       |
|------|---------------------------------------------------------------|
| `I`  | Opened: JSON object with the fields of `SourceInfo`             |
| `A`  | AudioBlock: number of channels (u8), then int16 planes          |
| `G`  | SourceGap: number of samples (u64), then the reason in UTF-8     |
| `V`  | VideoFrame: media sample (u64), width (u16), height (u16), RGB   |
| `X`  | Failed: kind (u8), then one sentence in UTF-8                   |
| `E`  | Ended: how many samples were NaN or infinite (u64)              |

What the zygote of those processes and their parent say to each other (`ingest.zygote`) is `ZYGOTE_MESSAGE`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ingest.source import MAX_CHANNELS, AudioBlock, SourceGap, SourceInfo, VideoFrame
from pipeline.timebase import CHUNK_SAMPLES

MAX_BLOCK_SAMPLES = CHUNK_SAMPLES
MAX_TEXT_BYTES = 2_048
MAX_PAYLOAD_BYTES = 1 + MAX_CHANNELS * MAX_BLOCK_SAMPLES * 2
ZYGOTE_MESSAGE = struct.Struct("<cii")
"""Kind, pid, and a number that the kind gives a meaning to."""
_MAX_GAP_SAMPLES = 1 << 40
_MAX_SIDE_PX = (1 << 16) - 1
_MAX_NATIVE_PX = 1 << 28

_HEADER = struct.Struct("<cI")
_COUNT = struct.Struct("<Q")
_FRAME = struct.Struct("<QHH")
_RGB = 3
_SAMPLE = np.dtype("<i2")
_INFO: TypeAdapter[SourceInfo] = TypeAdapter(SourceInfo)


class WireError(Exception):
    """What arrived is not a message of this protocol."""


class FailureKind(IntEnum):
    """Which error the parent raises."""

    MEDIA = 1  # MediaError
    NOT_FOUND = 2  # SourceNotFound


@dataclass(frozen=True, slots=True)
class Opened:
    """The media was opened; comes first."""

    info: SourceInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """The media is not usable; nothing follows."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The media has been read to its end; nothing follows."""

    num_nonfinite: int


Message = Opened | AudioBlock | SourceGap | VideoFrame | Failed | Ended


def encode(message: Message) -> bytes:
    """Return the bytes of `message`. Long texts are cut, what cannot be printed becomes a question mark.

    Raises:
        ValueError: if a block has more than 1,280 samples or 8 channels, a frame no pixels or sides above 65,535, or a
            number does not fit.
    """
    match message:
        case Opened(info):
            kind, payload = b"I", json.dumps(dataclasses.asdict(info)).encode()
        case AudioBlock(samples):
            num_channels, num_samples = samples.shape
            if not (1 <= num_channels <= MAX_CHANNELS and 1 <= num_samples <= MAX_BLOCK_SAMPLES):
                raise ValueError(f"a block of {list(samples.shape)} does not fit into a message")
            kind, payload = b"A", bytes([num_channels]) + np.ascontiguousarray(samples, _SAMPLE).tobytes()
        case SourceGap(num_samples, reason):
            kind, payload = b"G", _pack_count(num_samples) + _pack_text(reason)
        case VideoFrame():
            return _encode_frame(message)
        case Failed(failure_kind, text):
            kind, payload = b"X", bytes([failure_kind]) + _pack_text(text)
        case Ended(num_nonfinite):
            kind, payload = b"E", _pack_count(num_nonfinite)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a message of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    return _HEADER.pack(kind, len(payload)) + payload


def _encode_frame(frame: VideoFrame) -> bytes:
    height_px, width_px, depth = frame.pixels.shape
    if frame.pixels.dtype != np.uint8 or depth != _RGB:
        raise ValueError(f"{frame.pixels.dtype}{list(frame.pixels.shape)} is no picture of uint8[height, width, 3]")
    if not (1 <= width_px <= _MAX_SIDE_PX and 1 <= height_px <= _MAX_SIDE_PX):
        raise ValueError(f"a frame of {width_px} x {height_px} pixels does not fit into a message")
    try:
        head = _FRAME.pack(frame.start_sample, width_px, height_px)
    except struct.error as error:
        raise ValueError(f"{frame.start_sample} does not fit into 64 bits") from error
    return _HEADER.pack(b"V", _FRAME.size + frame.pixels.size) + head + frame.pixels.tobytes()


class WireParser:
    """Turns bytes, split anywhere, into messages. Holds at most one incomplete message.

    Args:
        max_frame_pixels: of the largest frame that may come; 0: no frame is expected, so none is understood.
    """

    def __init__(self, max_frame_pixels: int = 0) -> None:
        self._pending = bytearray()
        self._decoders = dict(_DECODERS)
        self._max_frame_bytes = _FRAME.size + max_frame_pixels * _RGB
        if max_frame_pixels:
            self._decoders[b"V"] = _decode_frame

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes.

        Raises:
            WireError: if this is not the protocol; the parser must not be used any more.
        """
        self._pending += data
        messages: list[Message] = []
        start = 0
        while len(self._pending) - start >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._pending, start)
            if kind not in self._decoders:
                raise WireError(f"unknown kind of message: {kind!r}")
            max_bytes = self._max_frame_bytes if kind == b"V" else MAX_PAYLOAD_BYTES
            if length > max_bytes:
                raise WireError(f"message of {length} bytes is over the limit of {max_bytes}")
            end = start + _HEADER.size + length
            if len(self._pending) < end:
                break
            with memoryview(self._pending) as pending:  # a slice of the bytearray itself would be one more copy
                payload = bytes(pending[start + _HEADER.size : end])
            messages.append(self._decoders[kind](payload))
            start = end
        del self._pending[:start]
        return messages


def _pack_count(count: int) -> bytes:
    try:
        return _COUNT.pack(count)
    except struct.error as error:
        raise ValueError(f"{count} does not fit into 64 bits") from error


def _pack_text(text: str) -> bytes:
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore").encode()


def _unpack_text(payload: bytes) -> str:
    if len(payload) > MAX_TEXT_BYTES:
        raise WireError(f"text of {len(payload)} bytes is over the limit of {MAX_TEXT_BYTES}")
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        raise WireError("text is not UTF-8") from error
    return _printable(text)


def _printable(text: str) -> str:
    """Return `text`; it will be shown in terminals, which control characters could take over."""
    if not text.isprintable():
        raise WireError("text has characters that cannot be printed")
    return text


def _decode_opened(payload: bytes) -> Opened:
    try:
        info = _INFO.validate_json(payload, strict=True)
    except ValidationError as error:
        raise WireError(f"malformed description of a source: {error.error_count()} wrong fields") from error
    if not 1 <= info.num_channels <= MAX_CHANNELS:
        raise WireError(f"a source of {info.num_channels} channels, expected 1 to {MAX_CHANNELS}")
    if info.duration_s is not None and not 0 <= info.duration_s < math.inf:
        raise WireError(f"a source of {info.duration_s} s")
    if not (0 <= info.width_px <= _MAX_NATIVE_PX and 0 <= info.height_px <= _MAX_NATIVE_PX):
        raise WireError(f"a video of {info.width_px} x {info.height_px} pixels")
    _printable(info.container + info.codec)
    return Opened(info)


def _decode_audio(payload: bytes) -> AudioBlock:
    num_channels = payload[0] if payload else 0
    num_bytes = len(payload) - 1
    if not 1 <= num_channels <= MAX_CHANNELS or num_bytes <= 0 or num_bytes % (num_channels * _SAMPLE.itemsize):
        raise WireError(f"{len(payload)} bytes are no block of {num_channels} channels")
    planes = np.frombuffer(payload, _SAMPLE, offset=1).reshape(num_channels, -1)
    if planes.shape[1] > MAX_BLOCK_SAMPLES:
        raise WireError(f"block of {planes.shape[1]} samples is over the limit of {MAX_BLOCK_SAMPLES}")
    return AudioBlock(planes.astype(np.int16))


def _decode_gap(payload: bytes) -> SourceGap:
    if len(payload) < _COUNT.size:
        raise WireError(f"gap of {len(payload)} bytes is too short")
    (num_samples,) = _COUNT.unpack_from(payload)
    if not 1 <= num_samples <= _MAX_GAP_SAMPLES:
        raise WireError(f"gap of {num_samples} samples")
    return SourceGap(num_samples, _unpack_text(payload[_COUNT.size :]))


def _decode_frame(payload: bytes) -> VideoFrame:
    if len(payload) < _FRAME.size:
        raise WireError(f"frame of {len(payload)} bytes is too short")
    start_sample, width_px, height_px = _FRAME.unpack_from(payload)
    if not width_px * height_px or len(payload) != _FRAME.size + width_px * height_px * _RGB:
        raise WireError(f"{len(payload)} bytes are no frame of {width_px} x {height_px} pixels")
    pixels = np.frombuffer(payload, np.uint8, offset=_FRAME.size).reshape(height_px, width_px, _RGB)
    return VideoFrame(start_sample, pixels.copy())  # a copy, because bytes cannot be written to


def _decode_failed(payload: bytes) -> Failed:
    try:
        kind = FailureKind(payload[0] if payload else 0)
    except ValueError as error:
        raise WireError("failure of an unknown kind") from error
    return Failed(kind, _unpack_text(payload[1:]))


def _decode_ended(payload: bytes) -> Ended:
    if len(payload) != _COUNT.size:
        raise WireError(f"end of {len(payload)} bytes, expected {_COUNT.size}")
    return Ended(*_COUNT.unpack(payload))


_DECODERS: dict[bytes, Callable[[bytes], Message]] = {
    b"I": _decode_opened,
    b"A": _decode_audio,
    b"G": _decode_gap,
    b"X": _decode_failed,
    b"E": _decode_ended,
}
