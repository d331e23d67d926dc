"""The records: what an entry of a Redis stream holds (docs/records.md).

These models are the contract with every consumer. Their JSON Schema is committed (docs/records.schema.json); a test
fails when it changes without a new `SCHEMA_VERSION`. An entry's fields are flat strings: `to_fields` writes them (lists
as JSON, None left out), `record_from_fields` reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION = 2
"""1 had no scenes, and `und` was no language. Entries of version 1 are read as they are: nothing else changed."""


class WordRecord(BaseModel):
    """One word with its media times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    start_ms: int
    end_ms: int
    probability: float


class BaseRecord(BaseModel):
    """What every record carries. Media times are milliseconds since the stream's first sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION, description="schema version")
    stream: str = Field(description="id of the stream")
    start_ms: int = Field(ge=0, description="media time at which what the record is about begins")
    end_ms: int = Field(ge=0, description="media time at which it ends")
    utc_start: str | None = Field(default=None, description="start_ms mapped to UTC by the stream's anchors, ISO 8601")
    emitted_at: str | None = Field(default=None, description="wall clock when the record was made, UTC, ISO 8601")


class SpeechRecord(BaseRecord):
    """What records about one utterance share."""

    utterance: int = Field(ge=1, description="number of the utterance in its stream")
    revision: int = Field(ge=1, description="number of the snapshot of the utterance that was heard for this")
    channel: int = Field(ge=0, description="the microphone, counted from 0")
    text: str = Field(description="what was said")
    language: str = Field(
        description="spoken language, ISO 639-1; und (undetermined, BCP 47): the tier names none and none was given"
    )
    language_source: Literal["given", "detected", "tier"] = Field(
        description="who says that it is this language; tier: its models do not say, so it is und"
    )
    tier: Literal["edge", "phi4"] = Field(description="which models answered")
    words: list[WordRecord] = Field(default_factory=list, description="the words with their media times; finals only")
    guard: str | None = Field(default=None, description="the guard that cut or emptied the text, if one fired")


class PartialRecord(SpeechRecord):
    """A transcript that may be revised. Its first `stable_chars` characters stay until the final."""

    kind: Literal["partial"] = "partial"
    stable_chars: int = Field(ge=0, description="so many characters of the text stay as they are until the final")


class FinalRecord(SpeechRecord):
    """A transcript that never changes. `sequence` counts the stream's finals from 1; an empty text means: no speech."""

    kind: Literal["final"] = "final"
    sequence: int = Field(ge=1, description="number of the final in its stream, without holes")
    close_reason: str = Field(description="why the utterance ended: pause, long, limit or end")
    average_logprob: float = Field(description="mean log-probability of the text's tokens")


class TranslationRecord(SpeechRecord):
    """The translation of one final; its entry has the final's id."""

    kind: Literal["translation"] = "translation"
    sequence: int = Field(ge=1, description="number of the final that is translated")
    target_language: str = Field(description="language of the text, ISO 639-1")


class ErrorRecord(BaseRecord):
    """What stands in the place of a record that failed for good; that of a scene or a summary is in `health`."""

    kind: Literal["error"] = "error"
    utterance: int = Field(ge=0, description="0 when no utterance is concerned")
    sequence: int = Field(ge=0, description="number of the final in whose place this stands, 0 for none")
    task: str = Field(description="what failed: transcribe, translate:LANG, summarise, describe")
    message: str = Field(description="why")


class SummaryRecord(BaseRecord):
    """A rolling or closing summary of the finals `covers_from`..`covers_to` (sequences)."""

    kind: Literal["summary"] = "summary"
    text: str = Field(description="the summary")
    scope: Literal["rolling", "closing"] = Field(description="of the last minutes, or of the whole stream at its end")
    covers_from: int = Field(ge=1, description="sequence of the first final that it is about")
    covers_to: int = Field(ge=1, description="sequence of the last one")
    language: str = Field(description="language of the text, ISO 639-1")
    tier: Literal["edge", "phi4"] = Field(description="which models answered")


class SceneRecord(BaseRecord):
    """What a camera (or any picture of the stream) showed at `start_ms`, which is `end_ms` too."""

    kind: Literal["scene"] = "scene"
    text: str = Field(description="what is to be seen")
    language: str = Field(default="en", description="language of the text, ISO 639-1; descriptions are in English")
    tier: Literal["edge", "phi4"] = Field(description="which models answered")
    reason: Literal["first", "changed", "interval"] = Field(
        description="why it was looked at: the first frame, something changed, or the last look was long ago"
    )
    changed_share: float = Field(
        ge=0.0,
        le=1.0,
        description="share of the picture's area in tiles in which something changed since the last look",
    )
    guard: str | None = Field(default=None, description="the guard that cut the text, if one fired")


class HealthRecord(BaseRecord):
    """Something that happened to the stream itself."""

    kind: Literal["health"] = "health"
    event: Literal["started", "resumed", "gap", "overload", "level", "error", "ended", "failed"] = Field(
        description="what happened"
    )
    message: str = Field(default="", description="more about it, for people")


Record = Annotated[
    PartialRecord | FinalRecord | TranslationRecord | ErrorRecord | SummaryRecord | SceneRecord | HealthRecord,
    Field(discriminator="kind"),
]
RECORD_ADAPTER: TypeAdapter[Record] = TypeAdapter(Record)

_JSON_FIELDS = frozenset({"words"})


def to_fields(record: BaseRecord) -> dict[str, str]:
    """Return the flat string fields of a stream entry for `record`."""
    fields: dict[str, str] = {}
    for name, value in record.model_dump(mode="json").items():
        if value is None:
            continue
        fields[name] = json.dumps(value, ensure_ascii=False) if name in _JSON_FIELDS else str(value)
    return fields


def record_from_fields(fields: Mapping[str, str]) -> Record:
    """Return the record that `fields` hold.

    Raises:
        pydantic.ValidationError: if the fields are not a record of this schema.
    """
    values: dict[str, Any] = {k: json.loads(v) if k in _JSON_FIELDS else v for k, v in fields.items()}
    return RECORD_ADAPTER.validate_python(values)
