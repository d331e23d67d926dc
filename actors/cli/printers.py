"""How records are written: lines of text, JSON lines, or a caption file at the end.

A printer is given every record of a stream in the order of reading and is closed once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from actors.cli.console import note
from actors.cli.options import OutputFormat
from pipeline.errors import ConfigError
from pipeline.records import (
    BaseRecord,
    ErrorRecord,
    FinalRecord,
    HealthRecord,
    SceneRecord,
    SummaryRecord,
    TranslationRecord,
)
from pipeline.text.captions import final_line, scene_line, short_clock, to_srt, to_webvtt, translation_line

MAX_WAITING = 16
"""Finals and scenes that may wait for a translation of an earlier final before they are written without it."""


class Printer(Protocol):
    """Where records go."""

    def show(self, record: BaseRecord) -> None:
        """Take the next record."""
        ...

    def close(self) -> None:
        """Write what was held back. Nothing comes after it."""
        ...


@contextlib.contextmanager
def open_printer(
    output_format: OutputFormat, output: Path | None, target_languages: Collection[str] = ()
) -> Iterator[Printer]:
    """Yield the printer for a format; it writes to `output` or to stdout, and is closed at the end.

    Raises:
        ConfigError: if the file cannot be written.
    """
    with _open_output(output) as file:
        printer: Printer
        match output_format:
            case OutputFormat.LIVE:
                from actors.cli.live_view import LiveView  # noqa: PLC0415 - rich is for people who watch

                printer = LiveView()
            case OutputFormat.TEXT:
                printer = TextPrinter(file, target_languages)
            case OutputFormat.JSONL:
                printer = JsonPrinter(file)
            case OutputFormat.VTT | OutputFormat.SRT:
                printer = CaptionFilePrinter(file, output_format)
        try:
            yield printer
        except BrokenPipeError:
            raise
        except BaseException:
            with contextlib.suppress(BrokenPipeError):
                printer.close()
            raise
        else:
            printer.close()


@contextlib.contextmanager
def _open_output(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write {output}: {exc.strerror or exc}") from exc
    with file:
        yield file


class JsonPrinter:
    """Every record as one line of JSON, partials included."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def show(self, record: BaseRecord) -> None:
        """Write the record."""
        self._file.write(f"{record.model_dump_json(exclude_none=True)}\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing is held back."""


@dataclass(slots=True)
class _Waiting:
    """A final that is not yet complete, or what came after one."""

    lines: list[str]
    missing: set[str]


class TextPrinter:
    """One line a final, its translations below it, and one a scene: each waits until the final before it has its
    translations.
    """

    def __init__(self, file: TextIO, target_languages: Collection[str]) -> None:
        self._file = file
        self._target_languages = frozenset(target_languages)
        self._waiting: dict[int, _Waiting] = {}  # by sequence; scenes, which have none, count down from -1
        self._num_scenes = 0

    def show(self, record: BaseRecord) -> None:
        """Write what the record completes."""
        match record:
            case FinalRecord():
                lines = [final_line(record)] if record.text else []
                self._waiting[record.sequence] = _Waiting(lines, set(self._target_languages))
            case TranslationRecord():
                self._complete(record.sequence, record.target_language, translation_line(record) if record.text else "")
            case ErrorRecord():
                note(f"surtitle: no {record.task} at {short_clock(record.start_ms)}: {record.message}")
                self._complete(record.sequence, record.task.partition(":")[2], "")
            case SceneRecord():
                self._num_scenes += 1
                self._waiting[-self._num_scenes] = _Waiting([scene_line(record)], set())
            case SummaryRecord():
                self._write_complete(is_last=True)
                self._write(f"summary {short_clock(record.start_ms)} to {short_clock(record.end_ms)}: {record.text}")
            case HealthRecord(event="gap"):
                start, end = short_clock(record.start_ms), short_clock(record.end_ms)
                note(f"surtitle: sound was lost from {start} to {end}: {record.message}")
            case _:
                return
        self._write_complete()

    def close(self) -> None:
        """Write the finals that still wait for translations."""
        self._write_complete(is_last=True)

    def _complete(self, sequence: int, language: str, line: str) -> None:
        waiting = self._waiting.get(sequence)
        if waiting is None:
            if line:
                self._write(line)
            return
        waiting.missing.discard(language)
        waiting.lines += [line] if line else []

    def _write_complete(self, *, is_last: bool = False) -> None:
        """Write finals from the head; the head is written as it stands while nothing waits behind it."""
        while self._waiting:
            sequence, head = next(iter(self._waiting.items()))
            for line in head.lines:
                self._write(line)
            head.lines.clear()
            if head.missing and not is_last and len(self._waiting) <= MAX_WAITING:
                return
            del self._waiting[sequence]

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()


class CaptionFilePrinter:
    """A WebVTT or SRT file, written when the stream has ended: the text of all finals is held until then.

    Captions say what was said: scenes, summaries and errors are not in them.
    """

    def __init__(self, file: TextIO, output_format: OutputFormat) -> None:
        self._file = file
        self._format = output_format
        self._finals: list[FinalRecord] = []
        self._gaps: list[HealthRecord] = []

    def show(self, record: BaseRecord) -> None:
        """Keep finals and gaps."""
        match record:
            case FinalRecord():
                self._finals.append(record)
            case HealthRecord(event="gap"):
                self._gaps.append(record)
            case _:
                pass

    def close(self) -> None:
        """Write the file."""
        is_vtt = self._format is OutputFormat.VTT
        self._file.write(to_webvtt(self._finals, self._gaps) if is_vtt else to_srt(self._finals))
        self._file.flush()
