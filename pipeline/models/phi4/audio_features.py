"""Phi-4-multimodal's log-mel front end, equal to transformers' `Phi4MultimodalFeatureExtractor` for one clip.

25 ms Hamming windows every 10 ms, pre-emphasis within each window, samples scaled to 16 bits, power spectrum of 512
points, Kaldi's mel filters from 0 to 7,690 Hz, natural logarithm of at least 1 (Microsoft's
`processing_phi4mm.py` is where the numbers come from). A step of 10 ms depends on its own 400 samples only, so a clip
may be taken in pieces: steps `first` to `last` come from samples `first * 160` to `last * 160 + 400`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pipeline.timebase import SAMPLE_RATE_HZ

STEP_SAMPLES = 160
WINDOW_SAMPLES = 400
_FFT_SAMPLES = 512
_NUM_BINS = _FFT_SAMPLES // 2 + 1
_TOP_HZ = 7_690.0
_PRE_EMPHASIS = 0.97
_FULL_SCALE = 32_768.0
_MIN_POWER = 1.0
# Products and vectorised functions round by the shape they are given, so every step is computed in a block of one
# shape; one that fills vector registers and stays on one thread.
_BLOCK_STEPS = 64


def num_steps(num_samples: int) -> int:
    """Return how many steps of 10 ms a clip of `num_samples` has; samples after the last whole window give none."""
    return max(0, (num_samples - WINDOW_SAMPLES) // STEP_SAMPLES + 1)


class AudioFeatures:
    """The front end for `num_mels` bands on one device; stateless between calls."""

    def __init__(self, num_mels: int, device: torch.device | str = "cpu") -> None:
        self.num_mels = num_mels
        self.device = torch.device(device)
        window = torch.hamming_window(WINDOW_SAMPLES, periodic=False, dtype=torch.float64)
        self._window = window.to(self.device)
        self._filters = mel_filters(num_mels).to(self.device)

    @torch.inference_mode()
    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the features of one clip, or of a part of it: the same bits for a step in either.

        Args:
            samples: float32[num_samples], 16 kHz mono, -1..1, at least 400.

        Returns:
            float32[num_steps(num_samples), num_mels], on its device.

        Raises:
            ValueError: if the shape is not that.
        """
        if samples.dim() != 1 or len(samples) < WINDOW_SAMPLES:
            raise ValueError(
                f"samples have shape {list(samples.shape)}, expected [{WINDOW_SAMPLES} or more] (25 ms): add silence"
            )
        count = num_steps(len(samples))
        num_blocks = -(-count // _BLOCK_STEPS)
        block_hop = _BLOCK_STEPS * STEP_SAMPLES
        block_samples = block_hop - STEP_SAMPLES + WINDOW_SAMPLES
        used = samples[: (count - 1) * STEP_SAMPLES + WINDOW_SAMPLES].to(self.device, torch.float32)
        padded = F.pad(used, (0, (num_blocks - 1) * block_hop + block_samples - len(used)))
        blocks = padded.unfold(0, block_samples, block_hop)
        return torch.cat([self._block(block) for block in blocks])[:count]

    def _block(self, samples: torch.Tensor) -> torch.Tensor:
        windows = samples.unfold(0, WINDOW_SAMPLES, STEP_SAMPLES)  # [_BLOCK_STEPS, 400]
        # Each window starts anew: the sample before its first one counts as equal to it.
        before = torch.cat([windows[:, :1], windows[:, :-1]], dim=1)
        emphasised = (windows - _PRE_EMPHASIS * before) * _FULL_SCALE
        spectrum = torch.fft.rfft(self._window * emphasised, n=_FFT_SAMPLES).to(torch.complex64)
        power: torch.Tensor = spectrum.abs().square() @ self._filters  # [_BLOCK_STEPS, num_mels]
        return power.clamp_min_(_MIN_POWER).log_()


def mel_filters(num_mels: int) -> torch.Tensor:
    """Return Kaldi's filters, float32[257, num_mels]: triangles on the mel scale that are not scaled by area.

    Their edges are equally far apart in mels (Kaldi's `MelBanks`; torchaudio's `compliance.kaldi.get_mel_banks`).
    """
    bin_hz = torch.arange(_NUM_BINS, dtype=torch.float64) * (SAMPLE_RATE_HZ / _FFT_SAMPLES)
    bin_mel = 1_127.0 * torch.log(1.0 + bin_hz / 700.0)
    top_mel = 1_127.0 * math.log(1.0 + _TOP_HZ / 700.0)
    edge_mel = torch.linspace(0.0, top_mel, num_mels + 2, dtype=torch.float64)
    low, centre, high = edge_mel[:-2], edge_mel[1:-1], edge_mel[2:]
    rising = (bin_mel[:, None] - low) / (centre - low)
    falling = (high - bin_mel[:, None]) / (high - centre)
    return torch.minimum(rising, falling).clamp_min(0.0).to(torch.float32)
