"""What a call takes an encoder: what it measured at load, scaled by what was seen since. Without I/O or a clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.items import Snapshot


class CostModel:
    """Predicts an encoder's time for calls.

    It starts from what the encoder measured at load. Two scales, of partials and of finals, follow the calls since
    then, slowly, so that a machine that has become busy gets smaller calls.
    """

    _FOLLOW = 0.1

    def __init__(self, estimate_ms: Callable[[int, bool], float], num_side_by_side: int = 1) -> None:
        """Take what a snapshot costs alone, by its number of samples and whether it is final.

        `num_side_by_side` partials of a call run at once, finals one behind the other.
        """
        self._estimate_ms = estimate_ms
        self._num_side_by_side = num_side_by_side
        self._partial_scale = self._final_scale = 1.0

    def predict_ms(self, snapshots: Sequence[Snapshot]) -> float:
        """Return the expected time of one call with `snapshots`, in milliseconds."""
        finals = [self._estimate_ms(len(snapshot.samples), True) for snapshot in snapshots if snapshot.is_final]
        partials = [self._estimate_ms(len(snapshot.samples), False) for snapshot in snapshots if not snapshot.is_final]
        side_by_side_ms = max(max(partials, default=0.0), sum(partials) / self._num_side_by_side)
        return self._final_scale * sum(finals) + self._partial_scale * side_by_side_ms

    def observe(self, snapshots: Sequence[Snapshot], measured_ms: float) -> None:
        """Take note that one call with `snapshots` took `measured_ms`; of both kinds, if it held both."""
        predicted_ms = self.predict_ms(snapshots)
        if predicted_ms <= 0 or measured_ms <= 0:
            return
        ratio = min(4.0, max(0.25, measured_ms / predicted_ms)) ** self._FOLLOW
        if any(snapshot.is_final for snapshot in snapshots):
            self._final_scale = min(100.0, max(0.01, self._final_scale * ratio))
        if not all(snapshot.is_final for snapshot in snapshots):
            self._partial_scale = min(100.0, max(0.01, self._partial_scale * ratio))
