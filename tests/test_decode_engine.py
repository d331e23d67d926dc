from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import WhisperForConditionalGeneration

from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams, DecoderParts
from pipeline.decode.guards import GuardParams
from pipeline.decode.runner import Context, Lease, Row, TimedText
from pipeline.decode.scheduler import SchedulerParams
from pipeline.items import (
    TRANSCRIBE,
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Hypothesis,
    Outcome,
    SnapshotKey,
    Task,
    TaskKind,
)
from pipeline.models.linear import BlockedLinear, Int8Linear, are_rows_independent, pack_linear
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import load_checkpoint
from pipeline.models.whisper.decoder import WhisperDecoder
from pipeline.models.whisper.runner import WhisperRunner, load_parts
from tests.media import read_pcm
from tests.models import NO_GUARDS, answer, base_engine, base_parts, content, encode, request, run_dry
from tests.tiny_whisper import save_tiny, tiny_reference

pytestmark = pytest.mark.usefixtures("one_thread")

TO_ENGLISH = Task(TaskKind.TRANSLATE, "en")
TO_FRENCH = Task(TaskKind.TRANSLATE, "fr")
SOT, EOT = 50_258, 50_257
INIT_STD = 0.5
MAX_NEW_TOKENS = 24
PROMPT = (SOT, 50_259, 50_359, 50_363)  # start, English, transcribe, no timestamps


def key(utterance: int = 1, revision: int = 1, stream: str = "s") -> SnapshotKey:
    return SnapshotKey(stream, utterance, revision)


def hypothesis_of(outcomes: list[Outcome], task: Task = TRANSCRIBE) -> Hypothesis:
    (found,) = [outcome for outcome in outcomes if outcome.task == task]
    assert isinstance(found, Hypothesis), found
    return found


# A random model of a few thousand weights, large enough ones that it does not say the same token for ever


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    return ModelParams(name=str(save_tiny(tmp_path_factory.mktemp("tiny"), init_std=INIT_STD)), device="cpu")


@pytest.fixture(scope="module")
def tiny_parts(tiny: ModelParams) -> DecoderParts:
    return load_parts(tiny, 4)


@pytest.fixture(scope="module")
def reference() -> WhisperForConditionalGeneration:
    return tiny_reference(init_std=INIT_STD)


def tiny_engine(parts: DecoderParts, max_new_tokens: int = MAX_NEW_TOKENS, **scheduler: int) -> DecodeEngine:
    guards = NO_GUARDS.model_copy(update={"max_tokens": max_new_tokens})
    params = DecoderParams(guards=guards, scheduler=SchedulerParams(**{"num_slots": 4, **scheduler}))
    return DecodeEngine(ModelParams(), params, parts=parts)


def random_embeddings(seed: int, width: int = 32, num_positions: int = 120) -> Embeddings:
    values = np.random.default_rng(seed).standard_normal((num_positions, width)).astype(np.float32)
    return Embeddings(key(), values, num_positions * 320)


@torch.inference_mode()
def reference_greedy(model: WhisperForConditionalGeneration, embeddings: Embeddings, max_new_tokens: int) -> list[int]:
    """Greedy decoding by transformers' model, all tokens again for every token, with the tiny checkpoint's rules."""
    tokens: list[int] = []
    context = torch.from_numpy(embeddings.values)[None]
    while len(tokens) < max_new_tokens:
        logits = model(encoder_outputs=(context,), decoder_input_ids=torch.tensor([[*PROMPT, *tokens]])).logits[0, -1]
        logits[[1, 2, *range(EOT + 1, len(logits))]] = -torch.inf
        if not tokens:
            logits[[220, EOT]] = -torch.inf
        token = int(logits.argmax())
        if token == EOT:
            break
        tokens.append(token)
    return tokens


@torch.inference_mode()
def test_the_network_gives_the_logits_of_transformers(
    tiny: ModelParams, reference: WhisperForConditionalGeneration
) -> None:
    decoder = WhisperDecoder(load_checkpoint(tiny, "decoder"), 2, 200, torch.device("cpu"))
    context = torch.from_numpy(random_embeddings(5).values)
    lease = decoder.open(1, context, 64)
    tokens = (*PROMPT, *range(1_000, 1_030))
    ours = [
        decoder.logits(decoder.forward([Row(lease, at, tokens[at : at + 9], 0, False, False)]))
        for at in range(0, 34, 9)
    ]
    theirs = reference(encoder_outputs=(context[None],), decoder_input_ids=torch.tensor([tokens])).logits[0]
    assert (torch.cat(ours) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_those_of_transformers(
    tiny_parts: DecoderParts, reference: WhisperForConditionalGeneration, seed: int
) -> None:
    embeddings = random_embeddings(seed)
    hypothesis = hypothesis_of(answer(tiny_engine(tiny_parts), request(key()), embeddings))
    assert list(hypothesis.tokens) == reference_greedy(reference, embeddings, max_new_tokens=MAX_NEW_TOKENS)
    assert len(set(hypothesis.tokens)) > 8


@pytest.fixture(scope="module")
def without_draft(tiny_parts: DecoderParts) -> list[Hypothesis]:
    return [hypothesis_of(answer(tiny_engine(tiny_parts), request(key()), random_embeddings(i))) for i in range(3)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2),
    num_right=st.integers(0, 30),
    wrong=st.lists(
        st.sampled_from([0, 5, 220, EOT, SOT, 50_364, 51_864, -1, 10**9]) | st.integers(0, EOT), max_size=40
    ),
    tokens_per_step=st.sampled_from([8, 13, 512]),
)
def test_any_draft_gives_the_hypothesis_of_no_draft(
    tiny_parts: DecoderParts,
    without_draft: list[Hypothesis],
    *,
    seed: int,
    num_right: int,
    wrong: list[int],
    tokens_per_step: int,
) -> None:
    engine = tiny_engine(tiny_parts, tokens_per_step=tokens_per_step)
    embeddings, plain = random_embeddings(seed), without_draft[seed]
    drafted = hypothesis_of(answer(engine, request(key(), draft=(*plain.tokens[:num_right], *wrong)), embeddings))
    assert content(drafted) == content(plain)
    if tokens_per_step == 512 and num_right:
        assert drafted.num_passes <= plain.num_passes - min(num_right, len(plain.tokens)) + 1


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_requests_that_come_and_go_get_what_each_gets_alone(tiny_parts: DecoderParts, data: st.DataObject) -> None:
    arrivals = []
    for utterance in range(data.draw(st.integers(2, 6))):
        asked = request(
            key(utterance),
            is_final=data.draw(st.booleans()),
            language=data.draw(st.sampled_from([None, "en", "de"])),
            languages=data.draw(st.sampled_from([(), ("de", "fr")])),
            draft=data.draw(st.lists(st.integers(0, EOT), max_size=20)),
            tasks=data.draw(st.sampled_from([(TRANSCRIBE,), (TRANSCRIBE, TO_ENGLISH)])),
        )
        embeddings = replace(random_embeddings(utterance, num_positions=60 + 7 * utterance), key=asked.key)
        arrivals.append((asked, embeddings, data.draw(st.integers(0, 12))))
    expected = {asked.key: answer(tiny_engine(tiny_parts), asked, embeddings) for asked, embeddings, _ in arrivals}
    engine = tiny_engine(
        tiny_parts,
        num_slots=data.draw(st.integers(1, 4)),
        tokens_per_step=data.draw(st.sampled_from([8, 24, 512])),
    )
    outcomes: list[Outcome] = []
    for asked, embeddings, num_steps in arrivals:
        engine.submit(asked, Context(embeddings))
        for _ in range(num_steps):
            outcomes += engine.step()
    outcomes += run_dry(engine)
    for asked_key, answers in expected.items():
        assert [content(o) for o in outcomes if o.key == asked_key] == [content(o) for o in answers]
    assert open_slots(tiny_parts) == 0


def open_slots(parts: DecoderParts) -> int:
    assert isinstance(parts.runner, WhisperRunner)
    return parts.runner.decoder.memory.num_open


def test_a_partial_that_gave_its_slot_to_a_final_still_gets_its_hypothesis(tiny_parts: DecoderParts) -> None:
    engine = tiny_engine(tiny_parts, num_slots=1)
    alone = hypothesis_of(answer(engine, request(key(1), is_final=False), random_embeddings(1)))
    engine.submit(request(key(1), is_final=False), Context(replace(random_embeddings(1), key=key(1))))
    for _ in range(10):
        assert not engine.step()
    engine.submit(request(key(2)), Context(replace(random_embeddings(2), key=key(2))))
    final, partial = run_dry(engine)
    assert (final.key, partial.key) == (key(2), key(1))
    assert content(partial) == content(alone)


def test_a_draft_that_fits_again_late_is_not_fed_beyond_the_slot(tiny_parts: DecoderParts) -> None:
    embeddings = random_embeddings(0, num_positions=150)
    plain = hypothesis_of(answer(tiny_engine(tiny_parts, 448), request(key()), embeddings))
    assert len(plain.tokens) == 64 - len(PROMPT) - 1  # as many as a slot of 64 has room for
    draft = (*plain.tokens[8:], *range(1_000, 1_100))
    drafted = hypothesis_of(answer(tiny_engine(tiny_parts, 448), request(key(), draft=draft), embeddings))
    assert content(drafted) == content(plain)
    assert drafted.num_passes < plain.num_passes / 2


# Text that is given


@pytest.mark.parametrize("seed", range(2))
def test_every_start_of_the_text_as_prefix_gives_the_same_text(
    tiny_parts: DecoderParts, without_draft: list[Hypothesis], seed: int
) -> None:
    plain, embeddings = without_draft[seed], random_embeddings(seed)
    for num_given in range(1, MAX_NEW_TOKENS):
        engine = tiny_engine(tiny_parts, MAX_NEW_TOKENS - num_given)
        asked = replace(request(key(), is_final=False), prefix=plain.tokens[:num_given])
        hypothesis = hypothesis_of(answer(engine, asked, embeddings))
        assert (hypothesis.tokens, hypothesis.text) == (plain.tokens, plain.text)
        assert hypothesis.num_passes == plain.num_passes - num_given
        draft = (*plain.tokens[num_given : num_given + 5], 7, *plain.tokens[num_given + 6 :])
        drafted = hypothesis_of(answer(engine, replace(asked, draft=draft), embeddings))
        assert content(drafted) == content(hypothesis)
        assert drafted.num_passes <= min(hypothesis.num_passes, 6)


def test_a_prefix_may_be_fed_in_pieces_and_end_with_the_room_of_a_slot(tiny_parts: DecoderParts) -> None:
    given = tuple(range(1_000, 1_058))
    answers = {}
    for tokens_per_step in (8, 13, 512):
        engine = tiny_engine(tiny_parts, tokens_per_step=tokens_per_step)
        answers[tokens_per_step] = hypothesis_of(
            answer(engine, replace(request(key()), prefix=given), random_embeddings(1))
        )
    assert content(answers[8]) == content(answers[13]) == content(answers[512])
    assert answers[512].tokens[:-1] == given
    assert (answers[512].guard, answers[512].num_passes) == ("token_cap", 2)


def test_a_prefix_with_special_tokens_is_cut_at_the_first(tiny_parts: DecoderParts) -> None:
    engine, embeddings = tiny_engine(tiny_parts), random_embeddings(2)
    clean = hypothesis_of(answer(engine, replace(request(key()), prefix=(1_000, 2_000)), embeddings))
    assert clean.tokens[:2] == (1_000, 2_000)
    for special in (EOT, SOT, 50_364, -1, 10**9):
        asked = replace(request(key()), prefix=(1_000, 2_000, special, 3_000))
        assert content(hypothesis_of(answer(engine, asked, embeddings))) == content(clean)


def test_a_partial_with_a_prefix_that_gave_its_slot_to_a_final_still_gets_its_hypothesis(
    tiny_parts: DecoderParts,
) -> None:
    engine = tiny_engine(tiny_parts, num_slots=1)
    given = (1_000, 2_000, 3_000)
    asked = replace(request(key(1), is_final=False), prefix=given, wants_words=True)
    alone = hypothesis_of(answer(engine, asked, random_embeddings(1)))
    assert alone.tokens[:3] == given
    assert (alone.guard, alone.words) == ("token_cap", ())  # no times of what a guard cut
    engine.submit(asked, Context(replace(random_embeddings(1), key=key(1))))
    for _ in range(10):
        assert not engine.step()
    engine.submit(request(key(2)), Context(replace(random_embeddings(2), key=key(2))))
    _, partial = run_dry(engine)
    assert content(partial) == content(alone)


# What a request can do wrong, and what becomes of its neighbours


def bad_requests() -> list[tuple[str, DecodeRequest, Embeddings, str]]:
    good = random_embeddings(3)
    return [
        ("width", request(key(9)), random_embeddings(3, width=31), r"float32\[120, 31\], expected float32\[n, 32\]"),
        ("dtype", request(key(9)), replace(good, values=good.values.astype(np.float64)), "float64"),
        ("long", request(key(9)), random_embeddings(3, num_positions=1_501), "1501 positions.*1 to 1500"),
        ("empty", request(key(9)), replace(good, values=good.values[:0]), "0 positions"),
        ("nan", request(key(9)), replace(good, values=np.full_like(good.values, np.nan)), "not finite"),
        ("language", request(key(9), language="xx"), good, "'xx'"),
        ("languages", request(key(9), language=None, languages=("xx", "yy")), good, "xx, yy"),
        (
            "prefix",
            replace(request(key(9)), prefix=(1_000,) * 59),
            good,
            "63 tokens.* leaves no room for text",
        ),
    ]


@pytest.mark.parametrize("case", bad_requests(), ids=lambda case: case[0])
def test_a_bad_request_fails_alone_with_what_is_wrong(
    tiny_parts: DecoderParts, case: tuple[str, DecodeRequest, Embeddings, str]
) -> None:
    _, asked, embeddings, message = case
    engine = tiny_engine(tiny_parts)
    alone = answer(engine, request(key(1)), random_embeddings(1))
    engine.submit(request(key(1)), Context(replace(random_embeddings(1), key=key(1))))
    engine.submit(asked, Context(replace(embeddings, key=key(9))))
    failure, *others = run_dry(engine)
    assert isinstance(failure, Failure)
    assert (failure.key, failure.task, failure.kind) == (key(9), None, FailureKind.FAILED)
    assert re.search(message, failure.message)
    assert others == alone


def test_numbers_that_go_bad_while_decoding_fail_their_own_request_only(tiny_parts: DecoderParts) -> None:
    engine = tiny_engine(tiny_parts)
    alone = answer(engine, request(key(1)), random_embeddings(1))
    for utterance in (1, 2):
        engine.submit(request(key(utterance)), Context(replace(random_embeddings(utterance), key=key(utterance))))
    engine.step()
    assert isinstance(tiny_parts.runner, WhisperRunner)
    memory = tiny_parts.runner.decoder.memory
    with torch.inference_mode():
        memory.context_keys[:, 1].fill_(torch.nan)
    outcomes = run_dry(engine)
    with torch.inference_mode():
        memory.context_keys.zero_()
    assert [o for o in outcomes if o.key == key(1)] == alone
    (failure,) = [o for o in outcomes if o.key == key(2)]
    assert isinstance(failure, Failure)
    assert "not finite" in failure.message
    assert open_slots(tiny_parts) == 0


def test_a_context_that_cannot_be_written_fails_its_own_request_only_and_leaves_its_slot_free(
    tiny_parts: DecoderParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(tiny_parts, num_slots=2)
    alone = answer(engine, request(key(1)), random_embeddings(1, num_positions=60))
    assert isinstance(tiny_parts.runner, WhisperRunner)
    memory = tiny_parts.runner.decoder.memory
    with monkeypatch.context() as patch:
        # Keys of 120 positions can be written, their values cannot.
        patch.setattr(memory, "context_values", memory.context_values[:, :, :, :100])
        for utterance, num_positions in ((1, 60), (2, 120), (3, 120), (4, 120)):
            embeddings = random_embeddings(utterance, num_positions=num_positions)
            engine.submit(request(key(utterance)), Context(replace(embeddings, key=key(utterance))))
        outcomes = run_dry(engine)
    assert [content(o) for o in outcomes if o.key == key(1)] == [content(o) for o in alone]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert [failure.key for failure in failures] == [key(2), key(3), key(4)]
    assert all("failed on this request: RuntimeError" in failure.message for failure in failures)
    assert open_slots(tiny_parts) == 0
    assert isinstance(hypothesis_of(answer(engine, request(key(2)), random_embeddings(2))), Hypothesis)


def test_words_that_get_no_times_fail_their_own_request_only(
    tiny_parts: DecoderParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(tiny_parts)
    alone = answer(engine, request(key(1)), random_embeddings(1))
    words = WhisperRunner.words

    def words_or_error(runner: WhisperRunner, lease: Lease, text: TimedText, num_audio_samples: int) -> object:
        if lease.num_context_positions == 60:
            raise IndexError("as a real runner would")
        return words(runner, lease, text, num_audio_samples)

    monkeypatch.setattr(WhisperRunner, "words", words_or_error)
    engine.submit(request(key(1)), Context(replace(random_embeddings(1), key=key(1))))
    asked = request(key(2), tasks=(TRANSCRIBE, TO_ENGLISH))
    engine.submit(asked, Context(replace(random_embeddings(2, num_positions=60), key=key(2))))
    outcomes = run_dry(engine)
    assert [content(o) for o in outcomes if o.key == key(1)] == [content(o) for o in alone]
    message = "the decoder failed on this request: IndexError: as a real runner would"
    assert [o for o in outcomes if o.key == key(2)] == [Failure(key(2), None, FailureKind.FAILED, message)]
    assert open_slots(tiny_parts) == 0


def test_a_target_language_that_the_model_lacks_fails_that_task_only(tiny_parts: DecoderParts) -> None:
    asked = request(key(), language="de", tasks=(TRANSCRIBE, TO_FRENCH, TO_ENGLISH))
    first, second, third = answer(tiny_engine(tiny_parts), asked, random_embeddings(1))
    assert isinstance(first, Hypothesis)
    assert second == Failure(key(), TO_FRENCH, FailureKind.FAILED, "the model does not translate to 'fr', only to en")
    assert isinstance(third, Hypothesis)
    assert (first.task, third.task) == (TRANSCRIBE, TO_ENGLISH)
    assert first.tokens != third.tokens


def test_an_overtaken_partial_is_superseded_and_its_slot_is_free(tiny_parts: DecoderParts) -> None:
    engine = tiny_engine(tiny_parts)
    engine.submit(request(key(1, 1), is_final=False), Context(replace(random_embeddings(1), key=key(1, 1))))
    engine.step()
    engine.submit(request(key(1, 2)), Context(replace(random_embeddings(2), key=key(1, 2))))
    failure, final = run_dry(engine)
    assert isinstance(failure, Failure)
    assert (failure.key, failure.kind) == (key(1, 1), FailureKind.SUPERSEDED)
    assert isinstance(final, Hypothesis)
    assert open_slots(tiny_parts) == 0


def test_a_cancelled_request_has_no_outcome_and_can_come_again(tiny_parts: DecoderParts) -> None:
    engine = tiny_engine(tiny_parts)
    engine.submit(request(key()), Context(random_embeddings(1)))
    engine.step()
    with pytest.raises(ValueError, match="in work already"):
        engine.submit(request(key()), Context(random_embeddings(1)))
    engine.cancel(key())
    engine.cancel(key())
    assert not engine.has_work
    assert open_slots(tiny_parts) == 0
    assert len(answer(engine, request(key()), random_embeddings(1))) == 1


def test_a_full_queue_is_told_as_unavailable(tiny_parts: DecoderParts) -> None:
    engine = tiny_engine(tiny_parts, num_slots=1, max_waiting=1)
    for utterance in range(3):
        engine.submit(request(key(utterance)), Context(replace(random_embeddings(1), key=key(utterance))))
    outcomes = run_dry(engine)
    assert [o.key.utterance for o in outcomes if isinstance(o, Failure)] == [2]
    assert outcomes[0] == Failure(
        key(2), None, FailureKind.UNAVAILABLE, "the decoder's queue is full; submit the snapshot again later"
    )


# Whisper base and real speech


@pytest.fixture(scope="module")
def utterances(speech: Path) -> list[Embeddings]:
    samples = read_pcm(speech)
    spans = [(0.4, 3.4), (3.0, 8.5), (10.0, 12.0), (14.0, 20.0)]
    return [
        encode(samples[int(start * 16_000) : int(end * 16_000)], key(utterance))
        for utterance, (start, end) in enumerate(spans, start=1)
    ]


@pytest.fixture(scope="module")
def finals(utterances: list[Embeddings]) -> list[Hypothesis]:
    """Each utterance alone, without a draft."""
    return [hypothesis_of(answer(base_engine(), request(item.key), item)) for item in utterances]


def test_speech_becomes_text(finals: list[Hypothesis], speech: Path) -> None:
    words = speech.with_suffix(".txt").read_text().lower().split()
    heard = [word.strip(".,") for final in finals for word in final.text.lower().split()]
    assert len(heard) > 20
    assert sum(word in {w.strip(".,;:?!") for w in words} for word in heard) > 0.8 * len(heard)


def test_finals_are_the_same_in_a_batch_with_drafts_and_partials_beside_them(
    utterances: list[Embeddings], finals: list[Hypothesis]
) -> None:
    engine = base_engine()
    outcomes: list[Outcome] = []
    drafts = [final.tokens[: len(final.tokens) * i // 3] + (1_000,) * (i % 2) for i, final in enumerate(finals)]
    for item, draft in zip(utterances, drafts, strict=True):
        beside = key(item.key.utterance, stream="other")
        engine.submit(request(beside, is_final=False), Context(replace(item, key=beside)))
        engine.submit(request(item.key, draft=draft), Context(item))
        outcomes += engine.step()
        outcomes += engine.step()
    outcomes += run_dry(engine)
    assert [content(o) for o in sorted(outcomes, key=lambda o: o.key.utterance) if o.key.stream_id == "s"] == [
        content(final) for final in finals
    ]


def test_a_partial_goes_on_from_its_prefix_and_its_words_cover_it(
    utterances: list[Embeddings], finals: list[Hypothesis]
) -> None:
    embeddings, final = utterances[1], finals[1]
    num_given = sum(word.num_tokens for word in final.words[:4])
    asked = replace(request(embeddings.key, is_final=False), prefix=final.tokens[:num_given])
    plain, timed = [
        hypothesis_of(answer(base_engine(), replace(asked, wants_words=wants_words), embeddings))
        for wants_words in (False, True)
    ]
    assert plain.words == ()
    assert content(timed) == content(replace(plain, words=timed.words))
    assert (timed.text, timed.tokens) == (final.text, final.tokens)
    assert timed.num_passes == final.num_passes - num_given
    # the same places in the memory: the same times, though what was given has no probability
    assert [(w.text, w.start_sample, w.end_sample, w.num_tokens) for w in timed.words] == [
        (w.text, w.start_sample, w.end_sample, w.num_tokens) for w in final.words
    ]
    assert [word.probability for word in timed.words] == [1.0] * 4 + [word.probability for word in final.words[4:]]
    assert sum(word.num_tokens for word in timed.words) == len(timed.tokens)


def test_silence_leaves_nothing_of_a_prefix(utterances: list[Embeddings], finals: list[Hypothesis]) -> None:
    everything_is_silence = GuardParams(no_speech_threshold=0.0, logprob_threshold=0.0)
    asked = replace(request(utterances[1].key, is_final=False), prefix=finals[1].tokens[:6], wants_words=True)
    engine = base_engine(DecoderParams(guards=everything_is_silence))
    hypothesis = hypothesis_of(answer(engine, asked, utterances[1]))
    assert (hypothesis.text, hypothesis.tokens, hypothesis.words, hypothesis.guard) == ("", (), (), "silence")


def test_a_right_draft_is_verified_in_one_pass(utterances: list[Embeddings], finals: list[Hypothesis]) -> None:
    drafted = hypothesis_of(answer(base_engine(), request(utterances[1].key, draft=finals[1].tokens), utterances[1]))
    assert content(drafted) == content(finals[1])
    assert (drafted.num_passes, finals[1].num_passes) == (1, len(finals[1].tokens) + 1)


@torch.inference_mode()
def test_hidden_states_have_the_same_bits_however_the_rows_are_cut_and_mixed(utterances: list[Embeddings]) -> None:
    runner = base_parts().runner
    assert isinstance(runner, WhisperRunner)
    leases = [runner.open(slot, Context(item), 4, 224, is_exact=True) for slot, item in enumerate(utterances)]
    tokens = (*PROMPT, *range(1_000, 1_146))

    def row(lease: int, start: int, end: int) -> Row:
        return Row(leases[lease], start, tokens[start:end], 0, False, False)

    whole = [runner.decoder.forward([row(i, 0, 150)]) for i in range(4)]
    for cuts in ((0, 1, 2, 3, 4, 5, 9, 150), (0, 62, 63, 64, 65, 126, 149, 150), (0, 7, 24, 64, 128, 150)):
        pieces = [runner.decoder.forward([row(1, *cut)]) for cut in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole[1])
    for count in (2, 3, 4):
        mixed = runner.decoder.forward([row(i, 31 * i, 150) for i in range(count)])
        assert torch.equal(mixed, torch.cat([whole[i][31 * i :] for i in range(count)]))
    mixed = runner.decoder.forward([row(i, 149, 150) for i in range(4)])
    assert torch.equal(mixed, torch.cat([hidden[149:] for hidden in whole]))
    assert torch.equal(runner.decoder.logits(mixed)[2:3], runner.decoder.logits(mixed[2:3].contiguous()))
    for lease in leases:
        runner.close(lease)


def test_the_language_is_detected_among_those_allowed(utterances: list[Embeddings], finals: list[Hypothesis]) -> None:
    engine = base_engine()
    free = hypothesis_of(answer(engine, request(key(), language=None), utterances[1]))
    assert (free.language, free.tokens) == ("en", finals[1].tokens)
    bound = hypothesis_of(answer(engine, request(key(), language=None, languages=("de", "xx", "ja")), utterances[1]))
    assert bound.language in {"de", "ja"}
    given_one = hypothesis_of(answer(engine, request(key(), language=bound.language), utterances[1]))
    assert given_one.tokens == bound.tokens


def test_german_is_heard_and_translated(media: Path) -> None:
    embeddings = encode(read_pcm(media / "german.wav"), key())
    engine = base_engine()
    asked = request(key(), language=None, tasks=(TRANSCRIBE, TO_ENGLISH))
    transcript, translation = answer(engine, asked, embeddings)
    assert isinstance(transcript, Hypothesis)
    assert isinstance(translation, Hypothesis)
    assert transcript.language == translation.language == "de"
    assert translation.text != transcript.text
    assert transcript.words
    assert not translation.words
    only = answer(engine, request(key(), language=None, tasks=(TO_ENGLISH,)), embeddings)
    assert [content(o) for o in only] == [content(translation)]


def test_a_translation_to_the_language_spoken_is_a_copy(utterances: list[Embeddings], finals: list[Hypothesis]) -> None:
    asked = request(utterances[2].key, language=None, tasks=(TRANSCRIBE, TO_ENGLISH))
    transcript, translation = answer(base_engine(), asked, utterances[2])
    assert isinstance(transcript, Hypothesis)
    assert translation == replace(transcript, task=TO_ENGLISH, num_passes=0)
    assert transcript.text == finals[2].text


@pytest.mark.parametrize("kind", ["zeros", "white noise", "fan"])
def test_silence_and_noise_give_no_text(media: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    samples: NDArray[np.int16] = {
        "zeros": np.zeros(32_000, np.int16),
        "white noise": (rng.standard_normal(32_000) * 300).astype(np.int16),
        "fan": read_pcm(media / "noise.wav")[:48_000],
    }[kind]
    asked = request(key(), tasks=(TRANSCRIBE, TO_ENGLISH))
    for outcome in answer(base_engine(), asked, encode(samples, key())):
        assert isinstance(outcome, Hypothesis)
        assert (outcome.text, outcome.tokens, outcome.words, outcome.guard) == ("", (), (), "silence")


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(96, 32), (1_536, 512), (512, 2_048)], ids=str)
def test_both_kinds_of_linear_layer_have_independent_rows_and_agree(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape, generator=generator) * 0.02, torch.randn(shape[0], generator=generator)
    packed, blocked = pack_linear(weight, bias), BlockedLinear(weight, bias)
    x = torch.randn(37, shape[1], generator=generator)
    for linear in (packed, blocked):
        assert are_rows_independent(linear, shape[1])
        assert (linear(x) - torch.nn.functional.linear(x, weight, bias)).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(96, 32), (1_536, 512), (512, 2_048)], ids=str)
def test_a_layer_in_integers_has_independent_rows_and_is_near(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape, generator=generator) * 0.02, torch.randn(shape[0], generator=generator)
    linear = Int8Linear(weight, bias)
    assert are_rows_independent(linear, shape[1])
    x = torch.randn(5, 7, shape[1], generator=generator)
    x[0, 0] = 0.0
    x[1, 1] *= 1_000.0  # a row's scale is its own: loud ones do not drown others
    exact = torch.nn.functional.linear(x, weight, bias)
    near = linear(x)
    assert torch.equal(near[0, 0], bias)
    errors = (near - exact).norm(dim=-1) / (exact - bias).norm(dim=-1).clamp_min(1e-6)
    assert errors.max() < 0.03


def test_a_plain_matrix_product_does_not_have_independent_rows_here() -> None:
    weight = torch.randn(1_536, 512, generator=torch.Generator().manual_seed(1))
    assert not are_rows_independent(lambda x: torch.nn.functional.linear(x, weight), 512)
