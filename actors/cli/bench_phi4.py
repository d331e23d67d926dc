"""`surtitle bench phi4`: its arguments, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from actors.cli.app import bench_app
from actors.cli.options import ModelOption, RuntimeOption, load

if TYPE_CHECKING:
    from actors.bench.nano import NanoOptions
    from actors.bench.phi4 import Phi4Options
    from actors.bench.phi4_model import ModelOptions

NANO_CONFIG, NANO_MODEL = "phi4", "phi4-nano"
DEFAULT_ITEMS, DEFAULT_SEED, DEFAULT_MAX_STREAMS = 100, 1, 16


class Device(StrEnum):
    """Where the parts are measured."""

    CPU = "cpu"
    CUDA = "cuda"


ScaledOption = Annotated[
    bool, typer.Option("--scaled", help="A small model against transformers' generate, on this CPU.")
]
RandomOption = Annotated[
    bool, typer.Option("--random-weights", help="Memory and speed of the parts; on cuda at full size.")
]
NanoOption = Annotated[
    bool, typer.Option("--nano", help="The taught model on unseen items: errors, drafts, live against offline.")
]
RequestsOption = Annotated[
    int, typer.Option("--requests", metavar="N", min=1, max=512, help="Scaled: requests that come at once.")
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", metavar="S", min=0.1, max=40.0, help="Scaled: sound of each request.")
]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", metavar="R", min=1, max=1_000, help="Timed runs of each way, in turns.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", metavar="T", min=0, max=256, help="CPU threads; 0: all cores, nano: half.")
]
WidthOption = Annotated[
    int, typer.Option("--width", min=384, max=3_072, help="Width of a scaled model, a multiple of 384.")
]
LayersOption = Annotated[int, typer.Option("--layers", min=1, max=32, help="Layers of a scaled model.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Random weights: where to measure.")]
ItemsOption = Annotated[
    int | None,
    typer.Option("--items", metavar="N", min=1, max=5_000, help=f"Nano: items of each kind. Default: {DEFAULT_ITEMS}."),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="S", min=0, help=f"Nano: of the items. Default: {DEFAULT_SEED}."),
]
SweepOption = Annotated[
    bool, typer.Option("--sweep", help="Nano: also find how many live streams this machine holds; takes minutes.")
]
MaxStreamsOption = Annotated[
    int | None,
    typer.Option(
        "--max-streams", metavar="N", min=1, max=1_000, help=f"Bound of --sweep. Default: {DEFAULT_MAX_STREAMS}."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@bench_app.command("phi4")
def bench_phi4(
    *,
    is_scaled: ScaledOption = False,
    is_random: RandomOption = False,
    is_nano: NanoOption = False,
    num_requests: RequestsOption = 16,
    seconds: SecondsOption = 5.0,
    num_repeats: RepeatsOption = 3,
    num_threads: ThreadsOption = 0,
    width: WidthOption = 768,
    num_layers: LayersOption = 12,
    device: DeviceOption = Device.CPU,
    model: ModelOption = None,
    num_items: ItemsOption = None,
    seed: SeedOption = None,
    is_sweep: SweepOption = False,
    max_streams: MaxStreamsOption = None,
    runtime: RuntimeOption = None,
    is_json: JsonOption = False,
) -> None:
    """The phi4 tier, on random weights or as it was taught. Exit 1 if texts differ that must be the same."""
    if [is_scaled, is_random, is_nano].count(True) != 1:
        raise typer.BadParameter("give one of --scaled, --random-weights and --nano")
    of_nano = {"model": model, "items": num_items, "seed": seed, "sweep": is_sweep or None, "runtime": runtime}
    for name, value in {**of_nano, "max-streams": max_streams}.items():
        if value is not None and not is_nano:
            raise typer.BadParameter(f"--{name} needs --nano")
    if max_streams is not None and not is_sweep:
        raise typer.BadParameter("--max-streams needs --sweep")
    if is_nano:
        from actors.bench.nano import NanoOptions  # noqa: PLC0415 - commands import what they need
        from actors.bench.nano_streams import StreamOptions  # noqa: PLC0415

        settings = load(NANO_CONFIG, (), runtime, model or NANO_MODEL).settings
        streams = StreamOptions(max_streams or DEFAULT_MAX_STREAMS) if is_sweep else None
        drawn_by = DEFAULT_SEED if seed is None else seed
        _run_nano(NanoOptions(settings, num_items or DEFAULT_ITEMS, drawn_by, num_threads, streams), is_json=is_json)
        return
    from pipeline.models.phi4.scaled import GROUP_WIDTH, ScaledSize  # noqa: PLC0415

    if width % GROUP_WIDTH:
        raise typer.BadParameter(f"--width is {width}, expected a multiple of {GROUP_WIDTH}")
    size = ScaledSize(width, num_layers)
    if is_random:
        from actors.bench.phi4_model import ModelOptions  # noqa: PLC0415

        _run_random(ModelOptions(device.value, num_repeats, num_threads, size), is_json=is_json)
    else:
        from actors.bench.phi4 import Phi4Options  # noqa: PLC0415

        options = Phi4Options(num_requests, seconds, num_repeats, num_threads=num_threads, size=size)
        _run_scaled(options, is_json=is_json)


def _run_nano(options: NanoOptions, *, is_json: bool) -> None:
    from actors.bench.nano import run_nano  # noqa: PLC0415
    from actors.cli.benches import print_report, show_bar  # noqa: PLC0415
    from actors.cli.console import set_up_logging  # noqa: PLC0415

    set_up_logging("surtitle: %(message)s")
    with show_bar() as advance:
        report = run_nano(options, advance)
    print_report(report, report.to_json(), is_json=is_json)
    _fail_on(report.told_differences())


def _run_random(options: ModelOptions, *, is_json: bool) -> None:
    from actors.bench.phi4_model import run_phi4_model  # noqa: PLC0415
    from actors.cli.benches import print_report, show_bar  # noqa: PLC0415

    with show_bar() as advance:
        parts = run_phi4_model(options, advance)
    print_report(parts, parts.to_json(), is_json=is_json)


def _run_scaled(options: Phi4Options, *, is_json: bool) -> None:
    from actors.bench.phi4 import run_phi4  # noqa: PLC0415
    from actors.cli.benches import print_report, show_bar  # noqa: PLC0415

    with show_bar() as advance:
        report = run_phi4(options, advance)
    print_report(report, report.to_json(), is_json=is_json)
    _fail_on(report.told_differences())


def _fail_on(differences: Sequence[str]) -> None:
    """Tell `differences` and end with 1, if there are any."""
    from actors.cli.console import note  # noqa: PLC0415

    for line in differences:
        note(f"surtitle: tokens differ: {line}")
    if differences:
        raise typer.Exit(1)
