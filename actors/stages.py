"""The seam between a session and the models: the `Stages` protocol.

Two implementations: `actors/serve_stages.py` (Ray Serve deployments) and `actors/local_stages.py` (in-process threads).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from pipeline.items import Job, Outcome, RequestKey, Snapshot, TaskKind


@dataclass(frozen=True, slots=True)
class StagesInfo:
    """What answers: shown to people, written into records (`tier`) and used to check what a stream asks for."""

    tier: str
    model: str
    arithmetic: str  # a phrase: what partials and finals are computed in
    languages: tuple[str, ...]
    translates_to: tuple[str, ...]
    tasks: frozenset[TaskKind] = frozenset({TaskKind.TRANSCRIBE, TaskKind.TRANSLATE})
    eyes: EyesInfo | None = None


@dataclass(frozen=True, slots=True)
class EyesInfo:
    """How pictures are taken in: what a source brings its frames to, so that no stage has to resize them."""

    crop_size: int
    patch_size: int
    max_crops: int


class Stages(Protocol):
    """Everything behind the session: encode, decode, and the batching in between."""

    @property
    def info(self) -> StagesInfo:
        """What answers."""
        ...

    @property
    def cadence_ms(self) -> int:
        """New sound between two partials of an utterance that the stages can bear now, in milliseconds."""
        ...

    def submit(self, snapshot: Snapshot) -> AsyncGenerator[Outcome, None]:
        """Yield one outcome for each task of `snapshot`, each as soon as it is ready.

        A `Failure` with `task=None` stands for all tasks still open and ends the iteration. Never raises for what
        happens to the snapshot; a consumer that goes away closes the generator, which cancels the work where that is
        possible.
        """
        ...

    async def submit_job(self, job: Job) -> Outcome:
        """Return what came of `job`. Never raises for what happens to it; cancelling gives it up.

        A newer description of the same stream overtakes one that still waits, which fails as SUPERSEDED.
        """
        ...

    def withdraw(self, key: RequestKey) -> None:
        """Nobody needs the outcomes of `key` any more: what is open of it fails as SUPERSEDED, sent or not."""
        ...

    async def aclose(self) -> None:
        """Finish or fail what is in flight, release threads and handles. Idempotent."""
        ...
