"""Where configuration comes from: YAML files, the environment, flags. Each layer is a list of given keys.

Values of files are what YAML says; values of the environment and of flags are text, converted by the type of their key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from actors.settings_problems import Given, accepts_none, field_at, is_list
from pipeline.errors import ConfigError

ENVIRONMENT_PREFIX = "SURTITLE_"
CONFIG_VARIABLE = "SURTITLE_CONFIG"
_SUFFIXES = (".yaml", ".yml")
_MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Override:
    """A value given on the command line: `key` (dotted), the text, and the flag to name in errors."""

    key: str
    value: str
    flag: str


def parse_set_flag(text: str) -> Override:
    """Return the override that `--set TEXT` means.

    Raises:
        ConfigError: if it is not KEY=VALUE.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"flag --set {text}: expected section.key=value, such as --set vad.hangover_ms=600")
    return Override(key.strip(), value.strip(), f"flag --set {key.strip()}")


def names_of_configs() -> list[str]:
    """Return the names of the files that ship in configs/."""
    folder = resources.files("configs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve_config(name: str) -> Path:
    """Return the file that `name` (a name in configs/ or a path) stands for.

    Raises:
        ConfigError: if there is none.
    """
    if "/" in name or name.endswith(_SUFFIXES) or name.startswith("~"):
        path = Path(name).expanduser()
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise ConfigError(f"configuration file {path} {what}; known names: {', '.join(names_of_configs())}")
        return path
    known = names_of_configs()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"no configuration is called {name!r}; {hint}known names: {', '.join(known)} (a path needs a / or .yaml)"
        )
    return Path(str(resources.files("configs") / f"{name}.yaml"))


def from_file(path: Path, model: type[BaseModel]) -> list[Given]:
    """Return what the YAML file at `path` gives, each key with its line.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, gives a key twice or is not a mapping of sections.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_FILE_BYTES} bytes: not a configuration file")
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text (byte {exc.start})") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(exc).split())}") from exc
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{_shown(path)}:{root.start_mark.line + 1}: expected sections such as `vad:`, got {root.value!r}"
        )
    try:
        return list(_walk(root, path, "", model))
    except RecursionError as exc:
        raise ConfigError(f"{path} is nested too deeply") from exc


def _walk(node: yaml.MappingNode, path: Path, prefix: str, model: type[BaseModel]) -> Iterator[Given]:
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{_shown(path)}:{key_node.start_mark.line + 1}: unknown key; a key is a plain word")
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise ConfigError(f"{_shown(path)}:{line}: {key} is given twice (first in line {lines[key]}); remove one")
        lines[key] = line
        is_section = isinstance(value_node, yaml.MappingNode) and bool(value_node.value)
        if is_section:
            yield from _walk(value_node, path, f"{key}.", model)
            continue
        field = field_at(model, key)
        value = _construct(value_node)
        if value is None and field is not None and field.is_section and not accepts_none(field.info):
            continue  # `vad:` with nothing but comments below
        yield Given(key, value, f"{_shown(path)}:{line}", str(getattr(value_node, "value", "")))


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        return str(node.value)  # the model says what is wrong with it
    finally:
        loader.dispose()


def _shown(path: Path) -> Path:
    """Return `path` as somebody in the current directory would write it."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path


def from_environment(environ: Mapping[str, str], model: type[BaseModel]) -> list[Given]:
    """Return what variables `SURTITLE_SECTION__KEY` give; an unknown one is reported by the check of the keys."""
    found = []
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or name == CONFIG_VARIABLE:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        found.append(_from_text(key, environ[name], f"environment {name}", model))
    return found


def from_overrides(overrides: Iterable[Override], model: type[BaseModel]) -> list[Given]:
    """Return what the flags give."""
    return [_from_text(item.key, item.value, item.flag, model) for item in overrides]


def _from_text(key: str, text: str, origin: str, model: type[BaseModel]) -> Given:
    field = field_at(model, key)
    value: Any = text
    if field is not None:
        if accepts_none(field.info) and text.lower() in {"", "null", "none"}:
            value = None
        elif is_list(field.info):
            value = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
        elif field.is_section:
            value = {} if text in {"", "{}"} else text
    return Given(key, value, origin, text)
