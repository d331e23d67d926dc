"""`surtitle demo phi4`: caption a video of the closed world, ask about it, and say what of it was right."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from actors.cli.caption import caption_source
from actors.cli.console import note, progress
from actors.cli.options import OutputFormat
from actors.cli.spec import make_spec
from actors.demo.media import DemoMedia, Story, make_demo_media
from actors.demo.verdict import Row, judge
from actors.questions import AskSpec
from actors.service import GatewayClient
from actors.settings import Settings
from pipeline.errors import ConfigError, StageError
from pipeline.models.known import PHI4_NANO
from pipeline.models.tier import tier_of
from pipeline.records import BaseRecord, PartialRecord
from pipeline.teach.world import SECOND_LANGUAGE, WORDS
from pipeline.text.captions import short_clock

NANO = PHI4_NANO.name
DEMO_SETTINGS = (
    "summary.method=generated",
    "model.device=cpu",
    "model.encoder_threads=1",
    "model.decoder_threads=1",
    "decoder.slot_tokens=1024",
    "decoder.scheduler.num_slots=8",
)
"""Instead of those of configs/phi4.yaml: one stream, and products too small for a second thread."""

LANGUAGE = "en"
SUMMARY_MINUTES = 0.25
_MAX_RECORDS = 2_000
_KINDS = {
    "speech": "speech",
    "summary": "rolling summaries",
    "closing": "closing summary",
    "scene": "scenes",
    "question": "question",
}


def demo_phi4(settings: Settings, *, seed: int, is_realtime: bool, folder: Path | None) -> int:
    """Run the demonstration and return the exit status: 0 when it ran, whatever was right of it.

    Raises:
        SurtitleError: if the model, the tools or the service cannot be used.
    """
    if tier_of(settings.model) != "phi4":
        raise ConfigError(
            f"model {settings.model.name!r} is not of the phi4 tier: give phi4-nano, or a checkpoint of it"
        )
    note(
        f"A demonstration, not a recogniser: the model was taught a closed world of {len(WORDS)} words, and this video "
        "is drawn and spoken from it, so that what is right is known."
    )
    with _folder(folder) as where:
        with progress("speaking and drawing"):
            media = _make(where, seed)
        spec = make_spec(
            source=str(media.video),
            pace="realtime" if is_realtime else "fast",
            language=LANGUAGE,
            translate_to=(SECOND_LANGUAGE,),
            summary_minutes=SUMMARY_MINUTES,
            has_scenes=True,
        )
        witness = Witness(media)
        shown = OutputFormat.LIVE if sys.stdout.isatty() else OutputFormat.TEXT
        status = caption_source(settings, spec, shown, None, witness)
    if status == 0 and witness.has_asked:
        show_rows(media.story, judge(media.story, witness.records, witness.answer))
    if folder is not None:
        note(f"the video, its last picture and the question are in {folder}")
    return status


@contextlib.contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="surtitle-demo-") as name:
        yield Path(name)


def _make(folder: Path, seed: int) -> DemoMedia:
    try:
        return make_demo_media(folder, seed)
    except OSError as exc:
        raise ConfigError(f"cannot write {exc.filename or folder}: {exc.strerror or exc}") from exc


class Witness:
    """Keeps what the models say to the demonstration, and asks its question at the end."""

    def __init__(self, media: DemoMedia) -> None:
        self.records: list[BaseRecord] = []
        self.answer = ""
        self.has_asked = False
        self._media = media

    def show(self, record: BaseRecord) -> None:
        """Keep the record; partials are seen only."""
        if not isinstance(record, PartialRecord) and len(self.records) < _MAX_RECORDS:
            self.records.append(record)

    async def finish(self, gateway: GatewayClient) -> None:
        """Ask aloud about the last picture."""
        asked = AskSpec(sound=str(self._media.question), pictures=(str(self._media.picture),))
        try:
            self.answer = (await gateway.answer(asked)).text
        except StageError as exc:
            note(f"surtitle: {exc}")
        self.has_asked = True


# Showing what was right


def show_rows(story: Story, rows: Sequence[Row]) -> None:
    """Print what was said, shown and asked, what became of it, and how much of that is right."""
    if sys.stdout.isatty():
        _show_table(story, rows)
    else:
        typer.echo("")
        for row in rows:
            typer.echo(f"{short_clock(row.at_ms)[:-4]}  {_label(story, row)}: {row.expected or '(nothing)'}")
            typer.echo(f"       {', '.join(text for text, _ in _verdicts(row))}")
        typer.echo("")
    for line in _totals(rows):
        typer.echo(line)


def _show_table(story: Story, rows: Sequence[Row]) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for people who watch
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(expand=True)
    table.add_column("at", no_wrap=True)
    table.add_column("said, shown or asked", ratio=1)
    table.add_column("what became of it", ratio=1)
    kind = ""
    for row in rows:
        if kind not in ("", row.kind):
            table.add_section()
        kind = row.kind
        verdicts = [Text(text, style="green" if is_right else "red") for text, is_right in _verdicts(row)]
        asked = Text(f"{_label(story, row)}: ", style="bright_black").append(row.expected or "(nothing)", "default")
        table.add_row(short_clock(row.at_ms)[:-4], asked, Text("\n").join(verdicts))
    Console(file=sys.stdout).print(table)


def _label(story: Story, row: Row) -> str:
    labels = {"speech": "said", "summary": "summary", "closing": "closing summary", "scene": "shown"}
    return labels.get(row.kind) or f'asked aloud "{story.question.text}"'


def _verdicts(row: Row) -> list[tuple[str, bool]]:
    heard = "heard" if row.kind == "speech" else "model"
    verdicts = [(_verdict(heard, row.found, is_right=row.is_right), row.is_right)]
    if row.kind == "speech":
        is_right = row.is_translation_right
        verdicts.append((_verdict("German", row.found_translation, is_right=is_right), is_right))
    return verdicts


def _verdict(what: str, found: str, *, is_right: bool) -> str:
    if is_right and what != "German":
        return f"{what} right"
    return f"{what} {'right' if is_right else 'WRONG'}: {' '.join(found.split()) or '(nothing)'}"


def _totals(rows: Sequence[Row]) -> list[str]:
    """Return how much of each kind is right, a line each."""
    counts: list[tuple[str, int, int]] = []
    for kind, name in _KINDS.items():
        asked = [row for row in rows if row.kind == kind]
        counts.append((name, sum(row.is_right for row in asked), len(asked)))
        if kind == "speech":
            counts.append(("translations", sum(row.is_translation_right for row in asked), len(asked)))
    return [f"{name}: {num_right} of {num_asked} right" for name, num_right, num_asked in counts if num_asked]
