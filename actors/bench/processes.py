"""CPU time and memory of every process of the service: this one, all below it, and the Redis server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import psutil

_PERIOD_S = 0.5

_Identity = tuple[int, float]  # pid and start time: a pid alone may be used again


@dataclass(slots=True)
class ProcessUsage:
    """What the processes used since the start: filled while `watch_processes` runs.

    `cpu_s` is user and system time. A process that ends loses what it used since the last look, half a second at most.
    Private memory is resident without shared pages, so that weights in shared memory count for nobody.
    """

    cpu_s: float = 0.0
    start_private_bytes: int = 0
    peak_private_bytes: int = 0
    num_processes: int = 0
    cpu_s_by_name: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of all processes at one moment, in bytes.

    Resident memory counts a page that several processes share once for each of them; private memory leaves shared pages
    out.
    """

    resident_bytes: int
    private_bytes: int
    private_bytes_by_name: dict[str, int]  # processes of one name added up


def measure_memory(roots: Iterable[int]) -> Memory:
    """Return the memory of the processes `roots` and all below them."""
    resident = 0
    private_by_name: dict[str, int] = {}
    for process in _find(roots):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            memory, name = process.memory_info(), _name_of(process)
            resident += memory.rss
            private_by_name[name] = private_by_name.get(name, 0) + memory.rss - memory.shared
    return Memory(resident, sum(private_by_name.values()), private_by_name)


class _Meter:
    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = tuple(dict.fromkeys(roots))
        self._first: dict[_Identity, float] = {}
        self._last: dict[_Identity, float] = {}
        self._names: dict[_Identity, str] = {}
        self.usage = ProcessUsage()
        self.usage.start_private_bytes = self._look(is_start=True)
        self.usage.peak_private_bytes = self.usage.start_private_bytes

    def update(self) -> None:
        private_bytes = self._look(is_start=False)
        usage = self.usage
        usage.peak_private_bytes = max(usage.peak_private_bytes, private_bytes)
        usage.num_processes = max(usage.num_processes, len(self._last))
        used = {identity: last - self._first[identity] for identity, last in self._last.items()}
        usage.cpu_s = sum(used.values())
        by_name: dict[str, float] = {}
        for identity, seconds in used.items():
            by_name[self._names[identity]] = by_name.get(self._names[identity], 0.0) + seconds
        usage.cpu_s_by_name = by_name

    def _look(self, *, is_start: bool) -> int:
        private_bytes = 0
        for process in _find(self._roots):
            # A process may end between being listed and being read.
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                identity = (process.pid, process.create_time())
                times, memory = process.cpu_times(), process.memory_info()
                cpu_s = times.user + times.system
                # One that was not there at the start has used all its time since.
                self._first.setdefault(identity, cpu_s if is_start else 0.0)
                self._last[identity] = cpu_s
                self._names[identity] = _name_of(process)
                private_bytes += memory.rss - memory.shared
        return private_bytes


def _name_of(process: psutil.Process) -> str:
    """Return the process's name; a Ray actor's without the method that it is in, which comes and goes."""
    name = process.name()
    return name.partition(".")[0] if name.startswith("ray::") else name


def _find(roots: Iterable[int]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found[pid] = root
            found.update((child.pid, child) for child in root.children(recursive=True))
    return list(found.values())


@contextlib.asynccontextmanager
async def watch_processes(roots: Iterable[int]) -> AsyncIterator[ProcessUsage]:
    """Measure the processes `roots` and all below them, now, twice a second, and at the end of the block."""
    meter = _Meter(roots)
    watching = asyncio.create_task(_watch(meter), name="bench-processes")
    try:
        yield meter.usage
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        meter.update()


async def _watch(meter: _Meter) -> None:
    while True:
        await asyncio.sleep(_PERIOD_S)
        meter.update()
