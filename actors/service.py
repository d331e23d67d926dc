"""Running the service, and using a gateway in the same way with and without Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

from actors.app import Progress, RayApp
from actors.gateway import Gateway, GatewayInfo
from actors.listener import listen
from actors.questions import Answer, AskSpec, SummariseSpec
from actors.settings import Settings
from actors.spec import StreamSpec, StreamStatus
from actors.store import Store
from pipeline.errors import ServiceError
from pipeline.models.weights import check_hashes, locate_model

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GatewayClient(Protocol):
    """What commands do with a gateway (`actors.gateway.Gateway`), wherever it runs."""

    async def info(self) -> GatewayInfo:
        """Return what this gateway is."""
        ...

    async def start_stream(self, spec: StreamSpec) -> str:
        """Start captioning a source and return the stream's id."""
        ...

    async def stop_stream(self, stream_id: str) -> StreamStatus:
        """Flush and end a stream, and return what became of it."""
        ...

    async def wait_stream(self, stream_id: str) -> StreamStatus:
        """Return a stream's status once it has ended."""
        ...

    async def get_stream(self, stream_id: str) -> StreamStatus:
        """Return a stream's status now."""
        ...

    async def list_streams(self) -> list[StreamStatus]:
        """Return the streams that run, and those that ended lately."""
        ...

    async def answer(self, spec: AskSpec) -> Answer:
        """Answer a question about pictures, sound, or what a live stream shows now."""
        ...

    async def summarise(self, spec: SummariseSpec) -> Answer:
        """Summarise a text, or the speech of a media file."""
        ...

    async def drain(self) -> None:
        """End every stream with its last finals and admit nothing more."""
        ...


class RemoteGateway:
    """The gateway actor of a cluster, with the methods and errors of a gateway in this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def info(self) -> GatewayInfo:
        """Return what this gateway is."""
        info: GatewayInfo = await self._call("info")
        return info

    async def start_stream(self, spec: StreamSpec) -> str:
        """Start captioning a source and return the stream's id."""
        spec = spec.model_copy(update={"source": _absolute(spec.source)})
        stream_id: str = await self._call("start_stream", spec)
        return stream_id

    async def stop_stream(self, stream_id: str) -> StreamStatus:
        """Flush and end a stream, and return what became of it."""
        status: StreamStatus = await self._call("stop_stream", stream_id)
        return status

    async def wait_stream(self, stream_id: str) -> StreamStatus:
        """Return a stream's status once it has ended."""
        status: StreamStatus = await self._call("wait_stream", stream_id)
        return status

    async def get_stream(self, stream_id: str) -> StreamStatus:
        """Return a stream's status now."""
        status: StreamStatus = await self._call("get_stream", stream_id)
        return status

    async def list_streams(self) -> list[StreamStatus]:
        """Return the streams that run, and those that ended lately."""
        statuses: list[StreamStatus] = await self._call("list_streams")
        return statuses

    async def answer(self, spec: AskSpec) -> Answer:
        """Answer a question about pictures, sound, or what a live stream shows now."""
        paths = {
            "sound": None if spec.sound is None else _absolute(spec.sound),
            "pictures": tuple(map(_absolute, spec.pictures)),
        }
        answer: Answer = await self._call("answer", spec.model_copy(update=paths))
        return answer

    async def summarise(self, spec: SummariseSpec) -> Answer:
        """Summarise a text, or the speech of a media file."""
        source = None if spec.source is None else _absolute(spec.source)
        answer: Answer = await self._call("summarise", spec.model_copy(update={"source": source}))
        return answer

    async def drain(self) -> None:
        """End every stream with its last finals and admit nothing more."""
        await self._call("drain")

    async def aclose(self) -> None:
        """Drain and close the gateway. Its process lives on."""
        await self._call("aclose")

    async def _call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError  # noqa: PLC0415 - only with --runtime ray

        try:
            return await getattr(self._actor, method).remote(*args)
        except RayTaskError as exc:
            raise exc.cause from None
        except RayActorError as exc:
            raise ServiceError("the gateway died: see the logs of the service") from exc


def _absolute(source: str) -> str:
    """Return `source` for a process with another working directory."""
    return source if "://" in source else os.path.abspath(source)  # noqa: PTH100 - joins texts, without I/O


@asynccontextmanager
async def open_runtime(
    settings: Settings, progress: Progress | None = None, *, serves_http: bool = False
) -> AsyncIterator[GatewayClient]:
    """Start everything that `settings` say, yield the gateway, drain and stop everything at the end.

    Raises:
        ServiceError: if the service cannot start.
        ModelError: if the weights cannot be used.
        StoreError: if Redis cannot be used.
    """
    report = progress or (lambda _text: None)
    # In this process and first: a wrong file, an address that is taken or a store that does not answer is told at once,
    # not after models and cluster have loaded.
    await asyncio.to_thread(check_hashes, locate_model(settings.model.name, settings.model.revision))
    if serves_http:
        listen(settings.service.host, settings.service.port).close()
    async with Store(settings.redis):
        open_gateway = _open_here if settings.runtime == "local" else _open_on_ray
        async with open_gateway(settings, report, serves_http=serves_http) as gateway:
            yield gateway


@asynccontextmanager
async def _open_here(settings: Settings, report: Progress, *, serves_http: bool) -> AsyncIterator[GatewayClient]:
    gateway = Gateway(settings)
    report("loading the models")
    try:
        await gateway.start(serves_http=serves_http)
        yield gateway
    finally:
        await gateway.aclose()


@asynccontextmanager
async def _open_on_ray(settings: Settings, report: Progress, *, serves_http: bool) -> AsyncIterator[GatewayClient]:
    app = RayApp(settings, _from_thread(report))
    starting = asyncio.create_task(asyncio.to_thread(app.start, serves_http=serves_http))
    try:
        await asyncio.shield(starting)
        remote = RemoteGateway(app.gateway)
        try:
            yield remote
        finally:
            await remote.aclose()
    finally:
        # A thread cannot be interrupted: it is asked to end, and what it has started is stopped after it.
        app.cancel()
        await asyncio.wait({starting})
        if not starting.cancelled():
            starting.exception()
        await asyncio.to_thread(app.stop)


async def run_service(settings: Settings, progress: Progress | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then end every stream with its last finals and return.

    Raises:
        ServiceError, ModelError, StoreError: as `open_runtime`.
    """
    report = progress or logger.info
    async with signals_as_event() as stop, AsyncExitStack() as exits:
        entering = exits.enter_async_context(open_runtime(settings, report, serves_http=True))
        gateway = await _unless(stop, entering)
        if gateway is None:
            return
        _take_signals(stop)  # again: Ray has brought handlers of its own
        info = await gateway.info()
        report(f"{info.stages.model} computes {info.stages.arithmetic}")
        report(f"ready at {info.http_url}")
        await stop.wait()
        report("ending the streams")
        await gateway.drain()


async def _unless(stop: asyncio.Event, awaited: Coroutine[Any, Any, GatewayClient]) -> GatewayClient | None:
    """Return what `awaited` gives; None, and it is cancelled, if `stop` comes first."""
    task = asyncio.create_task(awaited)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        return None
    finally:
        stopped.cancel()
        await asyncio.wait({stopped})


def _take_signals(event: asyncio.Event) -> None:
    def take() -> None:
        # Ray's handler of SIGTERM hands on to this one, but aborts the process three seconds later (abseil's
        # failure_signal_handler.cc, alarm_on_failure_secs), in the middle of the last finals.
        signal.alarm(0)
        event.set()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, take)


@asynccontextmanager
async def signals_as_event() -> AsyncIterator[asyncio.Event]:
    """Yield an event that SIGINT or SIGTERM sets, instead of what they did before."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _take_signals(event)
    try:
        yield event
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _from_thread(report: Callable[[str], None]) -> Callable[[str], None]:
    loop = asyncio.get_running_loop()

    def report_from_thread(text: str) -> None:
        loop.call_soon_threadsafe(report, text)

    return report_from_thread
