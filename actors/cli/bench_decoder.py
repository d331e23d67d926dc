"""`surtitle bench decoder`: its arguments, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.cli.app import bench_app
from actors.cli.options import ConfigOption, ModelOption, SetOption, load


@bench_app.command("decoder")
def bench_decoder(
    *,
    num_requests: Annotated[
        int, typer.Option("--requests", metavar="N", min=1, max=512, help="Requests that are decoded together.")
    ] = 16,
    media: Annotated[
        Path | None,
        typer.Option("--media", metavar="FILE|DIR", help="A recording, or a folder with manifest.json. Default: demo."),
    ] = None,
    num_repeats: Annotated[
        int, typer.Option("--repeats", metavar="R", min=1, max=1_000, help="Timed runs of each way, in turns.")
    ] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of where utterances are cut.")] = 1,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    model: ModelOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """The decoder with drafts and batches, without them, and transformers' generate. Exit 1 if texts differ."""
    from actors.bench.decoder import DecoderOptions, run_decoder  # noqa: PLC0415 - commands import what they need
    from actors.cli.benches import print_report, show_bar  # noqa: PLC0415
    from actors.cli.console import note  # noqa: PLC0415

    settings = load(config, sets, model=model).settings
    options = DecoderOptions(media, num_requests, num_repeats, seed, settings)
    with show_bar() as advance:
        report = run_decoder(options, advance)
    print_report(report, report.to_json(), is_json=is_json)
    if not report.are_tokens_equal:
        for line in report.told_differences():
            note(f"surtitle: tokens differ: {line}")
        raise typer.Exit(1)
