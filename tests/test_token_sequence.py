"""The rules of one sequence, with a fake model whose greedy text is known: prefixes, drafts with mistakes, restarts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode.guards import SILENCE, TOKEN_CAP, GuardParams
from pipeline.decode.runner import Pick, RowResult, StartReading
from pipeline.decode.sequence import Feed, Limits, Prompt, TokenSequence
from tests.models import NO_GUARDS

EOT = 1_000
SOT, ENGLISH, GERMAN, TRANSCRIBE = range(EOT + 1, EOT + 5)
PROMPT = (SOT, ENGLISH, TRANSCRIBE)
MAX_NEW_TOKENS = 48
RESUMABLE = 5
"""So many tokens too many in a draft do not keep what follows them from being found again."""


@dataclass(frozen=True)
class Model:
    """Says `text` to its end; behind anything else, numbers that depend on all that went before."""

    text: tuple[int, ...]
    no_speech_probability: float = 0.0
    logprob: float = -0.25
    language: int = ENGLISH

    def next_token(self, before: Sequence[int]) -> int:
        if tuple(before) == self.text:
            return EOT
        if tuple(before) == self.text[: len(before)]:
            return self.text[len(before)]
        return 500 + sum((place + 1) * token for place, token in enumerate(before)) % 400


class Run:
    """A sequence run to its end over a memory of places, each of which holds what was last fed to it."""

    def __init__(
        self, model: Model, prompt: Prompt, draft: Sequence[int] = (), guards: GuardParams = NO_GUARDS, cap: int = 0
    ) -> None:
        self._model = model
        limits = Limits(cap or MAX_NEW_TOKENS, frozenset({EOT}), EOT, guards)
        self.sequence = TokenSequence(prompt, draft, limits, lambda tokens: " ".join(map(str, tokens)))
        self._num_places = len(prompt.tokens) + len(prompt.prefix) + limits.max_new_tokens
        self._memory: list[int] = []
        self.num_passes = 0

    def step(self, num_tokens: int = 512) -> None:
        feed = self.sequence.feed(num_tokens)
        assert feed.tokens
        assert feed.position + len(feed.tokens) <= self._num_places, "fed more than the memory has room for"
        assert feed.position <= len(self._memory)
        self._memory[feed.position :] = feed.tokens
        assert len(self._memory) < 3 or self._memory[0::2][:2] == [SOT, TRANSCRIBE]
        self.num_passes += 1
        self.sequence.account(feed, self._result(feed))

    def _result(self, feed: Feed) -> RowResult:
        picks = []
        for index in range(feed.pick_from, len(feed.tokens)):
            place = feed.position + index
            assert (feed.is_begin and index == feed.pick_from) == (place == len(PROMPT) - 1)
            token = self._model.next_token(self._memory[len(PROMPT) : place + 1])
            picks.append(Pick(token, self._model.logprob))
        start = StartReading(
            self._model.no_speech_probability,
            {language: float(language == self._model.language) for language in (ENGLISH, GERMAN)},
        )
        return RowResult(tuple(picks), start if feed.reads_start else None)

    def lose_memory(self) -> None:
        self._memory = []
        self.sequence.restart()

    def finish(self, num_tokens: int = 512) -> TokenSequence:
        while not self.sequence.is_finished:
            self.step(num_tokens)
        return self.sequence


def run(
    model: Model, draft: Sequence[int] = (), *, prefix: Sequence[int] = (), num_tokens: int = 512, cap: int = 0
) -> Run:
    done = Run(model, Prompt(PROMPT, prefix=tuple(prefix)), draft, cap=cap)
    done.finish(num_tokens)
    return done


TEXTS = st.lists(st.integers(0, 12), max_size=30).map(tuple)
DISTINCT = st.permutations(range(30)).flatmap(lambda order: st.integers(0, 30).map(lambda n: tuple(order[:n])))


@st.composite
def edited(
    draw: st.DrawFn, text: tuple[int, ...], *, new_tokens: st.SearchStrategy[int]
) -> tuple[tuple[int, ...], int]:
    """A draft that differs from `text` in a few places, and the passes that it may cost.

    Of each edit: the tokens of the text that the draft lacks, one pass each, and the pass that goes on behind them.
    """
    draft: list[int] = []
    num_passes, place = 1, 0
    for edit in range(draw(st.integers(0, 3))):
        begin = min(len(text), draw(st.integers(place, len(text))) + bool(edit))  # a right token between two edits
        draft += text[place:begin]
        place = min(len(text), begin + draw(st.integers(0, 3)))
        if begin < len(text):
            draft += draw(st.lists(new_tokens, max_size=RESUMABLE))
        num_passes += place - begin + 1
    return (*draft, *text[place:]), num_passes


@given(st.data())
def test_a_draft_with_words_changed_inserted_or_dropped_changes_no_token(data: st.DataObject) -> None:
    model = Model(data.draw(TEXTS))
    draft, _ = data.draw(edited(model.text, new_tokens=st.integers(0, EOT + 4)))
    done = run(model, draft, num_tokens=data.draw(st.sampled_from([1, 3, 8, 512])))
    plain = run(model)
    assert done.sequence.tokens == plain.sequence.tokens == model.text
    assert done.sequence.average_logprob == plain.sequence.average_logprob
    assert done.sequence.logprobs == plain.sequence.logprobs
    assert plain.num_passes == len(model.text) + 1


@given(st.data())
def test_a_draft_with_mistakes_costs_a_pass_or_two_for_each_and_not_one_for_every_token_behind_it(
    data: st.DataObject,
) -> None:
    model = Model(data.draw(DISTINCT))
    # tokens that the text has not, so that nothing is found where it does not belong
    draft, num_passes = data.draw(edited(model.text, new_tokens=st.integers(100, 400)))
    done = run(model, draft)
    assert done.sequence.tokens == model.text
    assert done.num_passes <= num_passes


@pytest.mark.parametrize(
    ("draft", "num_passes"),
    [
        ((*range(10), 100, *range(11, 30)), 3),  # another word
        ((*range(10), 100, 101, *range(12, 30)), 4),
        ((*range(10), 100, 101, *range(10, 30)), 2),  # words too many
        ((*range(10), *range(100, 105), *range(10, 30)), 2),
        ((*range(10), *range(11, 30)), 3),  # a word too few
        ((*range(10), *range(14, 30)), 6),
        ((100, *range(1, 10), 101, *range(11, 20), 102, *range(21, 30)), 7),
        ((), 31),
        (range(30), 1),
        (range(100, 130), 31),
    ],
)
def test_how_many_passes_a_draft_costs(draft: Sequence[int], num_passes: int) -> None:
    """Left at its first mistake, a draft would cost a pass for each of the 20 tokens behind it."""
    done = run(Model(tuple(range(30))), draft)
    assert (done.sequence.tokens, done.num_passes) == (tuple(range(30)), num_passes)


@given(st.data())
def test_a_draft_is_never_fed_beyond_the_cap(data: st.DataObject) -> None:
    model = Model(data.draw(st.lists(st.integers(0, 12), min_size=8, max_size=30).map(tuple)))
    cap = data.draw(st.integers(1, 30))
    draft, _ = data.draw(edited(model.text, new_tokens=st.integers(0, 12)))
    filler = data.draw(st.lists(st.integers(0, 12), max_size=40))
    done = run(model, (*draft[data.draw(st.integers(0, 8)) :], *filler), cap=cap)  # `Run` looks where it feeds
    assert done.sequence.tokens == model.text[:cap]
    assert done.sequence.guard == (TOKEN_CAP if len(model.text) > cap else None)


# A prefix


@given(st.data())
def test_a_prefix_of_the_text_gives_the_same_text_in_fewer_passes(data: st.DataObject) -> None:
    model = Model(data.draw(TEXTS))
    num_given = data.draw(st.integers(0, len(model.text)))
    draft, _ = data.draw(edited(model.text[num_given:], new_tokens=st.integers(0, EOT + 4)))
    num_tokens = data.draw(st.sampled_from([1, 2, 5, 512]))
    done = run(model, draft, prefix=model.text[:num_given], num_tokens=num_tokens)
    assert done.sequence.tokens == model.text
    assert done.sequence.logprobs == (0.0,) * num_given + (-0.25,) * (len(model.text) - num_given)
    assert done.sequence.average_logprob == -0.25
    if num_tokens == 512:
        assert done.num_passes <= len(model.text) - num_given + 1


def test_a_prefix_stays_whatever_the_model_would_have_said() -> None:
    model = Model((1, 2, 3))
    sequence = Run(model, Prompt(PROMPT, prefix=(7, 8)), cap=5).finish()
    assert sequence.tokens[:2] == (7, 8)
    assert len(sequence.tokens) == 7
    assert sequence.guard == TOKEN_CAP
    assert sequence.tokens[2] == model.next_token((7, 8))


def test_a_prefix_longer_than_the_cap_is_kept_whole() -> None:
    given_tokens = tuple(range(10, 30))
    sequence = run(Model((*given_tokens, 1, 2)), prefix=given_tokens, cap=4).sequence
    assert sequence.tokens == (*given_tokens, 1, 2)


@pytest.mark.parametrize("token", [EOT, SOT, -1, 10**9])
def test_a_prefix_ends_before_what_cannot_be_text(token: int) -> None:
    assert run(Model((1, 2, 3)), prefix=(1, token, 2)).sequence.tokens == (1, 2, 3)
    assert run(Model((1, 2, 3)), prefix=(1, token, 2)).num_passes == 3


def test_silence_leaves_nothing_of_a_prefix() -> None:
    model = Model((1, 2, 3), no_speech_probability=0.95, logprob=-2.0)
    done = Run(model, Prompt(PROMPT, prefix=(1, 2)), guards=GuardParams()).finish()
    assert (done.tokens, done.logprobs, done.guard) == ((), (), SILENCE)


@given(st.data())
def test_a_sequence_that_loses_its_memory_keeps_its_prefix_and_gives_the_same_text(data: st.DataObject) -> None:
    model = Model(data.draw(TEXTS))
    num_given = data.draw(st.integers(0, len(model.text)))
    draft, _ = data.draw(edited(model.text[num_given:], new_tokens=st.integers(0, 12)))
    restarted = Run(model, Prompt(PROMPT, prefix=model.text[:num_given]), draft)
    for num_steps in data.draw(st.lists(st.integers(0, 6), max_size=3)):
        for _ in range(num_steps):
            if not restarted.sequence.is_finished:
                restarted.step(data.draw(st.sampled_from([1, 4, 512])))
        if not restarted.sequence.is_finished:
            num_resume_tokens = restarted.sequence.num_resume_tokens
            restarted.lose_memory()
            assert restarted.sequence.num_pending == num_resume_tokens
    assert restarted.finish().tokens == model.text


@pytest.mark.parametrize(("num_steps", "num_passes"), [(0, 5), (1, 4), (2, 3), (3, 3)])
def test_a_sequence_that_loses_its_memory_keeps_what_is_left_of_its_draft(num_steps: int, num_passes: int) -> None:
    text = tuple(range(30))
    restarted = Run(Model(text), Prompt(PROMPT), (*text[:5], 100, *text[6:20], 101, *text[21:]))
    for _ in range(num_steps):
        restarted.step(8)
    restarted.lose_memory()
    assert restarted.finish().tokens == text
    assert restarted.num_passes == num_steps + num_passes


@given(st.data())
def test_a_language_guessed_wrong_costs_its_pass_and_no_draft(data: st.DataObject) -> None:
    model = Model(data.draw(DISTINCT), language=GERMAN)
    num_given = data.draw(st.integers(0, len(model.text)))
    draft, num_passes = data.draw(edited(model.text[num_given:], new_tokens=st.integers(100, 400)))
    done = Run(model, Prompt(PROMPT, (ENGLISH, GERMAN), model.text[:num_given]), draft)
    assert done.finish().prompt == (SOT, GERMAN, TRANSCRIBE)
    assert done.sequence.tokens == model.text
    assert done.num_passes <= num_passes + 1
