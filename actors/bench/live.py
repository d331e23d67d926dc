"""`surtitle bench live`: N streams at once, in real time, through the real service; seen by a consumer in Redis.

The service is started as `surtitle serve` does it (gateway, stages, ingest processes, Redis), with a store of its own
that is thrown away afterwards unless `redis.url` names one. What the figures mean: docs/performance.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import redis.asyncio as redis
from numpy.typing import NDArray

from actors.bench.latency import Latencies, Percentiles, Received, UtteranceTimes, find_error_records, measure
from actors.bench.media import Clip, find_reference, loop_clip, read_samples, write_wav
from actors.bench.processes import ProcessUsage, watch_processes
from actors.bench.wer import WordErrors, count_errors
from actors.follow import follow
from actors.service import GatewayClient, open_runtime
from actors.settings import Settings
from actors.spec import StreamSpec
from actors.store import KeyKind, Store, StreamKeys
from pipeline.audio.chunks_to_utterances import ChunksToUtterances, VadParams
from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.errors import ServiceError
from pipeline.items import UtteranceClosed, UtteranceOpened
from pipeline.records import FinalRecord, HealthRecord
from pipeline.timebase import SAMPLE_RATE_HZ, samples_to_ms

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str], None]

_FOLLOWED = frozenset({KeyKind.PARTIALS, KeyKind.TRANSCRIPTS, KeyKind.HEALTH})
_WARM_UP_S = 6.0
_MAX_DELAY_S = 60.0
"""A stream that is not over so long after its sound has ended is given up."""


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """What to play. Shorter media are looped as a whole until `min_seconds`; stream i starts `stagger_ms` * i late."""

    media: Path
    num_streams: int = 4
    settings: Settings = field(default_factory=Settings)
    min_seconds: float = 0.0
    stagger_ms: int = 0


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One stream as its consumer saw it."""

    stream_id: str
    latencies: Latencies
    words: WordErrors | None
    num_errors: int
    num_gaps: int
    ended_as: str
    ended_late_ms: float | None


@dataclass(frozen=True, slots=True)
class LiveReport:
    """All streams together."""

    runtime: str
    model: str
    seconds: float
    language: str | None
    streams: tuple[StreamResult, ...]
    usage: ProcessUsage
    is_whole_service: bool  # nothing of it ran where its processes cannot be seen

    @property
    def latencies(self) -> Latencies:
        """The measurements of all streams put together."""
        total = Latencies()
        for stream in self.streams:
            total.add(stream.latencies)
        return total

    @property
    def words(self) -> WordErrors | None:
        """The word errors of all streams; None without a reference text."""
        counted = [stream.words for stream in self.streams if stream.words is not None]
        return sum(counted, WordErrors()) if counted else None

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values; times in milliseconds, memory in MiB."""
        total, words, num_streams = self.latencies, self.words, len(self.streams)
        audio_s = num_streams * self.seconds
        grown = self.usage.peak_private_bytes - self.usage.start_private_bytes
        return {
            "streams": num_streams,
            "runtime": self.runtime,
            "model": self.model,
            "seconds": round(self.seconds, 2),
            "wer": None if words is None else round(words.rate, 5),
            "finals_lost": total.num_finals_lost,
            "num_finals": total.num_finals,
            "num_duplicate_finals": total.num_duplicate_finals,
            "num_partials": total.num_partials,
            "num_errors": sum(stream.num_errors for stream in self.streams),
            "num_gaps": sum(stream.num_gaps for stream in self.streams),
            "num_streams_failed": sum(stream.ended_as != "ended" for stream in self.streams),
            "num_stable_words": total.num_stable_words,
            "num_stable_words_lost": total.num_stable_words_lost,
            "first_word_ms": Percentiles.of(total.first_word_ms).to_json(),
            "emission_lag_ms": Percentiles.of(total.emission_lag_ms).to_json(),
            "stable_lag_ms": Percentiles.of(total.stable_lag_ms).to_json(),
            "commit_lag_ms": Percentiles.of(total.commit_lag_ms).to_json(),
            "finalisation_ms": Percentiles.of(total.finalisation_ms).to_json(),
            "cadence_ms": Percentiles.of(total.cadence_ms).to_json(),
            "cpu_s_per_audio_s": round(self.usage.cpu_s / audio_s, 4),
            "cpu_counts_every_process": self.is_whole_service,
            "cpu_s_by_process": {
                name: round(used_s, 2)
                for name, used_s in sorted(self.usage.cpu_s_by_name.items(), key=lambda item: -item[1])
            },
            "num_processes": self.usage.num_processes,
            "memory_mib_at_start": round(self.usage.start_private_bytes / 2**20, 1),
            "memory_mib_per_stream": round(grown / 2**20 / num_streams, 1),
            "num_cpus": len(os.sched_getaffinity(0)),
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        from actors.bench.tables import live_table  # noqa: PLC0415 - tables know the reports, not the other way

        return live_table(self)


@dataclass(frozen=True, slots=True)
class _Played:
    """What every stream plays, and what must come of it."""

    clip: Clip
    path: Path
    utterances: Mapping[int, UtteranceTimes]
    has_reference: bool


def run_live(options: LiveOptions, on_progress: Progress | None = None) -> LiveReport:
    """Start the service, play all streams to their end, stop it and return what was measured.

    Raises:
        MediaError: if the media cannot be used.
        ServiceError, StoreError, ModelError: if the service does not start, or a stream is not over in time.
    """
    return asyncio.run(measure_live(options, on_progress))


async def measure_live(options: LiveOptions, on_progress: Progress | None = None) -> LiveReport:
    """Do what `run_live` does, on a running event loop."""
    report = on_progress or (lambda _text: None)
    with tempfile.TemporaryDirectory(prefix="surtitle-bench-") as name:
        folder = Path(name)
        played, warm_up = await asyncio.to_thread(_prepare, options, folder)
        settings = _own_settings(options, folder)
        async with open_runtime(settings, report) as gateway, Store(settings.redis) as store:
            report("warming up")
            warm_up_id = await gateway.start_stream(StreamSpec(source=str(warm_up), pace="fast"))
            await gateway.wait_stream(warm_up_id)
            report(f"playing {options.num_streams} streams of {played.clip.seconds:.0f} s")
            async with watch_processes([os.getpid(), *await _server_pids(store)]) as usage:
                streams = await _play_all(options, played, gateway, store)
            info = await gateway.info()
            return LiveReport(
                runtime=settings.runtime,
                model=info.stages.model,
                seconds=played.clip.seconds,
                language=played.clip.language if played.has_reference else None,
                streams=tuple(streams),
                usage=usage,
                is_whole_service=store.is_embedded and (settings.runtime == "local" or settings.ray.address is None),
            )


def find_utterances(samples: NDArray[np.int16], params: VadParams) -> dict[int, UtteranceTimes]:
    """Return the utterances that the service will find in int16[n]: boundaries are a function of the samples."""
    chunker, detector = SamplesToChunks(1), ChunksToUtterances(params, 0)
    chunks = [*chunker.push(samples[np.newaxis]), *chunker.flush()]
    events = [event for chunk in chunks for event in detector.push(chunk)]
    events += detector.flush(len(samples))
    opened = [event for event in events if isinstance(event, UtteranceOpened)]
    closed = [event for event in events if isinstance(event, UtteranceClosed)]
    return {
        number: UtteranceTimes(samples_to_ms(first.onset_sample), samples_to_ms(last.last_speech_sample))
        for number, (first, last) in enumerate(zip(opened, closed, strict=True), start=1)
    }


def _prepare(options: LiveOptions, folder: Path) -> tuple[_Played, Path]:
    """Write what is played, and a short piece of it for warming up."""
    folder.chmod(0o755)  # ingest processes read the media as another user
    reference = find_reference(options.media)
    clip = Clip(
        options.media.name,
        reference.language if reference is not None else "en",
        reference.text if reference is not None else "",
        read_samples(options.media),
    )
    looped = loop_clip(clip, options.min_seconds)
    path, warm_up = folder / "media.wav", folder / "warm-up.wav"
    write_wav(path, looped.samples)
    write_wav(warm_up, clip.samples[: round(_WARM_UP_S * SAMPLE_RATE_HZ)])
    utterances = find_utterances(looped.samples, options.settings.vad)
    return _Played(looped, path, utterances, reference is not None), warm_up


def _own_settings(options: LiveOptions, folder: Path) -> Settings:
    """Return the settings with room for all streams and, unless a URL is given, a store of this run alone."""
    settings = options.settings
    service = settings.service.model_copy(
        update={"max_streams": max(settings.service.max_streams, options.num_streams + 1)}
    )
    store = settings.redis
    if store.url is None:
        store = store.model_copy(update={"data_dir": folder / "data"})
    return settings.model_copy(update={"service": service, "redis": store})


async def _server_pids(store: Store) -> list[int]:
    """Return the process of the store's server, if it runs on this machine for us alone."""
    if not store.is_embedded:
        return []
    info: Any = await store.client().info("server")
    return [int(info["process_id"])]


async def _play_all(options: LiveOptions, played: _Played, gateway: GatewayClient, store: Store) -> list[StreamResult]:
    run = secrets.token_hex(3)
    try:
        async with asyncio.TaskGroup() as group:
            playing = [
                group.create_task(
                    _play(f"bench-{run}-{index + 1}", index * options.stagger_ms / 1_000, played, gateway, store)
                )
                for index in range(options.num_streams)
            ]
    except* TimeoutError as failed:
        raise ServiceError(
            f"{len(failed.exceptions)} streams were not over {_MAX_DELAY_S:.0f} s after their sound: "
            "the machine cannot keep up with so many; take fewer streams"
        ) from failed
    except* Exception as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in playing]


async def _play(stream_id: str, delay_s: float, played: _Played, gateway: GatewayClient, store: Store) -> StreamResult:
    await asyncio.sleep(delay_s)
    await gateway.start_stream(StreamSpec(source=str(played.path), stream_id=stream_id, channels="mix"))
    client = store.client()
    async with asyncio.timeout(played.clip.seconds + _MAX_DELAY_S):
        received = [Received(entry.record, time.time() * 1_000) async for entry in follow(client, stream_id, _FOLLOWED)]
    await gateway.wait_stream(stream_id)
    return _judge(stream_id, received, await _read_anchor_ms(client, stream_id), played)


async def _read_anchor_ms(client: redis.Redis, stream_id: str) -> float:
    """Return the wall time of media sample 0 by the stream's own anchors."""
    stored: Any = await client.hget(StreamKeys(stream_id).state, "anchors")
    media_ms, utc = json.loads(stored)[0]
    return datetime.fromisoformat(utc).timestamp() * 1_000 - float(media_ms)


def _judge(stream_id: str, received: list[Received], anchor_ms: float, played: _Played) -> StreamResult:
    finals = [item.record for item in received if isinstance(item.record, FinalRecord)]
    text = " ".join(final.text for final in sorted(finals, key=lambda final: final.sequence) if final.text)
    health = [(item.record, item.at_ms) for item in received if isinstance(item.record, HealthRecord)]
    end = next(((record.event, at_ms) for record, at_ms in health if record.event in {"ended", "failed"}), None)
    clip = played.clip
    return StreamResult(
        stream_id=stream_id,
        latencies=measure(received, anchor_ms, played.utterances),
        words=count_errors(clip.text, text, clip.language) if played.has_reference else None,
        num_errors=len(find_error_records(received)),
        num_gaps=sum(record.event == "gap" for record, _ in health),
        ended_as=end[0] if end is not None else "lost",
        ended_late_ms=end[1] - anchor_ms - 1_000 * clip.seconds if end is not None else None,
    )
