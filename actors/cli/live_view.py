"""The live view: partials grey, their stable part white, finals bold; translations, scene and summary beside."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pipeline.records import (
    BaseRecord,
    ErrorRecord,
    FinalRecord,
    HealthRecord,
    PartialRecord,
    SceneRecord,
    SummaryRecord,
    TranslationRecord,
)
from pipeline.text.captions import short_clock

MAX_ROWS = 100
"""Finals held for the view, however tall the terminal is."""
_MIN_REFRESH_S = 0.08
_IDLE_REFRESHES_PER_SECOND = 2
"""Between records only the last of a burst is still to be drawn; drawing costs milliseconds."""
_LINES_BELOW = 4


@dataclass(slots=True)
class Row:
    """One final as shown, with what came of it."""

    sequence: int
    start_ms: int
    text: str
    is_error: bool = False
    translations: dict[str, str] = field(default_factory=dict)


class ViewState:
    """What the view shows now; bounded, whatever a stream's length."""

    def __init__(self) -> None:
        self.rows: deque[Row] = deque()
        self.partials: dict[int, PartialRecord] = {}
        self.summary: SummaryRecord | None = None
        self.scene: SceneRecord | None = None
        self.notice = ""

    def apply(self, record: BaseRecord) -> None:
        """Take the next record into the view."""
        match record:
            case PartialRecord():
                self.partials[record.utterance] = record
            case FinalRecord():
                self.partials.pop(record.utterance, None)
                if record.text:
                    self.rows.append(Row(record.sequence, record.start_ms, record.text))
            case TranslationRecord():
                for row in self.rows:
                    if row.sequence == record.sequence:
                        row.translations[record.target_language] = record.text
            case ErrorRecord():
                self._apply_error(record)
            case SummaryRecord():
                self.summary = record
            case SceneRecord():
                self.scene = record
            case HealthRecord(event="gap"):
                seconds = (record.end_ms - record.start_ms) / 1_000
                self.notice = f"{seconds:.1f} s of sound lost at {short_clock(record.start_ms)}"
            case HealthRecord(event="ended" | "failed"):
                self.partials.clear()
                self.notice = record.event
            case _:
                pass

    def _apply_error(self, record: ErrorRecord) -> None:
        if record.utterance == 0:  # it is about no speech, and must not push captions out of view
            self.notice = f"no {record.task} at {short_clock(record.start_ms)}: {record.message}"
            return
        self.partials.pop(record.utterance, None)
        self.rows.append(Row(0, record.start_ms, f"no {record.task}: {record.message}", is_error=True))

    def render(self) -> RenderableType:
        """Return rows and partials; the summary and the last scene beside them when there are any."""
        table = _speech_table(has_translations=self.has_translations)
        for row in self.rows:
            _add_row(table, row)
        for partial in self.partials.values():
            stable, rest = partial.text[: partial.stable_chars], partial.text[partial.stable_chars :]
            table.add_row(_time_of(partial.start_ms), Text.assemble((stable, "white"), (rest, "bright_black")))
        shown: RenderableType = table
        if panels := self._panels():
            beside = Table.grid(expand=True, padding=(0, 1))
            beside.add_column(ratio=2)
            beside.add_column(ratio=1)
            beside.add_row(table, Group(*panels))
            shown = beside
        return Group(shown, Text(self.notice, style="yellow")) if self.notice else shown

    @property
    def has_translations(self) -> bool:
        """Whether a column for translations is needed."""
        return any(row.translations for row in self.rows)

    def _panels(self) -> list[Panel]:
        panels: list[Panel] = []
        if self.scene is not None:
            title = f"scene at {short_clock(self.scene.start_ms)}"
            panels.append(Panel(Text(self.scene.text), title=title, title_align="left"))
        if self.summary is not None:
            title = f"summary to {short_clock(self.summary.end_ms)}"
            panels.append(Panel(Text(self.summary.text), title=title, title_align="left"))
        return panels


class LiveView:
    """A printer that keeps the newest rows in view and leaves older ones behind in the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout)
        self._state = ViewState()
        self._live = Live(
            console=self._console, refresh_per_second=_IDLE_REFRESHES_PER_SECOND, vertical_overflow="visible"
        )
        self._is_started = False
        self._refreshed_s = 0.0

    def show(self, record: BaseRecord) -> None:
        """Show the record, bursts of them at once; the first one opens the view."""
        if not self._is_started:
            self._live.start()
            self._is_started = True
        self._state.apply(record)
        while self._is_too_tall():
            self._leave_behind(self._state.rows.popleft())
        now_s = time.monotonic()
        is_due = now_s - self._refreshed_s >= _MIN_REFRESH_S
        self._live.update(self._state.render(), refresh=is_due)
        if is_due:
            self._refreshed_s = now_s

    def close(self) -> None:
        """Leave all rows in the terminal, and the cursor below them."""
        if not self._is_started:
            return
        self._live.update(self._state.render(), refresh=True)
        self._live.stop()

    def _is_too_tall(self) -> bool:
        if len(self._state.rows) <= 1:
            return False
        num_lines = len(self._console.render_lines(self._state.render(), pad=False))
        return num_lines > self._console.height - _LINES_BELOW or len(self._state.rows) > MAX_ROWS

    def _leave_behind(self, row: Row) -> None:
        table = _speech_table(has_translations=bool(row.translations))
        _add_row(table, row)
        self._console.print(table)


def _speech_table(*, has_translations: bool) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(ratio=3)
    if has_translations:
        table.add_column(ratio=2)
    return table


def _add_row(table: Table, row: Row) -> None:
    cells = [_time_of(row.start_ms), Text(row.text, style="red" if row.is_error else "bold")]
    if row.translations:
        cells.append(Text("\n".join(row.translations.values()), style="cyan"))
    table.add_row(*cells)


def _time_of(start_ms: int) -> Text:
    return Text(short_clock(start_ms)[:-4], style="bright_black")
