"""The commands: their arguments and help. What they do is in the modules beside this one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from actors.cli.options import (
    ConfigOption,
    FormatOption,
    ModelOption,
    OutputOption,
    RuntimeOption,
    SetOption,
    choose_format,
    load,
)

DEFAULT_SUMMARY_MINUTES = "5"

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

app = typer.Typer(
    name="surtitle",
    help="Live captions, translations and summaries of live media, in Redis streams.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="The models on this machine.", no_args_is_help=True)
config_app = typer.Typer(
    help="The configuration: what is in force, and what is wrong with a file.", no_args_is_help=True
)
bench_app = typer.Typer(help="Measure accuracy and speed on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")


class CaptionCommand(TyperCommand):
    """Lets `--summary` stand without a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--summary` its default before the arguments are parsed."""
        filled = []
        for index, arg in enumerate(args):
            filled.append(arg)
            if arg == "--summary" and not _is_number("".join(args[index + 1 : index + 2])):
                filled.append(DEFAULT_SUMMARY_MINUTES)
        return super().parse_args(ctx, filled)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@app.command(cls=CaptionCommand)
def caption(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file with sound.")],
    *,
    is_realtime: Annotated[
        bool,
        typer.Option("--realtime/--fast", help="Play as fast as it sounds, or as fast as it can be captioned."),
    ] = True,
    language: Annotated[
        str | None, typer.Option("--language", metavar="CODE", help="Language of the speech, as de; auto detects it.")
    ] = None,
    translate: Annotated[
        list[str] | None, typer.Option("--translate", metavar="CODE", help="Translate every final to CODE, as en.")
    ] = None,
    summary: Annotated[
        float | None,
        typer.Option(
            "--summary", metavar="[MINUTES]", min=0, max=1_440, help="Summarise every MINUTES (5), and at the end."
        ),
    ] = None,
    has_scenes: Annotated[
        bool | None,
        typer.Option("--scenes/--no-scenes", help="Say what the video shows when that changes (tier phi4)."),
    ] = None,
    model: ModelOption = None,
    runtime: RuntimeOption = None,
    output_format: FormatOption = None,
    output: OutputOption = None,
    stream_id: Annotated[
        str | None,
        typer.Option("--stream-id", metavar="ID", help="Name of the stream. Default: made from name and time."),
    ] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Caption SOURCE live. Ctrl-C ends it with what was said so far; a second one at once."""
    from actors.cli.caption import caption_source  # noqa: PLC0415 - commands import what they need
    from actors.cli.spec import make_spec  # noqa: PLC0415

    shown = choose_format(output_format, output, is_terminal=sys.stdout.isatty())
    spec = make_spec(
        source=source,
        stream_id=stream_id,
        pace="realtime" if is_realtime else "fast",
        language=language,
        translate_to=tuple(translate) if translate else None,
        summary_minutes=summary,
        has_scenes=has_scenes,
    )
    raise typer.Exit(caption_source(load(config, sets, runtime, model).settings, spec, shown, output))


@app.command()
def serve(
    model: ModelOption = None, runtime: RuntimeOption = None, config: ConfigOption = None, sets: SetOption = None
) -> None:
    """Run the service until it is told to stop: models loaded, HTTP API open."""
    from actors.cli.service import serve_forever  # noqa: PLC0415

    serve_forever(load(config, sets, runtime, model).settings)


@app.command()
def ask(
    question: Annotated[
        str, typer.Argument(metavar="[QUESTION]", help="What is asked. Without it, --sound holds the spoken question.")
    ] = "",
    *,
    pictures: Annotated[
        list[str] | None,
        typer.Option("--picture", metavar="FILE", help="A picture that it is about. May be repeated, four at most."),
    ] = None,
    sound: Annotated[
        str | None, typer.Option("--sound", metavar="FILE", help="Sound that it is about, or that asks it; a minute.")
    ] = None,
    is_json: JsonOption = False,
    model: ModelOption = None,
    runtime: RuntimeOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Answer a question about pictures or sound (tier phi4)."""
    from actors.cli.ask import ask_question  # noqa: PLC0415

    settings = load(config, sets, runtime, model).settings
    raise typer.Exit(ask_question(settings, question, tuple(pictures or ()), sound, is_json=is_json))


@app.command()
def summarise(
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="A file with speech.")] = None,
    *,
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="A text file, instead of SOURCE.")] = None,
    is_json: JsonOption = False,
    model: ModelOption = None,
    runtime: RuntimeOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Summarise the speech of a file, or a text (tier phi4)."""
    from actors.cli.ask import summarise as summarise_source  # noqa: PLC0415

    if (source is None) == (text is None):
        raise typer.BadParameter("give either SOURCE or --text FILE")
    settings = load(config, sets, runtime, model).settings
    raise typer.Exit(summarise_source(settings, source, text, is_json=is_json))


@app.command()
def watch(
    stream_id: Annotated[str, typer.Argument(metavar="STREAM", help="Id of the stream (see `surtitle streams`).")],
    *,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="POSITION", help="Only what came after it, as transcripts=3-1 or only 3-1."),
    ] = None,
    is_new_only: Annotated[bool, typer.Option("--new", help="Only what comes from now on.")] = False,
    is_staying: Annotated[
        bool, typer.Option("--stay", help="Stay when the stream has ended; keeps the embedded Redis up.")
    ] = False,
    output_format: FormatOption = None,
    output: OutputOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Follow a stream from Redis, live or long ended, from its start."""
    from actors.cli.watch import WatchRange, watch_stream  # noqa: PLC0415

    shown = choose_format(output_format, output, is_terminal=sys.stdout.isatty())
    what = WatchRange(after=after, is_new_only=is_new_only, is_staying=is_staying)
    raise typer.Exit(watch_stream(load(config, sets).settings, stream_id, what, shown, output))


@app.command()
def streams(
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """List the streams that Redis knows, newest first."""
    from actors.cli.watch import show_streams  # noqa: PLC0415

    show_streams(load(config, sets).settings, is_json=is_json)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as version_of  # noqa: PLC0415

    typer.echo(f"surtitle {version_of('surtitle')}")


@models_app.command("list")
def models_list() -> None:
    """List the models that are known or in the hub's cache."""
    from actors.cli.models import show_models  # noqa: PLC0415

    show_models()


@models_app.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known model, or a hub id (org/name).")],
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch of a hub id.")] = None,
) -> None:
    """Fetch a model, so that nothing is fetched at run time."""
    from actors.cli.models import pull  # noqa: PLC0415

    pull(name, revision)


@models_app.command("verify")
def models_verify(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A known model, a directory or a hub id.")
    ] = "whisper-base",
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch of a hub id.")] = None,
) -> None:
    """Hash every file of a model and compare."""
    from actors.cli.models import verify  # noqa: PLC0415

    raise typer.Exit(verify(name, revision))


@models_app.command("make-tiny")
def models_make_tiny(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory, or one made by this.")],
    layout: Annotated[
        Literal["native", "original"],
        typer.Option("--layout", help="As transformers has it, or as it was first published."),
    ] = "native",
    seed: Annotated[int, typer.Option("--seed", min=0, help="One seed gives the same weights in both layouts.")] = 0,
) -> None:
    """Write a phi4 checkpoint of random weights: all of the real one but its size and sense, to try the tier with."""
    from actors.cli.models import write_tiny  # noqa: PLC0415

    write_tiny(directory, layout, seed)


@models_app.command("teach")
def models_teach(
    directory: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new or empty directory, or one in which this was interrupted.")
    ],
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.05, max=10_000, help="Time for all stages; speaking comes on top.")
    ] = 50.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="What all that is drawn depends on.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="CPU threads.")] = 2,
) -> None:
    """Teach a tiny phi4 checkpoint to hear, see and write in a small world, in the stages of the real one."""
    from actors.cli.teach import teach  # noqa: PLC0415

    teach(directory, minutes, seed, threads)


@config_app.command("show")
def config_show(
    config: ConfigOption = None,
    sets: SetOption = None,
    is_changed_only: Annotated[bool, typer.Option("--changed", help="Only values that are not defaults.")] = False,
) -> None:
    """Print every value in force and where it came from."""
    from actors.cli.configuration import show_settings  # noqa: PLC0415

    show_settings(load(config, sets), is_changed_only=is_changed_only)


@config_app.command("check")
def config_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, or names in configs/.")],
) -> None:
    """Say all that is wrong with configuration files."""
    from actors.cli.configuration import check_files  # noqa: PLC0415

    raise typer.Exit(check_files(files))


@bench_app.command("accuracy")
def bench_accuracy(
    *,
    media: Annotated[Path, typer.Option("--media", metavar="DIR", help="Folder with recordings and manifest.json.")],
    is_given: Annotated[
        bool, typer.Option("--given-language", help="Tell both paths the language instead of letting them detect it.")
    ] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    model: ModelOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Word error rate of the live path, and of the same weights on whole recordings."""
    from actors.cli.benches import accuracy  # noqa: PLC0415

    accuracy(load(config, sets, model=model).settings, media, is_given=is_given, is_json=is_json)


from actors.cli import bench_decoder as _bench_decoder  # noqa: E402, F401 - registers its command on bench_app
from actors.cli import bench_live as _bench_live  # noqa: E402, F401 - registers its commands on bench_app
from actors.cli import bench_peer as _bench_peer  # noqa: E402, F401 - registers its command on bench_app
from actors.cli import bench_phi4 as _bench_phi4  # noqa: E402, F401 - registers its command on bench_app
