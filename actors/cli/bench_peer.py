"""`surtitle bench peer`: its arguments and help."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from actors.cli.app import bench_app
from actors.cli.options import ConfigOption, ModelOption, RuntimeOption, SetOption, load

_EXIT_INTERRUPTED = 130

_StaggerOption = Annotated[
    int,
    typer.Option(
        "--stagger-ms", metavar="MS", min=0, max=600_000, help="Start each stream so much later; 0: together."
    ),
]


@bench_app.command("peer")
def bench_peer(
    *,
    command: Annotated[
        str,
        typer.Option("--cmd", metavar="COMMAND", help="What starts the other system, quoted as for a shell."),
    ],
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Its WebSocket, as ws://127.0.0.1:8000/asr.")],
    media: Annotated[
        Path, typer.Option("--media", metavar="FILE|DIR", help="A recording, or a folder with manifest.json.")
    ],
    protocol: Annotated[str, typer.Option("--protocol", metavar="NAME", help="What it speaks.")] = "whisperlivekit",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, max=86_400, help="Length of a stream; shorter are looped.")
    ] = 60.0,
    language: Annotated[
        str, typer.Option("--language", metavar="CODE", help="Which recordings of a folder are played.")
    ] = "en",
    num_streams: Annotated[int, typer.Option("--streams", metavar="N", min=1, max=1_000, help="Streams at once.")] = 1,
    stagger_ms: _StaggerOption = 1_000,
    start_timeout_s: Annotated[
        float, typer.Option("--start-timeout", metavar="S", min=1, max=3_600, help="How long it may take to start.")
    ] = 180.0,
    has_surtitle: Annotated[
        bool, typer.Option("--with-surtitle/--without-surtitle", help="Measure surtitle after it, in the same way.")
    ] = True,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    model: ModelOption = None,
    runtime: RuntimeOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Another live speech system and surtitle on the same sound: latencies, word errors and CPU time, side by side."""
    from actors.bench.peer import PeerOptions, run_peer  # noqa: PLC0415 - commands import what they need
    from actors.cli.benches import print_report  # noqa: PLC0415
    from actors.cli.console import progress, set_up_logging  # noqa: PLC0415

    set_up_logging("surtitle: %(message)s")
    options = PeerOptions(
        command=command,
        url=url,
        media=media,
        protocol=protocol,
        seconds=seconds,
        language=language,
        num_streams=num_streams,
        stagger_ms=stagger_ms,
        start_timeout_s=start_timeout_s,
        has_surtitle=has_surtitle,
        settings=load(config, sets, runtime, model).settings,
    )
    try:
        with progress("reading the media") as report_progress:
            report = run_peer(options, report_progress)
    except asyncio.CancelledError:
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    print_report(report, report.to_json(), is_json=is_json)
