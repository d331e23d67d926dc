"""`surtitle models teach`: teach a tiny Phi-4-multimodal, and say what it has learned."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from actors.cli.console import note
from pipeline.errors import ModelError

if TYPE_CHECKING:
    from pipeline.teach.clips import Clip
    from pipeline.teach.evaluate import Examiner
    from pipeline.teach.stages import Report, Teaching

_CLIPS_PER_MINUTE, _MIN_CLIPS = 200, 100
_LINE_EVERY_S = 10.0
_ITEMS_PER_MINUTE, _MIN_ITEMS, _MAX_ITEMS = 4, 4, 100
_STAGE_ITEMS_SHARE = 0.3  # of the items at the end, at the end of a stage
SCORES = "scores.json"


class _Shower(Protocol):
    def show(self, report: Report, num_tokens_per_s: float) -> None: ...


def teach(directory: Path, minutes: float, seed: int, num_threads: int) -> None:
    """Teach a model into `directory`, or go on with it; print a score at the end of every stage.

    Raises:
        MediaError: if nothing here can speak.
        ModelError: if the directory holds something else, or what teaching needs is not installed.
    """
    import torch  # noqa: PLC0415 - takes 3 s to import

    from actors.speech_tools import check_speech_tools, run_speech_tool  # noqa: PLC0415
    from pipeline.teach.evaluate import Examiner  # noqa: PLC0415
    from pipeline.teach.learning import NUM_PARTS  # noqa: PLC0415
    from pipeline.teach.model import save_checkpoint  # noqa: PLC0415
    from pipeline.teach.stages import Teaching  # noqa: PLC0415

    _check_directory(directory)
    _check_installation()
    check_speech_tools()
    torch.set_num_threads(max(1, num_threads // NUM_PARTS))
    num_clips = max(_MIN_CLIPS, round(_CLIPS_PER_MINUTE * minutes))
    num_items = max(_MIN_ITEMS, min(_MAX_ITEMS, round(_ITEMS_PER_MINUTE * minutes)))
    budget_s = 60 * minutes

    def spoken() -> Sequence[Clip]:
        return _speak(directory, seed, num_clips, num_threads)

    teaching = Teaching(directory, seed, budget_s, time.monotonic, spoken, num_workers=min(num_threads, NUM_PARTS))
    if teaching.spent:
        note(f"going on behind {teaching.spent / 60:.1f} of {minutes:g} minutes")
    with _shower() as shower:
        for report in _timed(teaching, shower):
            save_checkpoint(teaching.nano, directory)
            few = max(_MIN_ITEMS, round(num_items * _STAGE_ITEMS_SHARE))
            examiner = Examiner(directory, run_speech_tool, seed)
            for name, score in _scores_of_stage(examiner, report.stage, few).items():
                typer.echo(f"{report.stage}: {name} {score:.3f} of {few} unseen items")
    scores = Examiner(directory, run_speech_tool, seed).examine(num_items).as_json()
    (directory / SCORES).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(scores))
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    note(f"{directory}: {num_bytes / 1e6:.1f} MB of weights, taught in {teaching.spent / 60:.1f} minutes")


def _timed(teaching: Teaching, shower: _Shower) -> Iterator[Report]:
    """Show every report, and yield those that end a stage."""
    num_tokens, begun = 0, teaching.spent
    for report in teaching.run():
        if report.is_end:
            yield report
            num_tokens, begun = 0, report.spent
            continue
        num_tokens += report.num_tokens
        shower.show(report, num_tokens / max(1e-9, report.spent - begun))


def _scores_of_stage(examiner: Examiner, stage: str, num_items: int) -> dict[str, float]:
    asked = {
        "language": examiner.read,
        "hearing": examiner.hear,
        "seeing": examiner.see,
        "spoken questions": examiner.see_and_hear,
    }
    return asked[stage](num_items)


def _speak(directory: Path, seed: int, num_clips: int, num_processes: int) -> Sequence[Clip]:
    """Return what is listened to, spoken now or in an earlier call."""
    from actors.speech_tools import run_speech_tool  # noqa: PLC0415
    from pipeline.teach.clips import clips_of, draw_spoken  # noqa: PLC0415
    from pipeline.teach.corpus import make_corpus  # noqa: PLC0415
    from pipeline.teach.stages import NUM_MELS, STATE_FOLDER  # noqa: PLC0415

    told_at = 0.0

    def tell(num_done: int, num_all: int) -> None:
        nonlocal told_at
        if num_done == num_all or time.monotonic() - told_at > _LINE_EVERY_S:
            told_at = time.monotonic()
            note(f"speaking: {num_done} of {num_all} sentences")

    plan = draw_spoken(seed, num_clips)
    pairs = [(spoken.text, spoken.voice) for spoken in plan]
    corpus = make_corpus(pairs, directory / STATE_FOLDER, num_processes, tell, tool=run_speech_tool, seed=seed)
    return clips_of(plan, corpus.__getitem__, NUM_MELS, seed)


def _check_directory(directory: Path) -> None:
    from pipeline.teach.stages import STATE_FOLDER  # noqa: PLC0415

    if directory.exists() and not directory.is_dir():
        raise ModelError(f"{directory} is not a directory: give a new or an empty one")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / STATE_FOLDER).is_dir():
        raise ModelError(f"{directory} is not empty and was not begun by teaching: give a new or an empty one")


def _check_installation() -> None:
    try:
        import transformers  # noqa: F401, PLC0415
    except ImportError as exc:
        raise ModelError("teaching needs transformers: install surtitle with the extra bench or dev") from exc


# Showing


class _Lines:
    """A line every ten seconds, with the means since the last one."""

    def __init__(self) -> None:
        self._stage, self._told_at, self._count = "", 0.0, 0
        self._sums: dict[str, float] = {}

    def show(self, report: Report, num_tokens_per_s: float) -> None:
        if report.stage != self._stage:
            self._stage, self._told_at = report.stage, time.monotonic()
            self._sums, self._count = {}, 0
        for name, loss in report.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss
        self._count += 1
        if time.monotonic() - self._told_at >= _LINE_EVERY_S or report.step == 1:
            typer.echo(f"{report.stage} {_told(report, self._sums, self._count, num_tokens_per_s)}")
            self._told_at, self._sums, self._count = time.monotonic(), {}, 0


class _Bar:
    """A bar for each stage."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - only for people who watch
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        columns = (TextColumn("{task.fields[stage]}", markup=False), BarColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=Console(stderr=True))
        self._means: dict[str, float] = {}
        self._stage = ""
        self._task = self.progress.add_task("", total=1.0, stage="")

    def show(self, report: Report, num_tokens_per_s: float) -> None:
        if report.stage != self._stage:
            self._stage, self._means = report.stage, dict(report.losses)
        for name, loss in report.losses.items():
            self._means[name] = 0.97 * self._means.get(name, loss) + 0.03 * loss
        self.progress.update(
            self._task,
            description=_told(report, self._means, 1, num_tokens_per_s),
            stage=report.stage,
            total=report.budget,
            completed=report.spent,
        )


@contextmanager
def _shower() -> Iterator[_Shower]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    bar = _Bar()
    with bar.progress:
        yield bar


def _told(report: Report, sums: dict[str, float], count: int, num_tokens_per_s: float) -> str:
    losses = ", ".join(f"{name} {value / count:.3f}" for name, value in sums.items())
    left_s = max(0.0, report.budget - report.spent)
    return (
        f"step {report.step}: loss of {losses}; {num_tokens_per_s:.0f} tokens/s, "
        f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
    )
