"""Stages over Ray Serve, on a real cluster: the same answers as in one process, also when replicas are killed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from ray.serve.handle import DeploymentResponseGenerator

from actors.local_stages import LocalStages
from actors.metrics import Metrics
from actors.serve_stages import ServeCall, ServeStages
from actors.stage_driver import StageDriver
from pipeline.items import TRANSCRIBE, Failure, FailureKind, Hypothesis, Outcome, Snapshot, SnapshotKey, Task, TaskKind
from tests.media import read_pcm
from tests.ray_cluster import RayCluster

# Routers of Serve live on the loop on which they were made.
pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGLISH = Task(TaskKind.TRANSLATE, "en")


@asynccontextmanager
async def open_stages(cluster: RayCluster, metrics: Metrics) -> AsyncIterator[ServeStages]:
    stages = await ServeStages.open(cluster.settings.dispatch, metrics, num_encoder_replicas=1, start_timeout_s=60)
    try:
        yield stages
    finally:
        await stages.aclose()


def finals_of(speech: Path, num: int) -> list[Snapshot]:
    """`num` finals of 2 to 4 s out of real speech."""
    samples = read_pcm(speech)
    return [
        snapshot(number, samples[number * 32_000 : number * 32_000 + 32_000 + 16_000 * (number % 3)])
        for number in range(1, num + 1)
    ]


def snapshot(utterance: int, samples: np.ndarray, *, revision: int = 1, is_final: bool = True) -> Snapshot:
    return Snapshot(
        key=SnapshotKey("stream", utterance, revision),
        channel=0,
        is_final=is_final,
        start_sample=0,
        samples=np.ascontiguousarray(samples),
        language=None,
        languages=(),
        draft=(),
        tasks=(TRANSCRIBE, ENGLISH) if utterance == 1 and is_final else (TRANSCRIBE,),
    )


async def outcomes_of(stages: StageDriver, item: Snapshot, first: asyncio.Event | None = None) -> list[Outcome]:
    outcomes = []
    async for outcome in stages.submit(item):
        outcomes.append(outcome)
        if first is not None:
            first.set()
    return outcomes


def without_effort(outcomes: list[Outcome]) -> list[Outcome]:
    """`outcomes` without how many passes they took, which depends on company."""
    return [
        dataclasses.replace(outcome, num_passes=0) if isinstance(outcome, Hypothesis) else outcome
        for outcome in outcomes
    ]


async def until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_met():  # noqa: ASYNC110 - what happens in other processes has no event here
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def finals(speech: Path) -> list[Snapshot]:
    return finals_of(speech, 4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(ray_cluster: RayCluster, finals: list[Snapshot]) -> list[list[Outcome]]:
    """What the same models answer in this process."""
    settings = ray_cluster.settings
    stages = await LocalStages.open(settings.model, settings.encoder, settings.decoder, settings.dispatch, Metrics())
    outcomes = await asyncio.gather(*(outcomes_of(stages, item) for item in finals))
    await stages.aclose()
    return [without_effort(each) for each in outcomes]


async def test_replicas_answer_as_one_process_does(
    ray_cluster: RayCluster, finals: list[Snapshot], expected: list[list[Outcome]]
) -> None:
    async with open_stages(ray_cluster, Metrics()) as stages:
        outcomes = await asyncio.gather(*(outcomes_of(stages, item) for item in finals))
    assert [without_effort(each) for each in outcomes] == expected
    assert any(isinstance(outcome, Hypothesis) and outcome.text for each in outcomes for outcome in each)


@pytest.mark.parametrize("deployment", ["Decoder", "AudioEncoder"])
async def test_finals_are_the_same_when_a_replica_is_killed_under_them(
    ray_cluster: RayCluster, finals: list[Snapshot], expected: list[list[Outcome]], deployment: str
) -> None:
    metrics = Metrics()
    async with open_stages(ray_cluster, metrics) as stages:
        partial = snapshot(9, finals[0].samples, is_final=False)
        first_outcome = asyncio.Event()
        tasks = [asyncio.create_task(outcomes_of(stages, item, first_outcome)) for item in (*finals, partial)]
        # The decoder has accepted its calls when its first outcome comes, the encoder when one is in flight.
        await until(lambda: first_outcome.is_set() if deployment == "Decoder" else stages.num_in_flight > 0)
        ray_cluster.kill(deployment)
        outcomes = await asyncio.gather(*tasks)
    assert [without_effort(each) for each in outcomes[:-1]] == expected
    if deployment == "AudioEncoder":
        # A decoder may have answered all that it had accepted before it died; what it had not, Serve sends elsewhere.
        assert metrics.registry.get_sample_value("surtitle_retries_total")
    [answer] = outcomes[-1]
    assert isinstance(answer, Hypothesis) or answer.kind in {FailureKind.UNAVAILABLE, FailureKind.SUPERSEDED}


async def test_a_bad_snapshot_fails_alone(ray_cluster: RayCluster, finals: list[Snapshot]) -> None:
    bad = snapshot(7, np.zeros(0, np.int16))
    async with open_stages(ray_cluster, Metrics()) as stages:
        [failure], served = await asyncio.gather(outcomes_of(stages, bad), outcomes_of(stages, finals[0]))
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.FAILED
    assert [outcome.task for outcome in served] == [TRANSCRIBE, ENGLISH]


async def test_a_call_that_is_answered_is_not_cancelled(
    ray_cluster: RayCluster, finals: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_cancelled = 0
    num_cancelled_when_closed: asyncio.Queue[int] = asyncio.Queue()
    cancel, aclose = DeploymentResponseGenerator.cancel, ServeCall.aclose

    def counting_cancel(response: DeploymentResponseGenerator) -> None:
        nonlocal num_cancelled
        num_cancelled += 1
        cancel(response)

    async def telling_aclose(call: ServeCall) -> None:
        await aclose(call)
        num_cancelled_when_closed.put_nowait(num_cancelled)

    monkeypatch.setattr(DeploymentResponseGenerator, "cancel", counting_cancel)
    monkeypatch.setattr(ServeCall, "aclose", telling_aclose)
    async with open_stages(ray_cluster, Metrics()) as stages, asyncio.timeout(60):
        for item in finals:
            await outcomes_of(stages, item)
            assert await num_cancelled_when_closed.get() == 0


async def test_a_consumer_that_goes_away_leaves_the_others_served(
    ray_cluster: RayCluster, finals: list[Snapshot]
) -> None:
    async with open_stages(ray_cluster, Metrics()) as stages:
        async with aclosing(stages.submit(finals[0])) as outcomes:
            await anext(outcomes)
        [served] = await outcomes_of(stages, finals[1])
        assert isinstance(served, Hypothesis)
        await until(lambda: stages.num_in_flight == 0)
