"""The AudioEncoder stage: snapshots in, embeddings out. A plain class; `actors/app.py` makes a Serve deployment of it.

On a CPU the partials of a call are encoded side by side, each by one thread of its own; a final has all threads to
itself. A partial's window of a few seconds in 8-bit integers takes as long with two threads as with one, at up to half
as much CPU time more (docs/performance.md); a final's is long, in float32, and somebody waits for it.

This module imports no torch, so that processes that only deploy the stage do not pay for it (3 s).
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.threads import choose_num_threads
from pipeline.audio.encoder_window import EncoderCosts, EncoderParams
from pipeline.errors import StageUnavailable
from pipeline.items import Embeddings, Failure, FailureKind, Snapshot
from pipeline.models.weights import ModelParams

if TYPE_CHECKING:
    from pipeline.audio.encoders import SnapshotEncoder

logger = logging.getLogger(__name__)

_MAX_FAILURES_IN_A_ROW = 3
_MAX_CALL_S = 120.0


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an encoder replica is, and what a snapshot costs it (measured at load)."""

    device: str
    partial_dtype: str
    final_dtype: str
    num_side_by_side: int  # partials of a call that are encoded at once
    cost: EncoderCosts


class AudioEncoder:
    """Holds the encoder's weights and the threads that compute with them."""

    def __init__(self, model: ModelParams, params: EncoderParams) -> None:
        """Load the weights (this blocks for seconds).

        Raises:
            WeightsHashError: if a weight file is not the pinned one.
            ModelError: if the model cannot be loaded.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audio-encoder")
        self._num_failures_in_a_row = 0
        self._computing_since: float | None = None
        try:
            self._encoder, self._info = self._thread.submit(_load, model, params).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._workers = ThreadPoolExecutor(
            self._info.num_side_by_side, thread_name_prefix="partial-encoder", initializer=_use_one_thread
        )

    async def encode(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        """Return the embeddings (or the failure) of each snapshot, in the same order."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, snapshots)

    def info(self) -> EncoderInfo:
        """Return what this replica is."""
        return self._info

    def check_health(self) -> None:
        """Return when all is well.

        Raises:
            StageUnavailable: if encoding failed several times in a row, or hangs.
        """
        if self._num_failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            raise StageUnavailable(f"the encoder failed {self._num_failures_in_a_row} times in a row")
        if self._is_hanging():
            raise StageUnavailable(f"the encoder has worked on one call for more than {_MAX_CALL_S:.0f} s")

    async def aclose(self) -> None:
        """End the threads after what they are doing; those that hang are left behind. Idempotent."""
        waits = not self._is_hanging()
        await asyncio.to_thread(self._thread.shutdown, wait=waits, cancel_futures=True)
        await asyncio.to_thread(self._workers.shutdown, wait=waits)

    def _is_hanging(self) -> bool:
        since = self._computing_since
        return since is not None and time.monotonic() - since > _MAX_CALL_S

    def _encode(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        self._computing_since = time.monotonic()
        try:
            outcomes = self._run(snapshots)
        finally:
            self._computing_since = None
        for outcome in outcomes:
            self._num_failures_in_a_row = self._num_failures_in_a_row + 1 if isinstance(outcome, Exception) else 0
        return [
            Failure(snapshot.key, None, FailureKind.FAILED, f"the audio encoder failed: {type(outcome).__name__}")
            if isinstance(outcome, Exception)
            else outcome
            for snapshot, outcome in zip(snapshots, outcomes, strict=True)
        ]

    def _run(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure | Exception]:
        if self._info.device != "cpu":
            return self._encode_isolated(snapshots)
        # Finals first: they have all threads, and none beside them.
        finals = iter(self._encode_isolated([snapshot for snapshot in snapshots if snapshot.is_final]))
        partials = self._workers.map(
            self._encode_isolated, [[snapshot] for snapshot in snapshots if not snapshot.is_final]
        )
        return [next(finals) if snapshot.is_final else next(partials)[0] for snapshot in snapshots]

    def _encode_isolated(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure | Exception]:
        """Encode together; when that raises, one by one, so that a bad snapshot fails alone. Threads run it at once."""
        try:
            return list(self._encoder.encode(snapshots))
        except Exception as exc:
            if len(snapshots) > 1:
                return [result for snapshot in snapshots for result in self._encode_isolated([snapshot])]
            logger.exception("a snapshot could not be encoded")
            return [exc]


def _load(model: ModelParams, params: EncoderParams) -> tuple[SnapshotEncoder, EncoderInfo]:
    # Torch is imported here, in the thread that will use it: see the module's docstring.
    import torch  # noqa: PLC0415

    from pipeline.audio.encoders import load_encoder  # noqa: PLC0415

    num_threads = choose_num_threads(model.encoder_threads, "encoder")
    # Each kind is measured as it runs: partials with one thread each, finals with all. The first calls, which allocate
    # and choose kernels, are made by it too.
    torch.set_num_threads(1)
    encoder = load_encoder(model, params, time.perf_counter)
    partial_cost = encoder.measure_cost(time.perf_counter, is_final=False)
    torch.set_num_threads(num_threads)
    final_cost = encoder.measure_cost(time.perf_counter, is_final=True)
    info = EncoderInfo(
        device=encoder.device,
        partial_dtype=encoder.partial_dtype,
        final_dtype=encoder.final_dtype,
        num_side_by_side=num_threads if encoder.device == "cpu" else 1,
        cost=EncoderCosts(partial=partial_cost, final=final_cost),
    )
    return encoder, info


def _use_one_thread() -> None:
    import torch  # noqa: PLC0415 - see the module's docstring

    torch.set_num_threads(1)
