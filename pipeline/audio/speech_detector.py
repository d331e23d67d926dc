"""Windows of sound in, speech or not out: webrtcvad behind a high-pass filter."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import webrtcvad
from numpy.typing import NDArray

from pipeline.timebase import SAMPLE_RATE_HZ

_NUM_TAPS = 257
_TAP_ONE = 1 << 15
_TRANSFORM_SAMPLES = 1_536
"""Length of the filter's Fourier transforms: an 80 ms chunk and the 256 samples before it."""
_BLOCK_SAMPLES = _TRANSFORM_SAMPLES - (_NUM_TAPS - 1)


def high_pass_taps(cutoff_hz: int) -> NDArray[np.float64]:
    """Return a linear-phase high-pass filter, float64[257]: whole numbers, 32,768 standing for 1.

    Windowed sinc (Hamming), so the transition is about 200 Hz wide and the delay 128 samples (8 ms). With whole taps
    every sum is a whole number, so that the result does not depend on how a processor adds.
    """
    offsets = np.arange(_NUM_TAPS) - _NUM_TAPS // 2
    low_pass = np.sinc(2 * cutoff_hz / SAMPLE_RATE_HZ * offsets) * np.hamming(_NUM_TAPS)
    taps: NDArray[np.float64] = np.rint(-_TAP_ONE * low_pass / low_pass.sum())
    taps[_NUM_TAPS // 2] -= taps.sum()
    return taps


@lru_cache(maxsize=16)
def _spectrum_of(cutoff_hz: int) -> NDArray[np.complex128]:
    """Return the transform of the filter: every detector starts with it, several a minute for each stream."""
    spectrum = np.fft.rfft(high_pass_taps(cutoff_hz), _TRANSFORM_SAMPLES)
    spectrum.flags.writeable = False
    return spectrum


class SpeechDetector:
    """webrtcvad with a memory of its own: it adapts to what it has heard since it was made.

    Wind, engines and fans put most of their energy below the band that carries speech, and webrtcvad takes loud rumble
    for speech in all of its modes. So it gets the sound without what lies below `high_pass_hz` (0: all of it).
    """

    def __init__(self, mode: int, high_pass_hz: int) -> None:
        self._vad = webrtcvad.Vad(mode)
        self._spectrum = _spectrum_of(high_pass_hz) if high_pass_hz else None
        self._history = np.zeros(_NUM_TAPS - 1, np.int16)

    def hear(self, windows: NDArray[np.int16]) -> list[tuple[bool, float]]:
        """Judge the next windows, int16[n, 160, 320 or 480]: for each, whether it is speech, and its energy.

        The energy is that above the cutoff. Digital silence, as gaps are filled with, is never speech. How the windows
        are grouped into calls changes nothing.
        """
        heard = windows.tobytes()
        filtered = windows.reshape(-1) if self._spectrum is None else self._filter(windows.reshape(-1), self._spectrum)
        above_cutoff = filtered.tobytes()
        as_float = filtered.astype(np.float64).reshape(windows.shape)  # squares of int16 add up exactly
        num_bytes = windows.shape[1] * windows.itemsize
        judged: list[tuple[bool, float]] = []
        for index, window in enumerate(as_float):
            here = slice(index * num_bytes, (index + 1) * num_bytes)
            is_speech = self._vad.is_speech(above_cutoff[here], SAMPLE_RATE_HZ)
            judged.append((is_speech and bool(heard[here].strip(b"\0")), float(window @ window)))
        return judged

    def _filter(self, sound: NDArray[np.int16], spectrum: NDArray[np.complex128]) -> NDArray[np.int16]:
        """Return int16[n] filtered, exactly: the floor of each sum of products, whatever the machine.

        The transforms' error is below 0.001 even for sound at full scale, and the sums are whole numbers, so rounding
        gives them back.
        """
        joined = np.concatenate((self._history, sound))
        self._history = joined[len(sound) :]
        filtered = np.empty(len(sound), np.int16)
        for start in range(0, len(sound), _BLOCK_SAMPLES):
            block = joined[start : start + _TRANSFORM_SAMPLES]
            product = np.fft.irfft(np.fft.rfft(block, _TRANSFORM_SAMPLES) * spectrum, _TRANSFORM_SAMPLES)
            sums = product[_NUM_TAPS - 1 : len(block)]
            np.rint(sums, out=sums)
            np.floor(np.multiply(sums, 1 / _TAP_ONE, out=sums), out=sums)
            np.minimum(np.maximum(sums, -32_768, out=sums), 32_767, out=sums)
            filtered[start : start + _BLOCK_SAMPLES] = sums
        return filtered
