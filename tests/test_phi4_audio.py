"""Phi-4-multimodal's sound, from samples to the decoder's inputs, against transformers on tiny random weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi4MultimodalAudioConfig, Phi4MultimodalConfig, Phi4MultimodalVisionConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.phi4_multimodal.feature_extraction_phi4_multimodal import Phi4MultimodalFeatureExtractor
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioEmbedding

from pipeline.errors import ModelError
from pipeline.models.phi4.audio_features import STEP_SAMPLES, WINDOW_SAMPLES, AudioFeatures, mel_filters, num_steps
from pipeline.models.phi4.config import Phi4Config, read_config
from pipeline.models.phi4.conformer import AudioProjection, ConformerEncoder, Projector, num_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

RATE_HZ = 16_000
# Shorter than a token's context, odd lengths, one full window of 40 s, and two and three windows.
LENGTHS = (97, 240, 33, 4_000, 4_400, 8_001)


@dataclass(frozen=True)
class Tiny:
    """transformers' encoder and projections, and ours with the same weights."""

    reference: Phi4MultimodalAudioEmbedding
    config: Phi4Config

    @property
    def encoder_tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.reference.encoder.state_dict())

    def encoder(self, dtype: torch.dtype = torch.float32) -> ConformerEncoder:
        return ConformerEncoder(self.config.audio, self.encoder_tensors, "cpu", dtype)

    @torch.inference_mode()
    def alone(self, clip: torch.Tensor) -> torch.Tensor:
        return self.reference.encoder(clip[None], None)[0]


def tiny(*, is_symmetric: bool = False) -> Tiny:
    config = Phi4MultimodalConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=[1],
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "factor": 32.0,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0] * 6,
            "long_factor": [2.0] * 6,
        },
        audio_config=Phi4MultimodalAudioConfig(
            hidden_size=32,
            intermediate_size=48,
            num_blocks=3,
            num_attention_heads=4,
            nemo_conv_channels=16,
            ext_pw_out_channel=32,
            depthwise_separable_out_channel=32,
            bias_max_distance=500,
            bias_symmetric=is_symmetric,
            audio_token_id=11,
        ),
        vision_config=Phi4MultimodalVisionConfig(image_token_id=10),
    )
    generator = torch.Generator().manual_seed(1)
    reference = Phi4MultimodalAudioEmbedding(config).eval()
    with torch.no_grad():
        # The usual start (weights of 0.02, biases of 0) hides mistakes: attention would be nearly uniform.
        for name, weight in reference.named_parameters():
            is_norm = "norm" in name and weight.dim() == 1
            scale = 0.5 if "bias_values" in name else 0.1 if weight.dim() == 1 or name.endswith(("b1", "b2")) else None
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * (scale or 1 / math.sqrt(weight[0].numel())) + (is_norm and name.endswith("weight")))
        norm = reference.encoder.encoder_embedding
        norm.global_mean.copy_(torch.linspace(7, 9, 80))
        norm.global_invstd.copy_(torch.linspace(0.2, 0.3, 80))
    return Tiny(reference, read_config(config.to_dict()))


@pytest.fixture(scope="module")
def pair() -> Tiny:
    return tiny()


def features(length: int) -> torch.Tensor:
    return 8 + 4 * torch.randn(length, 80, generator=torch.Generator().manual_seed(length))


def sound(num_samples: int, seed: int = 0) -> torch.Tensor:
    """Return a rising tone in noise, after a quarter of silence, float32 within -1..1."""
    time_s = torch.arange(num_samples, dtype=torch.float64) / RATE_HZ
    noise = torch.randn(num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.01
    samples = torch.sin(2 * math.pi * (120 + 400 * time_s) * time_s) * 0.4 + noise
    samples[: num_samples // 4] = 0
    return samples.float()


# Features


def reference_features(samples: torch.Tensor) -> torch.Tensor:
    return Phi4MultimodalFeatureExtractor()(samples, sampling_rate=RATE_HZ).audio_input_features[0]


def test_the_filters_are_transformers_kaldi_filters() -> None:
    expected = mel_filter_bank(257, 80, 0, 7_690, RATE_HZ, mel_scale="kaldi", triangularize_in_mel_space=True)
    assert np.abs(mel_filters(80).numpy() - expected).max() < 1e-7


@pytest.mark.parametrize("num_samples", [400, 559, 560, 16_000, 10 * 16_000 + 77, 40 * 16_000])
def test_a_clip_gives_transformers_features(num_samples: int) -> None:
    samples = sound(num_samples)
    expected = reference_features(samples)
    found = AudioFeatures(80)(samples)
    assert found.shape == expected.shape == (num_steps(num_samples), 80)
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("level", [0.0, 1e-6, 1.0])
def test_silence_and_full_scale_give_transformers_features(level: float) -> None:
    samples = torch.full((RATE_HZ,), level)
    found = AudioFeatures(80)(samples)
    assert torch.isfinite(found).all()
    assert (found - reference_features(samples)).abs().max() <= 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.lists(st.integers(1, 150), min_size=1, max_size=6), st.integers(0, 159))
def test_chunks_have_the_features_of_the_whole_bit_for_bit(first: int, counts: list[int], rest: int) -> None:
    compute = AudioFeatures(80)
    bounds = np.cumsum([0, first, *counts]).tolist()
    samples = sound(bounds[-1] * STEP_SAMPLES + WINDOW_SAMPLES - STEP_SAMPLES + rest, seed=first)
    whole = compute(samples)
    chunks = [
        compute(samples[start * STEP_SAMPLES : (end - 1) * STEP_SAMPLES + WINDOW_SAMPLES])
        for start, end in itertools.pairwise(bounds)
    ]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("shape", [(0,), (399,), (1, 16_000)])
def test_samples_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AudioFeatures(80)(torch.zeros(shape))


# Encoder


@pytest.mark.parametrize("length", [*LENGTHS, 1, 8, 9, 4_001, 8_000])
def test_a_clip_alone_gives_transformers_embeddings(pair: Tiny, length: int) -> None:
    (found,) = pair.encoder()([features(length)])
    assert found.shape == (math.ceil(length / 8), 32)
    assert num_tokens(length) == math.ceil(length / 8)
    assert (found - pair.alone(features(length))).abs().max() <= 1e-5


def test_clips_of_unequal_length_are_the_same_together_and_alone(pair: Tiny) -> None:
    encoder, clips = pair.encoder(), [features(length) for length in LENGTHS]
    for clip, together in zip(clips, encoder(clips), strict=True):
        assert (together - encoder([clip])[0]).abs().max() <= 2e-6
        assert (together - pair.alone(clip)).abs().max() <= 1e-5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_any_batch_is_the_same_together_and_alone(pair: Tiny, lengths: list[int]) -> None:
    # 1.7e-6 is the most that 250 such batches showed: float32 rounds by the shape of a product.
    encoder, clips = pair.encoder(), [features(length) for length in lengths]
    for clip, together in zip(clips, encoder(clips), strict=True):
        assert (together - encoder([clip])[0]).abs().max() <= 5e-6


def test_transformers_own_batch_lets_padding_change_a_clip(pair: Tiny) -> None:
    # Why a batch is compared with each clip alone, and not with the reference's batch.
    short, long = features(97), features(240)
    batch = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    is_kept = torch.arange(240) < torch.tensor([97, 240])[:, None]
    with torch.inference_mode():
        in_batch = pair.reference.encoder(batch, is_kept)
    assert (in_batch[1] - pair.alone(long)).abs().max() <= 1e-5
    assert (in_batch[0, : num_tokens(97)] - pair.alone(short)).abs().max() > 0.1


def test_a_symmetric_bias_is_transformers() -> None:
    symmetric = tiny(is_symmetric=True)
    found = symmetric.encoder()([features(700)])[0]
    assert (found - symmetric.alone(features(700))).abs().max() <= 1e-5


def test_bfloat16_is_as_near_to_float32_as_transformers_is() -> None:
    pair = tiny()
    clip = features(240)
    exact = pair.encoder()([clip])[0]
    found = pair.encoder(torch.bfloat16)([clip])[0]
    pair.reference.to(torch.bfloat16)
    expected = pair.alone(clip.bfloat16())
    assert found.dtype == expected.dtype == torch.bfloat16
    ours, theirs = (found.float() - exact).abs().mean(), (expected.float() - exact).abs().mean()
    assert 0 < ours < 1.2 * theirs < 0.1


def test_biases_in_bfloat16_are_rounded_after_transformers_mask_is_added() -> None:
    # The mask of kept keys is added as 1. What comes out differs by less than rounding elsewhere does: no embedding
    # would show it.
    pair = tiny()
    bias = pair.encoder(torch.bfloat16)._masked_bias([20])
    pair.reference.to(torch.bfloat16)
    layer = pair.reference.encoder.relative_attention_bias_layer
    with torch.inference_mode():
        expected = torch.ones(1, 1, 20, 20, dtype=torch.bool) + layer(torch.zeros(1, 20, 32))
    assert torch.equal(bias, expected)


@pytest.mark.parametrize("clips", [[], [torch.zeros(0, 80)], [torch.zeros(8, 79)], [torch.zeros(1, 8, 80)]])
def test_clips_of_another_shape_are_refused(pair: Tiny, clips: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"expected|no clips"):
        pair.encoder()(clips)


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(pair: Tiny) -> None:
    tensors = pair.encoder_tensors
    name = "encoders.1.conv.glu.b1"
    tensors[name] = torch.zeros(1, 31, 1)
    with pytest.raises(ModelError, match=rf"{name} is of shape \[1, 31, 1\], expected \[1, 32, 1\]"):
        ConformerEncoder(pair.config.audio, tensors)
    del tensors[name]
    with pytest.raises(ModelError, match=f"{name} is missing"):
        ConformerEncoder(pair.config.audio, tensors)


# Projections


@pytest.mark.parametrize(("projector", "mode"), [(Projector.SPEECH, "speech"), (Projector.VISION_SPEECH, "vision")])
def test_each_projection_is_transformers(pair: Tiny, projector: Projector, mode: str) -> None:
    clip = features(97)
    count = num_tokens(97)
    with torch.inference_mode():
        expected = pair.reference(
            torch.full((1, count), 11),
            torch.zeros(1, count, 64),
            clip[None],
            audio_embed_sizes=torch.tensor([count]),
            audio_projection_mode=mode,
        )[0]
    project = AudioProjection(pair.config, pair.reference.state_dict())
    found = project(pair.encoder()([clip])[0], projector)
    assert found.shape == (count, 64)
    assert (found - expected).abs().max() <= 1e-5
    other = next(each for each in Projector if each is not projector)
    assert (project(pair.encoder()([clip])[0], other) - expected).abs().max() > 0.1


def test_a_projection_is_chosen_by_kind_and_not_by_a_string(pair: Tiny) -> None:
    # Any string but "speech" means the other projection to the reference.
    project = AudioProjection(pair.config, pair.reference.state_dict())
    with pytest.raises(ValueError, match="projector is 'speech'"):
        project(torch.zeros(1, 32), "speech")  # type: ignore[arg-type]
