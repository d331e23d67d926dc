"""When an utterance opens and closes: a plain state machine over VAD windows.

All positions and lengths are whole windows, so that nothing here depends on sound or on a detector. One `Endpointer`
lives from the end of one utterance to the end of the next; whoever drives it starts a new one, and a new detector, at
`Close.end` and feeds it the windows from there on again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from pipeline.items import CloseReason


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """Lengths in windows; what each means is said at the field of the same name in `VadParams`."""

    onset: int
    min_speech: int
    hangover: int
    pre_roll: int
    post_roll: int
    soft_limit: int
    soft_pause: int
    limit_pause: int
    hard_limit: int
    cut_search: int
    quiet_span: int


@dataclass(frozen=True, slots=True)
class Open:
    """An utterance begins at window `start`; `onset` is its first window with speech."""

    start: int
    onset: int


@dataclass(frozen=True, slots=True)
class Close:
    """The utterance ends before window `end`. `speech_end` is the end of its last window with speech, at most `end`."""

    end: int
    speech_end: int
    reason: CloseReason


class _State(Enum):
    # Nobody speaks, or not yet for long enough to be sure.
    IDLE = auto()
    # An utterance is open.
    SPEECH = auto()
    # The utterance has ended; the instance is used up.
    CLOSED = auto()


class Endpointer:
    """Finds one utterance in consecutive windows.

    Args:
        limits: the lengths to go by.
        start: the first window that `step` will get.
        floor: the earliest window that pre-roll may reach, at most `start`.
        is_open: whether an utterance begins at `start` without waiting for an onset (after a cut).
    """

    def __init__(self, limits: EndpointLimits, start: int, *, floor: int | None = None, is_open: bool = False) -> None:
        self._limits = limits
        self._next = start
        self._floor = start if floor is None else floor
        self._start = start
        self._speech_end = start
        self._num_speech = 0
        self._run = 0
        self._longest_run = 0
        self._state = _State.SPEECH if is_open else _State.IDLE
        self._recent: deque[tuple[bool, float]] = deque(maxlen=limits.cut_search)

    @property
    def is_open(self) -> bool:
        """Whether an utterance is open."""
        return self._state is _State.SPEECH

    @property
    def speech_end(self) -> int:
        """The end of the last window with speech so far; the first window if there was none."""
        return self._speech_end

    @property
    def is_quiet(self) -> bool:
        """Whether no utterance is open and no speech is pending that could open one."""
        return self._state is _State.IDLE and self._num_speech == 0

    def step(self, is_speech: bool, energy: float) -> Open | Close | None:
        """Take the next window and return what it decides.

        Raises:
            RuntimeError: after a Close.
        """
        if self._state is _State.CLOSED:
            raise RuntimeError("the utterance has been closed: start a new Endpointer at its end")
        self._next += 1
        if self._state is _State.IDLE:
            return self._step_idle(is_speech)
        self._recent.append((is_speech, energy))
        if is_speech:
            self._speech_end = self._next
        return self._close_if_due()

    def finish(self) -> Close | None:
        """End the stream: close an open utterance at most `post_roll` behind its last speech."""
        if self._state is not _State.SPEECH:
            return None
        return self._close(min(self._next, self._speech_end + self._limits.post_roll), CloseReason.END)

    def _step_idle(self, is_speech: bool) -> Open | None:
        if not is_speech:
            self._run = 0
            if self._next - self._speech_end >= self._limits.soft_pause:
                self._num_speech = self._longest_run = 0
            return None
        if self._num_speech == 0:
            self._start = self._next - 1
        self._speech_end = self._next
        self._num_speech += 1
        self._run += 1
        self._longest_run = max(self._longest_run, self._run)
        if self._longest_run < self._limits.onset or self._num_speech < self._limits.min_speech:
            return None
        onset = self._start
        self._start = max(self._floor, onset - self._limits.pre_roll)
        self._state = _State.SPEECH
        return Open(self._start, onset)

    def _close_if_due(self) -> Close | None:
        limits = self._limits
        length, pause = self._next - self._start, self._next - self._speech_end
        if pause >= limits.hangover:
            return self._close(self._speech_end + limits.post_roll, CloseReason.PAUSE)
        if length >= limits.soft_limit and pause >= self._pause_needed(length):
            # Half of the pause stays for the next utterance, which may begin with a consonant too soft to be detected.
            return self._close(self._speech_end + min(limits.post_roll, pause // 2), CloseReason.LONG)
        if length >= limits.hard_limit:
            cut = self._best_cut()
            first = self._next - len(self._recent)
            heard = [index for index, (is_speech, _) in enumerate(self._recent) if is_speech and index < cut]
            self._speech_end = first + (heard[-1] + 1 if heard else 0)
            return self._close(first + cut, CloseReason.LIMIT)
        return None

    def _pause_needed(self, length: int) -> int:
        """Return the pause that ends an utterance of `length` windows: it gets shorter from limit to limit."""
        limits = self._limits
        span = max(1, limits.hard_limit - limits.soft_limit)
        return limits.soft_pause - (limits.soft_pause - limits.limit_pause) * (length - limits.soft_limit) // span

    def _close(self, end: int, reason: CloseReason) -> Close:
        self._state = _State.CLOSED
        return Close(end, self._speech_end, reason)

    def _best_cut(self) -> int:
        """Return where among the recent windows to cut: above 0, at most their number.

        The middle of the longest run without speech; where there is none, the middle of the `quiet_span` windows with
        the least energy. Of equals the last.
        """
        best_length, cut, run = 0, 0, 0
        for index, (is_speech, _) in enumerate(self._recent):
            run = 0 if is_speech else run + 1
            if run and run >= best_length:
                best_length, cut = run, index + 1 - run // 2
        if best_length:
            return cut
        energies = [energy for _, energy in self._recent]
        span = self._limits.quiet_span
        total = best = sum(energies[:span])
        best_start = 0
        for start in range(1, len(energies) - span + 1):
            total = sum(energies[start : start + span])
            if total <= best:
                best, best_start = total, start
        return best_start + (span + 1) // 2
