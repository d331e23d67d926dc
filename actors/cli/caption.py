"""`surtitle caption`: start everything, start the stream, follow it in Redis like any other consumer, and print."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from actors.cli.console import fail, note, progress, set_up_logging
from actors.cli.interrupts import Interrupts
from actors.cli.options import OutputFormat
from actors.cli.printers import Printer, open_printer
from actors.follow import follow
from actors.service import GatewayClient, open_runtime
from actors.settings import Settings
from actors.spec import StreamSpec, StreamStatus
from actors.store import KeyKind, Store, StreamKeys, default_data_dir
from pipeline.errors import SurtitleError
from pipeline.records import BaseRecord, FinalRecord, PartialRecord
from pipeline.text.captions import short_clock

_DRAIN_TIMEOUT_S = 10.0
"""How long the last records may take to be read after the stream has ended."""


class Companion(Protocol):
    """Sees a stream too, and has more to ask when it has ended."""

    def show(self, record: BaseRecord) -> None:
        """Take the next record."""
        ...

    async def finish(self, gateway: GatewayClient) -> None:
        """Ask the models that captioned the stream, which has ended."""
        ...


@dataclass(slots=True)
class _Job:
    """What is being done, and what was noticed on the way."""

    settings: Settings
    spec: StreamSpec
    output_format: OutputFormat
    output: Path | None
    companion: Companion | None = None
    loaded_after_s: float = 0.0
    first_text_after_s: float | None = None
    is_first_partial: bool = False


@dataclass(frozen=True, slots=True)
class _Started:
    """A stream that runs, and the way to it."""

    gateway: GatewayClient
    store: Store
    stream_id: str


def caption_source(
    settings: Settings,
    spec: StreamSpec,
    output_format: OutputFormat,
    output: Path | None,
    companion: Companion | None = None,
) -> int:
    """Caption one source to its end or to Ctrl-C, and return the exit status.

    `companion` sees every record; it is asked to finish unless the stream failed or somebody interrupts.

    Raises:
        SurtitleError: if the service, the stream or the output cannot be started.
    """
    set_up_logging("surtitle: %(message)s")
    return asyncio.run(_run(_Job(settings, spec, output_format, output, companion)))


async def _run(job: _Job) -> int:
    with Interrupts() as interrupts:
        try:
            return await _caption(job, interrupts)
        except BrokenPipeError:
            # Whoever read stdout has seen enough. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


async def _caption(job: _Job, interrupts: Interrupts) -> int:
    with contextlib.ExitStack() as printing:
        # The output first: a file that cannot be written is told at once, not after the models have loaded.
        printer = printing.enter_context(open_printer(job.output_format, job.output, _languages_of(job)))
        async with contextlib.AsyncExitStack() as exits:
            try:
                with progress("checking the weights") as report, interrupts.cancelling_this_task():
                    started = await _start(job, exits, report)
            except asyncio.CancelledError:
                if not interrupts.take_cancellation():
                    raise
                note("surtitle: interrupted before the stream began")
                return 0
            interrupts.arm()
            status = await _follow_to_end(job, started, printer, interrupts)
            printing.close()
            if status.state != "failed":
                await _finish(job, started, interrupts)
                _tell(job, started.store, started.stream_id)
    return fail(SurtitleError(status.message or "the stream failed")) if status.state == "failed" else 0


async def _finish(job: _Job, started: _Started, interrupts: Interrupts) -> None:
    if job.companion is None or interrupts.requested.is_set():
        return
    try:
        with progress("waiting for the answer"), interrupts.cancelling_this_task():
            await job.companion.finish(started.gateway)
    except asyncio.CancelledError:
        if not interrupts.take_cancellation():
            raise
        note("surtitle: interrupted before there was an answer")


async def _start(job: _Job, exits: contextlib.AsyncExitStack, report: Callable[[str], None]) -> _Started:
    gateway = await exits.enter_async_context(open_runtime(job.settings, report))
    store = await exits.enter_async_context(Store(job.settings.redis))
    job.loaded_after_s = _since_start_s()
    report("opening the source")
    return _Started(gateway, store, await gateway.start_stream(job.spec))


async def _follow_to_end(job: _Job, started: _Started, printer: Printer, interrupts: Interrupts) -> StreamStatus:
    """Print until the stream has ended and all of it is read; an interrupt ends the stream first."""
    ending = asyncio.create_task(_end_of(started, interrupts))
    following = asyncio.create_task(_print(job, started, printer))
    try:
        await asyncio.wait({ending, following}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done() and following.exception() is not None:
            await started.gateway.stop_stream(started.stream_id)
        status = await ending
        await asyncio.wait({following}, timeout=_DRAIN_TIMEOUT_S)
        if following.done():
            await following
    finally:
        ending.cancel()
        following.cancel()
        await asyncio.wait({ending, following})
    return status


async def _end_of(started: _Started, interrupts: Interrupts) -> StreamStatus:
    """Wait for the end of the stream; an interrupt brings it about."""
    ending = asyncio.create_task(started.gateway.wait_stream(started.stream_id))
    interrupted = asyncio.create_task(interrupts.requested.wait())
    try:
        await asyncio.wait({ending, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        return await ending if ending.done() else await started.gateway.stop_stream(started.stream_id)
    finally:
        ending.cancel()
        interrupted.cancel()
        await asyncio.wait({ending, interrupted})


async def _print(job: _Job, started: _Started, printer: Printer) -> None:
    store = started.store
    has_report = job.output is not None or not sys.stdout.isatty()
    with progress("captioning") if has_report else contextlib.nullcontext(lambda _text: None) as report:
        async for followed in follow(store.client(), started.stream_id, revive_store=store.ensure_running):
            record = followed.record
            if isinstance(record, PartialRecord | FinalRecord):
                if job.first_text_after_s is None:
                    job.first_text_after_s = _since_start_s()
                    job.is_first_partial = isinstance(record, PartialRecord)
                report(f"captioned to {short_clock(record.end_ms)}")
            printer.show(record)
            if job.companion is not None:
                job.companion.show(record)


def _since_start_s() -> float:
    """Return how long this process lives, the start of the interpreter included."""
    return time.time() - psutil.Process().create_time()


def _languages_of(job: _Job) -> tuple[str, ...]:
    return job.spec.translate_to if job.spec.translate_to is not None else job.settings.captions.translate_to


def _tell(job: _Job, store: Store, stream_id: str) -> None:
    """Say how quick it was and where the records are."""
    if job.first_text_after_s is not None:
        what = "partial" if job.is_first_partial else "text"
        note(
            f"first {what} {job.first_text_after_s:.1f} s after the start of the command "
            f"(ready to hear after {job.loaded_after_s:.1f} s)"
        )
    where = ""
    if store.is_embedded and job.settings.redis.data_dir != default_data_dir():
        where = f" --set redis.data_dir={job.settings.redis.data_dir.absolute()}"
    note(f"the same from Redis:  surtitle watch {stream_id}{where}")
    url = store.url if store.is_embedded else store.address
    hold = f" (while `surtitle watch {stream_id} --stay{where}` holds the embedded server)" if store.is_embedded else ""
    note(f"or with redis-py{hold}:")
    note("    import redis")
    note(f'    client = redis.Redis.from_url("{url}", decode_responses=True)')
    note(
        f'    print([entry["text"] for _, entry in client.xrange("{StreamKeys(stream_id).key(KeyKind.TRANSCRIPTS)}")])'
    )
