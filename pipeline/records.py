"""The records: what an entry of a Redis stream holds (docs/records.md).

These models are the contract with every consumer. Their JSON Schema is committed (docs/records.schema.json); a test fails
when it changes without a new `SCHEMA_VERSION`. An entry's fields are flat strings: `to_fields` writes
them (lists as JSON, None left out), `record_from_fields` reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION = 1


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

    v: int = SCHEMA_VERSION
    stream: str
    start_ms: int = Field(ge=0)
    end_ms: int = Field(ge=0)
    utc_start: str | None = Field(default=None, description="start_ms mapped to UTC by the stream's anchors, ISO 8601")
    emitted_at: str | None = Field(default=None, description="wall clock when the record was made, UTC, ISO 8601")


class SpeechRecord(BaseRecord):
    """What records about one utterance share."""

    utterance: int = Field(ge=1)
    revision: int = Field(ge=1)
    channel: int = Field(ge=0)
    text: str
    language: str
    language_source: Literal["given", "detected", "tier"]
    tier: Literal["edge", "phi4"]
    words: list[WordRecord] = Field(default_factory=list)
    guard: str | None = Field(default=None, description="the guard that cut or emptied the text, if one fired")


class PartialRecord(SpeechRecord):
    """A transcript that may be revised. Its first `stable_chars` characters stay until the final."""

    kind: Literal["partial"] = "partial"
    stable_chars: int = Field(ge=0)


class FinalRecord(SpeechRecord):
    """A transcript that never changes. `sequence` counts the stream's finals from 1; an empty text means: no speech."""

    kind: Literal["final"] = "final"
    sequence: int = Field(ge=1)
    close_reason: str
    average_logprob: float


class TranslationRecord(SpeechRecord):
    """The translation of one final; its entry has the final's id."""

    kind: Literal["translation"] = "translation"
    sequence: int = Field(ge=1)
    target_language: str


class ErrorRecord(BaseRecord):
    """What stands in the place of a record that failed for good."""

    kind: Literal["error"] = "error"
    utterance: int = Field(ge=0, description="0 when no utterance is concerned")
    sequence: int = Field(ge=0)
    task: str
    message: str


class SummaryRecord(BaseRecord):
    """A rolling or closing summary of the finals `covers_from`..`covers_to` (sequences)."""

    kind: Literal["summary"] = "summary"
    text: str
    scope: Literal["rolling", "closing"]
    covers_from: int = Field(ge=1)
    covers_to: int = Field(ge=1)
    language: str
    tier: Literal["edge", "phi4"]


class HealthRecord(BaseRecord):
    """Something that happened to the stream itself."""

    kind: Literal["health"] = "health"
    event: Literal["started", "resumed", "gap", "overload", "level", "error", "ended", "failed"]
    message: str = ""


Record = Annotated[
    PartialRecord | FinalRecord | TranslationRecord | ErrorRecord | SummaryRecord | HealthRecord,
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
