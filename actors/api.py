"""The HTTP API of the gateway: health, metrics, streams, questions, transcriptions.

It describes itself at /docs and /openapi.json. What streams say is in `actors/outlets.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from actors.listener import listen
from actors.outlets import add_outlets
from actors.questions import Answer, AskSpec, StreamQuestion, SummariseSpec
from actors.spec import StreamSpec, StreamStatus
from actors.transcriptions import create_router
from pipeline.errors import (
    CapacityExceeded,
    ConfigError,
    MediaError,
    ServiceError,
    SourceNotFound,
    StageError,
    StageUnavailable,
    StoreError,
    StreamNotFound,
    SurtitleError,
)

if TYPE_CHECKING:
    from actors.gateway import Gateway

logger = logging.getLogger(__name__)

_STATUS_OF: tuple[tuple[type[SurtitleError], HTTPStatus], ...] = (
    (CapacityExceeded, HTTPStatus.SERVICE_UNAVAILABLE),
    (ServiceError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StoreError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StageUnavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (StageError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (StreamNotFound, HTTPStatus.NOT_FOUND),
    (SourceNotFound, HTTPStatus.UNPROCESSABLE_ENTITY),
    (MediaError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (ConfigError, HTTPStatus.UNPROCESSABLE_ENTITY),
)
_STOP_TIMEOUT_S = 5


def create_api(gateway: Gateway) -> FastAPI:
    """Return the application that lets HTTP clients use `gateway`."""
    api = FastAPI(title="surtitle", docs_url="/docs", redoc_url=None)
    _add_error_handlers(api, gateway)

    @api.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", summary="Whether streams can be started")
    async def readyz() -> dict[str, str]:
        if not gateway.is_ready:
            raise ServiceError("the models are loading, or the service is stopping")
        return {"status": "ready"}

    @api.get("/metrics", summary="Metrics in Prometheus' text format")
    async def metrics() -> Response:
        return Response(gateway.render_metrics(), media_type=CONTENT_TYPE_LATEST)

    @api.post("/v1/streams", status_code=HTTPStatus.CREATED, summary="Start captioning a source")
    async def start_stream(spec: StreamSpec, response: Response) -> StreamStatus:
        stream_id = await gateway.start_stream(spec)
        response.headers["Location"] = f"/v1/streams/{stream_id}"
        return await gateway.get_stream(stream_id)

    @api.get("/v1/streams", summary="Streams that run, and those that ended lately")
    async def list_streams() -> list[StreamStatus]:
        return await gateway.list_streams()

    @api.get("/v1/streams/{stream_id}", summary="One stream")
    async def get_stream(stream_id: str) -> StreamStatus:
        return await gateway.get_stream(stream_id)

    @api.delete("/v1/streams/{stream_id}", summary="End a stream; answers when its last final is published")
    async def stop_stream(stream_id: str) -> StreamStatus:
        return await gateway.stop_stream(stream_id)

    @api.post("/v1/answers", summary="Answer a question about pictures, sound or a live stream (tier phi4)")
    async def answer(spec: AskSpec) -> Answer:
        return await gateway.answer(spec)

    @api.post("/v1/streams/{stream_id}/answers", summary="Answer a question about what a stream shows now (tier phi4)")
    async def answer_stream(stream_id: str, asked: StreamQuestion) -> Answer:
        return await gateway.answer(AskSpec(question=asked.question, stream_id=stream_id))

    @api.post("/v1/summaries", summary="Summarise a text, or the speech of a media file (tier phi4)")
    async def summarise(spec: SummariseSpec) -> Answer:
        return await gateway.summarise(spec)

    add_outlets(api, gateway)
    api.include_router(create_router(gateway))
    return api


@asynccontextmanager
async def open_http(gateway: Gateway, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> AsyncIterator[str]:
    """Serve the API on `host`:`port` (0: a free one) while the context is open; the value is its URL.

    Requests for another name than `allowed_hosts`, and the loopback's on loopback, get a 400; elsewhere none means any.

    Raises:
        ServiceError: if the address cannot be listened on.
    """
    listener = listen(host, port)
    url_host = f"[{host}]" if ":" in host else host
    api = create_api(gateway)
    names = [*allowed_hosts, *(["localhost", "127.0.0.1", "[::1]", url_host] if _is_loopback(host) else [])]
    if names:
        # A web page that resolves its own name to 127.0.0.1 must not get at the API through somebody's browser.
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    config = uvicorn.Config(api, log_config=None, access_log=False, timeout_graceful_shutdown=_STOP_TIMEOUT_S)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield f"http://{url_host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait({task})
        listener.close()


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the service decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _add_error_handlers(api: FastAPI, gateway: Gateway) -> None:
    async def on_surtitle_error(_request: Request, exc: Exception) -> Response:
        status = next(
            (status for kind, status in _STATUS_OF if isinstance(exc, kind)), HTTPStatus.INTERNAL_SERVER_ERROR
        )
        headers = {"Retry-After": str(gateway.retry_after_s)} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}
        return _problem(status, str(exc), type(exc).__name__, headers)

    async def on_invalid(_request: Request, exc: Exception) -> Response:
        errors = exc.errors() if isinstance(exc, RequestValidationError | ValidationError) else []
        # Not the refused values: a source may hold a password.
        detail = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors)
        return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, "ConfigError")

    async def on_http_error(_request: Request, exc: Exception) -> Response:
        status = HTTPStatus(exc.status_code) if isinstance(exc, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR
        return _problem(status, status.description, status.phrase)

    async def on_defect(_request: Request, exc: Exception) -> Response:
        logger.error("a request failed", exc_info=exc)
        return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error", type(exc).__name__)

    api.add_exception_handler(SurtitleError, on_surtitle_error)
    api.add_exception_handler(RequestValidationError, on_invalid)
    api.add_exception_handler(ValidationError, on_invalid)
    api.add_exception_handler(HTTPException, on_http_error)
    api.add_exception_handler(Exception, on_defect)


def _problem(status: HTTPStatus, detail: str, kind: str, headers: dict[str, str] | None = None) -> Response:
    """Return an RFC 9457 problem."""
    content: dict[str, Any] = {"title": status.phrase, "status": status.value, "detail": detail, "kind": kind}
    return JSONResponse(content, status.value, headers, media_type="application/problem+json")
