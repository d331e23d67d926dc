"""A session: the live object that owns one stream, between its source, the stages and Redis.

It drives a `pipeline.stream.Stream`: hears and sees the source, hands snapshots and jobs to the stages, publishes what
comes of them.
All of it runs on one event loop; nothing here computes for longer than a few milliseconds (a keyframe).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol, cast

from actors.door import check_stream
from actors.publisher import Publisher, StreamWriter
from actors.stages import Stages
from ingest.source import Source, SourceGap, SourceItem, VideoFrame
from pipeline.audio.samples_to_chunks import by_chunk_index
from pipeline.errors import MediaError
from pipeline.items import Frame, Job, Outcome, Snapshot
from pipeline.records import BaseRecord
from pipeline.stream import StartPoint, Stream
from pipeline.stream_params import StreamParams
from pipeline.text.hypotheses_to_records import Tier
from pipeline.timebase import CHUNK_SAMPLES, ms_to_samples

MAX_UNFINISHED_FINALS = 8
"""With more finals on their way the session hears nothing until one is out: memory stays bounded, no sound is lost."""


class Scheduling(StrEnum):
    """When partials are taken."""

    BY_TIME = "by_time"  # as sound arrives, as often as the stages can bear: live
    BY_SAMPLE = "by_sample"  # every partial is answered before more is heard: the same partials on every run


class SessionState(StrEnum):
    """The life of a session; it only moves forward."""

    OPENING = "opening"  # the source is being opened, nothing is published
    LIVE = "live"  # sound is heard
    CLOSING = "closing"  # no more sound; the last finals are on their way
    ENDED = "ended"  # `ended` or `failed` is published
    BROKEN = "broken"  # ended without a closing record: ownership lost, or Redis gone for good


class SessionObserver(Protocol):
    """Who counts what happens (metrics). Called on the event loop, must not block."""

    def on_record(self, record: BaseRecord) -> None:
        """Take note of a record that was handed to the publisher."""
        ...

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Take note of a snapshot that is about to be submitted."""
        ...

    def on_outcome(self, snapshot: Snapshot, outcome: Outcome) -> None:
        """Take note of an outcome of a submitted snapshot."""
        ...

    def on_keyframes_dropped(self, num_keyframes: int) -> None:
        """Take note of keyframes that nobody will look at."""
        ...


class Session:
    """One live stream.

    With `waits_for_scenes` every keyframe is looked at before more is heard, for media that is not live; otherwise only
    the newest one counts.
    """

    def __init__(
        self,
        stream_id: str,
        params: StreamParams,
        source: Source,
        stages: Stages,
        publisher: Publisher,
        *,
        scheduling: Scheduling = Scheduling.BY_TIME,
        waits_for_scenes: bool = False,
        observer: SessionObserver | None = None,
    ) -> None:
        self.stream_id = stream_id
        self.state = SessionState.OPENING
        self.failure: str | None = None
        self._params = params
        self._source = source
        self._stages = stages
        self._publisher = publisher
        self._scheduling = scheduling
        self._waits_for_scenes = waits_for_scenes
        self._observer = observer
        self._stop = asyncio.Event()
        self._progress = asyncio.Condition()
        self._publishing = asyncio.Lock()
        self._exits = contextlib.AsyncExitStack()
        self._stream: Stream | None = None
        self._writer: StreamWriter | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._start_sample = 0  # of the stream's clock, at which the source's is 0
        self._num_jobs = 0
        self._last_frame: Frame | None = None

    @property
    def last_frame(self) -> Frame | None:
        """What the stream showed last, for questions about it; None: nothing yet, or its video is not looked at."""
        return self._last_frame

    async def open(self) -> None:
        """Open the source and claim the stream; after this the first sound may come.

        Raises:
            ConfigError: if the models cannot do what the stream asks for.
            MediaError: if the source cannot be read. Nothing was published then.
            StoreError: if Redis refuses.
        """
        check_stream(self._params, self._stages.info)
        try:
            await self._exits.enter_async_context(self._source)
            tier = cast(Tier, self._stages.info.tier)
            eyes = self._stages.info.eyes
            self._writer = await self._publisher.open_stream(
                self.stream_id,
                datetime.now(UTC),
                tier=tier,
                target_languages=self._params.captions.translate_to,
            )
            resume = self._writer.resume
            self._start_sample = _ceil_to_grid(ms_to_samples(resume.covered_ms))
            self._stream = Stream(
                self.stream_id,
                self._params,
                num_channels=self._source.info.num_channels,
                tier=tier,
                start=StartPoint(
                    next_sequence=resume.next_sequence,
                    next_utterance=resume.next_utterance,
                    start_sample=self._start_sample,
                    is_resumed=resume.is_resumed,
                ),
                crop_size=None if eyes is None else eyes.crop_size,
            )
        except BaseException:
            await self._exits.aclose()
            raise
        self.state = SessionState.LIVE

    def request_stop(self) -> None:
        """Stop hearing: the open utterance becomes a final, then the stream ends."""
        self._stop.set()

    async def run(self) -> None:
        """Caption the source to its end (or to `request_stop`). Call once, after `open`.

        Raises:
            OwnershipLost: if a newer owner took the stream over.
            StoreError: if Redis stayed away for too long.
        """
        stream, writer = self._opened()
        closed_as = "failed"
        try:
            async with self._exits:
                try:
                    async with asyncio.TaskGroup() as self._tasks:
                        self.failure = await self._listen(stream)
                        self.state = SessionState.CLOSING
                        await self._close(stream)
                except* Exception as group:
                    raise group.exceptions[0] from group
            closed_as = "failed" if self.failure else "ended"
            self.state = SessionState.ENDED
        finally:
            if self.state is not SessionState.ENDED:
                self.state = SessionState.BROKEN
            await writer.close(closed_as)

    # -- hearing ----------------------------------------------------------------------------------

    async def _listen(self, stream: Stream) -> str | None:
        """Hear the source until it ends or a stop is requested; return why it failed, if it did."""
        await self._publish(stream)
        stop = asyncio.create_task(self._stop.wait())
        items = aiter(self._source)
        item: asyncio.Future[SourceItem] | None = None
        try:
            while True:
                item = asyncio.ensure_future(anext(items))
                await asyncio.wait({item, stop}, return_when=asyncio.FIRST_COMPLETED)
                # A stop also ends the hearing of a source that always has its next item ready.
                if self._stop.is_set() or not item.done():
                    return None
                await self._hear(stream, item.result())
        except StopAsyncIteration:
            return None
        except MediaError as exc:
            return str(exc)
        finally:
            # Whatever ended this: a source is closed only when nobody waits for it any more.
            waiting: list[asyncio.Future[Any]] = [stop] if item is None else [stop, item]
            for future in waiting:
                future.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _hear(self, stream: Stream, item: SourceItem) -> None:
        if isinstance(item, VideoFrame):
            await self._see(stream, Frame(self._start_sample + item.start_sample, item.pixels))
            return
        if isinstance(item, SourceGap):
            heard = stream.chunker.push_gap(item.num_samples, item.reason)
        else:
            heard = list(stream.chunker.push(item.samples))
        for group in by_chunk_index(heard):
            for chunk in group:
                stream.push(chunk)
            self._submit_due(stream)
            await self._publish(stream)
            if self._scheduling is Scheduling.BY_SAMPLE:
                await self._until(lambda: not stream.has_partial_in_flight and not self._num_jobs)
            await self._until(lambda: stream.num_unfinished_finals <= MAX_UNFINISHED_FINALS)

    async def _see(self, stream: Stream, frame: Frame) -> None:
        self._last_frame = frame
        num_dropped = stream.num_keyframes_dropped
        stream.push_frame(frame)
        if self._observer is not None and stream.num_keyframes_dropped > num_dropped:
            self._observer.on_keyframes_dropped(stream.num_keyframes_dropped - num_dropped)
        self._submit_due(stream)
        if self._waits_for_scenes or self._scheduling is Scheduling.BY_SAMPLE:
            await self._until(lambda: not self._num_jobs)

    async def _close(self, stream: Stream) -> None:
        if self.failure is None:
            stream.finish()
        else:
            stream.fail(self.failure)
        self._submit_due(stream)
        await self._publish(stream)
        await self._until(lambda: stream.has_ended)
        await self._publish(stream)

    # -- snapshots, jobs and records --------------------------------------------------------------

    def _submit_due(self, stream: Stream) -> None:
        tasks = self._tasks
        if tasks is None:
            raise RuntimeError("snapshots are submitted inside run() only")
        for key in stream.take_void_keys():
            self._stages.withdraw(key)
        cadence_ms = self._stages.cadence_ms if self._scheduling is Scheduling.BY_TIME else None
        for snapshot in stream.due_snapshots(cadence_ms):
            if self._observer is not None:
                self._observer.on_snapshot(snapshot)
            tasks.create_task(self._serve(stream, snapshot), name=f"snapshot-{snapshot.key.utterance}")
        for job in stream.take_jobs():
            self._num_jobs += 1
            tasks.create_task(self._serve_job(stream, job), name=f"{job.key.kind}-{job.key.number}")

    async def _serve(self, stream: Stream, snapshot: Snapshot) -> None:
        async with aclosing(self._stages.submit(snapshot)) as outcomes:
            async for outcome in outcomes:
                if self._observer is not None:
                    self._observer.on_outcome(snapshot, outcome)
                await self._take_in(stream, outcome)

    async def _serve_job(self, stream: Stream, job: Job) -> None:
        outcome = await self._stages.submit_job(job)
        self._num_jobs -= 1
        await self._take_in(stream, outcome)

    async def _take_in(self, stream: Stream, outcome: Outcome) -> None:
        stream.accept(outcome)
        self._submit_due(stream)
        await self._publish(stream)
        async with self._progress:
            self._progress.notify_all()

    async def _publish(self, stream: Stream) -> None:
        """Publish what the stream has made, in order; waits while Redis is behind."""
        _, writer = self._opened()
        async with self._publishing:
            for record in stream.take_records():
                await writer.publish(record)
                if self._observer is not None:
                    self._observer.on_record(record)

    async def _until(self, is_met: Callable[[], bool]) -> None:
        if is_met():
            return
        async with self._progress:
            await self._progress.wait_for(is_met)

    def _opened(self) -> tuple[Stream, StreamWriter]:
        if self._stream is None or self._writer is None:
            raise RuntimeError("call open() first")
        return self._stream, self._writer


def _ceil_to_grid(sample: int) -> int:
    """Round up to where chunks (80 ms) and detector windows of 10, 20 and 30 ms all begin."""
    grid_samples = 3 * CHUNK_SAMPLES
    return -(-sample // grid_samples) * grid_samples
