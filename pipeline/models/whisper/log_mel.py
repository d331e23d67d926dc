"""Whisper's log-mel front end, equal to transformers' `WhisperFeatureExtractor` for a window of the same length.

25 ms Hann windows every 10 ms, power spectrum, Slaney mel filters from 0 to 8 kHz, log10, floored 8 below the window's
maximum, scaled to about -1..1 (OpenAI's `whisper/audio.py`; the filters follow librosa's `filters.mel`).
"""

from __future__ import annotations

import math

import torch

from pipeline.timebase import SAMPLE_RATE_HZ

FFT_SAMPLES = 400
HOP_SAMPLES = 160
_MIN_POWER = 1e-10
_DYNAMIC_RANGE = 8.0  # in units of log10 of power

# Slaney's mel scale: linear up to 1 kHz, logarithmic above (Auditory Toolbox, 1998).
_HZ_PER_MEL = 200.0 / 3.0
_LOG_FROM_HZ = 1_000.0
_LOG_FROM_MEL = _LOG_FROM_HZ / _HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0


class LogMel:
    """The front end for `num_mels` bands on one device; stateless between calls."""

    def __init__(self, num_mels: int, device: torch.device | str = "cpu") -> None:
        self.num_mels = num_mels
        self._window = torch.hann_window(FFT_SAMPLES, device=device)
        self._filters = mel_filters(num_mels).to(device)

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the features of windows that lie one below the other.

        Args:
            samples: float32[num_windows, num_samples], 16 kHz, -1..1, with all the silence that the window has; the
                number of samples is a multiple of 160 and at least 400.

        Returns:
            float32[num_windows, num_samples / 160, num_mels]: time before mels, as the encoder reads it.

        Raises:
            ValueError: if the shape is not that.
        """
        if samples.dim() != 2 or samples.shape[1] % HOP_SAMPLES or samples.shape[1] < FFT_SAMPLES:
            raise ValueError(
                f"samples have shape {list(samples.shape)}, expected [windows, a multiple of {HOP_SAMPLES} from "
                f"{FFT_SAMPLES} on]"
            )
        spectrum = torch.stft(samples, FFT_SAMPLES, HOP_SAMPLES, window=self._window, return_complex=True)
        # One column more than there are hops comes out; Whisper drops the last one.
        parts = torch.view_as_real(spectrum[..., :-1])
        power = parts.square().sum(dim=-1).transpose(1, 2)  # [windows, hops, 201]
        log_power = (power @ self._filters).clamp_min_(_MIN_POWER).log10_()
        floor = log_power.amax(dim=(1, 2), keepdim=True) - _DYNAMIC_RANGE
        return torch.maximum(log_power, floor).add_(4.0).div_(4.0)


def mel_filters(num_mels: int) -> torch.Tensor:
    """Return the triangular filters, float32[201, num_mels], scaled by Slaney's normalisation to equal area."""
    bin_hz = torch.linspace(0.0, SAMPLE_RATE_HZ / 2, FFT_SAMPLES // 2 + 1, dtype=torch.float64)
    top_mel = _LOG_FROM_MEL + math.log(SAMPLE_RATE_HZ / 2 / _LOG_FROM_HZ) / _LOG_STEP
    edge_hz = _mel_to_hz(torch.linspace(0.0, top_mel, num_mels + 2, dtype=torch.float64))
    low, centre, high = edge_hz[:-2], edge_hz[1:-1], edge_hz[2:]
    rising = (bin_hz[:, None] - low) / (centre - low)
    falling = (high - bin_hz[:, None]) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    return (triangles * (2.0 / (high - low))).to(torch.float32)


def _mel_to_hz(mels: torch.Tensor) -> torch.Tensor:
    logarithmic = _LOG_FROM_HZ * torch.exp(_LOG_STEP * (mels - _LOG_FROM_MEL))
    return torch.where(mels < _LOG_FROM_MEL, mels * _HZ_PER_MEL, logarithmic)
