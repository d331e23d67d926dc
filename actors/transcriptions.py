"""`POST /v1/audio/transcriptions`: a file in, its transcript out, as clients of the OpenAI API expect (docs/openai.md).

A transcription is a stream like any other, whose file comes with the request and whose records are told to the client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from actors.door import check_languages
from actors.spec import StreamSpec, make_stream_id
from actors.stages import StagesInfo
from actors.transcript_formats import (
    Transcript,
    TranscriptionRequest,
    read_request,
    to_body,
    to_delta_event,
    to_done_event,
)
from pipeline.errors import (
    ConfigError,
    MediaError,
    ModelNotLoaded,
    RequestRefused,
    ServiceError,
    StageError,
    StageUnavailable,
    StoreError,
    StreamNotFound,
    SurtitleError,
    UploadTooLarge,
)
from pipeline.records import BaseRecord
from pipeline.stream_params import AUTO, CaptionParams, StreamParams
from pipeline.text.captions import short_clock

if TYPE_CHECKING:
    from actors.gateway import Gateway

T = TypeVar("T")

_PATH = "/v1/audio/transcriptions"
_STATUS_OF: tuple[tuple[type[SurtitleError], HTTPStatus], ...] = (
    (ModelNotLoaded, HTTPStatus.NOT_FOUND),
    (UploadTooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (ServiceError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StoreError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StageUnavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (MediaError, HTTPStatus.BAD_REQUEST),
    (ConfigError, HTTPStatus.BAD_REQUEST),
)
_FORM = {
    "type": "object",
    "required": ["file", "model"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "sound or video"},
        "model": {"type": "string", "description": "name of the loaded model, or whisper-1"},
        "language": {"type": "string", "description": "ISO 639-1 code of the speech, or auto; none: as configured"},
        "response_format": {"type": "string", "enum": ["json", "text", "srt", "vtt", "verbose_json"]},
        "timestamp_granularities[]": {"type": "array", "items": {"type": "string", "enum": ["segment", "word"]}},
        "stream": {"type": "boolean", "description": "answer with Server-Sent Events as finals come"},
        "temperature": {"type": "number", "enum": [0]},
    },
}
_DOCUMENTED: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def create_router(gateway: Gateway) -> APIRouter:
    """Return the route that lets clients of the OpenAI API use `gateway`."""
    router = APIRouter()

    @router.post(_PATH, summary="Transcribe a file, as the OpenAI API does", openapi_extra=_DOCUMENTED)
    async def transcribe(request: Request) -> Response:
        body = request.stream()
        try:
            try:
                return await _transcribe(gateway, request, body)
            except SurtitleError as exc:
                await gateway.uploads.discard(body)
                return _problem(exc, gateway.retry_after_s)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it

    return router


async def _transcribe(gateway: Gateway, request: Request, body: AsyncIterator[bytes]) -> Response:
    info = (await gateway.info()).stages
    async with AsyncExitStack() as exits:
        receiving = gateway.uploads.receive(body, request.headers.get("content-type"))
        upload = await exits.enter_async_context(receiving)
        asked = read_request(upload.fields, info.model)
        _check_language(asked, info)
        job = _Job(gateway, upload.location)
        await exits.enter_async_context(job.running(asked))
        if asked.is_streamed:
            return _EventStream(job, exits.pop_all())
        await _unless_gone(request.receive, job.finish())
        answer = to_body(job.transcript, asked)
        return PlainTextResponse(answer) if isinstance(answer, str) else JSONResponse(answer)


def _check_language(asked: TranscriptionRequest, info: StagesInfo) -> None:
    try:
        check_languages(StreamParams(captions=CaptionParams(language=asked.language or AUTO)), info)
    except ConfigError as exc:
        raise RequestRefused(str(exc), "language") from exc


class _Job:
    """One transcription: the stream of a file, and what it says."""

    def __init__(self, gateway: Gateway, location: str) -> None:
        self.transcript = Transcript()
        self._gateway = gateway
        self._location = location
        self._stream_id = make_stream_id("transcription")
        self._has_news = asyncio.Event()

    @asynccontextmanager
    async def running(self, asked: TranscriptionRequest) -> AsyncIterator[None]:
        """Run the stream while the context is open; one that still runs when it closes is ended.

        Raises: as `Gateway.start_stream`.
        """
        spec = StreamSpec(
            source=self._location,
            stream_id=self._stream_id,
            pace="fast",
            language=asked.language,
            translate_to=(),
            summary_minutes=0,
            has_scenes=False,
            has_partials=False,
            channels="mix",
            scheduling="by_sample",
        )
        try:
            await self._gateway.start_stream(spec, on_record=self._on_record)
        except MediaError as exc:
            raise self._media_error(exc) from exc
        try:
            yield
        finally:
            with suppress(StreamNotFound):  # so long ago that it was forgotten
                await self._gateway.stop_stream(self._stream_id)

    async def finish(self) -> None:
        """Wait until the stream has ended.

        Raises:
            MediaError: if the file could not be heard to its end.
            StageError: if a part of it could not be transcribed.
            ServiceError: if the stream ended before the file did.
        """
        status = await self._gateway.wait_stream(self._stream_id)
        missing = self.transcript.missing
        if status.state == "ended" and status.has_heard_all:
            if missing is None:
                return
            span = f"{short_clock(missing.start_ms)} to {short_clock(missing.end_ms)}"
            raise StageError(f"{span} could not be transcribed: {missing.message}")
        if not self._gateway.is_ready:
            raise ServiceError("the service is stopping")
        if self.transcript.media_failure is not None:
            raise self._media_error(self.transcript.media_failure)
        raise ServiceError(f"the transcription was cut off: {status.message or 'its stream was stopped'}")

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield an event for each final as it comes, and one behind the last.

        Raises: as `finish`.
        """
        finishing = asyncio.create_task(self.finish(), name="transcription")
        finishing.add_done_callback(lambda _task: self._has_news.set())
        num_told = 0
        try:
            while True:
                self._has_news.clear()
                while num_told < len(self.transcript.finals):
                    yield to_delta_event(self.transcript, num_told)
                    num_told += 1
                if finishing.done() and num_told == len(self.transcript.finals):
                    finishing.result()
                    yield to_done_event(self.transcript)
                    return
                if not finishing.done():
                    await self._has_news.wait()
        finally:
            finishing.cancel()
            await asyncio.wait({finishing})

    def _on_record(self, record: BaseRecord) -> None:
        self.transcript.take(record)
        self._has_news.set()

    def _media_error(self, cause: MediaError | str) -> MediaError:
        """Return an error that names no place on this machine: the file had another name where it came from."""
        return MediaError(str(cause).removeprefix(f"{self._location.rpartition('/')[2]}: "))


class _EventStream(StreamingResponse):
    """Tells the events of a job while there is a client; then, whatever happens, closes what the job holds."""

    def __init__(self, job: _Job, exits: AsyncExitStack) -> None:
        super().__init__(_lines(job), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._exits = exits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        del scope
        async with self._exits:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(ClientDisconnect):
                await _unless_gone(receive, self._tell(send))
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator[bytes, None], self.body_iterator)) as lines:
            async for line in lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})


async def _lines(job: _Job) -> AsyncGenerator[bytes, None]:
    """Yield the events of `job` as they are sent; one that fails ends in an error."""
    try:
        async with aclosing(job.events()) as events:
            async for event in events:
                yield _data(event)
    except SurtitleError as exc:
        yield _data(_error(exc))


def _data(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives.

    Raises:
        ClientDisconnect: if the client leaves first; `work` is cancelled then.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _status_of(exc: SurtitleError) -> HTTPStatus:
    return next((status for kind, status in _STATUS_OF if isinstance(exc, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)


def _error(exc: SurtitleError) -> dict[str, Any]:
    """Return the error as OpenAI's clients expect it."""
    status = _status_of(exc)
    parameter = exc.parameter if isinstance(exc, RequestRefused) else None
    message = f"{parameter}: {exc}" if parameter else str(exc)
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    code = "model_not_found" if isinstance(exc, ModelNotLoaded) else None
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _problem(exc: SurtitleError, retry_after_s: int) -> Response:
    """Return an RFC 9457 problem with the `error` that OpenAI's clients read."""
    status = _status_of(exc)
    error = _error(exc)
    detail = error["error"]["message"]
    content = {"title": status.phrase, "status": status.value, "detail": detail, "kind": type(exc).__name__} | error
    headers = {"Retry-After": str(retry_after_s)} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}
    return JSONResponse(content, status.value, headers, media_type="application/problem+json")
