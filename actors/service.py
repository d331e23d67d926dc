"""Running the service, and using a gateway in the same way with and without Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from actors.app import Progress, RayApp
from actors.gateway import Gateway, GatewayInfo
from actors.settings import Settings
from actors.spec import StreamSpec, StreamStatus
from pipeline.errors import ServiceError
from pipeline.models.weights import check_hashes, locate_model

logger = logging.getLogger(__name__)


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
        if "://" not in spec.source:
            # The actor's working directory is another one. (This only joins texts: no I/O.)
            spec = spec.model_copy(update={"source": os.path.abspath(spec.source)})  # noqa: ASYNC240, PTH100
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
    # In this process and first: a wrong file is told by name at once, not by a replica that keeps dying of it.
    checking = asyncio.create_task(asyncio.to_thread(_check_model, settings))
    if settings.runtime == "local":
        await checking
        gateway = Gateway(settings)
        report("loading the models")
        try:
            await gateway.start(serves_http=serves_http)
            yield gateway
        finally:
            await gateway.aclose()
        return
    app = RayApp(settings, _from_thread(report))
    try:
        starting = asyncio.create_task(asyncio.to_thread(app.start, serves_http=serves_http))
        try:
            await checking
        finally:
            # A thread cannot be interrupted; what it starts is stopped below.
            await asyncio.wait({starting})
        starting.result()
        remote = RemoteGateway(app.gateway)
        try:
            yield remote
        finally:
            await remote.aclose()
    finally:
        await asyncio.to_thread(app.stop)


async def run_service(settings: Settings, progress: Progress | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then end every stream with its last finals and return.

    Raises:
        ServiceError, ModelError, StoreError: as `open_runtime`.
    """
    async with open_runtime(settings, progress, serves_http=True) as gateway:
        info = await gateway.info()
        # Ray has handlers of its own; these come after them.
        async with signals_as_event() as stop:
            (progress or logger.info)(f"ready at {info.http_url}")
            await stop.wait()
            (progress or logger.info)("ending the streams")
            await gateway.drain()


@asynccontextmanager
async def signals_as_event() -> AsyncIterator[asyncio.Event]:
    """Yield an event that SIGINT or SIGTERM sets, instead of what they did before."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, event.set)
    try:
        yield event
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _check_model(settings: Settings) -> None:
    check_hashes(locate_model(settings.model.name, settings.model.revision))


def _from_thread(report: Callable[[str], None]) -> Callable[[str], None]:
    loop = asyncio.get_running_loop()

    def report_from_thread(text: str) -> None:
        loop.call_soon_threadsafe(report, text)

    return report_from_thread
