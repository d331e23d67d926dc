"""In-process stages: real encoder and decoder threads around a tiny Whisper of random weights."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.audio_encoder import AudioEncoder
from actors.decoder import Decoder
from actors.dispatch import DispatchParams
from actors.local_stages import LocalCall, LocalStages, LocalTransport
from actors.metrics import Metrics
from actors.stage_driver import stages_info
from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams
from pipeline.decode.scheduler import SchedulerParams
from pipeline.errors import ModelError, StageUnavailable
from pipeline.items import (
    TRANSCRIBE,
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Hypothesis,
    Outcome,
    Snapshot,
    SnapshotKey,
    Task,
    TaskKind,
)
from pipeline.local import LocalModels, serve_snapshots
from pipeline.models.weights import ModelParams
from pipeline.stream_params import SnapshotParams
from tests.tiny_whisper import save_tiny

ENGLISH = Task(TaskKind.TRANSLATE, "en")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    name = str(save_tiny(tmp_path_factory.mktemp("tiny")))
    return ModelParams(name=name, partial_dtype="float32", encoder_threads=1, decoder_threads=1)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@asynccontextmanager
async def open_stages(
    model: ModelParams, metrics: Metrics, snapshots: SnapshotParams | None = None, **dispatch: float
) -> AsyncIterator[LocalStages]:
    params = DispatchParams.model_validate(dispatch)
    stages = await LocalStages.open(model, EncoderParams(), DecoderParams(), params, metrics, snapshots=snapshots)
    try:
        yield stages
    finally:
        await stages.aclose()


def snapshot(utterance: int, revision: int = 1, *, is_final: bool = True, num_samples: int = 16_000) -> Snapshot:
    noise = np.random.default_rng(utterance).integers(-8_000, 8_000, num_samples).astype(np.int16)
    return Snapshot(
        key=SnapshotKey("stream", utterance, revision),
        channel=0,
        is_final=is_final,
        start_sample=0,
        samples=noise,
        language="de",
        languages=(),
        draft=(),
        tasks=(TRANSCRIBE, ENGLISH) if is_final else (TRANSCRIBE,),
    )


async def outcomes_of(stages: LocalStages, item: Snapshot) -> list[Outcome]:
    return [outcome async for outcome in stages.submit(item)]


async def test_snapshots_submitted_together_get_what_each_gets_alone(model: ModelParams, metrics: Metrics) -> None:
    snapshots = [snapshot(number, num_samples=9_000 * number, is_final=number % 2 == 0) for number in range(1, 7)]
    async with open_stages(model, metrics) as stages:
        together = await asyncio.gather(*(outcomes_of(stages, item) for item in snapshots))
    torch.set_num_threads(1)
    models = LocalModels(UtterancesToEmbeddings(model, EncoderParams()), DecodeEngine(model, DecoderParams()))
    for item, outcomes in zip(snapshots, together, strict=True):
        alone = list(serve_snapshots([item], models))
        # How often the engine was stepped for it depends on company; nothing else does.
        assert [dataclasses.replace(outcome, num_passes=0) for outcome in outcomes] == [
            dataclasses.replace(outcome, num_passes=0) for outcome in alone
        ]


async def test_stages_tell_what_each_of_them_computes_in(model: ModelParams, metrics: Metrics) -> None:
    async with open_stages(model, metrics) as stages:
        assert stages.info.arithmetic == "partials in float32, finals in float32"
        assert stages.info.model == model.name
    encoder = await asyncio.to_thread(
        AudioEncoder, model.model_copy(update={"partial_dtype": "bfloat16"}), EncoderParams()
    )
    decoder = await asyncio.to_thread(Decoder, model, DecoderParams())
    assert stages_info(encoder.info(), decoder.info()).arithmetic == (
        "encoder: partials in bfloat16, finals in float32; decoder: partials in float32, finals in float32"
    )
    await encoder.aclose()
    await decoder.aclose()


async def test_a_snapshot_that_cannot_be_encoded_fails_alone(model: ModelParams, metrics: Metrics) -> None:
    bad = dataclasses.replace(snapshot(1), samples=np.zeros(0, np.int16))
    async with open_stages(model, metrics) as stages:
        failed, served = await asyncio.gather(outcomes_of(stages, bad), outcomes_of(stages, snapshot(2)))
    assert [(type(outcome), outcome.task) for outcome in failed] == [(Failure, None)]
    assert [outcome.task for outcome in served] == [TRANSCRIBE, ENGLISH]
    assert all(isinstance(outcome, Hypothesis) for outcome in served)


async def test_a_partial_that_still_waits_is_superseded_by_the_next(model: ModelParams, metrics: Metrics) -> None:
    partials = [snapshot(1, revision, is_final=False, num_samples=40_000) for revision in range(1, 6)]
    async with open_stages(model, metrics) as stages:
        results = await asyncio.gather(*(outcomes_of(stages, item) for item in partials))
    [last] = results[-1]
    assert isinstance(last, Hypothesis)
    overtaken = [outcome for [outcome] in results[:-1] if isinstance(outcome, Failure)]
    assert overtaken
    assert {failure.kind for failure in overtaken} == {FailureKind.SUPERSEDED}
    assert metrics.registry.get_sample_value("surtitle_superseded_total") == len(overtaken)


async def test_the_cadence_stretches_while_the_stages_have_no_rest_and_is_a_metric(
    model: ModelParams, metrics: Metrics
) -> None:
    async with open_stages(model, metrics) as stages:
        assert stages.cadence_ms == SnapshotParams().min_cadence_ms

        async def talk(utterance: int) -> None:
            for revision in itertools.count(1):
                if stages.cadence_ms > 640:
                    return
                await outcomes_of(stages, snapshot(utterance, revision, is_final=False, num_samples=240_000))

        async with asyncio.timeout(60):
            await asyncio.gather(*(talk(utterance) for utterance in range(1, 9)))
        target_ms = metrics.registry.get_sample_value("surtitle_partial_cadence_target_ms")
        shares = [
            metrics.registry.get_sample_value("surtitle_stage_utilisation", {"stage": stage})
            for stage in ("encoder", "decoder")
        ]
    assert target_ms == stages.cadence_ms
    assert all(share is not None and 0 < share <= 1 for share in shares)


@pytest.mark.parametrize(("late_ms", "expected"), [(0, Hypothesis), (2 * 5_000 + 1, Failure)])
async def test_a_partial_expires_twice_the_longest_cadence_after_it_came_to_the_decoder(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, late_ms: int, expected: type[Outcome]
) -> None:
    step = DecodeEngine.step
    monkeypatch.setattr(DecodeEngine, "step", lambda engine, now_ms: step(engine, now_ms + late_ms))
    async with open_stages(model, metrics, SnapshotParams(max_cadence_ms=5_000)) as stages:
        final, partial = await asyncio.gather(
            outcomes_of(stages, snapshot(1)), outcomes_of(stages, snapshot(2, is_final=False))
        )
    assert [type(outcome) for outcome in final] == [Hypothesis, Hypothesis]
    assert [type(outcome) for outcome in partial] == [expected]
    if isinstance(partial[0], Failure):
        assert partial[0].kind is FailureKind.EXPIRED


async def test_a_consumer_that_goes_away_leaves_nothing_behind(model: ModelParams, metrics: Metrics) -> None:
    async with open_stages(model, metrics) as stages:
        async with aclosing(stages.submit(snapshot(1))) as outcomes:
            assert (await anext(outcomes)).task == TRANSCRIBE
        waiting = asyncio.create_task(outcomes_of(stages, snapshot(2)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert [outcome.task for outcome in await outcomes_of(stages, snapshot(1))] == [TRANSCRIBE, ENGLISH]


async def test_what_is_withdrawn_ends_as_superseded_waiting_or_sent_and_costs_others_nothing(
    model: ModelParams, metrics: Metrics
) -> None:
    async with open_stages(model, metrics, max_work_ms=1) as stages:
        async with aclosing(stages.submit(snapshot(5))) as kept:
            tasks = [asyncio.create_task(outcomes_of(stages, snapshot(number))) for number in range(1, 5)]
            # When the first is answered, the second is with the encoder and the others wait.
            assert (await anext(kept)).task == TRANSCRIBE
            for number in range(1, 5):
                stages.withdraw(snapshot(number).key)
            for task in tasks:
                [failure] = await task
                assert isinstance(failure, Failure)
                assert (failure.kind, failure.task) == (FailureKind.SUPERSEDED, None)
            assert (await anext(kept)).task == ENGLISH
        stages.withdraw(snapshot(5).key)
        assert [outcome.task for outcome in await outcomes_of(stages, snapshot(6))] == [TRANSCRIBE, ENGLISH]
    assert metrics.registry.get_sample_value("surtitle_superseded_total") == 4


async def test_what_is_open_when_the_stages_close_is_unavailable(model: ModelParams, metrics: Metrics) -> None:
    async with open_stages(model, metrics) as stages:
        task = asyncio.create_task(outcomes_of(stages, snapshot(1)))
        await asyncio.sleep(0)
    [failure] = await task
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.UNAVAILABLE
    [refused] = await outcomes_of(stages, snapshot(2))
    assert isinstance(refused, Failure)


async def test_many_finals_wait_outside_when_there_is_no_room(model: ModelParams, metrics: Metrics) -> None:
    async with open_stages(model, metrics, max_waiting_snapshots=1, max_in_flight_snapshots=2) as stages:
        results = await asyncio.gather(*(outcomes_of(stages, snapshot(number)) for number in range(1, 13)))
    assert all(isinstance(outcome, Hypothesis) for outcomes in results for outcome in outcomes)


@dataclasses.dataclass
class Outage:
    """Whether the stages are gone, and what the driver's clock says."""

    is_over: bool = False
    now_ms: float = 0.0


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    state = Outage()
    open_lane = LocalTransport.open_lane

    @asynccontextmanager
    async def open_lane_unless_gone(transport: LocalTransport) -> AsyncIterator[LocalTransport]:
        if not state.is_over:
            raise StageUnavailable("the stages are gone")
        async with open_lane(transport) as lane:
            yield lane

    monkeypatch.setattr(LocalTransport, "open_lane", open_lane_unless_gone)
    monkeypatch.setattr("actors.stage_driver._now_ms", lambda: state.now_ms)
    return state


async def submit_soon(stages: LocalStages, item: Snapshot) -> asyncio.Task[list[Outcome]]:
    task = asyncio.create_task(outcomes_of(stages, item))
    await asyncio.sleep(0)
    return task


def is_unavailable(outcomes: list[Outcome]) -> bool:
    return [isinstance(o, Failure) and o.kind is FailureKind.UNAVAILABLE for o in outcomes] == [True]


@pytest.mark.parametrize("leaves", ["expired", "abandoned"])
async def test_a_final_outside_enters_when_the_one_inside_leaves_unserved(
    model: ModelParams, metrics: Metrics, outage: Outage, leaves: str
) -> None:
    limits = {"max_waiting_snapshots": 1, "max_final_wait_ms": 60_000}
    async with open_stages(model, metrics, **limits) as stages, asyncio.timeout(30):
        first = await submit_soon(stages, snapshot(1))
        outage.now_ms = 30_000
        second = await submit_soon(stages, snapshot(2))
        if leaves == "expired":
            outage.now_ms = 60_000
            assert is_unavailable(await first)
        else:
            first.cancel()
            await asyncio.wait({first})
        outage.is_over = True
        assert all(isinstance(outcome, Hypothesis) for outcome in await second)


async def test_the_time_outside_counts_for_how_long_a_final_may_wait(
    model: ModelParams, metrics: Metrics, outage: Outage
) -> None:
    limits = {"max_waiting_snapshots": 1, "max_final_wait_ms": 60_000}
    async with open_stages(model, metrics, **limits) as stages, asyncio.timeout(30):
        first = await submit_soon(stages, snapshot(1))
        second = await submit_soon(stages, snapshot(2))
        outage.now_ms = 50_000
        first.cancel()
        await asyncio.wait({first})
        outage.now_ms = 60_000
        assert is_unavailable(await second)


async def test_a_final_that_finds_no_place_to_wait_is_given_up_in_time(
    model: ModelParams, metrics: Metrics, outage: Outage
) -> None:
    limits = {"max_waiting_snapshots": 1, "max_final_wait_ms": 100}
    async with open_stages(model, metrics, **limits) as stages, asyncio.timeout(30):
        partial = await submit_soon(stages, snapshot(1, is_final=False))
        assert is_unavailable(await outcomes_of(stages, snapshot(2)))
        assert not partial.done()
        outage.is_over = True
        assert all(isinstance(outcome, Hypothesis) for outcome in await partial)


class WatchedCall(LocalCall):
    """Tells, when it is closed, whether all of its outcomes were taken, to their end."""

    closed: asyncio.Queue[bool]
    has_ended = False

    async def outcomes(self) -> AsyncGenerator[Outcome, None]:
        async with aclosing(super().outcomes()) as outcomes:
            async for outcome in outcomes:
                yield outcome
        self.has_ended = True

    async def aclose(self) -> None:
        await super().aclose()
        self.closed.put_nowait(self.has_ended)


async def test_a_call_that_is_answered_runs_to_its_end(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WatchedCall, "closed", asyncio.Queue(), raising=False)
    monkeypatch.setattr("actors.local_stages.LocalCall", WatchedCall)
    async with open_stages(model, metrics) as stages, asyncio.timeout(60):
        await asyncio.gather(*(outcomes_of(stages, snapshot(number, is_final=number > 1)) for number in (1, 2, 3)))
        assert await WatchedCall.closed.get()


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list of how many steps each coming decoder makes before its engine crashes; empty: none crashes."""
    steps_left: list[int] = []
    step = DecodeEngine.step

    def step_or_crash(engine: DecodeEngine, now_ms: float) -> list[Outcome]:
        if steps_left:
            steps_left[0] -= 1
            if steps_left[0] < 0:
                steps_left.pop(0)
                raise MemoryError("as a real engine would")
        return step(engine, now_ms)

    monkeypatch.setattr(DecodeEngine, "step", step_or_crash)
    yield steps_left


async def test_finals_survive_a_crash_of_the_decoder(model: ModelParams, metrics: Metrics, crashes: list[int]) -> None:
    finals = [snapshot(number) for number in range(1, 4)]
    async with open_stages(model, metrics) as stages:
        expected = await asyncio.gather(*(outcomes_of(stages, item) for item in finals))
        crashes.append(2)
        results = await asyncio.gather(*(outcomes_of(stages, item) for item in finals))
    assert not crashes
    assert [[outcome.text for outcome in outcomes if isinstance(outcome, Hypothesis)] for outcomes in results] == [
        [outcome.text for outcome in outcomes if isinstance(outcome, Hypothesis)] for outcomes in expected
    ]
    assert metrics.registry.get_sample_value("surtitle_retries_total") == 3


async def test_a_snapshot_that_crashes_every_decoder_is_given_up(
    model: ModelParams, metrics: Metrics, crashes: list[int]
) -> None:
    async with open_stages(model, metrics, max_kills=2) as stages:
        crashes.extend([0, 0])
        [failure] = await outcomes_of(stages, snapshot(1))
        assert isinstance(failure, Failure)
        assert (failure.kind, crashes) == (FailureKind.FAILED, [])
        assert all(isinstance(outcome, Hypothesis) for outcome in await outcomes_of(stages, snapshot(2)))


async def test_an_encoder_that_fails_again_and_again_says_so(model: ModelParams) -> None:
    encoder = await asyncio.to_thread(AudioEncoder, model, EncoderParams())
    # what is no array at all makes the encoder raise, where a bad array only has a failure as its outcome
    bad, worse = (dataclasses.replace(snapshot(1, is_final=is_final), samples=[0]) for is_final in (False, True))
    good = snapshot(2, is_final=False)
    await encoder.encode([bad, worse, bad, good])
    encoder.check_health()
    await encoder.encode([good, bad])
    await encoder.encode([bad])
    encoder.check_health()
    [failure] = await encoder.encode([bad])
    assert isinstance(failure, Failure)
    assert (failure.key, failure.kind) == (bad.key, FailureKind.FAILED)
    with pytest.raises(StageUnavailable, match="3 times in a row"):
        encoder.check_health()
    assert isinstance((await encoder.encode([good]))[0], Embeddings)
    encoder.check_health()
    await encoder.aclose()


@dataclasses.dataclass
class Hang:
    """While it is armed, the next call of a stage hangs, until that is over."""

    is_armed: bool = False
    is_over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def wrap(self, method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def hang_or_call(*arguments: Any) -> list[Any]:
            if self.is_armed:
                self.is_armed = False
                self.is_over.wait()
            return method(*arguments)

        return hang_or_call


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
async def test_a_stage_that_hangs_is_left_behind_and_replaced(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    hang = Hang()
    monkeypatch.setattr("actors.audio_encoder._MAX_CALL_S", 0.0)
    monkeypatch.setattr("actors.decoder._MAX_STEP_S", 0.0)
    monkeypatch.setattr("actors.decoder._MAX_CLOSE_S", 0.1)
    cls, method = (UtterancesToEmbeddings, "encode") if stage == "encoder" else (DecodeEngine, "step")
    monkeypatch.setattr(cls, method, hang.wrap(getattr(cls, method)))
    async with open_stages(model, metrics, call_timeout_ms=1_000, max_kills=10) as stages, asyncio.timeout(60):
        expected = await outcomes_of(stages, snapshot(1))
        hang.is_armed = True
        try:
            outcomes = await outcomes_of(stages, snapshot(1))
        finally:
            hang.is_over.set()
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Hypothesis)] == [
        outcome.text for outcome in expected if isinstance(outcome, Hypothesis)
    ]
    assert len(expected) == len(outcomes) == 2


async def test_an_encoder_that_failed_three_times_in_a_row_is_replaced(
    model: ModelParams, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = UtterancesToEmbeddings.encode

    def encode_or_fail(encoder: UtterancesToEmbeddings, snapshots: list[Snapshot]) -> list[Embeddings | Failure]:
        if any(item.key.stream_id == "stream" and item.key.utterance <= 3 for item in snapshots):
            raise MemoryError("as a real encoder would")
        return encode(encoder, snapshots)

    monkeypatch.setattr(UtterancesToEmbeddings, "encode", encode_or_fail)
    async with open_stages(model, metrics) as stages:
        for number in range(1, 4):
            [failure] = await outcomes_of(stages, snapshot(number))
            assert isinstance(failure, Failure)
        assert "replacing" not in caplog.text
        assert all(isinstance(outcome, Hypothesis) for outcome in await outcomes_of(stages, snapshot(4)))
    assert "replacing the audio encoder: the encoder failed 3 times in a row" in caplog.text


async def test_a_crashed_decoder_says_so(model: ModelParams, crashes: list[int]) -> None:
    encoder = await asyncio.to_thread(AudioEncoder, model, EncoderParams())
    decoder = await asyncio.to_thread(Decoder, model, DecoderParams())
    encoder.check_health()
    decoder.check_health()
    item = snapshot(1)
    encoded = await encoder.encode([item])
    crashes.append(0)
    [failure] = [outcome async for outcome in decoder.decode(encoded, [DecodeRequest.of(item)])]
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.UNAVAILABLE
    with pytest.raises(StageUnavailable, match="MemoryError"):
        decoder.check_health()
    [later] = [outcome async for outcome in decoder.decode(encoded, [DecodeRequest.of(item)])]
    assert isinstance(later, Failure)
    await decoder.aclose()
    await encoder.aclose()


async def test_a_snapshot_sent_again_is_answered_to_the_newer_caller(model: ModelParams) -> None:
    encoder = await asyncio.to_thread(AudioEncoder, model, EncoderParams())
    decoder = await asyncio.to_thread(Decoder, model, DecoderParams())
    item = snapshot(1)
    encoded = await encoder.encode([item])
    assert isinstance(encoded[0], Embeddings)

    async def ask() -> list[Outcome]:
        return [outcome async for outcome in decoder.decode(encoded, [DecodeRequest.of(item)])]

    older, newer = await asyncio.gather(ask(), ask())
    assert [type(outcome) for outcome in newer] == [Hypothesis, Hypothesis]
    assert isinstance(older[-1], Failure)
    assert older[-1].kind is FailureKind.UNAVAILABLE
    await decoder.aclose()
    await encoder.aclose()


async def test_a_call_of_more_requests_than_the_decoder_has_room_for_is_answered(model: ModelParams) -> None:
    encoder = await asyncio.to_thread(AudioEncoder, model, EncoderParams())
    params = DecoderParams(scheduler=SchedulerParams(max_waiting=2))
    decoder = await asyncio.to_thread(Decoder, model, params)
    items = [snapshot(number) for number in range(1, 7)]
    encoded = await encoder.encode(items)

    async def ask(chosen: slice) -> list[Outcome]:
        requests = [DecodeRequest.of(item) for item in items[chosen]]
        return [outcome async for outcome in decoder.decode(encoded[chosen], requests)]

    async with asyncio.timeout(60):
        for _ in range(3):
            async with aclosing(decoder.decode(encoded, [DecodeRequest.of(item) for item in items])) as outcomes:
                await anext(outcomes)
        # Whoever went away has left all places; calls that go on have them in turn.
        answered = await asyncio.gather(ask(slice(0, 4)), ask(slice(4, 6)))
    for outcomes_of_call, call_items in zip(answered, (items[:4], items[4:]), strict=True):
        assert {(outcome.key, outcome.task) for outcome in outcomes_of_call} == {
            (item.key, task) for item in call_items for task in (TRANSCRIBE, ENGLISH)
        }
        assert all(isinstance(outcome, Hypothesis) for outcome in outcomes_of_call)
    await decoder.aclose()
    await encoder.aclose()


async def test_weights_that_are_not_there_are_an_error_at_start(tmp_path: Path, metrics: Metrics) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        async with open_stages(ModelParams(name=str(tmp_path)), metrics):
            pytest.fail("it started")
