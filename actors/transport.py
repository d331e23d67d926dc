"""How calls reach the models: what the stage driver wants of `actors/local_stages.py` and `actors/serve_stages.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from pipeline.items import DecodeRequest, Outcome, Snapshot


class StageCall(Protocol):
    """One call: some snapshots on their way through encoder and decoder."""

    async def wait_encoded(self) -> None:
        """Return when the encoder is done with this call. Never raises: `outcomes` tells what went wrong."""
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


class Transport(Protocol):
    """How calls reach the models."""

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
