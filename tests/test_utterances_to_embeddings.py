from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.audio.encoder_window import EncoderCost, EncoderCosts, EncoderParams
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.errors import ModelError
from pipeline.items import Embeddings, Failure, FailureKind, Snapshot, SnapshotKey
from pipeline.models.device import (
    check_final_arithmetic,
    choose_device,
    choose_partial_arithmetic,
    has_bfloat16_units,
    has_int8_units,
    measure_speed_up,
)
from pipeline.models.linear import Arithmetic
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import load_checkpoint
from pipeline.models.whisper.encoder import WhisperEncoder
from pipeline.models.whisper.log_mel import LogMel
from tests.models import needs_int8
from tests.tiny_whisper import save_tiny

RATE_HZ = 16_000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    return ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))), device="cpu")


@pytest.fixture(scope="module")
def stage(model: ModelParams) -> UtterancesToEmbeddings:
    return UtterancesToEmbeddings(model, EncoderParams())


def snapshot(num_samples: int, *, is_final: bool = False, seed: int = 0) -> Snapshot:
    samples = (np.random.default_rng(seed).standard_normal(num_samples) * 3_000).astype(np.int16)
    return holding(samples, is_final=is_final, revision=seed + 1)


def holding(samples: np.ndarray, *, is_final: bool = False, revision: int = 1) -> Snapshot:
    return Snapshot(SnapshotKey("s", 1, revision), 0, is_final, 0, samples, None, (), (), ())


@pytest.mark.parametrize(
    ("num_samples", "window_ms"), [(1, 2_200), (16_000, 3_000), (16_001, 3_200), (480_000, 30_000)]
)
def test_the_window_is_the_utterance_and_2_s_of_silence_or_a_little_more(num_samples: int, window_ms: int) -> None:
    assert EncoderParams().window_samples(num_samples) == window_ms * RATE_HZ // 1_000


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 480_000),
    st.integers(0, 5_000),
    st.integers(2, 200).map(lambda steps: steps * 20),
)
def test_a_window_holds_its_utterance_and_no_more_silence_than_asked_for(
    num_samples: int, silence_ms: int, step_ms: int
) -> None:
    params = EncoderParams(silence_ms=silence_ms, window_step_ms=step_ms)
    window = params.window_samples(num_samples)
    assert num_samples <= window <= 480_000
    assert window % 320 == 0
    assert window - num_samples < (silence_ms + step_ms) * 16
    assert window == 480_000 or window - num_samples >= silence_ms * 16


@pytest.mark.parametrize(
    "values",
    [
        {"silence_ms": -1},
        {"window_step_ms": 50},
        {"window_step_ms": 0},
        {"max_window_ms": 31_000},
        {"max_window_ms": 2_000},
        {"silence": 3},
    ],
)
def test_impossible_parameters_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        EncoderParams.model_validate(values)


def test_embeddings_are_the_encoders_for_the_window(stage: UtterancesToEmbeddings, model: ModelParams) -> None:
    item = snapshot(20_000, is_final=True)
    (embeddings,) = stage.encode([item])
    assert isinstance(embeddings, Embeddings)
    window = np.zeros(RATE_HZ * 34 // 10, dtype=np.float32)
    window[:20_000] = item.samples / 32_768.0
    expected = WhisperEncoder(load_checkpoint(model, "encoder"))(LogMel(80)(torch.from_numpy(window)[None]))[0]
    assert (embeddings.key, embeddings.num_audio_samples) == (item.key, 20_000)
    assert embeddings.values.dtype == np.float32
    assert embeddings.values.flags.c_contiguous
    assert embeddings.values.shape == (170, 32)
    assert np.array_equal(embeddings.values, expected.numpy())


def test_each_snapshot_gets_the_same_bits_in_a_call_and_alone(stage: UtterancesToEmbeddings) -> None:
    lengths = [9_000, 12_000, 12_000, 30_000, 100_000, 15_000, 12_345]
    items = [snapshot(length, is_final=seed % 3 == 0, seed=seed) for seed, length in enumerate(lengths)]
    alone = [stage.encode([item])[0] for item in items]
    for order in (items, items[::-1]):
        for outcome in stage.encode(order):
            (expected,) = [other for other in alone if other.key == outcome.key]
            assert isinstance(outcome, Embeddings)
            assert isinstance(expected, Embeddings)
            assert np.array_equal(outcome.values, expected.values)


def test_a_call_leaves_nothing_behind(stage: UtterancesToEmbeddings) -> None:
    first = stage.encode([snapshot(20_000)])[0]
    stage.encode([snapshot(300_000, seed=5), snapshot(480_001, seed=6)])
    again = stage.encode([snapshot(20_000)])[0]
    assert isinstance(first, Embeddings)
    assert isinstance(again, Embeddings)
    assert np.array_equal(first.values, again.values)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(0, dtype=np.int16),
        np.zeros(480_001, dtype=np.int16),
        np.zeros(16_000, dtype=np.float32),
        np.zeros((2, 16_000), dtype=np.int16),
    ],
)
def test_a_bad_snapshot_fails_alone(stage: UtterancesToEmbeddings, bad: np.ndarray) -> None:
    good = snapshot(10_000, seed=3)
    before, failure, after = stage.encode([good, holding(bad, revision=9), good])
    assert isinstance(failure, Failure)
    assert (failure.key.revision, failure.task, failure.kind) == (9, None, FailureKind.FAILED)
    assert failure.message
    assert isinstance(before, Embeddings)
    assert isinstance(after, Embeddings)
    assert np.array_equal(before.values, after.values)


def test_values_that_are_not_finite_are_a_failure(model: ModelParams) -> None:
    checkpoint = load_checkpoint(model, "encoder")
    checkpoint.tensors["encoder.layer_norm.bias"][0] = float("nan")
    stage = UtterancesToEmbeddings(model, EncoderParams(), checkpoint=checkpoint)
    (failure,) = stage.encode([snapshot(1_000)])
    assert isinstance(failure, Failure)
    assert "not finite" in failure.message


def test_an_empty_call_gives_nothing(stage: UtterancesToEmbeddings) -> None:
    assert stage.encode([]) == []


def test_silence_and_full_scale_are_encoded(stage: UtterancesToEmbeddings) -> None:
    for level in (0, 32_767, -32_768):
        (outcome,) = stage.encode([holding(np.full(16_000, level, dtype=np.int16))])
        assert isinstance(outcome, Embeddings)


@pytest.mark.parametrize("arithmetic", ["bfloat16", pytest.param("int8", marks=needs_int8)])
def test_partials_may_be_rough_and_finals_never_are(
    model: ModelParams, stage: UtterancesToEmbeddings, arithmetic: Arithmetic
) -> None:
    rough = UtterancesToEmbeddings(model.model_copy(update={"partial_dtype": arithmetic}), EncoderParams())
    assert (rough.partial_dtype, rough.final_dtype, rough.device) == (arithmetic, "float32", "cpu")
    partial, final = (rough.encode([snapshot(8_000, is_final=is_final)])[0] for is_final in (False, True))
    exact = stage.encode([snapshot(8_000)])[0]
    assert isinstance(partial, Embeddings)
    assert isinstance(final, Embeddings)
    assert isinstance(exact, Embeddings)
    assert partial.values.dtype == np.float32
    assert np.array_equal(final.values, exact.values)
    assert 0 < np.abs(partial.values - exact.values).max() < 0.2


@needs_int8
def test_finals_are_int8_if_asked_for_and_the_same_in_a_call_and_alone(model: ModelParams) -> None:
    rough = UtterancesToEmbeddings(model.model_copy(update={"final_dtype": "int8"}), EncoderParams())
    assert (rough.partial_dtype, rough.final_dtype) == ("float32", "int8")
    items = [snapshot(num_samples, is_final=True) for num_samples in (8_000, 20_000, 8_000)]
    for alone, together in zip(items, rough.encode(items), strict=True):
        (expected,) = rough.encode([alone])
        assert isinstance(expected, Embeddings)
        assert isinstance(together, Embeddings)
        assert np.array_equal(together.values, expected.values)


def test_a_window_longer_than_the_models_is_refused(tmp_path: Path) -> None:
    short = ModelParams(name=str(save_tiny(tmp_path, max_source_positions=500)), device="cpu")
    with pytest.raises(ModelError, match="at most 10000 ms"):
        UtterancesToEmbeddings(short, EncoderParams())
    assert UtterancesToEmbeddings(short, EncoderParams(max_window_ms=10_000)).config.max_source_positions == 500


def test_cuda_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert choose_device(ModelParams()).type == "cuda"
    else:
        with pytest.raises(ModelError, match="no CUDA device"):
            choose_device(ModelParams(device="cuda"))


class Ticks:
    """A clock that goes on by one given step at each look."""

    def __init__(self, steps_s: list[float]) -> None:
        self._steps = itertools.cycle(steps_s)
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += next(self._steps)
        return self._now_s


@pytest.mark.parametrize("arithmetic", ["bfloat16", "int8"])
def test_how_much_faster_a_reduced_arithmetic_is_gets_measured(arithmetic: Arithmetic) -> None:
    # Two looks for each product, three products for each dtype, float32 first.
    fast, slow = [0.0, 0.010], [0.0, 0.030]
    assert measure_speed_up(arithmetic, CPU, Ticks(slow * 3 + fast * 3)) == pytest.approx(3.0)
    assert measure_speed_up(arithmetic, CPU, Ticks(fast * 3 + slow * 3)) == 0.0
    assert measure_speed_up(arithmetic, CPU, Ticks(fast * 6)) == pytest.approx(1.0)


def test_a_machine_without_units_for_it_never_chooses_a_reduced_arithmetic() -> None:
    possible = {"float32", *(["bfloat16"] * has_bfloat16_units(CPU)), *(["int8"] * has_int8_units(CPU))}
    assert choose_partial_arithmetic(ModelParams(), CPU, time.perf_counter) in possible
    assert choose_partial_arithmetic(ModelParams(), CPU) == "float32"
    assert choose_partial_arithmetic(ModelParams(partial_dtype="bfloat16"), CPU) == "bfloat16"


@needs_int8
def test_integers_are_used_if_asked_for() -> None:
    assert choose_partial_arithmetic(ModelParams(partial_dtype="int8"), CPU) == "int8"
    assert check_final_arithmetic(ModelParams(final_dtype="int8"), CPU) == "int8"


REFUSES_INTEGERS = """
import time, torch
from pipeline.errors import ModelError
from pipeline.models.device import check_final_arithmetic, choose_partial_arithmetic
from pipeline.models.weights import ModelParams
cpu = torch.device("cpu")
for choose, asked, other in (
    (choose_partial_arithmetic, {"partial_dtype": "int8"}, "auto"),
    (check_final_arithmetic, {"final_dtype": "int8"}, "float32"),
):
    try:
        choose(ModelParams(**asked), cpu)
        raise SystemExit(f"{asked} is accepted")
    except ModelError as error:
        message = str(error)
        assert next(iter(asked)) in message and f"use '{other}'" in message, message
assert choose_partial_arithmetic(ModelParams(), cpu, time.perf_counter) != "int8"
"""


def test_integers_are_refused_where_their_sums_overflow() -> None:
    # oneDNN uses no instructions beyond those, whatever the processor has.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    ended = subprocess.run(
        [sys.executable, "-c", REFUSES_INTEGERS], env=environment, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_integers_are_for_cpus() -> None:
    with pytest.raises(ModelError, match="for CPUs, not for cuda"):
        choose_partial_arithmetic(ModelParams(partial_dtype="int8"), torch.device("cuda"))


def test_costs_grow_with_the_window_and_follow_the_measurement(model: ModelParams) -> None:
    stage = UtterancesToEmbeddings(model, EncoderParams())
    costs = [
        stage.measure_cost(Ticks([0.0, took_s]), is_final=is_final)
        for took_s, is_final in ((0.010, False), (0.020, True))
    ]
    for cost, took_ms in zip(costs, (10.0, 20.0), strict=True):
        assert cost.estimate_ms(1) == pytest.approx(took_ms + cost.ms_per_window)
    estimates = [costs[0].estimate_ms(seconds * RATE_HZ) for seconds in range(1, 28)]
    assert estimates == sorted(estimates)
    assert costs[0].estimate_ms(0) == costs[0].estimate_ms(10**9) == 0.0
    both = EncoderCosts(partial=costs[0], final=costs[1])
    for num_samples in (1, RATE_HZ, 20 * RATE_HZ):
        for is_final in (False, True):
            assert both.estimate_ms(num_samples, is_final) == costs[is_final].estimate_ms(num_samples)


@needs_int8
def test_partials_and_finals_are_measured_each_in_its_own_arithmetic(model: ModelParams) -> None:
    stage = UtterancesToEmbeddings(model.model_copy(update={"partial_dtype": "int8"}), EncoderParams())
    used: list[str] = []
    for is_final in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            stage.measure_cost(time.perf_counter, is_final=is_final)
        used += ["int8" if any("_int_mm" in event.key for event in profile.key_averages()) else "float32"]
    assert used == ["int8", "float32"]


def test_a_cost_model_and_parameters_need_no_torch() -> None:
    script = "import sys, pipeline.audio.encoder_window, pipeline.models.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert EncoderCost(EncoderParams(), 1.0, 10.0, 1.0).estimate_ms(16_000) == 1.0 + 3 * (10.0 + 3 * 1.0)
