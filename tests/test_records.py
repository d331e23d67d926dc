"""Records: what is written is what is read, and the committed schema is what the models say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.records import (
    RECORD_ADAPTER,
    SCHEMA_VERSION,
    BaseRecord,
    ErrorRecord,
    FinalRecord,
    HealthRecord,
    PartialRecord,
    SceneRecord,
    SummaryRecord,
    TranslationRecord,
    WordRecord,
    record_from_fields,
    to_fields,
)
from tests.stores import final

ROOT = Path(__file__).parent.parent
COMMITTED = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "records.schema.json").read_text()))
KINDS: list[type[BaseRecord]] = [
    PartialRecord,
    FinalRecord,
    TranslationRecord,
    ErrorRecord,
    SummaryRecord,
    SceneRecord,
    HealthRecord,
]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.integers(1, 10**9)
probabilities = st.floats(0, 1, allow_nan=False)
words = st.lists(
    st.builds(WordRecord, text=texts, start_ms=numbers, end_ms=numbers, probability=probabilities), max_size=3
)
common = {"v": st.integers(1, SCHEMA_VERSION), "start_ms": numbers, "end_ms": numbers}
spoken = common | {"words": words, "text": texts, "guard": st.none() | texts}
records = st.one_of(
    st.builds(PartialRecord, **spoken),
    st.builds(FinalRecord, **spoken, average_logprob=st.floats(-100, 0)),
    st.builds(TranslationRecord, **spoken),
    st.builds(ErrorRecord, **common),
    st.builds(SummaryRecord, **common),
    st.builds(SceneRecord, **common, text=texts, guard=st.none() | texts, changed_share=probabilities),
    st.builds(HealthRecord, **common),
)


@pytest.fixture(scope="module")
def export() -> ModuleType:
    """scripts/export_schema.py as a module."""
    spec = importlib.util.spec_from_file_location("export_schema", ROOT / "scripts" / "export_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(records)
@settings(max_examples=100, deadline=None)
def test_a_record_is_read_back_from_its_fields_as_it_was(record: BaseRecord) -> None:
    fields = to_fields(record)
    assert all(isinstance(value, str) for value in fields.values())
    assert record_from_fields(fields) == record


@given(records)
@settings(max_examples=50, deadline=None)
def test_a_record_is_valid_by_the_committed_schema(record: BaseRecord) -> None:
    COMMITTED.validate(record.model_dump(mode="json"))


@pytest.mark.parametrize(
    "change",
    [{"text": 5}, {"start_ms": -1}, {"tier": "cloud"}, {"sequence": 0}, {"new": "field"}, {"v": SCHEMA_VERSION + 1}],
)
def test_what_the_models_refuse_the_committed_schema_refuses_too(change: dict[str, Any]) -> None:
    broken = final("s", 1).model_dump(mode="json") | change
    with pytest.raises(ValidationError):
        RECORD_ADAPTER.validate_python(broken)
    with pytest.raises(jsonschema.ValidationError):
        COMMITTED.validate(broken)


def test_the_committed_schema_and_page_are_what_the_models_say(export: ModuleType) -> None:
    for path, text in export.outputs().items():
        assert path.read_text() == text, f"{path.name} is out of date: run python scripts/export_schema.py"


def test_a_model_that_changes_needs_a_new_schema_version(export: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class ChangedRecord(HealthRecord):
        severity: int

    monkeypatch.setattr(export, "RECORD_ADAPTER", TypeAdapter(ChangedRecord))
    with pytest.raises(SystemExit, match=f"SCHEMA_VERSION is still {SCHEMA_VERSION}"):
        export.versions_with_current()


def test_every_kind_is_in_the_schema_and_on_the_page() -> None:
    schema = (ROOT / "docs" / "records.schema.json").read_text()
    page = (ROOT / "docs" / "records.md").read_text()
    for kind in KINDS:
        name = kind.model_fields["kind"].default
        assert f'"const": "{name}"' in schema
        assert f"### `{name}`" in page


def test_fields_of_no_known_kind_are_refused() -> None:
    with pytest.raises(ValidationError):
        record_from_fields({"kind": "rumour", "stream": "s"})


def test_an_entry_of_version_1_is_read_as_it_was_written() -> None:
    entry = {
        "v": "1",
        "stream": "s",
        "start_ms": "1000",
        "end_ms": "1900",
        "utc_start": "2026-01-02T03:04:06.000Z",
        "emitted_at": "2026-01-02T03:04:08.000Z",
        "utterance": "1",
        "revision": "3",
        "channel": "0",
        "text": "Guten Tag",
        "language": "de",
        "language_source": "detected",
        "tier": "edge",
        "words": '[{"text": "Guten", "start_ms": 1000, "end_ms": 1300, "probability": 0.5}]',
        "kind": "final",
        "sequence": "1",
        "close_reason": "pause",
        "average_logprob": "-0.25",
    }
    record = record_from_fields(entry)
    assert isinstance(record, FinalRecord)
    assert (record.v, record.text, record.words[0].end_ms) == (1, "Guten Tag", 1_300)
    assert set(to_fields(record).items()) >= {(name, value) for name, value in entry.items() if name != "words"}


def test_an_entry_of_a_version_to_come_is_refused() -> None:
    fields = to_fields(final("s", 1)) | {"v": str(SCHEMA_VERSION + 1)}
    with pytest.raises(ValidationError, match="less than or equal to"):
        record_from_fields(fields)


def test_the_versions_before_keep_their_hashes() -> None:
    versions = json.loads((ROOT / "docs" / "records.versions.json").read_text())
    assert versions["1"] == "bbaaa9f5ffdfe86e101fc167a2af096399d66d809196dd4e4042d8e829decfd7"
    assert list(versions) == [str(version) for version in range(1, SCHEMA_VERSION + 1)]
