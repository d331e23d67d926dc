"""What streams say, over HTTP: Server-Sent Events, and captions to download. Both read Redis, live or long ended.

Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html. Every event's `id` is the position
in all keys that the client asked for: a client that comes back with it as `Last-Event-ID` misses and repeats nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Header, Query, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from actors.fan_out import End, Event, FanOut, Reader
from actors.follow import ALL_KINDS
from actors.store import KeyKind, translations_name
from pipeline.errors import ConfigError, SurtitleError
from pipeline.records import FinalRecord, HealthRecord, TranslationRecord
from pipeline.text.captions import Spoken, to_srt, to_text, to_webvtt

if TYPE_CHECKING:
    from actors.gateway import Gateway

_HEARTBEAT_S = 15.0
_RETRY_MS = 1_000
_MAX_POSITION_CHARS = 4_096
_MAX_DOWNLOADS = 2
_PRIVATE = {"Cache-Control": "no-store"}


class CaptionFormat(StrEnum):
    """What captions can be downloaded as: the extension."""

    VTT = "vtt"
    SRT = "srt"
    TXT = "txt"
    JSON = "json"


_MEDIA_TYPES = {
    CaptionFormat.VTT: "text/vtt; charset=utf-8",
    CaptionFormat.SRT: "application/x-subrip; charset=utf-8",
    CaptionFormat.TXT: "text/plain; charset=utf-8",
    CaptionFormat.JSON: "application/json",
}


def add_outlets(api: FastAPI, gateway: Gateway) -> None:
    """Let HTTP clients of `api` read the streams."""
    downloads = asyncio.Semaphore(_MAX_DOWNLOADS)

    @api.get(
        "/v1/streams/{stream_id}/events",
        summary="What a stream says, kept and to come, as Server-Sent Events; live or ended",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def follow_stream(
        stream_id: str,
        kinds: Annotated[
            str, Query(max_length=200, description=f"which, separated by commas: {', '.join(sorted(ALL_KINDS))}")
        ] = "",
        after: Annotated[
            str, Query(max_length=_MAX_POSITION_CHARS, description="the id of an event: go on behind it")
        ] = "",
        last_event_id: Annotated[
            str, Header(max_length=_MAX_POSITION_CHARS, description="the same, as browsers say it; goes before")
        ] = "",
    ) -> Response:
        wanted = [kind.strip() for kind in kinds.split(",")] if kinds else ALL_KINDS
        return EventStream(await gateway.fan_out.join(stream_id, wanted, last_event_id or after), stream_id)

    @api.get(
        "/v1/streams/{stream_id}/captions.{extension}",
        summary="The captions of a stream up to now, or their translation; live or ended",
        response_class=Response,
        responses={200: {"content": {media_type.partition(";")[0]: {} for media_type in _MEDIA_TYPES.values()}}},
    )
    async def download_captions(
        stream_id: str,
        extension: CaptionFormat,
        language: Annotated[
            str | None, Query(max_length=40, description="of a translation; none: as it was spoken")
        ] = None,
    ) -> Response:
        async with downloads:
            spoken = await _read_spoken(gateway.fan_out, stream_id, language)
            # A day of captions takes a second to write.
            content = await asyncio.to_thread(_write, spoken, extension)
        disposition = f'inline; filename="{stream_id}.{extension}"'
        return Response(
            content.encode(),
            media_type=_MEDIA_TYPES[extension],
            headers=_PRIVATE | {"Content-Disposition": disposition},
        )


class EventStream(StreamingResponse):
    """A reader's events as Server-Sent Events. However the response ends, the reader leaves."""

    def __init__(self, reader: Reader, stream_id: str, *, heartbeat_s: float = _HEARTBEAT_S) -> None:
        self.reader = reader
        headers = _PRIVATE | {"X-Accel-Buffering": "no"}
        super().__init__(
            _server_sent_events(reader, stream_id, heartbeat_s), headers=headers, media_type="text/event-stream"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events to the client."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reader.leave()


async def _server_sent_events(reader: Reader, stream_id: str, heartbeat_s: float) -> AsyncIterator[str]:
    yield f"retry: {_RETRY_MS}\n\n"
    try:
        while True:
            events = await reader.read(heartbeat_s)
            if events:
                yield "".join(map(_to_sse, events))
            elif reader.end is not None:
                yield _end_to_sse(reader.end, stream_id, reader.position)
                return
            else:
                yield ": still here\n\n"
    except SurtitleError as exc:
        yield _end_to_sse(End("failed", str(exc)), stream_id, reader.position)


def _to_sse(event: Event) -> str:
    return f"id: {event.position}\nevent: {event.kind}\ndata: {event.data}\n\n"


def _end_to_sse(end: End, stream_id: str, position: str) -> str:
    """Return the last event: `end` when the stream is over, else `closed`, behind which a client may go on."""
    name = "end" if end.reason == "ended" else "closed"
    data = json.dumps({"stream": stream_id, "reason": end.reason, "message": end.message, "after": position})
    return f"id: {position}\nevent: {name}\ndata: {data}\n\n"


@dataclass(slots=True)
class _SpokenStream:
    stream_id: str
    language: str | None
    captions: list[Spoken] = field(default_factory=list)
    gaps: list[HealthRecord] = field(default_factory=list)


async def _read_spoken(fan_out: FanOut, stream_id: str, language: str | None) -> _SpokenStream:
    """Return the finals that are kept, or their translations to `language`, and where sound was lost.

    Raises:
        ConfigError: if `language` is no language tag, or the stream is not translated to it.
        StreamNotFound: if there is no such stream.
        StoreError: if the store refuses or does not answer.
    """
    wanted = KeyKind.TRANSCRIPTS.value if language is None else translations_name(language)
    spoken = _SpokenStream(stream_id, language)
    kept = fan_out.kept(stream_id, {wanted.partition(":")[0], KeyKind.HEALTH})
    while page := await kept.read():
        for followed in page:
            record = followed.record
            if followed.kind == wanted and isinstance(record, FinalRecord | TranslationRecord):
                spoken.captions.append(record)
            elif isinstance(record, HealthRecord) and record.event == "gap":
                spoken.gaps.append(record)
    if language is not None and language not in kept.languages:
        there = ", ".join(kept.languages) or "no language"
        raise ConfigError(f"stream {stream_id} is not translated to {language!r}; it is to: {there}")
    return spoken


def _write(spoken: _SpokenStream, extension: CaptionFormat) -> str:
    match extension:
        case CaptionFormat.VTT:
            return to_webvtt(spoken.captions, spoken.gaps)
        case CaptionFormat.SRT:
            return to_srt(spoken.captions)
        case CaptionFormat.TXT:
            return to_text(spoken.captions)
        case CaptionFormat.JSON:
            content = {
                "stream": spoken.stream_id,
                "language": spoken.language,
                "captions": [record.model_dump(mode="json", exclude_none=True) for record in spoken.captions],
                "gaps": [record.model_dump(mode="json", exclude_none=True) for record in spoken.gaps],
            }
            return json.dumps(content, ensure_ascii=False) + "\n"
