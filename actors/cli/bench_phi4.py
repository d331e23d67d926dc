"""`surtitle bench phi4`: its arguments, and what it prints."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from actors.cli.app import bench_app


class Device(StrEnum):
    """Where the parts are measured."""

    CPU = "cpu"
    CUDA = "cuda"


@bench_app.command("phi4")
def bench_phi4(
    *,
    is_scaled: Annotated[
        bool, typer.Option("--scaled", help="A small model against transformers' generate, on this CPU.")
    ] = False,
    is_random: Annotated[
        bool, typer.Option("--random-weights", help="Memory and speed of the parts; on cuda at full size.")
    ] = False,
    num_requests: Annotated[
        int, typer.Option("--requests", metavar="N", min=1, max=512, help="Scaled: requests that come at once.")
    ] = 16,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.1, max=40.0, help="Scaled: sound of each request.")
    ] = 5.0,
    num_repeats: Annotated[
        int, typer.Option("--repeats", metavar="R", min=1, max=1_000, help="Timed runs of each way, in turns.")
    ] = 3,
    num_threads: Annotated[
        int, typer.Option("--threads", metavar="T", min=0, max=256, help="CPU threads of both ways; 0: all cores.")
    ] = 0,
    width: Annotated[
        int, typer.Option("--width", min=384, max=3_072, help="Width of a scaled model, a multiple of 384.")
    ] = 768,
    num_layers: Annotated[int, typer.Option("--layers", min=1, max=32, help="Layers of a scaled model.")] = 12,
    device: Annotated[Device, typer.Option("--device", help="Random weights: where to measure.")] = Device.CPU,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """The phi4 tier on random weights: speed and memory. Exit 1 if texts differ from those of the whole model."""
    if is_scaled == is_random:
        raise typer.BadParameter("give one of --scaled and --random-weights")
    from actors.cli.benches import print_report, show_bar  # noqa: PLC0415 - commands import what they need
    from actors.cli.console import note  # noqa: PLC0415
    from pipeline.models.phi4.scaled import GROUP_WIDTH, ScaledSize  # noqa: PLC0415

    if width % GROUP_WIDTH:
        raise typer.BadParameter(f"--width is {width}, expected a multiple of {GROUP_WIDTH}")
    size = ScaledSize(width, num_layers)
    if is_random:
        from actors.bench.phi4_model import ModelOptions, run_phi4_model  # noqa: PLC0415

        with show_bar() as advance:
            parts = run_phi4_model(ModelOptions(device.value, num_repeats, num_threads, size), advance)
        print_report(parts, parts.to_json(), is_json=is_json)
        return
    from actors.bench.phi4 import Phi4Options, run_phi4  # noqa: PLC0415

    options = Phi4Options(num_requests, seconds, num_repeats, num_threads=num_threads, size=size)
    with show_bar() as advance:
        report = run_phi4(options, advance)
    print_report(report, report.to_json(), is_json=is_json)
    if not report.are_tokens_equal:
        for line in report.told_differences():
            note(f"surtitle: tokens differ: {line}")
        raise typer.Exit(1)
