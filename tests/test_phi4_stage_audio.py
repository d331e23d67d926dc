"""Phi-4-multimodal's audio encoder as a stage, on tiny random weights."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Phi4MultimodalForCausalLM
from transformers.models.phi4_multimodal.feature_extraction_phi4_multimodal import Phi4MultimodalFeatureExtractor

from actors.audio_encoder import AudioEncoder
from pipeline.audio.encoder_window import EncoderParams, PiecewiseCost
from pipeline.audio.encoders import load_encoder
from pipeline.items import Embeddings, Failure, FailureKind, Job, JobKey, Snapshot, SnapshotKey, Task, TaskKind
from pipeline.models.phi4.audio_stage import MAX_SAMPLES, Phi4UtterancesToEmbeddings, num_tokens_of
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ

pytestmark = pytest.mark.usefixtures("one_thread")

# A window is 40 s. What follows the first one is attended to with the zeros that fill it up.
SECONDS = (1, 39, 40, 41, 95)
CLOSE = 1e-5
CLOSE_IN_A_BATCH = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("phi4"), seed=4)


@pytest.fixture(scope="module")
def stage(folder: Path) -> Phi4UtterancesToEmbeddings:
    found = load_encoder(ModelParams(name=str(folder), device="cpu"), EncoderParams(), None)
    assert isinstance(found, Phi4UtterancesToEmbeddings)
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.nn.Module:
    model = Phi4MultimodalForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model.model.embed_tokens_extend.audio_embed.encoder


def sound(num_samples: int, seed: int = 0) -> NDArray[np.int16]:
    """Return a rising tone in noise that comes and goes."""
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    noise = np.random.default_rng(seed).normal(0, 300, num_samples)
    tone = 9_000 * np.sin(2 * np.pi * (150 + 20 * time_s) * time_s) * np.sin(time_s) ** 2
    return (tone + noise).astype(np.int16)


def snapshot(samples: NDArray[np.int16], *, is_final: bool = True, utterance: int = 1) -> Snapshot:
    return Snapshot(SnapshotKey("s", utterance, 1), 0, is_final, 0, samples, None, (), (), ())


def embed(stage: Phi4UtterancesToEmbeddings, *snapshots: Snapshot) -> list[NDArray[np.float32]]:
    outcomes = stage.encode(snapshots)
    assert [outcome.key for outcome in outcomes] == [each.key for each in snapshots]
    values = []
    for outcome, each in zip(outcomes, snapshots, strict=True):
        assert isinstance(outcome, Embeddings), outcome
        assert outcome.num_audio_samples == len(each.samples)
        assert outcome.values.dtype == np.float32
        values.append(outcome.values)
    return values


def alone(reference: torch.nn.Module, samples: NDArray[np.int16]) -> NDArray[np.float32]:
    clip = torch.from_numpy(samples.astype(np.float32) / 32_768)
    features = Phi4MultimodalFeatureExtractor()(clip, sampling_rate=SAMPLE_RATE_HZ).audio_input_features
    with torch.inference_mode():
        found: NDArray[np.float32] = reference(features, None)[0].numpy()
    return found


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_snapshot_gets_transformers_embeddings_of_its_sound_alone(
    stage: Phi4UtterancesToEmbeddings, reference: torch.nn.Module, seconds: int
) -> None:
    samples = sound(seconds * SAMPLE_RATE_HZ, seconds)
    (found,) = embed(stage, snapshot(samples))
    assert found.shape == (math.ceil(seconds / 0.08), 32)
    assert np.abs(found - alone(reference, samples)).max() <= CLOSE


def test_more_windows_than_go_together_are_those_of_transformers(
    stage: Phi4UtterancesToEmbeddings, reference: torch.nn.Module
) -> None:
    samples = sound(9 * 40 * SAMPLE_RATE_HZ + 5_000)
    (found,) = embed(stage, snapshot(samples))
    assert len(found) == num_tokens_of(len(samples)) == 9 * 500 + 4
    assert np.abs(found - alone(reference, samples)).max() <= CLOSE


class Watching(TorchDispatchMode):
    """Notes how many windows attend together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.sizes.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def test_eight_windows_at_most_attend_together(stage: Phi4UtterancesToEmbeddings) -> None:
    watching = Watching()
    with watching:
        embed(stage, *(snapshot(sound(41 * SAMPLE_RATE_HZ), is_final=False, utterance=n) for n in range(1, 6)))
    assert watching.sizes == 3 * [8] + 3 * [2]


def test_a_final_has_the_same_bits_whatever_else_is_in_the_call(stage: Phi4UtterancesToEmbeddings) -> None:
    finals = [snapshot(sound(seconds * SAMPLE_RATE_HZ, seconds)) for seconds in (3, 1, 7, 41)]
    partials = [snapshot(sound(40_000 + 3_000 * n, n), is_final=False) for n in range(4)]
    together = embed(stage, *(each for pair in zip(finals, partials, strict=True) for each in pair))[::2]
    for final, found in zip(finals, together, strict=True):
        assert np.array_equal(found, embed(stage, final)[0])


def test_partials_are_the_same_together_and_alone(stage: Phi4UtterancesToEmbeddings) -> None:
    partials = [snapshot(sound(20_000 + 7_777 * n, n), is_final=False) for n in range(6)]
    for partial, found in zip(partials, embed(stage, *partials), strict=True):
        (expected,) = embed(stage, partial)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= CLOSE_IN_A_BATCH


def test_an_utterance_that_grows_by_80_ms_has_a_token_for_each_chunk(stage: Phi4UtterancesToEmbeddings) -> None:
    samples = sound(30 * CHUNK_SAMPLES)
    growing = [snapshot(samples[: n * CHUNK_SAMPLES], is_final=False) for n in range(1, 31)]
    assert [len(found) for found in embed(stage, *growing)] == list(range(1, 31))


@given(st.integers(1, 22_499), st.integers(0, CHUNK_SAMPLES - 1))
def test_a_rest_has_a_token_from_25_ms_on(num_chunks: int, rest: int) -> None:
    assert num_tokens_of(num_chunks * CHUNK_SAMPLES + rest) == num_chunks + (rest >= 400)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 399))
def test_sound_of_less_than_25_ms_is_filled_up_with_zeros(
    stage: Phi4UtterancesToEmbeddings, reference: torch.nn.Module, num_samples: int
) -> None:
    samples = sound(num_samples, num_samples)
    (found,) = embed(stage, snapshot(samples))
    assert len(found) == num_tokens_of(num_samples) == 1
    assert np.abs(found - alone(reference, np.pad(samples, (0, 400 - num_samples)))).max() <= CLOSE


def test_half_an_hour_has_22_500_tokens_and_no_more_is_taken(stage: Phi4UtterancesToEmbeddings) -> None:
    assert MAX_SAMPLES == 30 * 60 * SAMPLE_RATE_HZ
    (found,) = embed(stage, snapshot(np.zeros(MAX_SAMPLES, np.int16)))
    assert found.shape == (22_500, 32)
    (failure,) = stage.encode([snapshot(np.zeros(MAX_SAMPLES + 1, np.int16))])
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.task) == (FailureKind.FAILED, None)
    assert "28800001 samples cannot be encoded; 1 to 28800000 (30 minutes)" in failure.message


@pytest.mark.parametrize("is_final", [True, False])
def test_a_snapshot_that_cannot_be_encoded_fails_alone(stage: Phi4UtterancesToEmbeddings, is_final: bool) -> None:
    good = snapshot(sound(16_000), is_final=is_final)
    bad = [np.zeros(0, np.int16), np.zeros((2, 800), np.int16), np.zeros(800, np.float32)]
    outcomes = stage.encode([good, *(snapshot(each, is_final=is_final) for each in bad), good])  # type: ignore[arg-type]
    assert [type(outcome) for outcome in outcomes] == [Embeddings, Failure, Failure, Failure, Embeddings]
    assert stage.encode([]) == []


def test_values_that_are_not_finite_are_a_failure(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path)
    name = "model.embed_tokens_extend.audio_embed.encoder.encoders.0.layer_norm.weight"
    for path in directory.glob("model-*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][0] = math.inf
        save_file(tensors, path)
    stage = Phi4UtterancesToEmbeddings(ModelParams(name=str(directory), device="cpu"))
    (outcome,) = stage.encode([snapshot(sound(16_000))])
    assert isinstance(outcome, Failure)
    assert "not finite" in outcome.message


def test_the_sound_of_a_job_is_encoded_like_that_of_a_final(stage: Phi4UtterancesToEmbeddings) -> None:
    samples = sound(50_000)
    task = Task(TaskKind.SUMMARISE)
    job = Job(JobKey("s", task.kind, 3), task, samples=samples)
    assert job.snapshot is not None
    assert np.array_equal(embed(stage, job.snapshot)[0], embed(stage, snapshot(samples))[0])


def test_samples_that_may_only_be_read_are_encoded(stage: Phi4UtterancesToEmbeddings) -> None:
    samples = sound(16_000)
    samples.flags.writeable = False
    assert len(embed(stage, snapshot(samples))[0]) == 13


def test_bfloat16_is_told_and_comes_out_as_float32(folder: Path, stage: Phi4UtterancesToEmbeddings) -> None:
    rough = Phi4UtterancesToEmbeddings(ModelParams(name=str(folder), device="cpu", final_dtype="bfloat16"))
    assert (rough.device, rough.partial_dtype, rough.final_dtype) == ("cpu", "bfloat16", "bfloat16")
    assert (stage.device, stage.partial_dtype, stage.final_dtype) == ("cpu", "float32", "float32")
    (found,), (expected,) = embed(rough, snapshot(sound(16_000))), embed(stage, snapshot(sound(16_000)))
    assert 0 < np.abs(found - expected).mean() < 0.05


def test_the_cost_of_a_snapshot_is_measured_and_travels(stage: Phi4UtterancesToEmbeddings) -> None:
    now = iter(np.cumsum([0.0, 0.03, 1.0, 0.01, 1.0, 0.05, 1.0, 0.06]).tolist())
    cost = stage.measure_cost(lambda: next(now), is_final=True)
    assert cost.ms_per_snapshot == pytest.approx(10)
    assert cost.estimate_ms(4 * SAMPLE_RATE_HZ) == pytest.approx(50)
    assert pickle.loads(pickle.dumps(cost)) == cost  # noqa: S301 - our own
    assert type(cost).__module__ == "pipeline.audio.encoder_window"
    estimates = [cost.estimate_ms(seconds * SAMPLE_RATE_HZ) for seconds in (1, 10, 40, 41, 1_800)]
    assert estimates == sorted(estimates)
    assert cost.estimate_ms(0) == cost.estimate_ms(MAX_SAMPLES + 1) == 0.0


def test_the_last_piece_of_long_sound_costs_as_much_as_the_others() -> None:
    cost = PiecewiseCost(40 * 16_000, MAX_SAMPLES, 5.0, 2.0, 0.5)
    assert cost.estimate_ms(16_000) == 5.0 + 1 * (2.0 + 0.5)
    assert cost.estimate_ms(40 * 16_000) == 5.0 + 40 * (2.0 + 40 * 0.5)
    assert cost.estimate_ms(40 * 16_000 + 1) == cost.estimate_ms(80 * 16_000) == 5.0 + 2 * 40 * (2.0 + 40 * 0.5)


async def test_the_actor_holds_the_encoder_of_the_tier(folder: Path, stage: Phi4UtterancesToEmbeddings) -> None:
    model = ModelParams(name=str(folder), device="cpu", encoder_threads=1)
    encoder = AudioEncoder(model, EncoderParams())
    try:
        info = pickle.loads(pickle.dumps(encoder.info()))  # noqa: S301 - our own
        assert (info.device, info.partial_dtype, info.final_dtype) == ("cpu", "float32", "float32")
        assert info.cost.estimate_ms(16_000, True) > 0
        snapshots = [snapshot(sound(30_000)), snapshot(sound(20_000), is_final=False), snapshot(np.zeros(0, np.int16))]
        final, partial, failure = await encoder.encode(snapshots)
        assert isinstance(final, Embeddings)
        assert isinstance(partial, Embeddings)
        assert isinstance(failure, Failure)
        assert np.array_equal(final.values, embed(stage, snapshots[0])[0])
        assert np.array_equal(partial.values, embed(stage, snapshots[1])[0])
    finally:
        await encoder.aclose()
