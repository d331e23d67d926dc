"""`surtitle watch` and `surtitle streams`: consumers of Redis, without models."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from actors.cli.console import note
from actors.cli.interrupts import Interrupts
from actors.cli.options import OutputFormat
from actors.cli.printers import open_printer
from actors.follow import ALL_KINDS, Position, follow
from actors.settings import Settings
from actors.store import KeyKind, Store, translations_name
from actors.stream_list import StreamSummary, list_streams
from pipeline.records import HealthRecord
from pipeline.text.captions import short_clock

_BARE_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class WatchRange:
    """Which part of a stream is watched. `after` is a position, or the bare id of a final."""

    after: str | None = None
    is_new_only: bool = False
    is_staying: bool = False


def watch_stream(
    settings: Settings, stream_id: str, what: WatchRange, output_format: OutputFormat, output: Path | None
) -> int:
    """Print a stream until it has ended or Ctrl-C, and return the exit status.

    Raises:
        StreamNotFound: if Redis knows no such stream.
        StoreError: if Redis cannot be used.
    """
    return asyncio.run(_watch(settings, stream_id, what, output_format, output))


async def _watch(
    settings: Settings, stream_id: str, what: WatchRange, output_format: OutputFormat, output: Path | None
) -> int:
    with Interrupts() as interrupts:
        async with Store(settings.redis) as store:
            watching = asyncio.create_task(_print(store, stream_id, what, output_format, output))
            stopping = asyncio.create_task(interrupts.requested.wait())
            try:
                await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    await watching
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            finally:
                watching.cancel()
                stopping.cancel()
                await asyncio.wait({watching, stopping})
    return 0


async def _print(
    store: Store, stream_id: str, what: WatchRange, output_format: OutputFormat, output: Path | None
) -> None:
    client = store.client()
    found = [summary for summary in await list_streams(client) if summary.stream_id == stream_id]
    languages = found[0].target_languages if found else ()
    kinds = ALL_KINDS
    after: Position | str | None = what.after
    if what.after is not None and _BARE_ID.fullmatch(what.after):
        # Finals and their translations share ids; the other keys have ids of their own.
        kinds = frozenset({KeyKind.TRANSCRIPTS, KeyKind.TRANSLATIONS})
        names = [KeyKind.TRANSCRIPTS.value, *map(translations_name, languages)]
        after = Position(dict.fromkeys(names, what.after))
    position = ""
    try:
        with open_printer(output_format, output, languages) as printer:
            async for followed in follow(
                client,
                stream_id,
                kinds,
                after=after,
                from_start=not what.is_new_only,
                until_ended=not what.is_staying,
                revive_store=store.ensure_running,
            ):
                position = followed.position
                printer.show(followed.record)
                _tell_end(followed.record)
    except asyncio.CancelledError:
        if position:
            note(f"to go on from here:  surtitle watch {stream_id} --after {position}")
        raise


def _tell_end(record: object) -> None:
    if isinstance(record, HealthRecord) and record.event in {"ended", "failed"}:
        why = f": {record.message}" if record.message else ""
        note(f"the stream {record.event} at {short_clock(record.start_ms)}{why}")


def show_streams(settings: Settings, *, is_json: bool) -> None:
    """Print the streams that Redis knows.

    Raises:
        StoreError: if Redis cannot be used.
    """
    summaries = asyncio.run(_list(settings))
    if is_json:
        for summary in summaries:
            typer.echo(json.dumps(dataclasses.asdict(summary)))
        return
    if not summaries:
        note("no streams yet; `surtitle caption FILE` makes one")
        return
    width = max(len(summary.stream_id) for summary in summaries)
    for summary in summaries:
        languages = f" -> {', '.join(summary.target_languages)}" if summary.target_languages else ""
        typer.echo(
            f"{summary.stream_id:{width}}  {summary.state:6}  {summary.started_at}  "
            f"{short_clock(summary.covered_ms)[:-4]}  {summary.num_finals} finals{languages}"
        )


async def _list(settings: Settings) -> list[StreamSummary]:
    async with Store(settings.redis) as store:
        return await list_streams(store.client())
