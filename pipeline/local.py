"""The whole DAG in one process and one thread, driven by samples, without a clock: the oracle of the tests.

It is also the "live path in real-time order" of `surtitle bench accuracy`: snapshots are due at sample positions and
every one is answered before the next chunk is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.samples_to_chunks import by_chunk_index
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.runner import Context
from pipeline.items import DecodeRequest, Embeddings, Outcome, Snapshot
from pipeline.records import BaseRecord
from pipeline.stream import Stream
from pipeline.stream_params import StreamParams
from pipeline.text.hypotheses_to_records import Tier


@dataclass(frozen=True, slots=True)
class LocalModels:
    """The stages as plain objects."""

    encoder: UtterancesToEmbeddings
    engine: DecodeEngine
    tier: Tier = "edge"


def serve_snapshots(snapshots: list[Snapshot], models: LocalModels) -> Iterator[Outcome]:
    """Yield every outcome of `snapshots`, encoded and decoded together."""
    for snapshot, encoded in zip(snapshots, models.encoder.encode(snapshots), strict=True):
        if isinstance(encoded, Embeddings):
            models.engine.submit(DecodeRequest.of(snapshot), Context(encoded))
        else:
            yield encoded
    while models.engine.has_work:
        yield from models.engine.step()


def caption_samples(
    samples: NDArray[np.int16], params: StreamParams, models: LocalModels, stream_id: str = "local"
) -> list[BaseRecord]:
    """Return all records of a stream whose whole sound is `samples`, int16[num_channels, num_samples] at 16 kHz."""
    return caption_items([samples], params, models, stream_id)


def caption_items(
    runs: list[NDArray[np.int16]],
    params: StreamParams,
    models: LocalModels,
    stream_id: str = "local",
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[BaseRecord]:
    """Return all records of a stream that arrives as `runs` of samples, each int16[num_channels, n].

    `on_outcome` is told every outcome, before it is accepted.
    """
    stream = Stream(stream_id, params, num_channels=runs[0].shape[0] if runs else 1, tier=models.tier)
    records: list[BaseRecord] = []
    for run in runs:
        for items in by_chunk_index(stream.chunker.push(run)):
            for item in items:
                stream.push(item)
            records += _answer(stream, models, on_outcome)
    stream.finish()
    records += _answer(stream, models, on_outcome)
    return records


def _answer(stream: Stream, models: LocalModels, on_outcome: Callable[[Outcome], None] | None) -> list[BaseRecord]:
    while snapshots := stream.due_snapshots():
        for outcome in serve_snapshots(snapshots, models):
            if on_outcome is not None:
                on_outcome(outcome)
            stream.accept(outcome)
    return stream.take_records()
