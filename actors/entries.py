"""From a record to its stream entry: which key, which id, which fields. No I/O and no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from actors.store import KeyKind, RedisParams, translations_name
from pipeline.records import (
    BaseRecord,
    ErrorRecord,
    FinalRecord,
    HealthRecord,
    PartialRecord,
    SceneRecord,
    SummaryRecord,
    TranslationRecord,
    to_fields,
)

_COUNTED = frozenset({KeyKind.HEALTH.value, KeyKind.SUMMARIES.value, KeyKind.SCENES.value})
"""Numbered here, not by the records."""
NO_ID = "0-0"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as the write script takes it."""

    name: str  # of its key: a `KeyKind`, or `translations:LANG`
    entry_id: str
    previous_id: str  # what the same owner wrote or found before it in the same key
    maxlen: int  # 0: trimmed by retention only
    covers_ms: int | None  # media up to here is done for good
    end_ms: int
    strings: tuple[bytes, ...]  # field, value, field, value …


def iso_ms(moment: datetime) -> str:
    """Return `moment` as UTC, ISO 8601 with milliseconds: fixed width, so that texts compare as times do."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_id(entry_id: str) -> tuple[int, int]:
    """Return the two numbers of an entry id, for comparisons."""
    high, low = entry_id.split("-")
    return int(high), int(low)


def key_name_of(record: BaseRecord) -> str:  # noqa: PLR0911 - one return a kind is what the table says
    """Return the name of the key that `record` belongs to.

    Raises:
        ValueError: if it belongs to none: an unknown kind, or an error of a translation without its language.
    """
    match record:
        case PartialRecord():
            return KeyKind.PARTIALS.value
        case FinalRecord():
            return KeyKind.TRANSCRIPTS.value
        case TranslationRecord():
            return translations_name(record.target_language)
        case SummaryRecord():
            return KeyKind.SUMMARIES.value
        case SceneRecord():
            return KeyKind.SCENES.value
        case HealthRecord():
            return KeyKind.HEALTH.value
        case ErrorRecord(sequence=0):
            return KeyKind.HEALTH.value
        case ErrorRecord(task="transcribe"):
            return KeyKind.TRANSCRIPTS.value
        case ErrorRecord() if record.task.startswith("translate:"):
            return translations_name(record.task.removeprefix("translate:"))
        case ErrorRecord():
            raise ValueError(f"error of task {record.task!r} takes no place: say 'transcribe' or 'translate:LANG'")
        case _:
            raise ValueError(f"no key takes a {type(record).__name__}")


class EntryMaker:
    """Numbers and stamps the entries of one owner of one stream.

    Ids: what a final, its translations and the errors in their places have is the final's sequence; health,
    summaries and scenes count on after the last one found; partials count from 1 in every epoch.
    """

    def __init__(self, stream_id: str, epoch: int, last_ids: Mapping[str, str], params: RedisParams) -> None:
        self._stream_id = stream_id
        self._epoch = epoch
        self._last_ids = dict(last_ids)
        self._made_ids: dict[str, str] = {}
        self._num_partials = 0
        self._maxlens = {
            KeyKind.PARTIALS.value: params.partials_maxlen,
            KeyKind.HEALTH.value: params.health_maxlen,
        }

    def make(self, record: BaseRecord, emitted_at: datetime, utc_start: datetime) -> Entry:
        """Return the next entry: `record` stamped with `emitted_at` and `utc_start`.

        Raises:
            ValueError: if the record is of another stream, or would leave a hole in its key or come too late for it.
        """
        if record.stream != self._stream_id:
            raise ValueError(f"record of stream {record.stream!r} given to the writer of {self._stream_id!r}")
        name = key_name_of(record)
        entry_id = self._id_of(name, record)
        previous_id = self._last_ids.get(name, NO_ID)
        stamped = record.model_copy(update={"emitted_at": iso_ms(emitted_at), "utc_start": iso_ms(utc_start)})
        strings: list[bytes] = []
        for field, value in to_fields(stamped).items():
            strings += (field.encode(), value.encode("utf-8", "replace"))  # lone surrogates are no UTF-8
        self._made_ids[name] = entry_id
        self._last_ids[name] = max(previous_id, entry_id, key=parse_id)
        if name == KeyKind.PARTIALS:
            self._num_partials += 1
        return Entry(
            name=name,
            entry_id=entry_id,
            previous_id=previous_id,
            maxlen=self._maxlens.get(name, 0),
            covers_ms=record.end_ms if name == KeyKind.TRANSCRIPTS else None,
            end_ms=record.end_ms,
            strings=tuple(strings),
        )

    def _id_of(self, name: str, record: BaseRecord) -> str:
        if name == KeyKind.PARTIALS:
            return f"{self._epoch}-{self._num_partials + 1}"
        last_number = parse_id(self._last_ids.get(name, NO_ID))[0]
        if name in _COUNTED:
            return f"{last_number + 1}-1"
        sequence: int = getattr(record, "sequence")  # noqa: B009 - every record that reaches this line has one
        if name == KeyKind.TRANSCRIPTS and sequence > last_number + 1:
            raise ValueError(f"final {sequence} of {self._stream_id} leaves a hole: the next one is {last_number + 1}")
        if sequence < parse_id(self._made_ids.get(name, NO_ID))[0]:
            raise ValueError(f"{name} of {self._stream_id}: {sequence} comes after {self._made_ids[name]}")
        return f"{sequence}-1"


class MediaClock:
    """Maps media time to UTC by anchors: pairs of a media time and the moment at which it happened."""

    MAX_ANCHORS = 64

    def __init__(self, anchors: list[tuple[int, datetime]]) -> None:
        self._anchors = sorted(anchors)

    @property
    def anchors(self) -> list[tuple[int, datetime]]:
        """(media_ms, UTC), by media time."""
        return list(self._anchors)

    def add(self, media_ms: int, utc: datetime) -> None:
        """Add an anchor; from `media_ms` on it counts. The first anchor and the newest ones are kept."""
        kept = [anchor for anchor in self._anchors if anchor[0] != media_ms]
        self._anchors = sorted([*kept, (media_ms, utc)])
        if len(self._anchors) > self.MAX_ANCHORS:
            del self._anchors[1]

    def utc(self, media_ms: int) -> datetime:
        """Return the moment at which `media_ms` happened, by the last anchor at or before it."""
        anchor_ms, anchor_utc = self._anchors[0]
        for candidate_ms, candidate_utc in self._anchors:
            if candidate_ms <= media_ms:
                anchor_ms, anchor_utc = candidate_ms, candidate_utc
        return anchor_utc + timedelta(milliseconds=media_ms - anchor_ms)
