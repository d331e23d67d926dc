"""One step of learning: the parts of a batch side by side, and what the optimiser makes of their mean gradient.

Two threads with half of a batch each do 1.3 to 2.4 times as much as two threads within every operation, which are short
(measured on 2 cores). Every step has `NUM_PARTS` parts however many threads there are, so that what is learned does not
depend on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

NUM_PARTS = 2

_BETAS, _WEIGHT_DECAY, _MAX_NORM = (0.9, 0.98), 0.01, 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a step found.

    Args:
        loss: a scalar, the mean over what counts.
        told: what to tell of it, by name.
        num_tokens: how many tokens it had.
        afterwards: changes what the other parts of the step read, and is called when they are done.
    """

    loss: Tensor
    told: dict[str, float]
    num_tokens: int
    afterwards: Callable[[], None] | None = None


class Steps(Protocol):
    """What a stage learns with."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        ...

    def part(self, number: int, rng: random.Random, progress: float) -> Part:
        """Return one part of step `number`; called from several threads at once."""
        ...


class Learner:
    """Takes the steps of one stage. `workers` compute the parts."""

    def __init__(self, steps: Steps, workers: Executor) -> None:
        self._steps, self._workers = steps, workers
        self._parameters = list(steps.parameters().values())
        self.optimiser = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
        )

    def step(
        self, number: int, rngs: Sequence[random.Random], progress: float, rate: float
    ) -> tuple[dict[str, float], int]:
        """Learn from one part for each of `rngs`; return what to tell of the step, and how many tokens it had."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

        def compute(rng: random.Random) -> tuple[Part, Sequence[Tensor | None]]:
            part = self._steps.part(number, rng, progress)
            return part, torch.autograd.grad(part.loss, self._parameters, allow_unused=True)

        computed = list(self._workers.map(compute, rngs))
        for index, parameter in enumerate(self._parameters):
            found = [gradients[index] for _, gradients in computed]
            present = [gradient for gradient in found if gradient is not None]
            # A part that does not use a parameter has no say in it.
            parameter.grad = torch.stack(present).sum(0) / len(rngs) if present else None
        nn.utils.clip_grad_norm_(self._parameters, _MAX_NORM)
        self.optimiser.step()
        parts = [part for part, _ in computed]
        for part in parts:
            if part.afterwards is not None:
                part.afterwards()
        return _mean_told([part.told for part in parts]), sum(part.num_tokens for part in parts)


def _mean_told(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each name over those who tell it."""
    names = dict.fromkeys(name for told in each for name in told)
    values = {name: [told[name] for told in each if name in told] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
