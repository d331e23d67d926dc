"""`surtitle bench live`: N streams at once, in real time, through the real service; seen by a consumer in Redis.

The service is started as `surtitle serve` does it (gateway, stages, ingest processes, Redis), with a store of its own
that is thrown away afterwards unless `redis.url` names one. What the figures mean: docs/performance.md.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actors.bench.latency import Latencies, Percentiles, UtteranceTimes
from actors.bench.media import load_stream, write_wav
from actors.bench.processes import ProcessUsage, measure_memory, watch_processes
from actors.bench.rounds import LATE, Patience, Played, Rounds, StreamResult
from actors.bench.wer import WordErrors
from actors.service import GatewayClient, open_runtime
from actors.settings import Settings
from actors.spec import StreamSpec
from actors.store import Store
from pipeline.audio.chunks_to_utterances import ChunksToUtterances, VadParams
from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.errors import MediaError, ServiceError
from pipeline.items import UtteranceClosed, UtteranceOpened
from pipeline.timebase import SAMPLE_RATE_HZ, samples_to_ms

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str], None]

_WARM_UP_S = 6.0


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """What to play: `actors.bench.media.load_stream` says what `media`, `seconds` and `language` mean.

    Stream i starts `stagger_ms` * i late.
    """

    media: Path
    num_streams: int = 4
    settings: Settings = field(default_factory=Settings)
    seconds: float = 0.0
    stagger_ms: float = 0
    language: str = "en"
    patience: Patience = field(default_factory=Patience)
    keeps_records: bool = False  # what consumers received is in the results of the streams


@dataclass(frozen=True, slots=True)
class LiveReport:
    """All streams of one round together."""

    runtime: str
    model: str
    arithmetic: str
    seconds: float
    language: str | None
    streams: tuple[StreamResult, ...]
    usage: ProcessUsage
    idle_private_bytes: int  # before the first round
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

    @property
    def num_streams_failed(self) -> int:
        """Streams that were refused, or ended by an error."""
        return sum(stream.ended_as not in {"ended", LATE} for stream in self.streams)

    @property
    def num_streams_late(self) -> int:
        """Streams that were not over in time and were told to end."""
        return sum(stream.ended_as == LATE for stream in self.streams)

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values; times in milliseconds, memory in MiB."""
        total, words, num_streams = self.latencies, self.words, len(self.streams)
        audio_s = num_streams * self.seconds
        grown = self.usage.peak_private_bytes - self.idle_private_bytes
        return {
            "streams": num_streams,
            "runtime": self.runtime,
            "model": self.model,
            "arithmetic": self.arithmetic,
            "seconds": round(self.seconds, 2),
            "wer": None if words is None else round(words.rate, 5),
            "finals_lost": total.num_finals_lost,
            "num_finals": total.num_finals,
            "num_duplicate_finals": total.num_duplicate_finals,
            "num_partials": total.num_partials,
            "num_errors": sum(stream.num_errors for stream in self.streams),
            "num_gaps": sum(stream.num_gaps for stream in self.streams),
            "num_streams_failed": self.num_streams_failed,
            "num_streams_late": self.num_streams_late,
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
            "memory_mib_peak": round(self.usage.peak_private_bytes / 2**20, 1),
            "memory_mib_per_stream": round(grown / 2**20 / num_streams, 1),
            "num_cpus": len(os.sched_getaffinity(0)),
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        from actors.bench.tables import live_table  # noqa: PLC0415 - tables know the reports, not the other way

        return live_table(self)


class LiveBench:
    """The running service and what its streams play: one round after the other. Opened by `open_bench`."""

    def __init__(
        self, options: LiveOptions, settings: Settings, played: Played, warm_up: Path, report: Progress
    ) -> None:
        self._patience = options.patience
        self._keeps_records = options.keeps_records
        self._settings = settings
        self._played = played
        self._warm_up = warm_up
        self._report = report
        self._exits = AsyncExitStack()
        self._running: tuple[GatewayClient, Store] | None = None
        self._roots: list[int] = []
        self._idle_private_bytes = 0

    async def start(self) -> tuple[GatewayClient, Store]:
        """Start the service, with its store, and play a short stream that is not measured.

        Raises:
            ServiceError, StoreError, ModelError: if the service does not start.
        """
        gateway = await self._exits.enter_async_context(open_runtime(self._settings, self._report))
        store = await self._exits.enter_async_context(Store(self._settings.redis))
        self._report("warming up")
        warm_up_id = await gateway.start_stream(StreamSpec(source=str(self._warm_up), pace="fast"))
        await gateway.wait_stream(warm_up_id)
        self._roots = await find_root_pids(store)
        self._idle_private_bytes = (await asyncio.to_thread(measure_memory, self._roots)).private_bytes
        self._running = gateway, store
        return self._running

    async def stop(self) -> None:
        """Stop the service, if it runs."""
        self._running = None
        await self._exits.aclose()

    async def play(self, num_streams: int, stagger_ms: float) -> LiveReport:
        """Play one round. After a round whose streams did not even end when told to, the service is started anew.

        Raises:
            ServiceError, StoreError, ModelError: if the service breaks, or does not start again.
        """
        gateway, store = self._running or await self.start()
        self._report(f"playing {num_streams} streams of {self._played.clip.seconds:.0f} s")
        async with watch_processes(self._roots) as usage:
            rounds = Rounds(gateway, store, self._played, self._patience, self._keeps_records)
            streams, are_over = await rounds.play(num_streams, stagger_ms)
        info = await gateway.info()
        report = LiveReport(
            runtime=self._settings.runtime,
            model=info.stages.model,
            arithmetic=info.stages.arithmetic,
            seconds=self._played.clip.seconds,
            language=self._played.clip.language if self._played.has_reference else None,
            streams=tuple(streams),
            usage=usage,
            idle_private_bytes=self._idle_private_bytes,
            is_whole_service=is_whole_service(self._settings, store),
        )
        if not are_over:
            self._report("ending streams that hang, with their service")
            await self.stop()
        return report


def run_live(options: LiveOptions, on_progress: Progress | None = None) -> LiveReport:
    """Start the service, play all streams to their end, stop it and return what was measured.

    Raises:
        MediaError: if the media cannot be used.
        ServiceError, StoreError, ModelError: if the service does not start, or a stream is refused or not over in time.
    """
    return asyncio.run(measure_live(options, on_progress))


async def measure_live(options: LiveOptions, on_progress: Progress | None = None) -> LiveReport:
    """Do what `run_live` does, on a running event loop."""
    async with open_bench(options, options.num_streams, on_progress) as bench:
        report = await bench.play(options.num_streams, options.stagger_ms)
    refused = [stream for stream in report.streams if stream.ended_as == "refused"]
    if refused:
        raise ServiceError(f"{len(refused)} of {options.num_streams} streams were refused: {refused[0].failure}")
    if report.num_streams_late:
        raise ServiceError(
            f"{report.num_streams_late} streams were not over {options.patience.max_delay_s:.0f} s after their sound: "
            "the machine cannot keep up with so many; take fewer streams"
        )
    return report


@asynccontextmanager
async def open_bench(
    options: LiveOptions, max_streams: int, on_progress: Progress | None = None
) -> AsyncIterator[LiveBench]:
    """Prepare the media, start the service with room for `max_streams`, and stop it at the end.

    Raises:
        MediaError: if the media cannot be used, or hold no speech.
        ServiceError, StoreError, ModelError: if the service does not start.
    """
    with tempfile.TemporaryDirectory(prefix="surtitle-bench-") as name:
        folder = Path(name)
        played, warm_up = await asyncio.to_thread(_prepare, options, folder)
        settings = own_settings(options.settings, folder, max_streams)
        bench = LiveBench(options, settings, played, warm_up, on_progress or (lambda _text: None))
        try:
            await bench.start()
            yield bench
        finally:
            await bench.stop()


def own_settings(settings: Settings, folder: Path, max_streams: int) -> Settings:
    """Return `settings` with room for `max_streams` and a warm-up and, unless a URL is given, a store in `folder`."""
    service = settings.service.model_copy(update={"max_streams": max(settings.service.max_streams, max_streams + 1)})
    store = settings.redis
    if store.url is None:
        store = store.model_copy(update={"data_dir": folder / "data"})
    return settings.model_copy(update={"service": service, "redis": store})


async def find_root_pids(store: Store) -> list[int]:
    """Return this process, and that of the store's server if it runs on this machine for us alone."""
    if not store.is_embedded:
        return [os.getpid()]
    info: Any = await store.client().info("server")
    return [os.getpid(), int(info["process_id"])]


def is_whole_service(settings: Settings, store: Store) -> bool:
    """Whether every process of the service is below those of `find_root_pids`."""
    return store.is_embedded and (settings.runtime == "local" or settings.ray.address is None)


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


def _prepare(options: LiveOptions, folder: Path) -> tuple[Played, Path]:
    """Write what is played, and a short piece of it for warming up."""
    folder.chmod(0o755)  # ingest processes read the media as another user
    clip, has_reference = load_stream(options.media, options.seconds, options.language)
    utterances = find_utterances(clip.samples, options.settings.vad)
    if not utterances:
        raise MediaError(f"{options.media} holds no speech that the voice detector hears: nothing could be measured")
    path, warm_up = folder / "media.wav", folder / "warm-up.wav"
    write_wav(path, clip.samples)
    write_wav(warm_up, clip.samples[: round(_WARM_UP_S * SAMPLE_RATE_HZ)])
    return Played(clip, path, utterances, has_reference), warm_up
