"""Chunks of one channel in, utterance boundaries out: webrtcvad, endpointing, and what makes both repeatable.

webrtcvad adapts to what it has heard and shows none of that state, so two detectors that began at different samples
differ for seconds. A detector is therefore thrown away at every boundary: a new one starts exactly at the utterance's
end, warmed on the `warm_up_ms` of sound before it, and hears the windows behind it (again). From such a *checkpoint*
on, boundaries are a function of the samples from `warm_up_ms` before it, which is what replay after a loss needs
(docs/architecture.md, "Same audio, same utterances"). Silence gets checkpoints too, so that a replay stays short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.audio.endpointing import Close, Endpointer, EndpointLimits, Open
from pipeline.audio.speech_detector import SpeechDetector
from pipeline.items import Chunk, CloseReason, UtteranceClosed, UtteranceOpened
from pipeline.params import Params
from pipeline.timebase import ms_to_samples

_BYTES_PER_SAMPLE = 2
_QUIET_SPAN_MS = 100


class VadParams(Params):
    """How speech is found and where utterances end. Lengths are rounded up to whole windows."""

    mode: int = Field(
        default=2, ge=0, le=3, description="webrtcvad's aggressiveness: 3 takes the least noise for speech"
    )
    high_pass_hz: int = Field(
        default=400, ge=0, le=1_000, description="the detector hears nothing below; 0: everything"
    )
    window_ms: Literal[10, 20, 30] = Field(default=20, description="sound per decision of the detector")
    onset_ms: int = Field(
        default=100, ge=10, le=1_000, description="unbroken speech that an utterance must contain to open"
    )
    min_speech_ms: int = Field(default=200, ge=10, le=2_000, description="speech in all before an utterance opens")
    hangover_ms: int = Field(default=480, ge=60, le=3_000, description="silence after which an utterance is over")
    pre_roll_ms: int = Field(default=300, ge=0, le=2_000, description="sound kept before the first speech")
    post_roll_ms: int = Field(default=200, ge=30, le=3_000, description="sound kept behind the last speech")
    soft_limit_ms: int = Field(
        default=8_000, ge=1_000, le=28_000, description="length from which a short pause is enough"
    )
    soft_pause_ms: int = Field(default=200, ge=30, le=3_000, description="the shortest silence that counts as a pause")
    limit_pause_ms: int = Field(
        default=60,
        ge=10,
        le=3_000,
        description="near the hard limit so short a silence is enough; in between, the nearer the shorter",
    )
    hard_limit_ms: int = Field(default=15_000, ge=2_000, le=28_000, description="length at which an utterance is cut")
    cut_search_ms: int = Field(default=800, ge=200, le=14_000, description="how far back the place for the cut may lie")
    warm_up_ms: int = Field(default=1_000, ge=0, le=10_000, description="sound that a new detector hears beforehand")
    renew_ms: int = Field(default=30_000, ge=5_000, le=300_000, description="grid of new detectors while nobody speaks")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for low, high in (
            ("post_roll_ms", "hangover_ms"),
            ("soft_pause_ms", "hangover_ms"),
            ("limit_pause_ms", "soft_pause_ms"),
            ("soft_pause_ms", "cut_search_ms"),
            ("pre_roll_ms", "warm_up_ms"),
            ("soft_limit_ms", "hard_limit_ms"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must not be above {high}={getattr(self, high)}")
        if 2 * self.cut_search_ms > self.hard_limit_ms:
            raise ValueError(
                f"cut_search_ms={self.cut_search_ms} must be at most half of hard_limit_ms={self.hard_limit_ms}"
            )
        return self

    def windows(self, ms: int) -> int:
        """Return how many whole windows cover `ms` milliseconds."""
        return -(-ms // self.window_ms)

    @property
    def history_ms(self) -> int:
        """How far behind the newest sample an utterance that opens now can begin.

        It opens when `min_speech_ms` of speech came together, in the worst case one window at a time with almost a
        hangover between them.
        """
        return self.windows(self.min_speech_ms) * self.hangover_ms + self.onset_ms + self.pre_roll_ms + 1_000

    def limits(self) -> EndpointLimits:
        """Return the lengths that endpointing goes by, in windows."""
        return EndpointLimits(
            onset=self.windows(self.onset_ms),
            min_speech=self.windows(self.min_speech_ms),
            hangover=self.windows(self.hangover_ms),
            pre_roll=self.windows(self.pre_roll_ms),
            post_roll=self.windows(self.post_roll_ms),
            soft_limit=self.windows(self.soft_limit_ms),
            soft_pause=self.windows(self.soft_pause_ms),
            limit_pause=self.windows(self.limit_pause_ms),
            hard_limit=self.windows(self.hard_limit_ms),
            cut_search=self.windows(self.cut_search_ms),
            quiet_span=self.windows(_QUIET_SPAN_MS),
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """From where boundaries can be found again without knowing what came before, but for `warm_up_ms` of sound.

    `previous_end_sample` is the end of the last utterance before, which pre-roll does not reach behind. `is_open` says
    that an utterance begins at `start_sample` itself: the one before was cut there.
    """

    start_sample: int
    previous_end_sample: int
    is_open: bool = False

    @classmethod
    def behind(cls, end_sample: int, reason: CloseReason) -> Checkpoint:
        """Return the checkpoint that the end of an utterance is, from what its final record tells."""
        return cls(end_sample, end_sample, is_open=reason is CloseReason.LIMIT)


STREAM_START = Checkpoint(0, 0)


class _RecentSound:
    """The newest samples as bytes, addressed by media sample."""

    def __init__(self, start_sample: int) -> None:
        self._bytes = bytearray()
        self.start_sample = start_sample

    @property
    def end_sample(self) -> int:
        return self.start_sample + len(self._bytes) // _BYTES_PER_SAMPLE

    def append(self, chunk: Chunk) -> None:
        self._bytes += chunk.samples.tobytes()

    def cut(self, start_sample: int, num_samples: int) -> NDArray[np.int16]:
        first = (start_sample - self.start_sample) * _BYTES_PER_SAMPLE
        # copied: a view would forbid the bytearray to shrink
        return np.frombuffer(bytes(self._bytes[first : first + num_samples * _BYTES_PER_SAMPLE]), np.int16)

    def drop_before(self, sample: int) -> None:
        if sample > self.start_sample:
            del self._bytes[: (sample - self.start_sample) * _BYTES_PER_SAMPLE]
            self.start_sample = sample


class ChunksToUtterances:
    """Finds the utterances of one channel.

    Windows lie on a grid that starts at media sample 0, so every boundary is a whole number of windows. A window of
    digital silence, as gaps are filled with, is never speech.

    Args:
        params: see `VadParams`.
        channel: the channel whose chunks will come.
        resume_at: where to start looking for speech. The first chunk pushed may lie up to `warm_up_ms` (and a
            chunk) before that and should, unless the stream starts there: the detector is warmed on it.
    """

    def __init__(self, params: VadParams, channel: int, resume_at: Checkpoint = STREAM_START) -> None:
        self._params = params
        self._channel = channel
        self._limits = params.limits()
        self._window_samples = ms_to_samples(params.window_ms)
        self._warm_up_windows = params.windows(params.warm_up_ms)
        self._renew_windows = params.windows(params.renew_ms)
        if resume_at.start_sample % self._window_samples:
            raise ValueError(
                f"checkpoint at sample {resume_at.start_sample} is not on the grid of {params.window_ms} ms"
            )
        self._sound: _RecentSound | None = None
        self._next_index: int | None = None
        self._events: list[UtteranceOpened | UtteranceClosed] = []
        self._detector: SpeechDetector | None = None
        self._next_window = 0
        self._resume_at(resume_at)
        self._is_flushed = False

    @property
    def last_speech_sample(self) -> int:
        """The end of the newest window that was judged to be speech since the last boundary."""
        return self._endpointer.speech_end * self._window_samples

    @property
    def checkpoint(self) -> Checkpoint:
        """The newest point from which a replay finds the same boundaries as this object will.

        A replay needs `warm_up_ms` of sound before it as well.
        """
        return self._checkpoint

    @property
    def num_held_samples(self) -> int:
        """How much sound this object keeps: bounded by `cut_search_ms`, `warm_up_ms` and a chunk."""
        return 0 if self._sound is None else self._sound.end_sample - self._sound.start_sample

    def push(self, chunk: Chunk) -> list[UtteranceOpened | UtteranceClosed]:
        """Take the next chunk and return the boundaries that are now certain, in order.

        Raises:
            ValueError: if the chunk is of another channel, does not follow the last one, or is the first one and lies
                behind the point to resume at.
            RuntimeError: after `flush`.
        """
        sound = self._accept(chunk)
        sound.append(chunk)
        while (end_window := sound.end_sample // self._window_samples) > self._next_window:
            self._judge(sound, end_window)
        history = self._limits.cut_search + self._warm_up_windows + 1
        sound.drop_before((self._next_window - history) * self._window_samples)
        events, self._events = self._events, []
        return events

    def flush(self, end_sample: int | None = None) -> list[UtteranceClosed]:
        """End the stream and close the open utterance, if any.

        Args:
            end_sample: where the sound ended, if before the end of the last chunk (which is padded with zeros).
        """
        if self._is_flushed:
            return []
        self._is_flushed = True
        close = self._endpointer.finish()
        if close is None or self._sound is None:
            return []
        closed = self._closed_at(close)
        if end_sample is None or end_sample >= closed.end_sample:
            return [closed]
        last_speech_sample = min(closed.last_speech_sample, end_sample)
        return [UtteranceClosed(self._channel, end_sample, last_speech_sample, closed.reason)]

    def _accept(self, chunk: Chunk) -> _RecentSound:
        if self._is_flushed:
            raise RuntimeError("chunk after flush: a stream has one end; make a new ChunksToUtterances")
        if chunk.channel != self._channel:
            raise ValueError(f"got a chunk of channel {chunk.channel}, expected channel {self._channel}")
        if self._sound is None:
            if chunk.start_sample > self._checkpoint.start_sample:
                raise ValueError(
                    f"first chunk starts at sample {chunk.start_sample}, behind the checkpoint at "
                    f"{self._checkpoint.start_sample}"
                )
            self._sound = _RecentSound(chunk.start_sample)
        elif chunk.index != self._next_index:
            raise ValueError(f"chunk {chunk.index} does not follow chunk {(self._next_index or 0) - 1}")
        self._next_index = chunk.index + 1
        return self._sound

    def _judge(self, sound: _RecentSound, end_window: int) -> None:
        """Judge the windows up to `end_window`, or up to the first one that makes the detector start anew.

        The detector hears all of them at once, because a call costs more than a window; one that is thrown away may
        have heard more than counts.
        """
        if self._detector is None:
            self._detector = self._warmed_detector(sound)
        for is_speech, energy in self._detector.hear(self._windows(sound, self._next_window, end_window)):
            self._next_window += 1
            match self._endpointer.step(is_speech, energy):
                case Open(start, onset):
                    self._events.append(self._opened_at(start, onset))
                case Close() as close:
                    self._events.append(self._closed_at(close))
                    self._resume_at(Checkpoint.behind(close.end * self._window_samples, close.reason))
                    return
                case None if self._is_renewal_due():
                    here = self._next_window * self._window_samples
                    self._resume_at(Checkpoint(here, self._checkpoint.previous_end_sample))
                    return

    def _is_renewal_due(self) -> bool:
        """Return whether nobody speaks and the grid of `renew_ms` has been passed since the last new detector."""
        began = self._checkpoint.start_sample // self._window_samples
        return self._endpointer.is_quiet and self._next_window // self._renew_windows > began // self._renew_windows

    def _resume_at(self, checkpoint: Checkpoint) -> None:
        """Go on at `checkpoint` with a new detector; nothing else that was heard counts any more."""
        self._checkpoint = checkpoint
        self._detector = None
        self._next_window = checkpoint.start_sample // self._window_samples
        floor = checkpoint.previous_end_sample // self._window_samples
        self._endpointer = Endpointer(self._limits, self._next_window, floor=floor, is_open=checkpoint.is_open)
        if checkpoint.is_open:
            self._events.append(self._opened_at(self._next_window, self._next_window))

    def _warmed_detector(self, sound: _RecentSound) -> SpeechDetector:
        detector = SpeechDetector(self._params.mode, self._params.high_pass_hz)
        first = max(self._next_window - self._warm_up_windows, -(-sound.start_sample // self._window_samples))
        detector.hear(self._windows(sound, first, self._next_window))
        return detector

    def _windows(self, sound: _RecentSound, first: int, end: int) -> NDArray[np.int16]:
        """Return windows `first` to `end`, int16[end - first, window_samples]."""
        samples = sound.cut(first * self._window_samples, (end - first) * self._window_samples)
        return samples.reshape(end - first, self._window_samples)

    def _opened_at(self, start: int, onset: int) -> UtteranceOpened:
        return UtteranceOpened(self._channel, start * self._window_samples, onset * self._window_samples)

    def _closed_at(self, close: Close) -> UtteranceClosed:
        end_sample, speech_end = close.end * self._window_samples, close.speech_end * self._window_samples
        return UtteranceClosed(self._channel, end_sample, speech_end, close.reason)
