"""The AudioEncoder stage: snapshots in, embeddings out. A plain class; `actors/app.py` makes a Serve deployment of it.

This module imports no torch, so that processes that only deploy the stage do not pay for it (3 s).
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actors.threads import choose_num_threads
from pipeline.audio.encoder_window import EncoderCost, EncoderParams
from pipeline.errors import StageUnavailable
from pipeline.items import TRANSCRIBE, Embeddings, Failure, FailureKind, Snapshot, SnapshotKey
from pipeline.models.weights import ModelParams
from pipeline.timebase import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings

logger = logging.getLogger(__name__)

_MAX_FAILURES_IN_A_ROW = 3
_MAX_CALL_S = 120.0


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an encoder replica is, and what a snapshot costs it (measured at load)."""

    model: str
    device: str
    partial_dtype: str
    final_dtype: str
    num_threads: int
    cost: EncoderCost


class AudioEncoder:
    """Holds the encoder's weights and the one thread that computes with them."""

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
        since = self._computing_since
        if since is not None and time.monotonic() - since > _MAX_CALL_S:
            raise StageUnavailable(f"the encoder has worked on one call for more than {_MAX_CALL_S:.0f} s")

    async def aclose(self) -> None:
        """End the thread after what it is doing. Idempotent."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _encode(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        self._computing_since = time.monotonic()
        try:
            return self._encode_isolated(snapshots)
        finally:
            self._computing_since = None

    def _encode_isolated(self, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        """Encode together; when that raises, one by one, so that a bad snapshot fails alone."""
        try:
            embeddings = list(self._encoder.encode(snapshots))
        except Exception as exc:
            if len(snapshots) > 1:
                return [result for snapshot in snapshots for result in self._encode_isolated([snapshot])]
            logger.exception("a snapshot could not be encoded")
            self._num_failures_in_a_row += 1
            message = f"the audio encoder failed: {type(exc).__name__}"
            return [Failure(snapshot.key, None, FailureKind.FAILED, message) for snapshot in snapshots]
        self._num_failures_in_a_row = 0
        return embeddings


def _load(model: ModelParams, params: EncoderParams) -> tuple[UtterancesToEmbeddings, EncoderInfo]:
    # Torch is imported here, in the thread that will use it: see the module's docstring.
    import torch  # noqa: PLC0415

    from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings  # noqa: PLC0415

    num_threads = choose_num_threads(model.encoder_threads, "encoder")
    torch.set_num_threads(num_threads)
    encoder = UtterancesToEmbeddings(model, params, clock=time.perf_counter)
    _warm_up(encoder)
    info = EncoderInfo(
        model=model.name,
        device=encoder.device,
        partial_dtype=encoder.partial_dtype,
        final_dtype=encoder.final_dtype,
        num_threads=num_threads,
        cost=encoder.cost,
    )
    return encoder, info


def _warm_up(encoder: UtterancesToEmbeddings) -> None:
    """Run one second of silence through `encoder`: the first call allocates and chooses kernels."""
    snapshot = Snapshot(
        key=SnapshotKey("warm-up", 1, 1),
        channel=0,
        is_final=False,
        start_sample=0,
        samples=np.zeros(SAMPLE_RATE_HZ, np.int16),
        language=None,
        languages=(),
        draft=(),
        tasks=(TRANSCRIBE,),
    )
    encoder.encode([snapshot])
