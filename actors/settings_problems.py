"""What is wrong with a configuration, in one line each: where, which key, which value, and the fix."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

UNITS = {
    "ms": ("milliseconds", 0.001),
    "s": ("seconds", 1.0),
    "minutes": ("minutes", 60.0),
    "hours": ("hours", 3_600.0),
    "hz": ("hertz", None),
    "khz": ("kilohertz", None),
    "samples": ("samples", None),
    "chunks": ("chunks", None),
    "mb": ("megabytes", None),
    "bytes": ("bytes", None),
    "tokens": ("tokens", None),
    "steps": ("steps", None),
}
"""Unit suffixes of keys: their names, and seconds in one of them where it is a time."""
_ALIASES = {"sec": "s", "secs": "s", "seconds": "s", "millis": "ms", "msec": "ms", "min": "minutes", "h": "hours"}
_NUMBER_WITH_UNIT = re.compile(
    r"\s*(-?\d+(?:\.\d+)?)\s*(ms|msec|s|secs?|seconds|min|minutes|h|hours)\s*", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"://[^/]*@")


@dataclass(frozen=True, slots=True)
class Given:
    """A key that some layer gives. `text` is the value as it was written."""

    key: str
    value: Any
    origin: str
    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one given key."""

    origin: str
    key: str
    text: str
    message: str

    def __str__(self) -> str:
        text = "(hidden)" if _CREDENTIALS.search(self.text) else self.text
        shown = f" = {text}" if text else ""
        return f"{self.origin}: {self.key}{shown}: {self.message}"


@dataclass(frozen=True, slots=True)
class Field:
    """A key of the settings; `section` is the model of a section."""

    info: FieldInfo
    section: type[BaseModel] | None

    @property
    def is_section(self) -> bool:
        """Whether the key holds keys of its own."""
        return self.section is not None


def field_at(model: type[BaseModel], key: str) -> Field | None:
    """Return the field that dotted `key` names in `model`, or None."""
    *sections, last = key.split(".")
    current: type[BaseModel] | None = model
    for name in sections:
        info = current.model_fields.get(name) if current is not None else None
        current = _section_of(info) if info is not None else None
    info = current.model_fields.get(last) if current is not None else None
    return None if info is None else Field(info, _section_of(info))


def accepts_none(info: FieldInfo) -> bool:
    """Return whether the field may be null."""
    return type(None) in typing.get_args(info.annotation)


def is_list(info: FieldInfo) -> bool:
    """Return whether the field holds a list."""
    return typing.get_origin(info.annotation) in {tuple, list, frozenset, set}


def leaves_of(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield every key of `model` with its value and description, sections flattened."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, info.description or ""


def check_keys(given: Iterable[Given], model: type[BaseModel]) -> list[Problem]:
    """Return a problem for every key that does not exist or holds true or false where that means nothing."""
    problems = []
    for item in given:
        field = field_at(model, item.key)
        if field is None:
            problems.append(Problem(item.origin, item.key, item.text, _unknown_key(item, model)))
        elif isinstance(item.value, bool) and not _accepts_bool(field.info):
            quoted = (
                f'; YAML reads {item.text} as {item.value}, quote it: "{item.text}"' if _accepts_text(field) else ""
            )
            problems.append(Problem(item.origin, item.key, item.text, f"expected {_expected(item.key, field)}{quoted}"))
        elif field.is_section and item.value is not None and item.value != {}:
            problems.append(Problem(item.origin, item.key, item.text, "is a section: give its keys, one a line"))
    return problems


def explain(error: ValidationError, given: Mapping[str, Given], model: type[BaseModel]) -> list[Problem]:
    """Return the problems that validation found, each at the layer that gave the value."""
    problems = []
    for detail in error.errors(include_url=False, include_context=False):
        parts = [str(part) for part in detail["loc"] if not isinstance(part, int)]
        key = ".".join(parts)
        while key and field_at(model, key) is None:
            key = key.rpartition(".")[0]
        message = detail["msg"].removeprefix("Value error, ")
        item = given.get(key)
        if item is None:  # a rule between several keys of a section
            involved = [
                other
                for other in given.values()
                if other.key.startswith(f"{key}.") and other.key.rpartition(".")[2] in message
            ]
            origin = involved[-1].origin if involved else "configuration"
            key = involved[-1].key if len(involved) == 1 else key
            problems.append(Problem(origin, key, involved[-1].text if len(involved) == 1 else "", message))
            continue
        field = field_at(model, key)
        is_secret = field is not None and not field.info.repr
        hint = _value_hint(item, field) if field is not None else ""
        text = "(hidden)" if is_secret else item.text
        problems.append(Problem(item.origin, key, text, f"{_lower_first(message)}{hint}"))
    return problems


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    candidates = [info.annotation, *typing.get_args(info.annotation)]
    for candidate in candidates:
        if (
            isinstance(candidate, type)
            and not isinstance(candidate, types.GenericAlias)
            and issubclass(candidate, BaseModel)
        ):
            return candidate
    return None


def _accepts_bool(info: FieldInfo) -> bool:
    return info.annotation is bool or bool in typing.get_args(info.annotation)


def _accepts_text(field: Field) -> bool:
    return field.info.annotation is str or str in typing.get_args(field.info.annotation)


def _expected(key: str, field: Field) -> str:
    annotation = field.info.annotation
    if annotation in {int, float}:
        kind = "a whole number" if annotation is int else "a number"
        unit = UNITS.get(key.rpartition("_")[2])
        return f"{kind} of {unit[0]}" if unit else kind
    return "text" if _accepts_text(field) else "something else"


def _unknown_key(item: Given, model: type[BaseModel]) -> str:
    prefix, _, name = item.key.rpartition(".")
    parent = field_at(model, prefix) if prefix else None
    section = parent.section if parent is not None else (model if not prefix else None)
    if section is None:
        top = item.key.partition(".")[0]
        close = difflib.get_close_matches(top, model.model_fields, n=1)
        return f"unknown section{_did_you_mean(close)}; sections: {', '.join(model.model_fields)}"
    stem, unit = _split_unit(name)
    for sibling in section.model_fields:
        sibling_stem, sibling_unit = _split_unit(sibling)
        if stem == sibling_stem and sibling_unit:
            return f"unknown key; did you mean {sibling} ({UNITS[sibling_unit][0]})?{_converted(item, unit, sibling)}"
    close = difflib.get_close_matches(name, section.model_fields, n=1)
    if close:
        return f"unknown key{_did_you_mean(close)}"
    elsewhere = [key for key in _all_keys(model) if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown key here{_did_you_mean(elsewhere[:1])}"
    for top in () if prefix else model.model_fields:
        if name.startswith(f"{top}_"):
            return f"unknown key; did you mean {top}.{name.removeprefix(f'{top}_')} (SURTITLE_{top.upper()}__…)?"
    what = f"keys of {prefix}" if prefix else "sections"
    return f"unknown key; {what}: {', '.join(section.model_fields)}"


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {names[0]}?" if names else ""


def _split_unit(name: str) -> tuple[str, str | None]:
    stem, _, last = name.rpartition("_")
    unit = _ALIASES.get(last, last)
    return (stem, unit) if stem and unit in UNITS else (name, None)


def _converted(item: Given, unit: str | None, sibling: str) -> str:
    """Return ' …: 0.48 seconds are hangover_ms 480' where both units are times."""
    target = _split_unit(sibling)[1]
    try:
        number = float(item.value)
    except (TypeError, ValueError):
        return ""
    if unit is None or target is None or UNITS[unit][1] is None or UNITS[target][1] is None:
        return ""
    return f" {item.text} {UNITS[unit][0]} are {sibling}: {_convert(number, unit, target)}"


def _convert(number: float, unit: str, target: str) -> str:
    value = number * (UNITS[unit][1] or 1.0) / (UNITS[target][1] or 1.0)
    return f"{value:.10g}"


def _value_hint(item: Given, field: Field) -> str:
    """Return what probably was meant, where a time was written in another unit."""
    unit = _split_unit(item.key.rpartition(".")[2])[1]
    if unit is None or field.info.annotation not in {int, float}:
        return ""
    name = UNITS[unit][0]
    matched = _NUMBER_WITH_UNIT.fullmatch(item.text)
    if matched and UNITS[unit][1] is not None:
        written = matched[2].lower()
        number = _convert(float(matched[1]), _ALIASES.get(written, written), unit)
        return f"; write the number of {name} without a unit: {number}"
    if unit == "ms" and isinstance(item.value, float | str) and _is_fraction(item.text):
        return f"; the unit is milliseconds: {item.text} seconds are {_convert(float(item.text), 's', 'ms')}"
    return f"; the unit is {name}"


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:
        return False


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        section = _section_of(info)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
