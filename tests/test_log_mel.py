from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from pipeline.models.whisper.log_mel import LogMel, mel_filters

RATE_HZ = 16_000


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Return a rising tone in noise that swells and fades, float32 within -1..1."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    tone = np.sin(2 * np.pi * (120 + 400 * time_s) * time_s) * 0.4 * np.sin(np.pi * time_s / seconds)
    return (tone + rng.standard_normal(len(time_s)) * 0.01).astype(np.float32)


def reference(window: np.ndarray, num_mels: int) -> np.ndarray:
    """Return transformers' features, [mels, steps], of a window that already has all its silence."""
    chunk_s = len(window) / RATE_HZ
    extractor = WhisperFeatureExtractor(feature_size=num_mels, chunk_length=chunk_s)
    extractor.n_samples = len(window)
    extractor.nb_max_frames = len(window) // extractor.hop_length
    return np.asarray(extractor(window, sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0])


@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_filters_are_transformers_slaney_filters(num_mels: int) -> None:
    expected = mel_filter_bank(
        num_frequency_bins=201,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=8_000.0,
        sampling_rate=RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    assert np.abs(mel_filters(num_mels).numpy() - expected).max() < 1e-7


@pytest.mark.parametrize("num_mels", [80, 128])
def test_sound_padded_to_30_s_gives_transformers_features(num_mels: int) -> None:
    samples = sound(7.3)
    expected = WhisperFeatureExtractor(feature_size=num_mels)(samples, sampling_rate=RATE_HZ, return_tensors="np")
    window = np.zeros(30 * RATE_HZ, dtype=np.float32)
    window[: len(samples)] = samples
    features = LogMel(num_mels)(torch.from_numpy(window)[None])
    assert features.shape == (1, 3_000, num_mels)
    assert np.abs(features[0].numpy().T - np.asarray(expected["input_features"][0])).max() < 1e-4


@pytest.mark.parametrize(("speech_s", "window_s"), [(0.64, 3), (3.999, 6), (9.9, 12), (2.0, 2)])
def test_shorter_windows_give_transformers_features(speech_s: float, window_s: int) -> None:
    window = np.zeros(window_s * RATE_HZ, dtype=np.float32)
    samples = sound(speech_s)
    window[: len(samples)] = samples
    features = LogMel(80)(torch.from_numpy(window)[None])
    assert np.abs(features[0].numpy().T - reference(window, 80)).max() < 1e-4


@pytest.mark.parametrize("level", [0.0, 1e-6, 1.0])
def test_silence_and_full_scale_give_transformers_features(level: float) -> None:
    window = np.full(RATE_HZ, level, dtype=np.float32)
    features = LogMel(80)(torch.from_numpy(window)[None])
    assert torch.isfinite(features).all()
    assert np.abs(features[0].numpy().T - reference(window, 80)).max() < 1e-4


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(3, 150), st.integers(0, 1_000))
def test_a_window_is_the_same_alone_and_among_others(num_windows: int, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = 10.0 ** -torch.arange(num_windows)[:, None]
    windows = torch.randn(num_windows, num_steps * 160, generator=generator) * 0.1 * levels
    log_mel = LogMel(80)
    together = log_mel(windows)
    for row, window in zip(together, windows, strict=True):
        assert (row - log_mel(window[None])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(16_000,), (1, 16_001), (1, 320), (1, 1, 16_000), (1, 0)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        LogMel(80)(torch.zeros(shape))
