"""The AudioEncoder stage: snapshots in, embeddings out. A plain class; `actors/app.py` makes a Serve deployment of it.

On a CPU the partials of a call are encoded side by side, each by one thread of its own; a final has all threads to
itself. A partial's window of a few seconds in 8-bit integers takes as long with two threads as with one, at up to half
as much CPU time more (docs/performance.md); a final's is long, in float32, and somebody waits for it.

This module imports no torch, so that processes that only deploy the stage do not pay for it (3 s).
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.owned_thread import OwnedThread, encode_isolated
from actors.threads import choose_num_threads
from pipeline.audio.encoder_window import EncoderCosts, EncoderParams
from pipeline.items import Embeddings, Failure, Snapshot
from pipeline.models.weights import ModelParams

if TYPE_CHECKING:
    from pipeline.audio.encoders import SnapshotEncoder

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
        self._thread = OwnedThread("audio encoder", _MAX_CALL_S)
        self._encoder, self._info = self._thread.load(lambda: _load(model, params))
        self._workers = ThreadPoolExecutor(
            self._info.num_side_by_side, thread_name_prefix="partial-encoder", initializer=_use_one_thread
        )

    async def encode(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        """Return the embeddings (or the failure) of each snapshot, in the same order."""
        return await self._thread.run(self._run, snapshots)

    def info(self) -> EncoderInfo:
        """Return what this replica is."""
        return self._info

    def check_health(self) -> None:
        """Return when all is well.

        Raises:
            StageUnavailable: if encoding failed several times in a row, or hangs.
        """
        self._thread.check_health()

    async def aclose(self) -> None:
        """End the threads after what they are doing; those that hang are left behind. Idempotent."""
        waits = not self._thread.is_hanging
        await self._thread.aclose()
        await asyncio.to_thread(self._workers.shutdown, wait=waits)

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
        return encode_isolated(self._encoder.encode, snapshots)


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
