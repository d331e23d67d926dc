"""`Stages` in one process: encoders and decoder in their own threads, behind the same dispatchers as with Ray.

For devices without room for Ray (`--runtime local`), and for tests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from actors.audio_encoder import AudioEncoder
from actors.cost_model import CostModel
from actors.decoder import Decoder
from actors.dispatch import DispatchParams
from actors.job_queue import JobParams
from actors.metrics import Metrics
from actors.stage_driver import StageDriver, stages_info
from actors.transport import frame_sets_of, sounds_of
from pipeline.audio.encoder_window import EncoderParams
from pipeline.decode.embeddings_to_hypotheses import DecoderParams
from pipeline.errors import StageUnavailable
from pipeline.items import DecodeRequest, Embeddings, Failure, Job, Outcome, Pictures, Snapshot
from pipeline.models.tier import tier_of
from pipeline.models.weights import ModelParams
from pipeline.stream_params import SnapshotParams
from pipeline.vision.params import VisionParams

if TYPE_CHECKING:
    from actors.vision_encoder import VisionEncoder

logger = logging.getLogger(__name__)

_Encoded = tuple[list[Embeddings | Failure | None], list[Pictures | Failure | None] | None]
"""What the encoders made of a call's sound and of its pictures."""


class _Stage(Protocol):
    def check_health(self) -> None: ...

    async def aclose(self) -> None: ...


_S = TypeVar("_S", bound=_Stage)


class LocalStages(StageDriver):
    """Encoders and decoder of this process. Made by `open`."""

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
        jobs: JobParams | None = None,
        vision: VisionParams | None = None,
    ) -> LocalStages:
        """Load the models (off the event loop) and start. `snapshots` holds the bounds of the cadence.

        There are eyes if the tier of `model` has some.

        Raises:
            WeightsHashError: if a weight file is not the pinned one.
            ModelError: if the model cannot be loaded.
        """
        # It reads a file.
        tier = await asyncio.to_thread(tier_of, model)
        makes_eyes = _make_eyes(model, vision or VisionParams()) if tier == "phi4" else None
        ears, decoder, eyes = await asyncio.gather(
            Place.open("audio encoder", lambda: AudioEncoder(model, encoder_params)),
            Place.open("decoder", lambda: Decoder(model, decoder_params)),
            _nothing() if makes_eyes is None else Place.open("vision encoder", makes_eyes),
        )
        transport = LocalTransport(ears, decoder, eyes)
        encoder_info = ears.stage.info()
        cost = CostModel(encoder_info.cost.estimate_ms, encoder_info.num_side_by_side)
        info = stages_info(encoder_info, decoder.stage.info(), None if eyes is None else eyes.stage.info().eyes)
        stages = cls(transport, info, dispatch, cost, metrics, snapshots=snapshots, jobs=jobs)
        stages.start()
        return stages


class Place(Generic[_S]):
    """Where a stage stands; one that crashed or hangs is replaced before the next call."""

    def __init__(self, name: str, make: Callable[[], _S], stage: _S) -> None:
        self.stage = stage
        self._name = name
        self._make = make
        self._replacing = asyncio.Lock()

    @classmethod
    async def open(cls, name: str, make: Callable[[], _S]) -> Place[_S]:
        """Make the first stage, off the event loop."""
        return cls(name, make, await asyncio.to_thread(make))

    async def take(self) -> _S:
        """Return the stage, which works.

        Raises:
            ModelError: if it has to be replaced and its model cannot be loaded any more.
        """
        # Snapshots and jobs may find it broken at the same time.
        async with self._replacing:
            try:
                self.stage.check_health()
            except StageUnavailable as exc:
                logger.warning("replacing the %s: %s", self._name, exc)
                await self.stage.aclose()
                self.stage = await asyncio.to_thread(self._make)
            return self.stage


class LocalTransport:
    """One encoder for sound, one decoder, and one encoder for pictures where there are eyes."""

    max_calls = 1
    """The encoder takes its next call at once, so a second one waiting would only be staler."""

    def __init__(self, ears: Place[AudioEncoder], decoder: Place[Decoder], eyes: Place[VisionEncoder] | None) -> None:
        self._ears = ears
        self._decoder = decoder
        self._eyes = eyes

    @asynccontextmanager
    async def open_lane(self) -> AsyncIterator[LocalTransport]:
        """Yield at once, with an encoder and a decoder that work."""
        await self._ears.take()
        await self._decoder.take()
        yield self

    async def start(self, snapshots: list[Snapshot], requests: list[DecodeRequest]) -> LocalCall:
        """Send `snapshots` to the encoder; `requests` follow to the decoder."""
        return LocalCall(self._decoder.stage, requests, _hear(self._ears.stage, snapshots))

    async def start_jobs(self, jobs: list[Job], requests: list[DecodeRequest]) -> LocalCall:
        """Send the frames and the sound of `jobs` to the encoders; `requests` follow to the decoder.

        Raises:
            StageUnavailable: if there are frames and no eyes.
        """
        sounds, frame_sets = sounds_of(jobs), frame_sets_of(jobs)
        if frame_sets and self._eyes is None:
            raise StageUnavailable("this tier has no vision encoder")
        ears = await self._ears.take() if sounds else None
        eyes = await self._eyes.take() if frame_sets and self._eyes is not None else None
        decoder = await self._decoder.take()

        async def encode() -> _Encoded:
            heard, seen = await asyncio.gather(
                _nothing() if ears is None else ears.encode(sounds),
                _nothing() if eyes is None else eyes.encode(frame_sets),
            )
            return (list(heard) if heard else [None] * len(jobs)), (list(seen) if seen else None)

        return LocalCall(decoder, requests, encode())

    async def aclose(self) -> None:
        """End all threads. Idempotent."""
        await self._ears.stage.aclose()
        await self._decoder.stage.aclose()
        if self._eyes is not None:
            await self._eyes.stage.aclose()


class LocalCall:
    """One call through the stages of this process."""

    def __init__(
        self, decoder: Decoder, requests: list[DecodeRequest], encoding: Coroutine[Any, Any, _Encoded]
    ) -> None:
        self._decoder = decoder
        self._requests = requests
        self._encoding = asyncio.create_task(encoding, name="local-encoding")

    async def wait_encoded(self) -> None:
        """Return when the encoders are done with this call."""
        await asyncio.wait({self._encoding})

    async def outcomes(self) -> AsyncGenerator[Outcome, None]:
        """Yield the outcomes as they come."""
        encoded, pictures = await self._encoding
        async with aclosing(self._decoder.decode(encoded, self._requests, pictures)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def aclose(self) -> None:
        """Forget the call."""
        self._encoding.cancel()
        await asyncio.wait({self._encoding})


def _make_eyes(model: ModelParams, params: VisionParams) -> Callable[[], VisionEncoder]:
    from actors.vision_encoder import VisionEncoder  # noqa: PLC0415 - only where there are eyes

    return lambda: VisionEncoder(model, params)


async def _hear(encoder: AudioEncoder, snapshots: list[Snapshot]) -> _Encoded:
    return list(await encoder.encode(snapshots)), None


async def _nothing() -> None:
    return None
