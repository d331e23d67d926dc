"""One window of sound in, speech or not out: webrtcvad behind a high-pass filter."""

from __future__ import annotations

import numpy as np
import webrtcvad
from numpy.typing import NDArray

from pipeline.timebase import SAMPLE_RATE_HZ

_NUM_TAPS = 257
_TAP_ONE = 1 << 15


def high_pass_taps(cutoff_hz: int) -> NDArray[np.float64]:
    """Return a linear-phase high-pass filter, float64[257]: whole numbers, 32,768 standing for 1.

    Windowed sinc (Hamming), so the transition is about 200 Hz wide and the delay 128 samples (8 ms). With whole taps
    every sum is exact in float64, so that the result does not depend on the order in which a processor adds.
    """
    offsets = np.arange(_NUM_TAPS) - _NUM_TAPS // 2
    low_pass = np.sinc(2 * cutoff_hz / SAMPLE_RATE_HZ * offsets) * np.hamming(_NUM_TAPS)
    taps: NDArray[np.float64] = np.rint(-_TAP_ONE * low_pass / low_pass.sum())
    taps[_NUM_TAPS // 2] -= taps.sum()
    return taps


class SpeechDetector:
    """webrtcvad with a memory of its own: it adapts to what it has heard since it was made.

    Wind, engines and fans put most of their energy below the band that carries speech, and webrtcvad takes loud rumble
    for speech in all of its modes. So it gets the sound without what lies below `high_pass_hz` (0: all of it).
    """

    def __init__(self, mode: int, high_pass_hz: int) -> None:
        self._vad = webrtcvad.Vad(mode)
        self._taps = high_pass_taps(high_pass_hz) if high_pass_hz else None
        self._history = np.zeros(_NUM_TAPS - 1, np.int16)

    def hear(self, window: NDArray[np.int16]) -> tuple[bool, float]:
        """Judge the next int16[160, 320 or 480]; return whether it is speech, and its energy above the cutoff.

        Digital silence, as gaps are filled with, is never speech.
        """
        filtered = window if self._taps is None else self._filter(window, self._taps)
        is_speech = self._vad.is_speech(filtered.tobytes(), SAMPLE_RATE_HZ)
        as_float = filtered.astype(np.float64)  # squares of int16 add up exactly
        return is_speech and bool(window.any()), float(as_float @ as_float)

    def _filter(self, window: NDArray[np.int16], taps: NDArray[np.float64]) -> NDArray[np.int16]:
        joined = np.concatenate((self._history, window))
        self._history = joined[len(window) :]
        exact = np.convolve(joined.astype(np.float64), taps, mode="valid")
        return np.clip(np.floor(exact / _TAP_ONE), -32_768, 32_767).astype(np.int16)
