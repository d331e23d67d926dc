"""`Stages` in one process: encoder and decoder in their own threads, behind the same dispatcher as with Ray.

For devices without room for Ray (`--runtime local`), and for tests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from actors.audio_encoder import AudioEncoder
from actors.cost_model import CostModel
from actors.decoder import Decoder
from actors.dispatch import DispatchParams
from actors.metrics import Metrics
from actors.stage_driver import StageDriver, stages_info
from pipeline.audio.encoder_window import EncoderParams
from pipeline.decode.embeddings_to_hypotheses import DecoderParams
from pipeline.errors import StageUnavailable
from pipeline.items import DecodeRequest, Outcome, Snapshot
from pipeline.models.weights import ModelParams
from pipeline.stream_params import SnapshotParams

logger = logging.getLogger(__name__)


class LocalStages(StageDriver):
    """Encoder and decoder of this process. Made by `open`."""

    @classmethod
    async def open(
        cls,
        model: ModelParams,
        encoder_params: EncoderParams,
        decoder_params: DecoderParams,
        dispatch: DispatchParams,
        metrics: Metrics,
        *,
        snapshots: SnapshotParams | None = None,
    ) -> LocalStages:
        """Load both models (off the event loop) and start. `snapshots` holds the bounds of the cadence.

        Raises:
            WeightsHashError: if a weight file is not the pinned one.
            ModelError: if the model cannot be loaded.
        """
        encoder, decoder = await asyncio.gather(
            asyncio.to_thread(AudioEncoder, model, encoder_params),
            asyncio.to_thread(Decoder, model, decoder_params),
        )
        transport = LocalTransport(encoder, decoder, model, encoder_params, decoder_params)
        cost = CostModel(encoder.info().cost.estimate_ms, encoder.info().num_side_by_side)
        stages = cls(
            transport, stages_info(encoder.info(), decoder.info()), dispatch, cost, metrics, snapshots=snapshots
        )
        stages.start()
        return stages


class LocalTransport:
    """One encoder, one decoder; one that crashed or hangs is replaced before the next call."""

    max_calls = 1
    """The encoder takes its next call at once, so a second one waiting would only be staler."""

    def __init__(
        self,
        encoder: AudioEncoder,
        decoder: Decoder,
        model: ModelParams,
        encoder_params: EncoderParams,
        decoder_params: DecoderParams,
    ) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._model = model
        self._encoder_params = encoder_params
        self._decoder_params = decoder_params

    @asynccontextmanager
    async def open_lane(self) -> AsyncIterator[LocalTransport]:
        """Yield at once, with an encoder and a decoder that work."""
        try:
            self._encoder.check_health()
        except StageUnavailable as exc:
            logger.warning("replacing the audio encoder: %s", exc)
            await self._encoder.aclose()
            self._encoder = await asyncio.to_thread(AudioEncoder, self._model, self._encoder_params)
        try:
            self._decoder.check_health()
        except StageUnavailable as exc:
            logger.warning("replacing the decoder: %s", exc)
            await self._decoder.aclose()
            self._decoder = await asyncio.to_thread(Decoder, self._model, self._decoder_params)
        yield self

    async def start(self, snapshots: list[Snapshot], requests: list[DecodeRequest]) -> LocalCall:
        """Send `snapshots` to the encoder; `requests` follow to the decoder."""
        return LocalCall(self._encoder, self._decoder, snapshots, requests)

    async def aclose(self) -> None:
        """End both threads. Idempotent."""
        await self._encoder.aclose()
        await self._decoder.aclose()


class LocalCall:
    """One call through the two stages of this process."""

    def __init__(
        self, encoder: AudioEncoder, decoder: Decoder, snapshots: list[Snapshot], requests: list[DecodeRequest]
    ) -> None:
        self._decoder = decoder
        self._requests = requests
        self._encoding = asyncio.create_task(encoder.encode(snapshots), name="local-encoding")

    async def wait_encoded(self) -> None:
        """Return when the encoder is done with this call."""
        await asyncio.wait({self._encoding})

    async def outcomes(self) -> AsyncGenerator[Outcome, None]:
        """Yield the outcomes as they come."""
        encoded = await self._encoding
        async with aclosing(self._decoder.decode(encoded, self._requests)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def aclose(self) -> None:
        """Forget the call."""
        self._encoding.cancel()
        await asyncio.wait({self._encoding})
