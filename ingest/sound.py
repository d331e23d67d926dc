"""The sound of one file: packets in, blocks of 16 kHz and gaps out. Imports PyAV: for processes that decode."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.audio.stream import AudioStream
from numpy.typing import NDArray

from ingest.normalize import Normalizer, check_form
from ingest.source import AudioBlock, AudioParams, SourceGap
from ingest.tracks import MAX_BAD_PACKETS, reason_of
from ingest.wire import MAX_BLOCK_SAMPLES
from pipeline.errors import MediaError
from pipeline.timebase import SAMPLE_RATE_HZ


class Timeline:
    """Finds sound that is missing from the timestamps. Time only goes forward: a jump back begins a new count."""

    def __init__(self, params: AudioParams) -> None:
        self._params = params
        self._threshold_s = Fraction(params.min_gap_ms, 1_000)
        self._clearly_no_jump_s = params.min_gap_ms / 2_000
        self._began_s: Fraction | None = None
        self._num_samples = 0  # heard since then, at this rate
        self._rate_hz = 0
        self._zero_s: Fraction | None = None  # the timestamp at which the media clock would have been 0

    def gap_before(self, sound: av.AudioFrame) -> int:
        """Return how many samples at 16 kHz are missing in front of `sound`, or 0, and count it in.

        Raises:
            MediaError: if the jump is over `max_gap_ms`.
        """
        if self._is_on_time(sound):
            self._num_samples += sound.samples
            return 0
        expected_s = self._expected_s()
        if sound.pts is None or sound.time_base is None:
            begins_s = expected_s or Fraction(0)
        else:
            begins_s = sound.pts * sound.time_base
        jump_s = begins_s - (begins_s if expected_s is None else expected_s)
        if expected_s is not None and abs(jump_s) <= self._threshold_s:
            begins_s = expected_s
        if self._zero_s is None:
            self._zero_s = begins_s
        elif jump_s < -self._threshold_s:
            self._zero_s += jump_s
        self._began_s, self._num_samples, self._rate_hz = begins_s, sound.samples, sound.sample_rate
        if jump_s <= self._threshold_s:
            return 0
        if jump_s > Fraction(self._params.max_gap_ms, 1_000):
            raise MediaError(
                f"the timestamps jump by {float(jump_s):.0f} s, over the limit of "
                f"{self._params.max_gap_ms / 1_000:.0f} s: repair the file or raise audio.max_gap_ms"
            )
        return round(jump_s * SAMPLE_RATE_HZ)

    def skip(self, num_samples: int) -> None:
        """Let `num_samples` at 16 kHz pass as if they had been heard."""
        self._num_samples += num_samples * self._rate_hz // SAMPLE_RATE_HZ

    def sample_of(self, time_s: Fraction) -> int | None:
        """Return the media time of a timestamp of the file; None before any sound."""
        return None if self._zero_s is None else round((time_s - self._zero_s) * SAMPLE_RATE_HZ)

    def _is_on_time(self, sound: av.AudioFrame) -> bool:
        """Whether there is clearly no jump. Fractions are exact and slow, and nearly all sound is on time."""
        if self._began_s is None or sound.sample_rate != self._rate_hz:
            return False
        if sound.time is None:
            return True
        expected_s = float(self._began_s) + self._num_samples / self._rate_hz
        return abs(sound.time - expected_s) < self._clearly_no_jump_s

    def _expected_s(self) -> Fraction | None:
        return None if self._began_s is None else self._began_s + Fraction(self._num_samples, self._rate_hz)


class Blocks:
    """Collects sound into blocks that end where a chunk of the stream ends: what is less starts no work there."""

    def __init__(self) -> None:
        self.num_samples = 0  # of sound, given out or held
        self.end_sample = 0  # media time behind all that was pushed and skipped
        self._held: list[NDArray[np.int16]] = []
        self._num_channels = 1

    def push(self, samples: NDArray[np.int16]) -> Iterator[AudioBlock]:
        """Take int16[channels, n] and yield the blocks that are complete."""
        self._num_channels = samples.shape[0]
        while samples.shape[1]:
            part = samples[:, : MAX_BLOCK_SAMPLES - self.end_sample % MAX_BLOCK_SAMPLES]
            samples = samples[:, part.shape[1] :]
            self._held.append(part)
            self.end_sample += part.shape[1]
            self.num_samples += part.shape[1]
            if self.end_sample % MAX_BLOCK_SAMPLES == 0:
                yield from self.flush()

    def push_silence(self, end_sample: int) -> Iterator[AudioBlock]:
        """Go on with zeros up to media time `end_sample` and yield the blocks that are complete."""
        while self.end_sample < end_sample:
            num_samples = min(MAX_BLOCK_SAMPLES, end_sample - self.end_sample)
            yield from self.push(np.zeros((self._num_channels, num_samples), np.int16))

    def skip(self, num_samples: int) -> None:
        """Let time go on without sound. Flush first."""
        self.end_sample += num_samples

    def flush(self) -> Iterator[AudioBlock]:
        """Yield what is held, if anything."""
        held, self._held = self._held, []
        if held:
            yield AudioBlock(held[0] if len(held) == 1 else np.concatenate(held, axis=1))


class Sound:
    """The sound of a track, or what stands for it in a file that has none: silence.

    Args:
        track: what is decoded; None: only silence can be had.
        params: see `AudioParams`.
    """

    def __init__(self, track: AudioStream | None, params: AudioParams) -> None:
        self._track = track
        self._normalizer = Normalizer(params)
        self._timeline = Timeline(params)
        self._blocks = Blocks()
        self._num_bad = 0
        self._last_error = ""
        self._has_sound = False

    @property
    def num_nonfinite(self) -> int:
        """How many samples were NaN or infinite."""
        return self._normalizer.num_nonfinite

    @property
    def has_begun(self) -> bool:
        """Whether anything was decoded, so that it is known where the media clock is 0."""
        return self._has_sound

    def sample_of(self, time_s: Fraction) -> int | None:
        """Return the media time of a timestamp of the file; None before any sound."""
        return self._timeline.sample_of(time_s)

    def push(self, packet: av.Packet[AudioStream] | None) -> Iterator[AudioBlock | SourceGap]:
        """Take the next packet, or None at the end, and yield what is ready; a damaged packet is passed over.

        Raises:
            MediaError: nothing can be decoded, or nothing any more; its form cannot be used, or its timestamps leap.
        """
        for sound in self._decoded(packet):
            check_form(sound.sample_rate, sound.layout.nb_channels)
            gap_samples = self._timeline.gap_before(sound)
            if gap_samples:
                yield from self._blocks.push(self._normalizer.flush())
                yield from self._blocks.flush()
                yield SourceGap(gap_samples, "timestamps of the source jump")
                self._blocks.skip(gap_samples)
            yield from self._blocks.push(self._normalizer.push(sound))
        if packet is None:
            if self._num_bad and not self._has_sound:
                raise MediaError(f"the audio track cannot be decoded: {self._last_error}")
            yield from self._blocks.push(self._normalizer.flush())
            yield from self._blocks.flush()
            if self._blocks.num_samples == 0:
                raise MediaError("no sound can be decoded: the audio track is empty or damaged")

    def push_silence(self, end_sample: int) -> Iterator[AudioBlock]:
        """Go on with silence up to media time `end_sample`; sound that comes after all goes on from there."""
        if self._blocks.end_sample >= end_sample:
            return
        if self._has_sound:
            yield from self._blocks.push(self._normalizer.flush())
            self._timeline.skip(max(0, end_sample - self._blocks.end_sample))
        yield from self._blocks.push_silence(end_sample)

    def flush(self) -> Iterator[AudioBlock]:
        """Yield what is held of a block."""
        return self._blocks.flush()

    def _decoded(self, packet: av.Packet[AudioStream] | None) -> Iterator[av.AudioFrame]:
        if self._track is None:
            return
        try:
            decoded = self._track.codec_context.decode(packet)
        except (av.FFmpegError, ValueError) as error:
            self._num_bad, self._last_error = self._num_bad + 1, reason_of(error)
            if self._num_bad >= MAX_BAD_PACKETS:
                raise MediaError(f"{self._num_bad} packets in a row cannot be decoded: {self._last_error}") from error
            return
        for sound in decoded:
            if sound.samples:
                self._num_bad, self._has_sound = 0, True
                yield sound
