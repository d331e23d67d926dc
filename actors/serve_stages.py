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
from actors.job_queue import JobParams
from actors.metrics import Metrics
from actors.stage_driver import StageDriver, stages_info
from actors.stages import EyesInfo
from actors.transport import frame_sets_of, sounds_of
from pipeline.errors import ServiceError, StageUnavailable
from pipeline.items import DecodeRequest, Job, Outcome, Snapshot
from pipeline.stream_params import SnapshotParams

logger = logging.getLogger(__name__)

ENCODER_APP = "surtitle-audio-encoder"
ENCODER = "AudioEncoder"
DECODER_APP = "surtitle-decoder"
DECODER = "Decoder"
EYES_APP = "surtitle-vision-encoder"
EYES = "VisionEncoder"

_LANE_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 10.0
_JOB_START_TIMEOUT_S = 30.0
"""How long jobs may wait for an encoder that works on others, or is being replaced."""


class ServeStages(StageDriver):
    """Encoder and decoder deployments, and one for pictures where the tier has eyes. Made by `open`."""

    @classmethod
    async def open(
        cls,
        dispatch: DispatchParams,
        metrics: Metrics,
        *,
        num_encoder_replicas: int,
        start_timeout_s: float,
        snapshots: SnapshotParams | None = None,
        jobs: JobParams | None = None,
    ) -> ServeStages:
        """Connect to the deployments, wait for a replica of each, and start. `snapshots` bounds the cadence.

        Raises:
            ServiceError: if they do not answer within `start_timeout_s`.
        """
        encoder = get_deployment_handle(ENCODER, ENCODER_APP)
        decoder = get_deployment_handle(DECODER, DECODER_APP)
        eyes: DeploymentHandle[Any] | None = None
        eyes_info: EyesInfo | None = None
        try:
            async with asyncio.timeout(start_timeout_s):
                encoder_info, decoder_info = await asyncio.gather(_info_of(encoder), _info_of(decoder))
                # `actors.app` deploys eyes for this tier.
                if decoder_info.tier == "phi4":
                    eyes = get_deployment_handle(EYES, EYES_APP)
                    eyes_info = (await _info_of(eyes)).eyes
        except TimeoutError as exc:
            raise ServiceError(f"the stages did not start within {start_timeout_s:.0f} s") from exc
        except (RayError, RayServeException) as exc:
            raise ServiceError(f"the stages did not start: {_first_line(exc)}") from exc
        max_calls = dispatch.max_calls_per_replica * num_encoder_replicas
        transport = ServeTransport(encoder, decoder, max_calls, eyes)
        cost = CostModel(encoder_info.cost.estimate_ms, encoder_info.num_side_by_side)
        info = stages_info(encoder_info, decoder_info, eyes_info)
        stages = cls(transport, info, dispatch, cost, metrics, snapshots=snapshots, jobs=jobs)
        stages.start()
        return stages


class ServeTransport:
    """Places on encoder replicas, chosen by Serve's router among those with room."""

    def __init__(
        self,
        encoder: DeploymentHandle[Any],
        decoder: DeploymentHandle[Any],
        max_calls: int,
        eyes: DeploymentHandle[Any] | None = None,
    ) -> None:
        self.max_calls = max_calls
        self._handles = tuple(handle for handle in (encoder, decoder, eyes) if handle is not None)
        self._encode = encoder.options(method_name="encode")
        self._look = None if eyes is None else eyes.options(method_name="encode")
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

    async def start_jobs(self, jobs: list[Job], requests: list[DecodeRequest]) -> ServeCall:
        """Send the frames and the sound of `jobs` to encoders, and their answers, once they exist, on to a decoder.

        Raises:
            StageUnavailable: if there are frames and no eyes, or no replica takes them within half a minute.
        """
        sounds, frame_sets = sounds_of(jobs), frame_sets_of(jobs)
        if frame_sets and self._look is None:
            raise StageUnavailable("this tier has no vision encoder")
        sending = []
        if sounds:
            sending.append(_ref_of(self._encode.remote(sounds), "audio encoder", _JOB_START_TIMEOUT_S))
        if frame_sets and self._look is not None:
            sending.append(_ref_of(self._look.remote(frame_sets), "vision encoder", _JOB_START_TIMEOUT_S))
        refs = await asyncio.gather(*sending)
        encoded = refs[0] if sounds else [None] * len(jobs)
        pictures = refs[-1] if frame_sets else None
        return ServeCall(refs, self._decode.remote(encoded, requests, pictures))

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
        response = self._encode.dispatch(self._selection, snapshots)
        encoded = await _ref_of(response, "audio encoder", _START_TIMEOUT_S)
        return ServeCall([encoded], self._decode.remote(encoded, requests))


class ServeCall:
    """One call through encoder replicas and a decoder replica. `encoded` are references to what the encoders give."""

    def __init__(self, encoded: list[Any], outcomes: Any) -> None:
        self._encoded = encoded
        self._outcomes = outcomes
        self._has_ended = False

    async def wait_encoded(self) -> None:
        """Return when the encoders are done with this call."""
        for encoded in self._encoded:
            with contextlib.suppress(RayError, RayServeException):
                await encoded

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


async def _ref_of(response: Any, stage: str, timeout_s: float) -> Any:
    """Return the reference to the answer of an encoder, which need not exist yet.

    Raises:
        StageUnavailable: if no replica took the call.
    """
    try:
        # The reference exists as soon as the call is on its way; the router wants to be waited for until then.
        return await asyncio.wait_for(response._to_object_ref(), timeout_s)
    except (TimeoutError, RayError, RayServeException) as exc:
        raise StageUnavailable(f"the {stage} was not reached: {_first_line(exc)}") from exc


async def _info_of(handle: DeploymentHandle[Any]) -> Any:
    return await handle.options(method_name="info").remote()


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
