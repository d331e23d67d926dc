"""Partials in reduced arithmetic beside exact finals, and rows of one token that attend together."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams, DecoderParts
from pipeline.decode.runner import Context, Lease, Row
from pipeline.decode.scheduler import SchedulerParams
from pipeline.items import TRANSCRIBE, Embeddings, Hypothesis, Outcome, SnapshotKey, Task, TaskKind
from pipeline.models.device import has_bfloat16_units, has_int8_units
from pipeline.models.linear import Arithmetic
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import load_checkpoint
from pipeline.models.whisper.decoder import WhisperDecoder
from pipeline.models.whisper.runner import load_parts
from tests.media import read_pcm
from tests.models import NO_GUARDS, answer, base_engine, content, encode, needs_int8, request, run_dry
from tests.test_decode_engine import hypothesis_of, key, random_embeddings
from tests.tiny_whisper import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_SLOTS, MAX_PLACES, MAX_POSITIONS, WIDTH = 7, 192, 400, 32
REDUCED = (pytest.param("int8", marks=needs_int8), "bfloat16")
TO_ENGLISH = Task(TaskKind.TRANSLATE, "en")
NEAR = 0.03
"""Attention may round differently in another shape, and an input of a layer then to the next integer."""


def are_near(values: Tensor, expected: Tensor) -> bool:
    """Whether each row is within a share of its length of what is expected."""
    return bool(((values - expected).norm(dim=-1) <= NEAR * expected.norm(dim=-1)).all())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    directory = save_tiny(tmp_path_factory.mktemp("tiny"), init_std=0.5, max_target_positions=MAX_PLACES)
    return ModelParams(name=str(directory), device="cpu")


@pytest.fixture(params=REDUCED)
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    chosen: Arithmetic = request.param
    return chosen


# The network: rows of one token


@dataclass(frozen=True)
class Case:
    """A lease of so many context positions that is about to feed `num_next` tokens at `place`."""

    slot: int
    num_positions: int
    place: int
    num_next: int = 1


CASES = {
    "neighbours": (Case(0, 100, 20), Case(1, 100, 20)),
    "holes": (Case(1, 100, 20), Case(4, 100, 20), Case(6, 100, 20)),
    "slots in any order": (Case(5, 100, 20), Case(0, 90, 30), Case(3, 80, 10)),
    "contexts": (Case(0, 37, 20), Case(2, 399, 20), Case(3, 1, 20)),
    "places": (Case(0, 50, 5), Case(1, 50, 63), Case(2, 50, 64), Case(3, 50, 127), Case(4, 50, 190)),
    "beside longer rows": (
        Case(0, 37, 9),
        Case(2, 120, 60, 9),
        Case(3, 300, 64),
        Case(6, 80, 150, 2),
        Case(5, 60, 130),
    ),
}


class Network:
    """The tiny network with a memory in which every slot was used before, to its end."""

    def __init__(self, model: ModelParams, arithmetic: Arithmetic) -> None:
        self._random = torch.Generator().manual_seed(5)
        self.decoder = WhisperDecoder(
            load_checkpoint(model, "decoder"),
            NUM_SLOTS,
            MAX_POSITIONS,
            torch.device("cpu"),
            partial_arithmetic=arithmetic,
        )
        for slot in range(NUM_SLOTS):
            lease = self._open(slot, MAX_POSITIONS, 5.0)
            self.decoder.forward([Row(lease, 0, self._tokens(MAX_PLACES), 0, False, False)])
            self.decoder.memory.close(lease)

    def _open(self, slot: int, num_positions: int, scale: float, *, is_exact: bool = False) -> Lease:
        context = scale * torch.randn(num_positions, WIDTH, generator=self._random)
        return self.decoder.open(slot, context, MAX_PLACES, is_exact=is_exact)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 50_000, (count,), generator=self._random).tolist())

    def row(self, case: Case) -> Row:
        """What `case` feeds next; all before is in the memory."""
        lease = self._open(case.slot, case.num_positions, 1.0)
        self.decoder.forward([Row(lease, 0, self._tokens(case.place), 0, False, False)])
        return Row(lease, case.place, self._tokens(case.num_next), 0, False, False)

    def look(self, row: Row) -> Tensor:
        """The attention that word times are made of, after `row` was fed."""
        return self.decoder.attention(row.lease, row.position + len(row.tokens), row.lease.num_context_positions)


@torch.inference_mode()
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES.keys())
def test_rows_of_one_token_give_together_what_each_gives_alone(
    tiny: ModelParams, arithmetic: Arithmetic, cases: Sequence[Case]
) -> None:
    network = Network(tiny, arithmetic)
    rows = [network.row(case) for case in cases]
    alone = [network.decoder.forward([row]) for row in rows]
    looks = [network.look(row) for row in rows]
    keys = network.decoder.memory.keys.clone()
    # so that what was fed alone is not what is found in the memory
    for row in rows:
        span = slice(row.position, row.position + len(row.tokens))
        network.decoder.memory.keys[:, row.lease.slot, :, span] = 9.0
        network.decoder.memory.values[:, row.lease.slot, :, span] = 9.0
        network.decoder.memory.queries[:, row.lease.slot, span] = 9.0
    together = network.decoder.forward(rows)
    assert are_near(together, torch.cat(alone))
    assert torch.cat(alone).std() > 0.5
    # what they leave behind is the same too: in their own places, and nowhere else
    for row, look in zip(rows, looks, strict=True):
        assert are_near(network.look(row), look)
    assert are_near(network.decoder.memory.keys, keys)


@torch.inference_mode()
def test_slots_between_those_that_attend_together_may_hold_anything(tiny: ModelParams, arithmetic: Arithmetic) -> None:
    network = Network(tiny, arithmetic)
    rows = [network.row(Case(slot, 60, 70)) for slot in (0, 2, 4)]
    expected = network.decoder.forward(rows)
    for slot in (1, 3, 5):
        network.decoder.memory.keys[:, slot] = torch.inf
        network.decoder.memory.values[:, slot] = torch.nan
        network.decoder.memory.context_keys[:, slot] = torch.nan
        network.decoder.memory.context_values[:, slot] = torch.inf
    assert torch.equal(network.decoder.forward(rows), expected)


@pytest.fixture
def reduced_parts(tiny: ModelParams, arithmetic: Arithmetic) -> DecoderParts:
    return load_parts(tiny.model_copy(update={"partial_dtype": arithmetic}), 6)


@pytest.fixture(scope="module")
def exact_parts(tiny: ModelParams) -> DecoderParts:
    return load_parts(tiny.model_copy(update={"partial_dtype": "float32"}), 6)


def test_exact_rows_keep_their_bits_beside_reduced_ones(reduced_parts: DecoderParts, exact_parts: DecoderParts) -> None:
    runner, exact = reduced_parts.runner, exact_parts.runner
    places = ((0, 40), (1, 70), (2, 63), (3, 128), (4, 70))
    tokens = tuple(range(1_000, 1_130))
    leases, expected = {}, {}
    for slot, place in places:
        is_exact = slot % 2 == 0
        leases[slot] = runner.open(slot, Context(random_embeddings(slot)), 4, MAX_PLACES - 4, is_exact=is_exact)
        runner.run([Row(leases[slot], 0, tokens[:place], place, False, False)])
        if is_exact:
            lease = exact.open(slot, Context(random_embeddings(slot)), 4, MAX_PLACES - 4, is_exact=True)
            exact.run([Row(lease, 0, tokens[:place], place, False, False)])
            [expected[slot]] = exact.run([Row(lease, place, tokens[place : place + 1], 0, False, False)])
            exact.close(lease)
    rows = [Row(leases[slot], place, tokens[place : place + 1], 0, False, False) for slot, place in places]
    alone = [runner.run([row])[0] for row in rows]
    together = runner.run(rows)
    backwards = runner.run(rows[::-1])[::-1]
    later = runner.run([*rows[1:], rows[0]])  # a reduced one first
    turned = [later[-1], *later[:-1]]
    assert [alone[slot] for slot in expected] == list(expected.values())
    for results in (together, backwards, turned):
        assert [results[slot] for slot in expected] == list(expected.values())
        assert [result.picks[0].token for result in results] == [result.picks[0].token for result in alone]
    # the others are not exact, or nothing was shown
    lease = exact.open(1, Context(random_embeddings(1)), 4, MAX_PLACES - 4, is_exact=True)
    exact.run([Row(lease, 0, tokens[:70], 70, False, False)])
    assert exact.run([Row(lease, 70, tokens[70:71], 0, False, False)]) != [alone[1]]
    exact.close(lease)
    for lease in leases.values():
        runner.close(lease)


# Engines


def tiny_engine(parts: DecoderParts, max_new_tokens: int = 80) -> DecodeEngine:
    guards = NO_GUARDS.model_copy(update={"max_tokens": max_new_tokens, "max_tokens_per_s": 1_000.0})
    params = DecoderParams(guards=guards, scheduler=SchedulerParams(num_slots=6))
    return DecodeEngine(ModelParams(), params, parts=parts)


def answers_together(engine: DecodeEngine, items: Sequence[Embeddings], *, finals: frozenset[int]) -> list[Outcome]:
    """What the requests get that are submitted a step apart; those of the utterances in `finals` are finals."""
    outcomes: list[Outcome] = []
    for item in items:
        is_final = item.key.utterance in finals
        tasks = (TRANSCRIBE, TO_ENGLISH) if is_final else (TRANSCRIBE,)
        engine.submit(request(item.key, is_final=is_final, language="de", tasks=tasks), Context(item))
        outcomes += engine.step()
    return outcomes + run_dry(engine)


def test_finals_of_an_engine_with_reduced_partials_are_those_of_an_exact_engine(
    reduced_parts: DecoderParts, exact_parts: DecoderParts
) -> None:
    items = [replace(random_embeddings(seed, num_positions=60 + 50 * seed), key=key(seed)) for seed in range(6)]
    finals = frozenset({1, 2, 5})
    mixed = answers_together(tiny_engine(reduced_parts), items, finals=finals)
    for item in items:
        own = [outcome for outcome in mixed if outcome.key == item.key]
        if item.key.utterance in finals:
            asked = request(item.key, language="de", tasks=(TRANSCRIBE, TO_ENGLISH))
            assert [content(outcome) for outcome in own] == [
                content(outcome) for outcome in answer(tiny_engine(exact_parts), asked, item)
            ]
    partials = [outcome for outcome in mixed if outcome.key.utterance not in finals]
    assert len(partials) == 3


@pytest.mark.parametrize("chosen", ["float32", *REDUCED])
def test_an_engine_tells_the_arithmetic_that_was_chosen(tiny: ModelParams, chosen: Arithmetic) -> None:
    model = tiny.model_copy(update={"partial_dtype": chosen})
    engine = DecodeEngine(model, DecoderParams(scheduler=SchedulerParams(num_slots=1)))
    assert (engine.partial_dtype, engine.final_dtype) == (chosen, "float32")
    # and it computes in it: exact only where partials are float32
    partial, final = [
        hypothesis_of(answer(engine, request(key(), is_final=is_final), random_embeddings(0)))
        for is_final in (False, True)
    ]
    assert (partial.average_logprob == final.average_logprob) == (chosen == "float32")


@needs_int8
def test_partials_in_float32_beside_finals_in_integers_are_those_of_float32(
    tiny: ModelParams, exact_parts: DecoderParts
) -> None:
    parts = load_parts(tiny.model_copy(update={"partial_dtype": "float32", "final_dtype": "int8"}), 6)
    items = [replace(random_embeddings(seed), key=key(seed)) for seed in range(4)]
    mixed = answers_together(tiny_engine(parts), items, finals=frozenset({1, 3}))
    for item in items:
        is_partial = item.key.utterance in (0, 2)
        [found] = [o for o in mixed if isinstance(o, Hypothesis) and o.key == item.key and o.task == TRANSCRIBE]
        expected = hypothesis_of(answer(tiny_engine(exact_parts), request(item.key, language="de"), item))
        # rows that attend together round differently in the last bits, 8-bit integers in more
        assert (abs(found.average_logprob - expected.average_logprob) < 1e-4) == is_partial
        assert (found.tokens == expected.tokens) or not is_partial


def test_without_a_choice_an_engine_measures_if_it_has_a_clock(tiny: ModelParams) -> None:
    params = DecoderParams(scheduler=SchedulerParams(num_slots=1))
    auto = tiny.model_copy(update={"partial_dtype": "auto"})
    assert DecodeEngine(auto, params).partial_dtype == "float32"
    calls = 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        return time.perf_counter()

    engine = DecodeEngine(auto, params, clock=clock)
    possible = {
        "float32",
        *(["int8"] * has_int8_units(torch.device("cpu"))),
        *(["bfloat16"] * has_bfloat16_units(torch.device("cpu"))),
    }
    assert engine.partial_dtype in possible
    assert (calls > 0) == (len(possible) > 1)


# Whisper base in 8-bit integers


@functools.cache
def int8_parts() -> DecoderParts:
    return load_parts(ModelParams(partial_dtype="int8"), SchedulerParams().num_slots)


def int8_engine() -> DecodeEngine:
    return DecodeEngine(ModelParams(), DecoderParams(), parts=int8_parts())


@pytest.fixture(scope="module")
def utterances(speech: Path) -> list[Embeddings]:
    samples = read_pcm(speech)
    spans = [(0.4, 3.4), (3.0, 8.5), (10.0, 12.0), (14.0, 20.0)]
    return [
        encode(samples[int(start * 16_000) : int(end * 16_000)], SnapshotKey("s", utterance, 1))
        for utterance, (start, end) in enumerate(spans, start=1)
    ]


def transcriptions(outcomes: Sequence[Outcome]) -> dict[int, Hypothesis]:
    return {o.key.utterance: o for o in outcomes if isinstance(o, Hypothesis) and o.task == TRANSCRIBE}


@needs_int8
def test_partials_in_integers_give_together_the_tokens_that_each_gives_alone(utterances: list[Embeddings]) -> None:
    alone = [hypothesis_of(answer(int8_engine(), request(item.key, is_final=False), item)) for item in utterances]
    engine = int8_engine()
    for item in utterances:
        engine.submit(request(item.key, is_final=False), Context(item))
    together = transcriptions(run_dry(engine))
    for item, expected in zip(utterances, alone, strict=True):
        found = together[item.key.utterance]
        assert (found.tokens, found.text, found.num_passes) == (expected.tokens, expected.text, expected.num_passes)
        assert found.average_logprob == pytest.approx(expected.average_logprob, abs=0.02)


@needs_int8
def test_finals_beside_partials_in_integers_are_those_of_float32(utterances: list[Embeddings]) -> None:
    exact = [hypothesis_of(answer(base_engine(), request(item.key), item)) for item in utterances]
    engine = int8_engine()
    for item in utterances:
        beside = replace(item, key=SnapshotKey("other", item.key.utterance, 1))
        engine.submit(request(beside.key, is_final=False), Context(beside))
        engine.submit(request(item.key), Context(item))
    outcomes = run_dry(engine)
    finals = transcriptions([outcome for outcome in outcomes if outcome.key.stream_id == "s"])
    partials = transcriptions([outcome for outcome in outcomes if outcome.key.stream_id == "other"])
    for item, expected in zip(utterances, exact, strict=True):
        assert content(finals[item.key.utterance]) == content(expected)
        partial = partials[item.key.utterance]
        assert partial.average_logprob != expected.average_logprob
        if expected.guard is None:
            assert partial.average_logprob == pytest.approx(expected.average_logprob, abs=0.1)
    assert sum(expected.guard is None for expected in exact) >= 3
    assert int8_engine().partial_dtype == "int8"
