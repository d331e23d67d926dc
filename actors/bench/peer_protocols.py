"""What other systems say on their sockets: one class a protocol, kept apart from how the figures are made.

A protocol turns messages into what a viewer sees. To compare with another system, add a class and an entry in
`PROTOCOLS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Shown:
    """What a viewer sees after a message: text that will not change any more, and text that may."""

    committed: str
    tail: str


@dataclass(frozen=True, slots=True)
class Done:
    """The other side has told all that it will ever tell of this stream."""


class PeerProtocol(Protocol):
    """One stream's conversation. Sound goes out as binary messages of s16le, 16 kHz, mono."""

    end_of_sound: bytes | str
    """The message that says that no sound will follow."""

    def read(self, message: bytes | str) -> Shown | Done | None:
        """Return what `message` changes; None if nothing.

        Raises:
            ServiceError: if it is an error, or no message of this protocol.
        """
        ...


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore")

    text: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: str | None = None
    mode: str = "full"
    is_pcm: bool = Field(default=True, alias="useAudioWorklet")
    error: str | None = None
    lines: tuple[_Line, ...] | None = None
    buffer_transcription: str = ""
    buffer_diarization: str = ""


class WhisperLiveKit:
    """`/asr` of WhisperLiveKit in its full mode: every message holds the whole text.

    `lines` are committed, `buffer_diarization` is text that waits for its speaker, `buffer_transcription` is the
    hypothesis behind them (QuentinFuxa/WhisperLiveKit 0.2.26, `basic_server.py` and `timed_objects.py`).
    """

    end_of_sound: bytes | str = b""

    def read(self, message: bytes | str) -> Shown | Done | None:
        """Return what `message` changes; None if nothing.

        Raises:
            ServiceError: if it is an error, or no message of this protocol.
        """
        try:
            told = _MESSAGE.validate_json(message)
        except ValidationError as exc:
            first = exc.errors()[0]
            place = ".".join(map(str, first["loc"])) or "message"
            raise ServiceError(f"the peer does not speak WhisperLiveKit's protocol: {place}: {first['msg']}") from exc
        if told.error:
            raise ServiceError(f"the peer reports an error: {told.error[:200]}")
        if told.type == "ready_to_stop":
            return Done()
        if told.type == "config":
            if not told.is_pcm:
                raise ServiceError("the peer expects a container format, not PCM: start it with --pcm-input")
            if told.mode != "full":
                raise ServiceError(f"the peer sends mode {told.mode!r}: take the URL without mode=, or mode=full")
            return None
        if told.lines is None:
            return None
        committed = " ".join(line.text.strip() for line in told.lines if line.text)
        return Shown(committed, f"{told.buffer_diarization} {told.buffer_transcription}".strip())


_MESSAGE = TypeAdapter(_Message)

PROTOCOLS: Mapping[str, type[PeerProtocol]] = {"whisperlivekit": WhisperLiveKit}
