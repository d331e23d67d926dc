"""What was said and shown against what the records have: every text is right to the letter, or wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.demo.media import Said, Story
from pipeline.records import BaseRecord, FinalRecord, SceneRecord, SummaryRecord, TranslationRecord
from pipeline.teach.world import SECOND_LANGUAGE, summary_of

Kind = Literal["speech", "summary", "closing", "scene", "question"]

_LATE_MS = 20
"""A frame's time may be rounded."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that the models were asked for.

    Args:
        at_ms: media time.
        expected: what is right; empty where nothing was said.
        found: what the models have; empty: nothing.
        expected_translation: of speech, the right translation.
        found_translation: of speech, what the models have.
    """

    kind: Kind
    at_ms: int
    expected: str
    found: str
    expected_translation: str = ""
    found_translation: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the text is right."""
        return self.expected == self.found

    @property
    def is_translation_right(self) -> bool:
        """Whether the translation is right."""
        return self.expected_translation == self.found_translation


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Sentences that were heard together, with the finals in which they were."""

    said: tuple[Said, ...]
    finals: tuple[FinalRecord, ...]


def judge(story: Story, records: Iterable[BaseRecord], answer: str) -> list[Row]:
    """Return what became of all that was said and shown, and of the question, in that order."""
    records = list(records)
    finals = [record for record in records if isinstance(record, FinalRecord) and record.text.strip()]
    rows = _speech_rows(_stretches(story.said, finals), records)
    rows += [_summary_row(record, story.said) for record in records if isinstance(record, SummaryRecord)]
    rows += _scene_rows(story, [record for record in records if isinstance(record, SceneRecord)])
    return [*rows, Row("question", story.shown[-1].start_ms, story.question.answer, answer.strip())]


def _stretches(said: Sequence[Said], finals: Sequence[FinalRecord]) -> list[_Stretch]:
    """Put together what overlaps: a final can have several sentences, and a sentence several finals."""
    pieces: list[Said | FinalRecord] = [*said, *finals]
    groups: list[list[Said | FinalRecord]] = []
    end_ms = -1
    for piece in sorted(pieces, key=lambda piece: (piece.start_ms, piece.end_ms)):
        if piece.start_ms >= end_ms:
            groups.append([])
        groups[-1].append(piece)
        end_ms = max(end_ms, piece.end_ms)
    return [
        _Stretch(
            tuple(piece for piece in group if isinstance(piece, Said)),
            tuple(piece for piece in group if isinstance(piece, FinalRecord)),
        )
        for group in groups
    ]


def _speech_rows(stretches: Iterable[_Stretch], records: Iterable[BaseRecord]) -> list[Row]:
    translations = {
        record.sequence: record.text
        for record in records
        if isinstance(record, TranslationRecord) and record.target_language == SECOND_LANGUAGE
    }
    return [
        Row(
            "speech",
            (stretch.said or stretch.finals)[0].start_ms,
            _joined(one.saying.text for one in stretch.said),
            _joined(final.text for final in stretch.finals),
            _joined(one.saying.translation for one in stretch.said),
            _joined(translations.get(final.sequence, "") for final in stretch.finals),
        )
        for stretch in stretches
    ]


def _summary_row(summary: SummaryRecord, said: Iterable[Said]) -> Row:
    # By time: a sentence of which nothing was heard counts too.
    covered = [one.saying for one in said if one.start_ms < summary.end_ms and summary.start_ms < one.end_ms]
    kind: Kind = "closing" if summary.scope == "closing" else "summary"
    return Row(kind, summary.end_ms, summary_of(covered), summary.text.strip())


def _scene_rows(story: Story, records: Sequence[SceneRecord]) -> list[Row]:
    rows = []
    for record in records:
        shown = story.shown_at(record.start_ms + _LATE_MS)
        rows.append(Row("scene", record.start_ms, shown.scene.description, record.text.strip()))
    seen = {story.shown_at(record.start_ms + _LATE_MS).start_ms for record in records}
    missed = [Row("scene", one.start_ms, one.scene.description, "") for one in story.shown if one.start_ms not in seen]
    return sorted([*rows, *missed], key=lambda row: row.at_ms)


def _joined(texts: Iterable[str]) -> str:
    return " ".join(text.strip() for text in texts if text.strip())
