"""Finals or translations to caption files: WebVTT (https://www.w3.org/TR/webvtt1/), SRT, plain text. Pure functions.

A cue has at most two lines of 42 columns (the usual limit of subtitles for broadcast; a wide East Asian character
takes two columns) and stays for seven seconds at most. Its times are those of its first and last word.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.records import FinalRecord, HealthRecord, SceneRecord, TranslationRecord

MAX_COLUMNS = 42
MAX_LINES = 2
MAX_CUE_MS = 7_000
_SENTENCE_END = (".", "?", "!", "…", "。", "？", "！")  # noqa: RUF001 - full-width marks are meant


Spoken = FinalRecord | TranslationRecord
"""What a caption can be made of: a final, or its translation."""


@dataclass(frozen=True, slots=True)
class Cue:
    """One caption on the screen: media times, the channel it was heard on, and its lines (not escaped)."""

    start_ms: int
    end_ms: int
    channel: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is never broken over two lines. `has_space` says that a space stands before it when something else does."""

    text: str
    start_ms: int
    end_ms: int
    has_space: bool

    @property
    def columns(self) -> int:
        return columns_of(self.text)


def columns_of(text: str) -> int:
    """Return how many columns `text` takes: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def to_cues(finals: Iterable[Spoken]) -> list[Cue]:
    """Return the cues of `finals`, ordered by start. Cues of one channel never overlap; empty finals give none."""
    cues: list[Cue] = []
    free_from_ms: dict[int, int] = defaultdict(int)
    for final in sorted(finals, key=lambda final: (final.channel, final.start_ms, final.sequence)):
        for units in _split_into_cues(_units_of(final)):
            start_ms = max(units[0].start_ms, free_from_ms[final.channel])
            end_ms = max(units[-1].end_ms, start_ms + 1)
            free_from_ms[final.channel] = end_ms
            cues.append(Cue(start_ms, end_ms, final.channel, _wrap(units)))
    return sorted(cues, key=lambda cue: (cue.start_ms, cue.end_ms, cue.channel))


def to_webvtt(finals: Iterable[Spoken], gaps: Iterable[HealthRecord] = ()) -> str:
    """Return a WebVTT file; several channels are told apart by voices, lost sound (`gaps`) is noted where it was."""
    cues = to_cues(finals)
    has_voices = len({cue.channel for cue in cues}) > 1
    blocks = [(gap.start_ms, 0, _note_of(gap)) for gap in gaps]
    for number, cue in enumerate(cues, start=1):
        voice = f"<v Channel {cue.channel + 1}>" if has_voices else ""
        lines = "\n".join(_escape_webvtt(line) for line in cue.lines)
        times = f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}"
        blocks.append((cue.start_ms, number, f"{number}\n{times}\n{voice}{lines}"))
    return "\n\n".join(["WEBVTT", *(block for _, _, block in sorted(blocks))]) + "\n"


def to_srt(finals: Iterable[Spoken]) -> str:
    """Return a SubRip file; several channels are told apart by a dash and the channel's number."""
    cues = to_cues(finals)
    has_voices = len({cue.channel for cue in cues}) > 1
    blocks = []
    for number, cue in enumerate(cues, start=1):
        # SubRip has no escapes: an arrow in the text would be read as a line of times.
        lines = "\n".join(line.replace("-->", "-- >") for line in cue.lines)
        voice = f"[{cue.channel + 1}] " if has_voices else ""
        blocks.append(f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n{voice}{lines}\n")
    return "\n".join(blocks)


def to_text(finals: Iterable[Spoken], translations: Iterable[TranslationRecord] = ()) -> str:
    """Return one line a final, its translations indented below."""
    below: dict[int, list[TranslationRecord]] = defaultdict(list)
    for translation in translations:
        below[translation.sequence].append(translation)
    lines = []
    for final in finals:
        if final.text:
            lines.append(final_line(final))
            lines += [translation_line(translation) for translation in below[final.sequence] if translation.text]
    return "".join(f"{line}\n" for line in lines)


def final_line(final: Spoken) -> str:
    """Return `[mm:ss.mmm] text`."""
    channel = f"(channel {final.channel + 1}) " if final.channel else ""
    return f"[{short_clock(final.start_ms)}] {channel}{_clean(final.text)}"


def translation_line(translation: TranslationRecord) -> str:
    """Return the line of a translation, indented to stand below its final."""
    return f"    {translation.target_language}: {_clean(translation.text)}"


def scene_line(scene: SceneRecord) -> str:
    """Return `scene mm:ss.mmm: text`, for plain text; caption files have no scenes."""
    return f"scene {short_clock(scene.start_ms)}: {_clean(scene.text)}"


def short_clock(ms: int) -> str:
    """Return `mm:ss.mmm`; minutes go on counting behind an hour."""
    seconds, millis = divmod(ms, 1_000)
    return f"{seconds // 60:02d}:{seconds % 60:02d}.{millis:03d}"


def _clock(ms: int, mark: str) -> str:
    seconds, millis = divmod(ms, 1_000)
    return f"{seconds // 3_600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{mark}{millis:03d}"


def _clean(text: str) -> str:
    """Return `text` on one line, without control characters."""
    return " ".join("".join("\ufffd" if _is_control(char) else char for char in part) for part in text.split())


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in {"Cc", "Cs"}


def _escape_webvtt(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _note_of(gap: HealthRecord) -> str:
    reason = _clean(gap.message).replace("-->", "-- >")
    return f"NOTE gap {_clock(gap.start_ms, '.')} to {_clock(gap.end_ms, '.')} {reason}".rstrip()


def _units_of(final: Spoken) -> list[_Unit]:
    """Cut the text at spaces, and where a run without spaces is wider than a line; give each piece its times."""
    parts = _clean(final.text).split()
    times = _char_times(final, "".join(parts))
    units: list[_Unit] = []
    position = 0
    for part in parts:
        for index, piece in enumerate(_cut(part)):
            start_ms, end_ms = times[position][0], times[position + len(piece) - 1][1]
            position += len(piece)
            units.append(_Unit(piece, start_ms, max(start_ms, end_ms), has_space=index == 0))
    return units


def _char_times(final: Spoken, chars: str) -> list[tuple[int, int]]:
    """Return start and end of every character that is not a space: from the words where they are the text's."""
    words = [("".join(_clean(word.text).split()), word.start_ms, word.end_ms) for word in final.words]
    if "".join(text for text, _, _ in words) != chars:
        words = [(chars, final.start_ms, final.end_ms)]
    times = []
    for text, start_ms, end_ms in words:
        span_ms = max(0, end_ms - start_ms)
        for index in range(len(text)):
            edges = (index * span_ms // len(text), (index + 1) * span_ms // len(text))
            times.append((start_ms + edges[0], start_ms + edges[1]))
    return times


def _cut(part: str) -> Iterator[str]:
    while columns_of(part) > MAX_COLUMNS:
        length = columns = 0
        while columns + columns_of(part[length]) <= MAX_COLUMNS:
            columns += columns_of(part[length])
            length += 1
        yield part[:length]
        part = part[length:]
    yield part


def _split_into_cues(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    """Fill cues in order; one that cannot hold all that follows ends at a sentence's end in its second half."""
    rest = list(units)
    while rest:
        fitting = _num_fitting(rest)
        if fitting < len(rest):
            ends = [
                count for count in range(fitting // 2 + 1, fitting + 1) if rest[count - 1].text.endswith(_SENTENCE_END)
            ]
            fitting = ends[-1] if ends else fitting
        yield rest[:fitting]
        rest = rest[fitting:]


def _num_fitting(units: Sequence[_Unit]) -> int:
    """Return how many of `units` one cue can hold; at least one."""
    num_lines, columns = 1, 0
    for index, unit in enumerate(units):
        if index and unit.end_ms - units[0].start_ms > MAX_CUE_MS:
            return index
        space = int(unit.has_space and columns > 0)
        if columns + space + unit.columns > MAX_COLUMNS:
            num_lines, columns, space = num_lines + 1, 0, 0
            if num_lines > MAX_LINES:
                return index
        columns += space + unit.columns
    return len(units)


def _wrap(units: Sequence[_Unit]) -> tuple[str, ...]:
    lines = [""]
    for unit in units:
        space = " " if unit.has_space and lines[-1] else ""
        if columns_of(lines[-1]) + len(space) + unit.columns > MAX_COLUMNS:
            lines.append("")
            space = ""
        lines[-1] += space + unit.text
    return tuple(lines)
