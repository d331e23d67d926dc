"""`surtitle bench live` and `surtitle bench memory`: their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.cli.app import bench_app
from actors.cli.options import ConfigOption, ModelOption, RuntimeOption, SetOption, load

MediaOption = Annotated[
    Path,
    typer.Option("--media", metavar="FILE|DIR", help="Recording that every stream plays, or a folder of them."),
]
LanguageOption = Annotated[
    str, typer.Option("--language", metavar="CODE", help="Of a folder, join the recordings of this language.")
]
SecondsOption = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        metavar="S",
        min=0,
        max=86_400,
        help="Loop or join recordings to about S seconds. Default: once; 60 with --sweep.",
    ),
]
StaggerOption = Annotated[
    int | None,
    typer.Option(
        "--stagger-ms", metavar="MS", min=0, max=600_000, help="Start each stream so much later (1000); 0: together."
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="With --sweep: draw latency against streams.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@bench_app.command("live")
def bench_live(
    *,
    media: MediaOption,
    num_streams: Annotated[
        int | None, typer.Option("--streams", metavar="N", min=1, max=1_000, help="Streams at once. Default: 4.")
    ] = None,
    seconds: SecondsOption = None,
    stagger_ms: StaggerOption = None,
    language: LanguageOption = "en",
    is_sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the largest number of streams within the limits of latency.")
    ] = False,
    max_streams: Annotated[
        int | None, typer.Option("--max-streams", metavar="N", min=1, max=1_000, help="Bound of --sweep. Default: 64.")
    ] = None,
    plot: PlotOption = None,
    is_json: JsonOption = False,
    model: ModelOption = None,
    runtime: RuntimeOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Latencies and CPU time with N streams at once, in real time, as a consumer of Redis sees them."""
    from actors.cli.benches import live, sweep  # noqa: PLC0415 - commands import what they need

    for name, value, goes_with_sweep in (
        ("--streams", num_streams, False),
        ("--stagger-ms", stagger_ms, False),
        ("--max-streams", max_streams, True),
        ("--plot", plot, True),
    ):
        if value is not None and goes_with_sweep is not is_sweep:
            raise typer.BadParameter(f"{name} {'needs' if goes_with_sweep else 'does not go with'} --sweep")
    settings = load(config, sets, runtime, model).settings
    if is_sweep:
        sweep(settings, media, seconds, language, max_streams=max_streams, plot=plot, is_json=is_json)
    else:
        live(settings, media, seconds, language, num_streams=num_streams, stagger_ms=stagger_ms, is_json=is_json)


@bench_app.command("memory")
def bench_memory(
    *,
    media: MediaOption,
    minutes: Annotated[
        float, typer.Option("--minutes", metavar="M", min=4, max=1_440, help="Length of the stream.")
    ] = 30.0,
    language: LanguageOption = "en",
    is_json: JsonOption = False,
    model: ModelOption = None,
    runtime: RuntimeOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Memory of the whole service over one long stream, fed fast. Exit 1 if it grew by more than 5 %."""
    from actors.cli.benches import memory  # noqa: PLC0415 - commands import what they need

    is_flat = memory(load(config, sets, runtime, model).settings, media, minutes, language, is_json=is_json)
    raise typer.Exit(0 if is_flat else 1)
