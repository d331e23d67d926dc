"""The cadence of partials, against a simulation of streams and stages in plain Python."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.cadence import CadenceParams, CadencePolicy, StageLoad
from actors.load_meter import LoadMeter
from pipeline.timebase import CHUNK_MS

STEP_MS = 5
TICK_MS = 250
MAX_CALL_MS = 250.0
MIN_MS, MAX_MS = 320, 2_000
TARGET = CadenceParams().target_utilisation


@dataclass(slots=True, eq=False)
class Talker:
    """A stream: it speaks until `pauses_at`, is silent until `speaks_at`, and so on; or it never pauses."""

    phase_ms: int
    last_ms: int
    pauses_at: float
    speaks_at: float = 0
    num_shown: int = 2
    in_flight: Job | None = None


@dataclass(slots=True, eq=False)
class Job:
    """A snapshot: what it costs each stage."""

    talker: Talker
    is_final: bool
    submitted_ms: int
    encode_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Tick:
    now_ms: int
    cadence_ms: int
    load: StageLoad


class Simulation:
    """One encoder that takes all that waits up to a call's work, and one decoder, one after the other.

    A partial costs `encode_ms` and `decode_ms`, a final twice that.
    """

    def __init__(self, num: int, encode_ms: float, decode_ms: float, *, has_pauses: bool = False, seed: int = 0):
        self.random = random.Random(seed)
        self.policy = CadencePolicy(CadenceParams(), MIN_MS, MAX_MS)
        self.costs_ms = (encode_ms, decode_ms)
        self.has_pauses = has_pauses
        self.now_ms = 0
        self.meter = LoadMeter(0)
        self.talkers: list[Talker] = []
        self.waiting: list[Job] = []
        self.call: list[Job] = []
        self.call_ends_at = 0.0
        self.decoding: deque[Job] = deque()
        self.decoded_at = 0.0
        self.ticks: list[Tick] = []
        self.add(num)

    def add(self, num: int) -> None:
        """`num` more talkers begin, out of step."""
        for _ in range(num):
            talker = Talker(self.random.randrange(0, CHUNK_MS, STEP_MS), self.now_ms, float("inf"))
            talker.last_ms -= self.random.randrange(0, MIN_MS, STEP_MS)
            if self.has_pauses:
                self.speak(talker, self.now_ms)
            self.talkers.append(talker)

    def stop_all(self) -> None:
        """All talkers leave; what they asked for is given up."""
        self.talkers, self.waiting = [], []

    def speak(self, talker: Talker, at_ms: float) -> None:
        talker.speaks_at, talker.num_shown = at_ms, 0
        talker.pauses_at = at_ms + self.random.uniform(1_500, 8_000)

    def run(self, ms: int) -> list[Tick]:
        """Go on for `ms` and return the ticks of that time."""
        first = len(self.ticks)
        for _ in range(ms // STEP_MS):
            self.now_ms += STEP_MS
            for talker in self.talkers:
                if (self.now_ms + talker.phase_ms) % CHUNK_MS == 0:
                    self.hear(talker)
            self.encode()
            self.decode()
            if self.now_ms % TICK_MS == 0:
                self.tick()
        return self.ticks[first:]

    def hear(self, talker: Talker) -> None:
        if self.now_ms < talker.speaks_at:
            return
        if self.now_ms >= talker.pauses_at:
            self.waiting = [job for job in self.waiting if job is not talker.in_flight]
            self.submit(talker, is_final=True)
            talker.in_flight = None
            self.speak(talker, self.now_ms + self.random.uniform(200, 1_500))
            talker.last_ms = round(talker.speaks_at) + MIN_MS
            return
        cadence_ms = MIN_MS if talker.num_shown < 2 else self.policy.cadence_ms
        if talker.in_flight is None and self.now_ms - talker.last_ms >= cadence_ms:
            talker.in_flight = self.submit(talker, is_final=False)
            talker.last_ms = self.now_ms

    def submit(self, talker: Talker, *, is_final: bool) -> Job:
        encode_ms, decode_ms = (2 * cost_ms if is_final else cost_ms for cost_ms in self.costs_ms)
        self.waiting.append(Job(talker, is_final, self.now_ms, encode_ms, decode_ms))
        return self.waiting[-1]

    def encode(self) -> None:
        if self.call and self.now_ms >= self.call_ends_at:
            self.meter.set_encoding(0, self.now_ms)
            self.meter.add_decoding(len(self.call), self.now_ms)
            self.decoding += self.call
            self.call = []
        if self.call or not self.waiting:
            return
        self.waiting.sort(key=lambda job: (not job.is_final, job.submitted_ms))
        work_ms = 0.0
        while self.waiting and (not self.call or work_ms + self.waiting[0].encode_ms <= MAX_CALL_MS):
            work_ms += self.waiting[0].encode_ms
            self.call.append(self.waiting.pop(0))
        for job in self.call:
            self.meter.note_wait(self.now_ms - job.submitted_ms, is_final=job.is_final)
        self.call_ends_at = self.now_ms + work_ms
        self.meter.set_encoding(1, self.now_ms)

    def decode(self) -> None:
        if self.decoding and self.decoded_at and self.now_ms >= self.decoded_at:
            job = self.decoding.popleft()
            self.meter.end_decoding(1, self.now_ms)
            self.decoded_at = 0.0
            if job.talker.in_flight is job:
                job.talker.in_flight = None
                job.talker.num_shown += 1
        if self.decoding and not self.decoded_at:
            self.decoded_at = self.now_ms + self.decoding[0].decode_ms

    def tick(self) -> None:
        for job in self.waiting:
            self.meter.note_wait(self.now_ms - job.submitted_ms, is_final=job.is_final)
        load = self.meter.take(self.now_ms, sum(job.encode_ms for job in self.waiting))
        self.policy.tick(load)
        self.ticks.append(Tick(self.now_ms, self.policy.cadence_ms, load))


def utilisation(ticks: list[Tick]) -> float:
    """Return the share of time for which the busier stage was busy."""
    elapsed_ms = sum(tick.load.elapsed_ms for tick in ticks)
    return max(
        sum(tick.load.encoder_busy_ms for tick in ticks) / elapsed_ms,
        sum(tick.load.decoder_busy_ms for tick in ticks) / elapsed_ms,
    )


def reached_after_ms(ticks: list[Tick], cadence_ms: int) -> int:
    """Return how long it took until the cadence was at most, or if it began below that, at least `cadence_ms`."""
    is_falling = ticks[0].cadence_ms > cadence_ms
    there = (tick for tick in ticks if tick.cadence_ms == cadence_ms or (tick.cadence_ms < cadence_ms) == is_falling)
    return next(there).now_ms - ticks[0].now_ms + TICK_MS


@given(
    num=st.integers(1, 32),
    wanted_ms=st.floats(1.3 * MIN_MS, MAX_MS / 1.3),
    decoder_share=st.floats(0.1, 2.0),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=30, deadline=None)
def test_the_busier_stage_comes_to_its_target_and_the_cadence_stays_there(num, wanted_ms, decoder_share, seed):
    encode_ms = wanted_ms * TARGET / num / max(1.0, decoder_share)
    # One partial in flight: below the time that one takes, the cadence is without effect.
    assume(wanted_ms > 1.5 * encode_ms * (1 + decoder_share))
    simulation = Simulation(num, encode_ms, encode_ms * decoder_share, seed=seed)
    simulation.run(20_000)
    settled = simulation.run(20_000)
    cadences = [tick.cadence_ms for tick in settled]
    middle = statistics.median(cadences)
    # A chance meeting of all streams may stretch it for a moment; it must not come again and again.
    num_near = sum(0.75 * middle <= cadence_ms <= 1.25 * middle for cadence_ms in cadences)
    assert num_near >= 0.9 * len(cadences)
    assert utilisation(settled) == pytest.approx(TARGET, rel=0.2)


@given(
    num=st.integers(1, 16),
    wanted_ms=st.one_of(st.floats(10, MIN_MS / 2), st.floats(1.3 * MAX_MS, 10 * MAX_MS)),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=30, deadline=None)
def test_the_cadence_stays_at_a_bound_where_the_target_lies_beyond_it(num, wanted_ms, seed):
    encode_ms = wanted_ms * TARGET / num
    assume(num > 2 or wanted_ms < MIN_MS)  # one partial in flight: two streams cannot keep stages busy all the time
    simulation = Simulation(num, encode_ms, encode_ms / 2, seed=seed)
    simulation.run(10_000)
    cadences = [tick.cadence_ms for tick in simulation.run(20_000)]
    bound_ms = MIN_MS if wanted_ms < MIN_MS else MAX_MS
    assert cadences.count(bound_ms) >= 0.9 * len(cadences)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("encode_ms", "decode_ms"), [(100, 50), (200, 20), (60, 100), (90, 150)])
@pytest.mark.parametrize("has_pauses", [False, True])
def test_sixteen_streams_at_once_stretch_the_cadence_in_two_seconds_and_it_comes_back_in_five(
    encode_ms: float, decode_ms: float, has_pauses: bool, seed: int
) -> None:
    simulation = Simulation(1, encode_ms, decode_ms, has_pauses=has_pauses, seed=seed)
    simulation.run(10_000)
    simulation.add(15)
    ticks = simulation.run(10_000)
    assert reached_after_ms(ticks, 1_600) <= 2_250
    assert reached_after_ms(ticks, MAX_MS) <= 3_000
    simulation.stop_all()
    simulation.run(round(sum(job.decode_ms for job in simulation.decoding) + MAX_CALL_MS))
    assert reached_after_ms(simulation.run(10_000), MIN_MS) <= 5_000


@given(
    num=st.integers(1, 24),
    encode_ms=st.floats(5, 150),
    decode_ms=st.floats(5, 150),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=30, deadline=None)
def test_conversations_do_not_swing_it_from_one_bound_to_the_other(num, encode_ms, decode_ms, seed):
    """Utterances come and go, so the load is never the same; a cadence that hunts would show both bounds."""
    simulation = Simulation(num, encode_ms, decode_ms, has_pauses=True, seed=seed)
    simulation.run(10_000)
    cadences = [tick.cadence_ms for tick in simulation.run(30_000)]
    crossings = sum((a < 800) != (b < 800) for a, b in itertools.pairwise(cadences))
    assert not (MIN_MS in cadences and MAX_MS in cadences and crossings > 4)


def test_a_final_that_waits_too_long_stretches_it_at_once_and_it_holds() -> None:
    policy = CadencePolicy(CadenceParams(late_final_ms=150), MIN_MS, MAX_MS)
    policy.tick(StageLoad(TICK_MS, 0, final_wait_ms=150))
    assert policy.cadence_ms == MIN_MS
    policy.tick(StageLoad(TICK_MS, 0, final_wait_ms=151))
    assert policy.cadence_ms == round(1.5 * MIN_MS)
    for _ in range(3):
        policy.tick(StageLoad(TICK_MS, 0))
    assert policy.cadence_ms == round(1.5 * MIN_MS)
    for _ in range(3):
        policy.tick(StageLoad(TICK_MS, 0))
    assert policy.cadence_ms == MIN_MS


def test_utilisation_is_that_of_each_stage() -> None:
    policy = CadencePolicy(CadenceParams(), MIN_MS, MAX_MS)
    assert (policy.encoder_utilisation, policy.decoder_utilisation) == (0, 0)
    for _ in range(20):
        policy.tick(StageLoad(TICK_MS, 100, decoder_busy_ms=25, num_decoded=1))
    assert policy.encoder_utilisation == pytest.approx(0.4)
    assert policy.decoder_utilisation == pytest.approx(0.1)


@given(
    loads=st.lists(
        st.builds(
            StageLoad,
            elapsed_ms=st.floats(0, 60_000),
            encoder_busy_ms=st.floats(0, 60_000),
            encoder_waiting_ms=st.floats(0, 1e6),
            decoder_busy_ms=st.floats(0, 60_000),
            num_decoding=st.integers(0, 1_000),
            num_decoded=st.integers(0, 1_000),
            final_wait_ms=st.floats(0, 1e6),
            partial_wait_ms=st.floats(0, 1e6),
        ),
        max_size=60,
    )
)
def test_whatever_the_load_the_cadence_keeps_its_bounds_and_remembers_little(loads: list[StageLoad]) -> None:
    policy = CadencePolicy(CadenceParams(), MIN_MS, MAX_MS)
    for load in loads:
        policy.tick(load)
        assert MIN_MS <= policy.cadence_ms <= MAX_MS
        assert 0 <= policy.encoder_utilisation <= 1
    for _ in range(100):
        policy.tick(StageLoad(TICK_MS, 0))
    assert policy.cadence_ms == MIN_MS
    assert len(policy._spans) <= 6_000 / TICK_MS


def test_the_meter_adds_up_what_was_busy_and_the_longest_waits() -> None:
    meter = LoadMeter(1_000)
    meter.set_encoding(0.5, 1_100)
    meter.set_encoding(1, 1_150)
    meter.set_encoding(0, 1_200)
    meter.add_decoding(2, 1_200)
    meter.end_decoding(1, 1_220)
    meter.note_wait(40, is_final=False)
    meter.note_wait(30, is_final=False)
    meter.note_wait(7, is_final=True)
    assert meter.take(1_250, 12) == StageLoad(
        elapsed_ms=250,
        encoder_busy_ms=75,
        encoder_waiting_ms=12,
        decoder_busy_ms=50,
        num_decoding=1,
        num_decoded=1,
        final_wait_ms=7,
        partial_wait_ms=40,
    )
    meter.end_decoding(1, 1_300)
    assert meter.take(1_500, 0) == StageLoad(elapsed_ms=250, encoder_busy_ms=0, decoder_busy_ms=50, num_decoded=1)


def test_partials_gather_only_while_the_stages_are_busy() -> None:
    policy = CadencePolicy(CadenceParams(), 320, 2_000)
    assert policy.gather_ms == 0, "idle stages work one by one"
    waits = [policy.gather_ms]
    for _ in range(12):
        policy.tick(StageLoad(250, 250, encoder_waiting_ms=500, decoder_busy_ms=250, final_wait_ms=400))
        waits.append(policy.gather_ms)
    assert waits == sorted(waits)
    assert 0 < waits[-1] <= 400
