"""What the stages were doing between two ticks, from what their driver tells. Without I/O, threads or a clock."""

from __future__ import annotations

from actors.cadence import StageLoad


class LoadMeter:
    """Adds up busy times and waits. Times are milliseconds on any clock that does not go back."""

    def __init__(self, now_ms: float) -> None:
        self._tick_ms = now_ms
        self._encoder = _Level(now_ms)
        self._decoder = _Level(now_ms)
        self._num_decoding = 0
        self._num_decoded = 0
        self._final_wait_ms = 0.0
        self._partial_wait_ms = 0.0

    def set_encoding(self, share: float, now_ms: float) -> None:
        """From now on `share` of the encoders' places are taken, 0 to 1."""
        self._encoder.set(min(1.0, share), now_ms)

    def add_decoding(self, num: int, now_ms: float) -> None:
        """`num` more snapshots are encoded and wait for their outcomes."""
        self._num_decoding += num
        self._decoder.set(float(self._num_decoding > 0), now_ms)

    def end_decoding(self, num: int, now_ms: float) -> None:
        """`num` of them are answered, or nobody waits for them any more."""
        self._num_decoded += num
        self.add_decoding(-num, now_ms)

    def note_wait(self, waited_ms: float, *, is_final: bool) -> None:
        """A snapshot waited, or waits, for `waited_ms` for the call that carries it."""
        if is_final:
            self._final_wait_ms = max(self._final_wait_ms, waited_ms)
        else:
            self._partial_wait_ms = max(self._partial_wait_ms, waited_ms)

    def take(self, now_ms: float, waiting_work_ms: float) -> StageLoad:
        """Return the load since the last call; `waiting_work_ms` is what is predicted for the encoder."""
        load = StageLoad(
            elapsed_ms=now_ms - self._tick_ms,
            encoder_busy_ms=self._encoder.take(now_ms),
            encoder_waiting_ms=waiting_work_ms,
            decoder_busy_ms=self._decoder.take(now_ms),
            num_decoding=self._num_decoding,
            num_decoded=self._num_decoded,
            final_wait_ms=self._final_wait_ms,
            partial_wait_ms=self._partial_wait_ms,
        )
        self._tick_ms = now_ms
        self._num_decoded = 0
        self._final_wait_ms = self._partial_wait_ms = 0.0
        return load


class _Level:
    """A level that is added up over time."""

    def __init__(self, now_ms: float) -> None:
        self._level = 0.0
        self._since_ms = now_ms
        self._total_ms = 0.0

    def set(self, level: float, now_ms: float) -> None:
        self._total_ms += self._level * (now_ms - self._since_ms)
        self._level, self._since_ms = level, now_ms

    def take(self, now_ms: float) -> float:
        self.set(self._level, now_ms)
        total_ms, self._total_ms = self._total_ms, 0.0
        return total_ms
