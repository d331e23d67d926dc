"""How often partials come: one cadence for all streams of a gateway, without I/O, threads or a clock.

A closed loop over what the stage driver sees. In the last few rounds the busier stage was busy for so long (what piled
up in front of it counts as well); divided by the number of rounds that is what one partial of every utterance costs.
The cadence wanted is the one at which that takes `target_utilisation` of the time. Rounds are counted at the cadences
that were in force, so a change is never judged by what happened before it, and the loop settles without swinging.

The stages are *behind* when a final waited too long, when partials wait longer than the cadence, or when a stage did
not rest for a whole round. What the window shows is then too little, so the cadence stretches at every tick.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from pydantic import Field

from pipeline.params import Params
from pipeline.timebase import CHUNK_MS

_WINDOW_ROUNDS = 4.0
"""Utterances may come in step with each other: over fewer rounds their bursts would be taken for load."""
_MIN_WINDOW_MS = 1_500.0
_MAX_WINDOW_MS = 6_000.0
_MIN_ROUNDS = 0.1
_MAX_STEP = 1.5
"""From 320 ms to 2 s in five ticks."""
_MIN_STEP = 0.8
_DEADBAND = 1.08
"""Utilisation is not measured so exactly that it could be followed more closely."""
_HOLD_MS = 1_000.0
"""The cadence does not shorten for so long after the stages were behind: the effect of a stretch is not seen sooner."""
_GATHER_SHARE = 0.2
_MAX_GATHER_MS = 400.0
_COMPANY_SHARE = 0.7
_NO_REST_MS = 750.0
"""A stage may work for so long on one final."""


class CadenceParams(Params):
    """How busy partials may make the stages."""

    target_utilisation: float = Field(
        default=0.7, ge=0.1, le=0.95, description="share of the time for which the busier stage may work"
    )
    late_final_ms: float = Field(
        default=150.0, ge=10, le=10_000, description="a final that waits longer for its call stretches the cadence"
    )


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What the stages did since the last tick. All times in milliseconds."""

    elapsed_ms: float
    encoder_busy_ms: float  # of several places: the mean
    encoder_waiting_ms: float = 0.0  # predicted time of what waits at the end
    decoder_busy_ms: float = 0.0  # something encoded was not answered
    num_decoding: int = 0  # snapshots encoded and not answered at the end
    num_decoded: int = 0
    final_wait_ms: float = 0.0  # the longest wait of a final for its call, also of one that still waits
    partial_wait_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class _Span:
    load: StageLoad
    num_rounds: float  # how often an utterance that goes on came round
    encoder_piled_up_ms: float
    num_piled_up: int  # snapshots, in front of the decoder


class CadencePolicy:
    """The cadence that the stages can bear. Whoever drives it calls `tick` about four times a second."""

    def __init__(self, params: CadenceParams, min_cadence_ms: int, max_cadence_ms: int) -> None:
        self._params = params
        self._min_ms = float(min_cadence_ms)
        self._max_ms = float(max_cadence_ms)
        self._cadence_ms = self._min_ms
        self._last_round_ms = self._round_ms
        self._last_load = StageLoad(0.0, 0.0)
        self._spans: deque[_Span] = deque()
        self._no_rest_ms = {"encoder": 0.0, "decoder": 0.0}
        self._hold_ms = 0.0

    @property
    def cadence_ms(self) -> int:
        """New sound between two partials of an utterance, in milliseconds; whole chunks within the bounds."""
        whole_ms = round(self._cadence_ms / CHUNK_MS) * CHUNK_MS
        return round(min(self._max_ms, max(self._min_ms, whole_ms)))

    @property
    def company_cadence_ms(self) -> int:
        """The cadence while somebody waits for a call: who is nearly due goes along instead of alone a little later."""
        return round(max(self._min_ms, _COMPANY_SHARE * self.cadence_ms))

    @property
    def gather_ms(self) -> float:
        """How long after a call the next one that has partials only may wait for company, in milliseconds.

        The decoder reads its weights once a pass, whoever is in it: four partials together cost it half of what they
        cost one by one. Idle stages lose nothing by working one by one, so they do.
        """
        return min(_MAX_GATHER_MS, _GATHER_SHARE * (self.cadence_ms - self._min_ms))

    @property
    def encoder_utilisation(self) -> float:
        """Share of the last few rounds in which the encoder was busy, 0 to 1."""
        return self._share(sum(span.load.encoder_busy_ms for span in self._spans))

    @property
    def decoder_utilisation(self) -> float:
        """Share of the last few rounds in which the decoder was busy, 0 to 1."""
        return self._share(sum(span.load.decoder_busy_ms for span in self._spans))

    def tick(self, load: StageLoad) -> None:
        """Take note of what happened since the last tick and choose the cadence until the next one."""
        if load.elapsed_ms <= 0:
            return
        self._note(load)
        is_behind = self._is_behind(load)
        self._hold_ms = _HOLD_MS if is_behind else max(0.0, self._hold_ms - load.elapsed_ms)
        ratio = self._wanted_ms() / self._cadence_ms
        if is_behind:
            step = _MAX_STEP
        elif 1 / _DEADBAND < ratio < _DEADBAND or (ratio < 1 and self._hold_ms > 0):
            return
        else:
            # Half of the way: a burst more or less in the window does not show in the cadence.
            step = min(_MAX_STEP, max(_MIN_STEP, math.sqrt(ratio)))
        self._cadence_ms = min(self._max_ms, max(self._min_ms, self._cadence_ms * step))

    @property
    def _round_ms(self) -> float:
        return math.ceil(self.cadence_ms / CHUNK_MS) * CHUNK_MS

    def _note(self, load: StageLoad) -> None:
        # While the cadence grows, utterances come round more rarely than once a cadence, and the other way round.
        round_ms = self._round_ms
        growth = math.log(round_ms / self._last_round_ms)
        self._last_round_ms = round_ms
        self._spans.append(
            _Span(
                load,
                num_rounds=load.elapsed_ms / round_ms - growth,
                encoder_piled_up_ms=load.encoder_waiting_ms - self._last_load.encoder_waiting_ms,
                num_piled_up=load.num_decoding - self._last_load.num_decoding,
            )
        )
        self._last_load = load
        while len(self._spans) > 1 and self._is_enough_without(self._spans[0]):
            self._spans.popleft()

    def _is_enough_without(self, oldest: _Span) -> bool:
        elapsed_ms = sum(span.load.elapsed_ms for span in self._spans) - oldest.load.elapsed_ms
        num_rounds = sum(span.num_rounds for span in self._spans) - oldest.num_rounds
        return elapsed_ms >= _MAX_WINDOW_MS or (elapsed_ms >= _MIN_WINDOW_MS and num_rounds >= _WINDOW_ROUNDS)

    def _is_behind(self, load: StageLoad) -> bool:
        no_rest_ms = 0.0
        for stage, busy_ms in (("encoder", load.encoder_busy_ms), ("decoder", load.decoder_busy_ms)):
            has_rested = busy_ms < 0.98 * load.elapsed_ms
            self._no_rest_ms[stage] = 0.0 if has_rested else self._no_rest_ms[stage] + load.elapsed_ms
            no_rest_ms = max(no_rest_ms, self._no_rest_ms[stage])
        return (
            load.final_wait_ms > self._params.late_final_ms
            or load.partial_wait_ms > self._cadence_ms
            or no_rest_ms > max(_NO_REST_MS, self._cadence_ms)
        )

    def _wanted_ms(self) -> float:
        num_rounds = max(_MIN_ROUNDS, sum(span.num_rounds for span in self._spans))
        encoder_ms = sum(span.load.encoder_busy_ms + span.encoder_piled_up_ms for span in self._spans)
        decoder_ms = sum(span.load.decoder_busy_ms for span in self._spans)
        num_decoded = sum(span.load.num_decoded for span in self._spans)
        if num_decoded:
            decoder_ms *= max(0.0, 1 + sum(span.num_piled_up for span in self._spans) / num_decoded)
        return max(0.0, encoder_ms, decoder_ms) / num_rounds / self._params.target_utilisation

    def _share(self, busy_ms: float) -> float:
        elapsed_ms = sum(span.load.elapsed_ms for span in self._spans)
        return min(1.0, busy_ms / elapsed_ms) if elapsed_ms else 0.0
