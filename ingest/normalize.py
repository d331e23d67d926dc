"""Decoded sound of any kind in, 16 kHz int16 out.

Imports PyAV, so it belongs into processes that decode: `ingest.worker` for pulled media.
"""

from __future__ import annotations

import av
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from ingest.source import MAX_CHANNELS, MAX_RATE_HZ, MIN_RATE_HZ, AudioParams, ChannelMode
from pipeline.errors import MediaError
from pipeline.timebase import SAMPLE_RATE_HZ

_NAN_GRACE_S = 1
"""The share of bad samples is judged from this much sound on: a click at the start is no reason to refuse a stream."""

_MAX_FLOAT_LEVEL = 8.0
"""Float sound is held within this (1.0 is full scale), so that no filter overflows."""


def check_form(rate_hz: int, num_channels: int) -> None:
    """Refuse sound that cannot be brought to 16 kHz sensibly, before anything is decoded.

    Raises:
        MediaError: if the rate is not 8 to 192 kHz, or there are not 1 to 8 channels.
    """
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise MediaError(
            f"sample rate is {rate_hz} Hz; sound of {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz can be used: convert it first"
        )
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise MediaError(
            f"sound has {num_channels} channels; 1 to {MAX_CHANNELS} can be used: select or mix some first"
        )


class Normalizer:
    """Brings the sound of one stream to 16 kHz.

    Channels are mixed by FFmpeg's standard matrix for the layout (the subwoofer left out), or kept apart. NaN and
    infinite samples become zero before the resampler could smear them over their neighbours, and are counted.
    """

    def __init__(self, params: AudioParams) -> None:
        self._params = params
        self._resampler: AudioResampler | None = None
        self._form: tuple[int, str, str] | None = None
        self._packer: AudioResampler | None = None
        self._packer_form: tuple[int, str, str] | None = None
        self._num_channels: int | None = None
        self._num_values = 0
        self._num_nonfinite = 0

    @property
    def num_nonfinite(self) -> int:
        """How many samples were NaN or infinite, over all channels."""
        return self._num_nonfinite

    def push(self, sound: av.AudioFrame) -> NDArray[np.int16]:
        """Take decoded sound and return what is ready: int16[channels or 1, n], contiguous; n may be 0.

        A change of rate, layout or format inside the stream is followed, a change of the number of channels only when
        they are mixed.

        Raises:
            MediaError: if rate or channels cannot be used, or too many samples are NaN or infinite.
        """
        num_channels = sound.layout.nb_channels
        check_form(sound.sample_rate, num_channels)
        num_out = 1 if self._params.channels is ChannelMode.MIX else num_channels
        if self._num_channels is None:
            self._num_channels = num_out
        elif num_out != self._num_channels:
            raise MediaError(
                f"the number of channels changed from {self._num_channels} to {num_out}; "
                "use channels=mix for sources that do this"
            )
        clean = self._without_nonfinite(sound)
        form = (sound.sample_rate, sound.layout.name, clean.format.name)
        ready: list[av.AudioFrame] = []
        if self._resampler is None or form != self._form:
            ready = self._drain()
            self._form = form
            layout = "mono" if self._params.channels is ChannelMode.MIX else sound.layout.name
            self._resampler = AudioResampler(format="s16", layout=layout, rate=SAMPLE_RATE_HZ)
        ready += self._resampler.resample(clean)
        return self._joined(ready)

    def flush(self) -> NDArray[np.int16]:
        """Return what the resampler still holds, as `push` does. Sound may follow, as after a gap.

        Raises:
            MediaError: if too many samples of the stream were NaN or infinite.
        """
        if self._num_values:
            self._judge_nonfinite()
        ready = self._drain()
        return self._joined(ready)

    def _drain(self) -> list[av.AudioFrame]:
        resampler, self._resampler = self._resampler, None
        return [] if resampler is None else resampler.resample(None)

    def _joined(self, pieces: list[av.AudioFrame]) -> NDArray[np.int16]:
        num_channels = self._num_channels or 1
        parts = [piece.to_ndarray().reshape(-1, num_channels).T for piece in pieces]
        joined = np.concatenate([np.zeros((num_channels, 0), np.int16), *parts], axis=1)
        if joined.dtype != np.int16:
            raise RuntimeError(f"the resampler gave {joined.dtype}, expected int16")
        return np.ascontiguousarray(joined)

    def _without_nonfinite(self, sound: av.AudioFrame) -> av.AudioFrame:
        """Return the sound without NaN and infinities, and without the timestamps that the resampler would act on."""
        self._num_values += sound.samples * sound.layout.nb_channels
        if sound.format.name not in {"flt", "fltp", "dbl", "dblp"}:
            sound.pts = None
            return sound
        packed = self._packed(sound)
        values = packed.to_ndarray()
        is_finite = np.isfinite(values)
        self._num_nonfinite += int(values.size - np.count_nonzero(is_finite))
        if self._num_values >= _NAN_GRACE_S * sound.sample_rate * sound.layout.nb_channels:
            self._judge_nonfinite()
        level = np.where(is_finite, values, 0).clip(-_MAX_FLOAT_LEVEL, _MAX_FLOAT_LEVEL).astype(np.float32)
        clean = av.AudioFrame.from_ndarray(level, format="flt", layout=sound.layout)
        clean.sample_rate = sound.sample_rate
        return clean

    def _packed(self, sound: av.AudioFrame) -> av.AudioFrame:
        """Return float sound with its channels interleaved; values, NaN among them, stay what they are.

        PyAV 18.1 reads past the planes of sound that has 8 of them, so planes are never touched here.
        """
        form = (sound.sample_rate, sound.layout.name, sound.format.name)
        if self._packer is None or form != self._packer_form:
            # made once for each form: FFmpeg sets up a graph of filters for it, which costs more than 20 ms of sound
            self._packer = AudioResampler(format=sound.format.packed, layout=sound.layout, rate=sound.sample_rate)
            self._packer_form = form
        sound.pts = None  # the graph would act on a jump
        (packed,) = self._packer.resample(sound)
        return packed

    def _judge_nonfinite(self) -> None:
        share = self._num_nonfinite / self._num_values
        if share > self._params.max_nan_share:
            raise MediaError(
                f"{share:.0%} of the samples so far are NaN or infinite, over the limit of "
                f"{self._params.max_nan_share:.0%}: the recording is broken"
            )
