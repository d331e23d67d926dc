"""The whole DAG in one process and one thread, driven by samples, without a clock: the oracle of the tests.

It is also the "live path in real-time order" of `surtitle bench accuracy`: snapshots are due at sample positions, and
every one, and every job, is answered before the next chunk is heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.samples_to_chunks import by_chunk_index
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.runner import Context
from pipeline.items import (
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Frame,
    FrameSet,
    Job,
    Outcome,
    Pictures,
    Snapshot,
)
from pipeline.records import BaseRecord
from pipeline.stream import Stream
from pipeline.stream_params import StreamParams
from pipeline.text.hypotheses_to_records import Tier


class Ears(Protocol):
    """From snapshots to embeddings."""

    def encode(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        """Return one outcome for each of `snapshots`, in their order."""
        ...


class Eyes(Protocol):
    """From frames to pictures."""

    def encode(self, frame_sets: list[FrameSet]) -> list[Pictures | Failure]:
        """Return one outcome for each of `frame_sets`, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class LocalModels:
    """The stages as plain objects. Without `eyes`, whatever has frames fails."""

    encoder: Ears
    engine: DecodeEngine
    tier: Tier = "edge"
    eyes: Eyes | None = None


def serve_snapshots(snapshots: list[Snapshot], models: LocalModels) -> Iterator[Outcome]:
    """Yield every outcome of `snapshots`, encoded and decoded together."""
    for snapshot, encoded in zip(snapshots, models.encoder.encode(snapshots), strict=True):
        if isinstance(encoded, Embeddings):
            models.engine.submit(DecodeRequest.of(snapshot), Context(sound=encoded))
        else:
            yield encoded
    while models.engine.has_work:
        yield from models.engine.step()


def serve_jobs(jobs: Iterable[Job], models: LocalModels) -> Iterator[Outcome]:
    """Yield the one outcome of each of `jobs`, encoded one by one and decoded together."""
    for job in jobs:
        context = _context_of(job, models)
        if isinstance(context, Context):
            models.engine.submit(DecodeRequest.of_job(job), context)
        else:
            yield replace(context, task=job.task)
    while models.engine.has_work:
        yield from models.engine.step()


def _context_of(job: Job, models: LocalModels) -> Context | Failure:
    context = Context()
    if (snapshot := job.snapshot) is not None:
        [sound] = models.encoder.encode([snapshot])
        if isinstance(sound, Failure):
            return sound
        context = replace(context, sound=sound)
    if job.frames:
        if models.eyes is None:
            return Failure(job.key, job.task, FailureKind.FAILED, "these models cannot see: give no frames")
        [pictures] = models.eyes.encode([FrameSet(job.key, job.frames)])
        if isinstance(pictures, Failure):
            return pictures
        context = replace(context, pictures=pictures)
    return context


def caption_samples(
    samples: NDArray[np.int16],
    params: StreamParams,
    models: LocalModels,
    stream_id: str = "local",
    *,
    frames: Sequence[Frame] = (),
) -> list[BaseRecord]:
    """Return all records of a stream whose whole sound is `samples`, int16[num_channels, num_samples] at 16 kHz.

    `frames` is its video, in order of media time.
    """
    return caption_items([samples], params, models, stream_id, frames=frames)


def caption_items(
    runs: list[NDArray[np.int16]],
    params: StreamParams,
    models: LocalModels,
    stream_id: str = "local",
    on_outcome: Callable[[Outcome], None] | None = None,
    *,
    frames: Sequence[Frame] = (),
) -> list[BaseRecord]:
    """Return all records of a stream that arrives as `runs` of samples, each int16[num_channels, n].

    `frames`, in order of media time, are seen when the sound was heard up to them, the last ones at the end.
    `on_outcome` is told every outcome, before it is accepted.
    """
    stream = Stream(stream_id, params, num_channels=runs[0].shape[0] if runs else 1, tier=models.tier)
    unseen = deque(frames)
    records: list[BaseRecord] = []
    for run in runs:
        for items in by_chunk_index(stream.chunker.push(run)):
            for item in items:
                stream.push(item)
            while unseen and unseen[0].start_sample < items[-1].end_sample:
                records += _see(stream, unseen.popleft(), models, on_outcome)
            records += _answer(stream, models, on_outcome)
    while unseen:
        records += _see(stream, unseen.popleft(), models, on_outcome)
    stream.finish()
    records += _answer(stream, models, on_outcome)
    return records


def _see(
    stream: Stream, frame: Frame, models: LocalModels, on_outcome: Callable[[Outcome], None] | None
) -> list[BaseRecord]:
    """Show `stream` a frame and answer what it asks about it: sound is answered for when the whole chunk is heard."""
    stream.push_frame(frame)
    _accept(stream, serve_jobs(stream.take_jobs(), models), on_outcome)
    return stream.take_records()


def _answer(stream: Stream, models: LocalModels, on_outcome: Callable[[Outcome], None] | None) -> list[BaseRecord]:
    while True:
        snapshots, jobs = stream.due_snapshots(), stream.take_jobs()
        if not snapshots and not jobs:
            return stream.take_records()
        if snapshots:
            _accept(stream, serve_snapshots(snapshots, models), on_outcome)
        _accept(stream, serve_jobs(jobs, models), on_outcome)


def _accept(stream: Stream, outcomes: Iterable[Outcome], on_outcome: Callable[[Outcome], None] | None) -> None:
    for outcome in outcomes:
        if on_outcome is not None:
            on_outcome(outcome)
        stream.accept(outcome)
