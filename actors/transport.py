"""How calls reach the models: what the stage driver wants of `actors/local_stages.py` and `actors/serve_stages.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from pipeline.items import DecodeRequest, FrameSet, Job, Outcome, Snapshot


class StageCall(Protocol):
    """One call: some snapshots, or jobs, on their way through the encoders and the decoder."""

    async def wait_encoded(self) -> None:
        """Return when the encoders are done with this call. Never raises: `outcomes` tells what went wrong."""
        ...

    def outcomes(self) -> AsyncGenerator[Outcome, None]:
        """Yield the outcomes as they come.

        Raises:
            StageUnavailable: if a stage died under the call or fell silent.
        """
        ...

    async def aclose(self) -> None:
        """Give the call up: nobody waits for its outcomes any more."""
        ...


class Lane(Protocol):
    """A place that is free for one call now."""

    async def start(self, snapshots: list[Snapshot], requests: list[DecodeRequest]) -> StageCall:
        """Send `snapshots` to the encoder and, with what that makes of them, `requests` to the decoder.

        Raises:
            StageUnavailable: if they did not reach the stage.
        """
        ...


class JobTransport(Protocol):
    """How jobs reach the models."""

    async def start_jobs(self, jobs: list[Job], requests: list[DecodeRequest]) -> StageCall:
        """Send the frames and the sound of `jobs` to the encoders and, with what these make of them, `requests` on.

        All of `jobs` have the same needs: with one all have frames, with one all have sound.

        Raises:
            StageUnavailable: if they did not reach a stage.
        """
        ...


class Transport(JobTransport, Protocol):
    """How snapshots and jobs reach the models."""

    @property
    def max_calls(self) -> int:
        """Calls that may be with the encoders at once."""
        ...

    def open_lane(self) -> AbstractAsyncContextManager[Lane]:
        """Wait until an encoder has room for a call, and hold the place while the context is open.

        Raises:
            StageUnavailable: if no encoder has room for a while.
        """
        ...

    async def aclose(self) -> None:
        """Release threads and handles. Idempotent."""
        ...


def sounds_of(jobs: list[Job]) -> list[Snapshot]:
    """Return the sound of `jobs`, which have the same needs, as the audio encoder takes it; empty: they have none."""
    return [snapshot for job in jobs if (snapshot := job.snapshot) is not None]


def frame_sets_of(jobs: list[Job]) -> list[FrameSet]:
    """Return the frames of `jobs`, which have the same needs, for the vision encoder; empty: they have none."""
    return [FrameSet(job.key, job.frames) for job in jobs if job.frames]
