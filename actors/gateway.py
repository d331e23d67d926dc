"""The gateway: admits streams, runs their sessions, owns the publisher and the way to the stages.

A plain class. With Ray it is wrapped as a named actor (`actors/app.py`); with `--runtime local` it is used as it is. It
imports no torch and no ray by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from actors.fan_out import FanOut
from actors.metrics import Metrics
from actors.publisher import Publisher
from actors.questions import Answer, AskSpec, Questions, SummariseSpec
from actors.record_tap import RecordTap
from actors.session import Scheduling, Session, SessionState
from actors.settings import Settings
from actors.sources import open_source
from actors.spec import StreamSpec, StreamState, StreamStatus, make_stream_id
from actors.stages import Stages, StagesInfo
from actors.store import Store
from actors.uploads import Uploads
from ingest.processes import DecoderProcesses
from ingest.source import Source
from pipeline.errors import CapacityExceeded, MediaError, ServiceError, StreamNotFound, SurtitleError
from pipeline.records import BaseRecord

if TYPE_CHECKING:
    from actors.stage_driver import StageDriver

logger = logging.getLogger(__name__)

_MAX_STATUSES_KEPT = 256
_STATES: dict[SessionState, StreamState] = {
    SessionState.OPENING: "opening",
    SessionState.LIVE: "live",
    SessionState.CLOSING: "closing",
    SessionState.ENDED: "ended",
    SessionState.BROKEN: "failed",
}


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """What a gateway that has started is: its models, its store and, if it serves HTTP, its address."""

    stages: StagesInfo
    redis_address: str
    http_url: str | None


@dataclass(slots=True)
class _Running:
    session: Session
    source: Source
    started_at: str
    task: asyncio.Task[None] | None = None


class Gateway:
    """One process's streams. All methods belong to the event loop on which `start` ran."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._exits = AsyncExitStack()
        self._info: GatewayInfo | None = None
        self._publisher: Publisher | None = None
        self._stages: Stages | None = None
        self._questions: Questions | None = None
        self._fan_out: FanOut | None = None
        self._decoders = DecoderProcesses()
        self._running: dict[str, _Running] = {}
        self._statuses: OrderedDict[str, StreamStatus] = OrderedDict()
        self._is_draining = False
        self.uploads = Uploads.of(settings)

    async def start(self, *, serves_http: bool = False) -> GatewayInfo:
        """Open the door, the store and the stages, and return when streams can be started.

        Raises:
            ServiceError: if the port is in use or the stages do not start.
            StoreError: if Redis cannot be used.
            ModelError: if the weights cannot be used.
        """
        try:
            # The door first: a port in use is told at once, not after the models have loaded.
            http_url = await self._open_door() if serves_http else None
            await self._exits.enter_async_context(self._decoders)
            store = Store(self._settings.redis)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._exits.enter_async_context(store))
                opening = group.create_task(self._open_stages())
            stages = opening.result()
            self._exits.push_async_callback(stages.aclose)
            self._stages = stages
            slot_tokens = self._settings.decoder.slot_tokens
            self._questions = Questions(stages, self._settings.audio, self._decoders, slot_tokens=slot_tokens)
            self._publisher = await self._exits.enter_async_context(Publisher(store))
            self._fan_out = await self._exits.enter_async_context(FanOut(store))
        except BaseExceptionGroup as group_of_errors:
            await self._exits.aclose()
            raise group_of_errors.exceptions[0] from group_of_errors
        except BaseException:
            await self._exits.aclose()
            raise
        self._info = GatewayInfo(stages.info, store.address, http_url)
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether streams can be started."""
        return self._info is not None and not self._is_draining

    @property
    def retry_after_s(self) -> int:
        """What a refused client is told to wait."""
        return self._settings.service.retry_after_s

    @property
    def fan_out(self) -> FanOut:
        """The readers of all streams.

        Raises:
            ServiceError: if the gateway has not started.
        """
        if self._fan_out is None:
            raise ServiceError("the gateway has not started yet: try again in some seconds")
        return self._fan_out

    async def info(self) -> GatewayInfo:
        """Return what this gateway is.

        Raises:
            ServiceError: if it has not started.
        """
        if self._info is None:
            raise ServiceError("the gateway has not started yet: try again in some seconds")
        return self._info

    async def start_stream(
        self,
        spec: StreamSpec,
        *,
        source: Source | None = None,
        on_record: Callable[[BaseRecord], None] | None = None,
    ) -> str:
        """Open the source, start captioning it and return the stream's id; `on_record` is shown its records as they go.

        `source` is what a door brings, such as a live connection; without one `spec.source` is opened.

        Raises:
            CapacityExceeded: if as many streams as allowed are live.
            ServiceError: if the gateway has not started or is stopping, or a stream of that id is live here.
            ConfigError: if the models cannot do what is asked for.
            MediaError: if the source cannot be read.
            StoreError: if Redis refuses.
        """
        if self._publisher is None or self._stages is None or self._is_draining:
            raise ServiceError("the gateway is stopping" if self._is_draining else "the gateway has not started yet")
        stream_id = spec.stream_id or make_stream_id(spec.source)
        self._admit(stream_id)
        params = spec.stream_params(self._settings.stream_params())
        if source is None:
            source = open_source(spec, params, self._settings.audio, self._stages.info, self._decoders)
        session = Session(
            stream_id,
            params,
            source,
            self._stages,
            self._publisher,
            scheduling=Scheduling(spec.scheduling),
            waits_for_scenes=spec.pace == "fast",
            observer=self._metrics if on_record is None else RecordTap(self._metrics, on_record),
        )
        running = self._running[stream_id] = _Running(session, source, _now())
        self._metrics.streams_live.set(len(self._running))
        try:
            await session.open()
        except BaseException:
            self._forget(stream_id)
            raise
        self._metrics.streams_started.inc()
        running.task = asyncio.create_task(self._run(stream_id, running), name=f"session-{stream_id}")
        if self._is_draining:
            session.request_stop()
        return stream_id

    async def stop_stream(self, stream_id: str) -> StreamStatus:
        """Let the open utterance become a final, end the stream and return what became of it.

        Raises:
            StreamNotFound: if no such stream is known here.
        """
        running = self._running.get(stream_id)
        if running is not None:
            running.session.request_stop()
        return await self.wait_stream(stream_id)

    async def wait_stream(self, stream_id: str) -> StreamStatus:
        """Return the stream's status once it has ended.

        Raises:
            StreamNotFound: if no such stream is known here.
        """
        running = self._running.get(stream_id)
        if running is not None and running.task is not None:
            await asyncio.wait({running.task})
        return await self.get_stream(stream_id)

    async def get_stream(self, stream_id: str) -> StreamStatus:
        """Return the stream's status now.

        Raises:
            StreamNotFound: if no such stream is known here.
        """
        running = self._running.get(stream_id)
        if running is not None:
            return _status_of(stream_id, running)
        status = self._statuses.get(stream_id)
        if status is None:
            raise StreamNotFound(f"no stream {stream_id[:80]!r} is known to this gateway")
        return status

    async def list_streams(self) -> list[StreamStatus]:
        """Return the streams that run, and those that ended lately."""
        live = [_status_of(stream_id, running) for stream_id, running in self._running.items()]
        return live + list(reversed(self._statuses.values()))

    async def answer(self, spec: AskSpec) -> Answer:
        """Answer a question about pictures, sound, or what a live stream shows now.

        Raises:
            CapacityExceeded: if as many questions as allowed are being answered.
            ServiceError: if the gateway has not started or is stopping, or the models did not get to it.
            StreamNotFound: if no such stream is live here.
            ConfigError: if the models cannot do what is asked for, or the question is about nothing.
            MediaError: if a picture or the sound cannot be read, or is too long.
            StageError: if the models have no answer.
        """
        with self._asked() as questions:
            if spec.stream_id is None:
                return await questions.answer(spec)
            running = self._running.get(spec.stream_id)
            if running is None:
                raise StreamNotFound(f"no stream {spec.stream_id!r} is live here")
            return await questions.answer(spec, running.session.last_frame)

    async def summarise(self, spec: SummariseSpec) -> Answer:
        """Summarise a text, or the speech of a media file.

        Raises: as `answer`.
        """
        with self._asked() as questions:
            return await questions.summarise(spec)

    async def drain(self) -> None:
        """Admit nothing more, end every stream with its last finals; those too slow are cut off. Idempotent."""
        self._is_draining = True
        for running in self._running.values():
            running.session.request_stop()
        tasks = {running.task for running in self._running.values() if running.task is not None}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._settings.service.drain_timeout_s)
        for task in late:
            task.cancel()
        if late:
            logger.warning("%d streams did not end in time and were cut off", len(late))
            await asyncio.wait(late)

    async def aclose(self) -> None:
        """Drain, then close stages, publisher, store and door. Idempotent."""
        await self.drain()
        self._info = None
        await self._exits.aclose()

    def render_metrics(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        if self._publisher is not None:
            self._metrics.duplicates.set(self._publisher.counters.duplicates)
        if self._fan_out is not None:
            self._metrics.on_readers(self._fan_out)
        return self._metrics.render()

    # -- starting ---------------------------------------------------------------------------------

    async def _open_door(self) -> str:
        from actors.api import open_http  # noqa: PLC0415 - FastAPI takes half a second; only the service needs it

        service = self._settings.service
        return await self._exits.enter_async_context(open_http(self, service.host, service.port, service.allowed_hosts))

    async def _open_stages(self) -> StageDriver:
        settings = self._settings
        if settings.runtime == "local":
            from actors.local_stages import LocalStages  # noqa: PLC0415 - only this runtime has models in-process

            return await LocalStages.open(
                settings.model,
                settings.encoder,
                settings.decoder,
                settings.dispatch,
                self._metrics,
                snapshots=settings.snapshots,
                jobs=settings.jobs,
                vision=settings.vision,
            )
        from actors.serve_stages import ServeStages  # noqa: PLC0415 - the other runtime works without Ray installed

        return await ServeStages.open(
            settings.dispatch,
            self._metrics,
            num_encoder_replicas=settings.ray.num_encoder_replicas,
            start_timeout_s=settings.service.start_timeout_s,
            snapshots=settings.snapshots,
            jobs=settings.jobs,
        )

    # -- sessions ---------------------------------------------------------------------------------

    @contextmanager
    def _asked(self) -> Iterator[Questions]:
        """Yield who answers. A process that decodes media dies with the gateway: then the media is not to blame."""
        stopping = ServiceError("the gateway is stopping")
        if self._questions is None or not self.is_ready:
            raise stopping if self._is_draining else ServiceError("the gateway has not started yet")
        try:
            yield self._questions
        except MediaError as exc:
            if self._is_draining:
                raise stopping from exc
            raise

    def _admit(self, stream_id: str) -> None:
        if stream_id in self._running:
            raise ServiceError(f"stream {stream_id!r} is live here already: stop it first or use another id")
        limit = self._settings.service.max_streams
        if len(self._running) >= limit:
            self._metrics.streams_refused.inc()
            raise CapacityExceeded(
                f"{len(self._running)} streams are live and service.max_streams is {limit}: "
                f"try again in {self.retry_after_s} s or raise the limit"
            )

    async def _run(self, stream_id: str, running: _Running) -> None:
        """Run one session to its end. Whatever happens in it stays in it."""
        session = running.session
        try:
            await session.run()
        except SurtitleError as exc:
            session.failure = session.failure or str(exc)
            logger.warning("stream %s failed: %s", stream_id, exc)
        except asyncio.CancelledError:
            session.failure = session.failure or "cut off while the gateway was stopping"
        except Exception as exc:
            session.failure = session.failure or f"internal error: {type(exc).__name__}"
            logger.exception("stream %s failed", stream_id)
        finally:
            self._forget(stream_id)
            self._metrics.nonfinite_samples.inc(running.source.num_nonfinite or 0)
            status = _status_of(stream_id, running)
            is_failed = session.failure is not None or session.state is not SessionState.ENDED
            if is_failed:
                self._metrics.streams_failed.inc()
            self._statuses[stream_id] = status.model_copy(
                update={"state": "failed" if is_failed else "ended", "ended_at": _now()}
            )
            while len(self._statuses) > _MAX_STATUSES_KEPT:
                self._statuses.popitem(last=False)

    def _forget(self, stream_id: str) -> None:
        self._running.pop(stream_id, None)
        self._metrics.forget(stream_id)
        self._metrics.streams_live.set(len(self._running))


def _status_of(stream_id: str, running: _Running) -> StreamStatus:
    session = running.session
    return StreamStatus(
        stream_id=stream_id,
        state=_STATES[session.state],
        message=session.failure or "",
        started_at=running.started_at,
        has_heard_all=running.source.num_nonfinite is not None,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
