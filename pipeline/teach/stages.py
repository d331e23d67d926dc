"""The four stages in which the model is taught, one after the other, each for its share of the time.

Time is what the caller's clock says, and counts only while it runs: a call that was interrupted is gone on with where
its state was written last. What a step learns from depends on the seed and the step's number alone.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from pipeline.errors import ModelError
from pipeline.teach.clips import Clip
from pipeline.teach.hearing import Hearing
from pipeline.teach.language import draw_row, texts_of_world
from pipeline.teach.learning import NUM_PARTS, Learner, Part, Steps
from pipeline.teach.lessons import Teacher
from pipeline.teach.model import Nano, make_tokenizer, new_model
from pipeline.teach.network import Network
from pipeline.teach.seeing import Seeing, SpokenQuestions
from pipeline.teach.world import SECOND_LANGUAGE

STATE_FOLDER = ".teaching"
NUM_MELS = 80
"""Bands of the features."""
_STATE, _TOKENIZER = "state.pt", "tokenizer.json"
_FORMAT = 1

_NUM_TEXTS = 600
_PROMPT_WEIGHT = 0.1
_ROWS_PER_PART, _PARTS_PER_POOL = 16, 3
_WARM_UP_STEPS = 60
_LEAST_SHARE = 0.02  # of the learning rate, at the end
_SAVE_EVERY = 0.04  # of the whole time


class Reading:
    """The steps of stage 1, over rows of text."""

    def __init__(self, network: Network, teacher: Teacher) -> None:
        self._network, self._teacher = network, teacher

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name: all that reads and writes text, and no adapter."""
        model = self._network.nano.model
        return {name: value for name, value in model.named_parameters() if "embed_tokens_extend" not in name}

    def part(self, number: int, rng: random.Random, progress: float) -> Part:
        """Return one part of a step."""
        del number, progress
        rows = [draw_row(rng, self._teacher) for _ in range(_ROWS_PER_PART * _PARTS_PER_POOL)]
        # Rows of about one length, so that little of a batch is padding.
        rows.sort(key=lambda row: len(row.tokens))
        first = rng.randrange(_PARTS_PER_POOL) * _ROWS_PER_PART
        found = self._network.loss(rows[first : first + _ROWS_PER_PART], None, has_prompt=True)
        prompt = torch.zeros(()) if found.prompt is None else found.prompt
        told = {"answers": found.answer.item(), "texts": prompt.item()}
        return Part(found.answer + _PROMPT_WEIGHT * prompt, told, found.num_tokens)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, its share of the time, its learning rate at most, and from when on in it the rate falls."""

    name: str
    share: float
    learning_rate: float
    falls_from: float = 0.0

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of step `step`: it rises, stays, and falls by a cosine."""
        fallen = max(0.0, progress - self.falls_from) / (1.0 - self.falls_from)
        rise = min(1.0, (step + 1) / _WARM_UP_STEPS)
        return self.learning_rate * rise * max(_LEAST_SHARE, 0.5 + 0.5 * math.cos(math.pi * fallen))


STAGES = (
    Stage("language", 0.12, 2e-3),
    Stage("seeing", 0.26, 2e-3),
    Stage("hearing", 0.50, 1e-3, falls_from=0.4),
    Stage("spoken questions", 0.12, 5e-4),
)


@dataclass(frozen=True, slots=True)
class Report:
    """How it goes: after a step, or (`is_end`) at the end of a stage.

    `losses` are means over the steps since the last report; `spent` and `budget` are of the whole, in the clock's unit.
    """

    stage: str
    step: int
    losses: dict[str, float]
    num_tokens: int
    spent: float
    budget: float
    is_end: bool = False


class Teaching:
    """Teaches one model into `directory`, or goes on with it.

    Args:
        directory: its state is in the folder `.teaching`.
        seed: what everything that is drawn depends on.
        budget: time for all stages, in the unit of `clock`.
        clock: tells time; only its differences count.
        sayings: spoken sentences for stage 3, the questions among them for stage 4; called when they are needed.
        num_workers: threads that compute the parts of a step; what is learned does not depend on how many.

    Raises:
        ModelError: if the state in `directory` is of another seed, budget or version, or cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        seed: int,
        budget: float,
        clock: Callable[[], float],
        sayings: Callable[[], Sequence[Clip]],
        *,
        num_workers: int = NUM_PARTS,
    ) -> None:
        self._folder = directory / STATE_FOLDER
        self._seed, self._budget, self._clock = seed, budget, clock
        self._sayings, self._num_workers = sayings, num_workers
        self._clips: Sequence[Clip] | None = None
        self._steps: Steps | None = None
        self._stage = self._step = 0
        self._spent = 0.0
        self._pending: dict[str, Any] | None = None
        self._folder.mkdir(parents=True, exist_ok=True)
        self.nano: Nano = self._begin()
        self._network = Network(self.nano)
        self._teacher = Teacher(self.nano.tokenizer, self.nano.config)

    @property
    def is_done(self) -> bool:
        """Whether all stages are through."""
        return self._stage == len(STAGES)

    @property
    def spent(self) -> float:
        """Time that was spent, in this call and in those before it."""
        return self._spent

    def run(self) -> Iterator[Report]:
        """Teach until all stages are through; yield after every step, and after the end of every stage."""
        with ThreadPoolExecutor(self._num_workers, "teaching") as workers:
            while not self.is_done:
                stage = STAGES[self._stage]
                yield from self._run_stage(stage, workers)
                self._stage, self._step, self._steps = self._stage + 1, 0, None
                self._save(None)
                yield Report(stage.name, 0, {}, 0, self._spent, self._budget, is_end=True)

    def _run_stage(self, stage: Stage, workers: Executor) -> Iterator[Report]:
        steps = self._steps = self._make_steps()
        parameters = steps.parameters()
        for parameter in self.nano.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        learner = Learner(steps, workers)
        self._resume(steps, learner.optimiser)
        begin = self._budget * sum(earlier.share for earlier in STAGES[: self._stage])
        length = self._budget * stage.share
        saved, last = self._spent, self._clock()
        while (progress := (self._spent - begin) / length) < 1.0:
            seeds = [f"{self._seed}/{stage.name}/{self._step}/{part}" for part in range(NUM_PARTS)]
            rngs = [random.Random(seed) for seed in seeds]  # noqa: S311 - repeatable on purpose
            progress = max(0.0, progress)
            told, num_tokens = learner.step(self._step, rngs, progress, stage.rate(self._step, progress))
            self._step += 1
            now = self._clock()
            self._spent, last = self._spent + now - last, now
            if self._spent - saved >= _SAVE_EVERY * self._budget:
                self._save(learner.optimiser)
                saved = self._spent
            yield Report(stage.name, self._step, told, num_tokens, self._spent, self._budget)
            last = self._clock()  # what the caller did meanwhile is not teaching

    def _make_steps(self) -> Steps:
        name = STAGES[self._stage].name
        if name == "language":
            return Reading(self._network, self._teacher)
        if name == "seeing":
            return Seeing(self._network, self._teacher, self._seed)
        if name == "hearing":
            hearing = Hearing(self._network, self._teacher, self._spoken(), self._seed)
            if self._step == 0:
                hearing.set_normalisation()
            return hearing
        questions = [clip for clip in self._spoken() if clip.text.endswith("?")]
        spoken = SpokenQuestions(self._network, self._teacher, questions, self._seed)
        if self._step == 0:
            spoken.begin()
        return spoken

    def _spoken(self) -> Sequence[Clip]:
        if self._clips is None:
            self._clips = self._sayings()
        return self._clips

    # State

    def _begin(self) -> Nano:
        """Return the model as it was left, or a new one."""
        tokenizer_path, path = self._folder / _TOKENIZER, self._folder / _STATE
        if not path.is_file():
            rng = random.Random(f"{self._seed}/texts")  # noqa: S311
            tokenizer = make_tokenizer(texts_of_world(rng, _NUM_TEXTS), SECOND_LANGUAGE)
            tokenizer.save(str(tokenizer_path))
            return new_model(tokenizer, self._seed)
        try:
            state = torch.load(path, weights_only=True)
            tokenizer = Tokenizer.from_file(str(tokenizer_path))
        except Exception as exc:  # torch and tokenizers raise what they like for a bad file
            raise ModelError(f"cannot go on from {path}: {exc}. Remove {self._folder} to begin anew") from exc
        wanted = {"format": _FORMAT, "seed": self._seed, "budget": self._budget}
        found = {key: state.get(key) for key in wanted}
        if found != wanted:
            raise ModelError(
                f"{self._folder} was begun with {found}, not {wanted}: call it so again, or remove it to begin anew"
            )
        self._stage, self._step, self._spent = state["stage"], state["step"], state["spent"]
        self._pending = state
        nano = new_model(tokenizer, self._seed)
        nano.load_state(state["model"])
        return nano

    def _resume(self, steps: Steps, optimiser: torch.optim.Optimizer) -> None:
        """Take what the stage had besides the model, if it was interrupted."""
        state, self._pending = self._pending, None
        if state is None or state["optimiser"] is None:
            return
        optimiser.load_state_dict(state["optimiser"])
        if isinstance(steps, Seeing):
            steps.matcher.load_state_dict(state["aside"])
        if isinstance(steps, Hearing):
            steps.speller.load_state_dict(state["aside"])
            for clip, ends in zip(steps.clips, state["ends"], strict=True):
                clip.ends = tuple(ends)

    def _save(self, optimiser: torch.optim.Optimizer | None) -> None:
        """Write all that is needed to go on, at once or not at all."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "seed": self._seed,
            "budget": self._budget,
            "stage": self._stage,
            "step": self._step,
            "spent": self._spent,
            "model": self.nano.state(),
            "optimiser": optimiser.state_dict() if optimiser else None,
        }
        if isinstance(self._steps, Hearing):
            state["aside"] = self._steps.speller.state_dict()
            state["ends"] = [list(clip.ends) for clip in self._steps.clips]
        if isinstance(self._steps, Seeing):
            state["aside"] = self._steps.matcher.state_dict()
        new = self._folder / f"{_STATE}.new"
        torch.save(state, new)
        os.replace(new, self._folder / _STATE)  # noqa: PTH105 - replaces at once
