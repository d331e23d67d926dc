"""`Stages` over Ray Serve deployments (docs/decisions/0003-how-calls-reach-replicas.md).

A replica is chosen first (`choose_replica` reserves a place on it) and only then is it decided what goes along, so the
freshest snapshots travel. The encoder's answer is passed to the decoder as a reference before it exists: the arrays go
from replica to replica in shared memory. The decoder answers as a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from ray.exceptions import RayError
from ray.serve import get_deployment_handle
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.cost_model import CostModel
from actors.dispatch import DispatchParams
from actors.metrics import Metrics
from actors.stage_driver import StageDriver, stages_info
from pipeline.errors import ServiceError, StageUnavailable
from pipeline.items import DecodeRequest, Outcome, Snapshot
from pipeline.stream_params import SnapshotParams

logger = logging.getLogger(__name__)

ENCODER_APP = "surtitle-audio-encoder"
ENCODER = "AudioEncoder"
DECODER_APP = "surtitle-decoder"
DECODER = "Decoder"

_LANE_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 10.0


class ServeStages(StageDriver):
    """Encoder and decoder deployments. Made by `open`."""

    @classmethod
    async def open(
        cls,
        dispatch: DispatchParams,
        metrics: Metrics,
        *,
        num_encoder_replicas: int,
        start_timeout_s: float,
        snapshots: SnapshotParams | None = None,
    ) -> ServeStages:
        """Connect to the deployments, wait for a replica of each, and start. `snapshots` bounds the cadence.

        Raises:
            ServiceError: if they do not answer within `start_timeout_s`.
        """
        encoder = get_deployment_handle(ENCODER, ENCODER_APP)
        decoder = get_deployment_handle(DECODER, DECODER_APP)
        try:
            async with asyncio.timeout(start_timeout_s):
                encoder_info, decoder_info = await asyncio.gather(_info_of(encoder), _info_of(decoder))
        except TimeoutError as exc:
            raise ServiceError(f"the stages did not start within {start_timeout_s:.0f} s") from exc
        except (RayError, RayServeException) as exc:
            raise ServiceError(f"the stages did not start: {_first_line(exc)}") from exc
        max_calls = dispatch.max_calls_per_replica * num_encoder_replicas
        transport = ServeTransport(encoder, decoder, max_calls)
        cost = CostModel(encoder_info.cost.estimate_ms, encoder_info.num_side_by_side)
        stages = cls(transport, stages_info(encoder_info, decoder_info), dispatch, cost, metrics, snapshots=snapshots)
        stages.start()
        return stages


class ServeTransport:
    """Places on encoder replicas, chosen by Serve's router among those with room."""

    def __init__(self, encoder: DeploymentHandle[Any], decoder: DeploymentHandle[Any], max_calls: int) -> None:
        self.max_calls = max_calls
        self._handles: tuple[DeploymentHandle[Any], ...] = (encoder, decoder)
        self._encode = encoder.options(method_name="encode")
        self._decode = decoder.options(method_name="decode", stream=True)

    @asynccontextmanager
    async def open_lane(self) -> AsyncIterator[ServeLane]:
        """Reserve a place on an encoder replica while the context is open.

        Raises:
            StageUnavailable: if no replica has room within two seconds.
        """
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_LANE_TIMEOUT_S):
                    selection = await stack.enter_async_context(self._encode.choose_replica())
            except TimeoutError as exc:
                raise StageUnavailable("no audio encoder has room") from exc
            except (RayError, RayServeException) as exc:
                raise StageUnavailable(f"no audio encoder answers: {_first_line(exc)}") from exc
            yield ServeLane(self._encode, self._decode, selection)

    async def aclose(self) -> None:
        """End the routers. Idempotent."""
        for handle in self._handles:
            router: Any = handle
            await router.shutdown_async()
        self._handles = ()


class ServeLane:
    """A reserved place on one encoder replica."""

    def __init__(self, encode: DeploymentHandle[Any], decode: DeploymentHandle[Any], selection: Any) -> None:
        self._encode = encode
        self._decode = decode
        self._selection = selection

    async def start(self, snapshots: list[Snapshot], requests: list[DecodeRequest]) -> ServeCall:
        """Send `snapshots` to the chosen replica, and its answer, once it exists, on to a decoder.

        Raises:
            StageUnavailable: if the replica is gone.
        """
        response: Any = self._encode.dispatch(self._selection, snapshots)
        try:
            # The reference exists as soon as the call is on its way; the router wants to be waited for until then.
            encoded = await asyncio.wait_for(response._to_object_ref(), _START_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException) as exc:
            raise StageUnavailable(f"the audio encoder was not reached: {_first_line(exc)}") from exc
        outcomes = self._decode.remote(encoded, requests)
        return ServeCall(encoded, outcomes)


class ServeCall:
    """One call through an encoder and a decoder replica."""

    def __init__(self, encoded: Any, outcomes: Any) -> None:
        self._encoded = encoded
        self._outcomes = outcomes
        self._has_ended = False

    async def wait_encoded(self) -> None:
        """Return when the encoder is done with this call."""
        with contextlib.suppress(RayError, RayServeException):
            await self._encoded

    async def outcomes(self) -> AsyncGenerator[Outcome, None]:
        """Yield the outcomes as they come.

        Raises:
            StageUnavailable: if a replica died under the call.
        """
        try:
            async for outcome in self._outcomes:
                yield outcome
        except (RayError, RayServeException) as exc:
            raise StageUnavailable(f"{type(exc).__name__}: {_first_line(exc)}") from exc
        self._has_ended = True

    async def aclose(self) -> None:
        """Cancel the call unless it has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._outcomes.cancel()


async def _info_of(handle: DeploymentHandle[Any]) -> Any:
    return await handle.options(method_name="info").remote()


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
