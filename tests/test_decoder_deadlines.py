"""Deadlines through the engine and through the stage, with a tiny random Whisper."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest

from actors.decoder import Decoder
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams, DecoderParts
from pipeline.decode.runner import Context
from pipeline.decode.scheduler import SchedulerParams
from pipeline.items import DecodeRequest, Embeddings, Failure, FailureKind, Hypothesis, Outcome, SnapshotKey
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.runner import WhisperRunner, load_parts
from tests.models import request
from tests.tiny_whisper import save_tiny

OVERRUN_MS = 500
NUM_POSITIONS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    return ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))), device="cpu", decoder_threads=1)


@pytest.fixture(scope="module")
def parts(model: ModelParams) -> DecoderParts:
    return load_parts(model, 1)


def engine_of(parts: DecoderParts) -> DecodeEngine:
    scheduler = SchedulerParams(num_slots=1, max_overrun_ms=OVERRUN_MS)
    return DecodeEngine(ModelParams(), DecoderParams(scheduler=scheduler), parts=parts)


def ask(utterance: int, *, is_final: bool) -> tuple[DecodeRequest, Context]:
    key = SnapshotKey("s", utterance, 1)
    values = np.random.default_rng(utterance).standard_normal((NUM_POSITIONS, 32)).astype(np.float32)
    return request(key, is_final=is_final), Context(Embeddings(key, values, NUM_POSITIONS * 320))


def run_dry(engine: DecodeEngine, now_ms: float) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    while engine.has_work:
        outcomes.update({outcome.key.utterance: outcome for outcome in engine.step(now_ms)})
    return outcomes


def is_expired(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.kind is FailureKind.EXPIRED and outcome.task is None


def test_a_partial_that_waits_past_its_deadline_fails_as_expired_and_a_final_does_not(parts: DecoderParts) -> None:
    engine = engine_of(parts)
    for utterance, is_final in ((1, True), (2, True), (3, False)):
        engine.submit(*ask(utterance, is_final=is_final), deadline_ms=100.0)
    outcomes = run_dry(engine, 100.5)
    assert [is_expired(outcomes[utterance]) for utterance in (1, 2, 3)] == [False, False, True]
    assert next(iter(outcomes)) == 3  # at once, not after what was before it


@pytest.mark.parametrize(("overrun_ms", "expires"), [(OVERRUN_MS, False), (OVERRUN_MS + 1, True)])
def test_a_partial_that_runs_too_long_past_its_deadline_gives_its_slot_back(
    parts: DecoderParts, overrun_ms: int, expires: bool
) -> None:
    engine = engine_of(parts)
    engine.submit(*ask(1, is_final=False), deadline_ms=100.0)
    engine.step(50.0)
    assert is_expired(run_dry(engine, 100.0 + overrun_ms)[1]) == expires
    assert isinstance(parts.runner, WhisperRunner)
    assert parts.runner.decoder.memory.num_open == 0
    engine.submit(*ask(1, is_final=False))
    assert isinstance(run_dry(engine, 1e9)[1], Hypothesis)


def test_a_deadline_that_is_no_number_is_refused_and_leaves_nothing_behind(parts: DecoderParts) -> None:
    engine = engine_of(parts)
    with pytest.raises(ValueError, match="deadline of nan ms"):
        engine.submit(*ask(1, is_final=False), deadline_ms=math.nan)
    assert not engine.has_work
    engine.submit(*ask(1, is_final=False))
    assert isinstance(run_dry(engine, 0.0)[1], Hypothesis)


async def test_the_stage_counts_a_deadline_from_the_arrival_of_the_request(model: ModelParams) -> None:
    decoder = await asyncio.to_thread(Decoder, model, DecoderParams())
    # -1: it had passed when the request came. A minute is more than this test takes, and less than the machine has been
    # up: taken for a time on the decoder's clock it would have passed as well.
    cases = {1: (False, -1.0), 2: (False, 60_000.0), 3: (True, -1.0), 4: (False, None)}
    asked = {utterance: ask(utterance, is_final=is_final) for utterance, (is_final, _) in cases.items()}
    requests = [replace(asked[utterance][0], deadline_in_ms=in_ms) for utterance, (_, in_ms) in cases.items()]
    encoded = [context.sound for _, context in asked.values()]
    outcomes = {outcome.key.utterance: outcome async for outcome in decoder.decode(encoded, requests)}
    assert {utterance: is_expired(outcome) for utterance, outcome in outcomes.items()} == {
        1: True,
        2: False,
        3: False,
        4: False,
    }
    await decoder.aclose()
