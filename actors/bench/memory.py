"""`surtitle bench memory`: whether a long stream's memory stays flat, over all processes of the real service.

One stream of looped media is fed as fast as it can be heard, so that half an hour of sound takes minutes. The media are
written to disk turn by turn: this process is one of those that are measured.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.bench.live import Progress, find_root_pids, is_whole_service, own_settings
from actors.bench.media import load_stream, write_looped_wav
from actors.bench.processes import Memory, measure_memory
from actors.follow import follow
from actors.service import GatewayClient, open_runtime
from actors.settings import Settings
from actors.spec import StreamSpec, StreamStatus
from actors.store import KeyKind, Store
from pipeline.errors import ConfigError, MediaError, ServiceError
from pipeline.records import FinalRecord, PartialRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

_FOLLOWED = frozenset({KeyKind.PARTIALS, KeyKind.TRANSCRIPTS, KeyKind.HEALTH})
_TAIL_S = 300.0
"""More sound than is judged: fed fast, it is heard minutes before its finals are out, and the process that decodes it
must still be there when the last sample is taken. Then the stream is told to end."""

_MAX_STALL_S = 120.0
"""A stream that publishes nothing for so long is given up."""


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """What to play and how long. All times but the period are of the media.

    Early is the median of the samples from `early_s` on, late that of the last, within `window_s` each: a single moment
    may fall on a large batch.
    """

    media: Path
    settings: Settings = field(default_factory=Settings)
    media_s: float = 1_800.0
    early_s: float = 120.0
    window_s: float = 60.0
    period_s: float = 1.0
    max_growth_percent: float = 5.0
    language: str = "en"


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory of all processes when the stream's records had come so far."""

    media_s: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """How much memory the service took early and late in the stream."""

    runtime: str
    model: str
    media_s: float
    wall_s: float
    early_s: float
    max_growth_percent: float
    num_finals: int
    num_samples: int
    early: Memory
    late: Memory
    peak: Memory
    is_whole_service: bool

    @property
    def growth_percent(self) -> float:
        """By how much resident memory grew from early to late."""
        return 100 * (self.late.resident_bytes - self.early.resident_bytes) / self.early.resident_bytes

    @property
    def is_flat(self) -> bool:
        """Whether it grew by no more than is allowed."""
        return self.growth_percent <= self.max_growth_percent

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values; memory in MiB."""
        moments = {"early": self.early, "end": self.late, "peak": self.peak}
        return {
            "runtime": self.runtime,
            "model": self.model,
            "media_s": round(self.media_s, 2),
            "wall_s": round(self.wall_s, 1),
            "early_s": self.early_s,
            **{f"resident_mib_{name}": _mib(memory.resident_bytes) for name, memory in moments.items()},
            **{f"private_mib_{name}": _mib(memory.private_bytes) for name, memory in moments.items()},
            "private_mib_by_process": {
                name: {moment: _mib(memory.private_bytes_by_name.get(name, 0)) for moment, memory in moments.items()}
                for name in sorted(self.late.private_bytes_by_name)
            },
            "growth_percent": round(self.growth_percent, 2),
            "max_growth_percent": self.max_growth_percent,
            "is_flat": self.is_flat,
            "num_finals": self.num_finals,
            "num_samples": self.num_samples,
            "counts_every_process": self.is_whole_service,
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        from actors.bench.tables import memory_table  # noqa: PLC0415 - tables know the reports, not the other way

        return memory_table(self)


def run_memory(options: MemoryOptions, on_progress: Progress | None = None) -> MemoryReport:
    """Start the service, play one long stream to its end, stop it and return what was measured.

    Raises:
        ConfigError: if the stream is too short to have an early and a late part.
        MediaError: if the media cannot be used, or hold no speech.
        ServiceError, StoreError, ModelError: if the service does not start, or the stream fails or hangs.
    """
    return asyncio.run(measure_stream_memory(options, on_progress))


async def measure_stream_memory(options: MemoryOptions, on_progress: Progress | None = None) -> MemoryReport:
    """Do what `run_memory` does, on a running event loop."""
    if options.media_s < options.early_s + 2 * options.window_s:
        raise ConfigError(
            f"a stream of {options.media_s:g} s is too short: memory is compared from {options.early_s:g} s on and in "
            f"the last {options.window_s:g} s, so give at least {options.early_s + 2 * options.window_s:g} s"
        )
    report = on_progress or (lambda _text: None)
    with tempfile.TemporaryDirectory(prefix="surtitle-bench-") as name:
        folder = Path(name)
        path = folder / "media.wav"
        await asyncio.to_thread(_write_media, options, path)
        settings = own_settings(options.settings, folder, 1)
        async with open_runtime(settings, report) as gateway, Store(settings.redis) as store:
            watch = _Watch(await find_root_pids(store), options, report)
            started_s = time.monotonic()
            await watch.play(path, gateway, store)
            if not watch.num_finals:
                raise MediaError(
                    f"nothing was said in {options.media}: how far a stream has come is told by its finals"
                )
            early, late, peak = select_moments(watch.samples, options)
            return MemoryReport(
                runtime=settings.runtime,
                model=(await gateway.info()).stages.model,
                media_s=options.media_s,
                wall_s=time.monotonic() - started_s,
                early_s=options.early_s,
                max_growth_percent=options.max_growth_percent,
                num_finals=watch.num_finals,
                num_samples=len(watch.samples),
                early=early,
                late=late,
                peak=peak,
                is_whole_service=is_whole_service(settings, store),
            )


def select_moments(samples: Sequence[MemorySample], options: MemoryOptions) -> tuple[Memory, Memory, Memory]:
    """Return the memory early, late and at its peak, of samples in the order of time.

    Raises:
        ServiceError: if none was taken early or late, because the stream ran through faster than samples are taken.
    """
    early_end_s, late_start_s = options.early_s + options.window_s, options.media_s - options.window_s
    early = [sample.memory for sample in samples if options.early_s <= sample.media_s < early_end_s]
    late = [sample.memory for sample in samples if sample.media_s >= late_start_s]
    if not early or not late:
        raise ServiceError(
            f"none of {len(samples)} samples fell into the {'late' if early else 'early'} part of the stream: "
            "play more minutes"
        )
    return _median(early), _median(late), max((sample.memory for sample in samples), key=_resident)


class _Watch:
    """Plays one stream and samples the memory of the processes `roots` and all below them while it lasts."""

    def __init__(self, roots: list[int], options: MemoryOptions, report: Progress) -> None:
        self.samples: list[MemorySample] = []
        self.num_finals = 0
        self._roots = roots
        self._options = options
        self._report = report
        self._heard_s = 0.0
        self._is_over = asyncio.Event()

    async def play(self, path: Path, gateway: GatewayClient, store: Store) -> None:
        """Return when the stream's records have come to the end of what is judged, and the stream is over."""
        stream_id = await gateway.start_stream(StreamSpec(source=str(path), pace="fast", channels="mix"))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sample())
                group.create_task(self._consume(stream_id, store))
                stopping = group.create_task(self._stop(stream_id, gateway))
        except* TimeoutError as failed:
            raise ServiceError(
                f"the stream published nothing for {_MAX_STALL_S:.0f} s, {self._heard_s:.0f} s into its sound"
            ) from failed
        except* Exception as failed:
            raise failed.exceptions[0] from failed
        status = stopping.result()
        if status.state != "ended":
            raise ServiceError(f"the stream {status.state} {self._heard_s:.0f} s into its sound: {status.message}")

    async def _consume(self, stream_id: str, store: Store) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_MAX_STALL_S) as patience:
            async for entry in follow(store.client(), stream_id, _FOLLOWED):
                patience.reschedule(loop.time() + _MAX_STALL_S)
                if isinstance(entry.record, PartialRecord | FinalRecord):
                    self._heard_s = max(self._heard_s, entry.record.end_ms / 1_000)
                    self.num_finals += isinstance(entry.record, FinalRecord)
                if self._heard_s >= self._options.media_s:
                    self._is_over.set()
        self._is_over.set()

    async def _stop(self, stream_id: str, gateway: GatewayClient) -> StreamStatus:
        await self._is_over.wait()
        return await gateway.stop_stream(stream_id)

    async def _sample(self) -> None:
        while not self._is_over.is_set():
            heard_s = self._heard_s
            memory = await asyncio.to_thread(measure_memory, self._roots)
            if self._is_over.is_set():
                return
            self.samples.append(MemorySample(heard_s, memory))
            self._report(f"{heard_s:.0f} of {self._options.media_s:.0f} s heard")
            try:
                async with asyncio.timeout(self._options.period_s):
                    await self._is_over.wait()
            except TimeoutError:
                continue


def _write_media(options: MemoryOptions, path: Path) -> None:
    path.parent.chmod(0o755)  # ingest processes read the media as another user
    turn, _ = load_stream(options.media, 0.0, options.language)
    write_looped_wav(path, turn, options.media_s + _TAIL_S)


def _median(memories: Sequence[Memory]) -> Memory:
    return sorted(memories, key=_resident)[(len(memories) - 1) // 2]


def _resident(memory: Memory) -> int:
    return memory.resident_bytes


def _mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)
