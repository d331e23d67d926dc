from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode.guards import (
    COMPRESSION,
    LOOP,
    SILENCE,
    TOKEN_CAP,
    GuardParams,
    LoopDetector,
    compression_ratio,
    is_repetitive,
    is_silence,
    is_sparse,
    num_tokens_before_repetition,
    token_cap,
)
from pipeline.decode.runner import Pick, RowResult, StartReading
from pipeline.decode.sequence import Limits, Prompt, TokenSequence

EOT = 10_000
SOT = 10_001
SPEECH = (
    "The invention of movable metal letters in the middle of the fifteenth century may justly be considered as the "
    "invention of the art of printing."
)
HINDI = (
    "भारत एक विशाल देश है जहाँ अनेक भाषाएँ बोली जाती हैं और हर राज्य की अपनी संस्कृति, खानपान तथा त्योहार होते हैं "
    "जिन्हें लोग बड़े उत्साह से मनाते हैं। गर्मियों में पहाड़ों की यात्रा करना बहुत लोकप्रिय है।"
)


def first_loop(tokens: list[int], params: GuardParams | None = None) -> tuple[int, int] | None:
    """Return (tokens seen, tokens kept) where a loop is found."""
    detector = LoopDetector(params or GuardParams())
    for seen, token in enumerate(tokens, start=1):
        kept = detector.push(token)
        if kept is not None:
            return seen, kept
    return None


@pytest.mark.parametrize(("period", "seen"), [(1, 12), (2, 12), (3, 12), (4, 16), (10, 40), (32, 128)])
def test_a_loop_is_found_at_its_fourth_turn_and_cut_behind_its_first(period: int, seen: int) -> None:
    before, turn = [900, 901, 902], list(range(period))
    assert first_loop(before + turn * 200) == (3 + seen, 3 + period)


def test_words_said_three_times_are_no_loop() -> None:
    assert first_loop([5, 6, 7, 8] * 3 + [9] * 8 + [5, 6] * 4) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_a_loop_is_what_a_plain_search_finds(tokens: list[int]) -> None:
    params = GuardParams(min_loop_repeats=3, min_loop_tokens=6, max_loop_period_tokens=8)

    def plain() -> int | None:
        for seen in range(1, len(tokens) + 1):
            for period in range(1, 9):
                span = max(3 * period, 6)
                tail = tokens[seen - span : seen]
                if seen >= span and all(tail[i] == tail[i - period] for i in range(period, span)):
                    return seen
        return None

    found = first_loop(tokens, params)
    assert (found[0] if found else None) == plain()


def test_speech_of_any_script_is_not_repetitive() -> None:
    params = GuardParams()
    assert not is_repetitive(SPEECH, params)
    assert not is_repetitive(HINDI, params)
    assert compression_ratio(HINDI) < 2.0
    assert compression_ratio("") == 0.0


def test_variations_on_one_sentence_are_repetitive_and_cut_to_about_the_first() -> None:
    words = [word for n in range(12) for word in f" I am going to go to the shop number {n}.".split(" ")[1:]]
    texts = [" ".join(words[: i + 1]) for i in range(len(words))]
    params = GuardParams()
    assert is_repetitive(texts[-1], params)
    tokens = list(range(len(words)))  # no token comes twice: only the ratio can tell
    assert 8 <= num_tokens_before_repetition(tokens, texts, params) <= 27
    assert num_tokens_before_repetition([], [], params) == 0


@pytest.mark.parametrize("num_repeated", [6, 9, 20, 33])
def test_a_text_that_repeats_its_end_is_kept_up_to_the_end_of_the_first_occurrence(num_repeated: int) -> None:
    start, sentence = list(range(100, 140)), list(range(20))
    tokens = start + sentence + [sentence[n % 20] for n in range(num_repeated)]
    texts = ["the same words " * 20] * len(tokens)
    assert num_tokens_before_repetition(tokens, texts, GuardParams()) == 60


@pytest.mark.parametrize(
    ("text", "no_speech", "logprob", "expected"),
    [
        ("Thank you.", 0.61, -1.01, True),
        ("Thank you.", 0.61, -0.99, False),
        ("Thank you.", 0.59, -1.01, False),
        ("Thank you.", 0.91, -0.7, True),
        ("The", 0.25, -2.9, True),
        ("mumbled speech", 0.05, -1.9, False),
        ("...", 0.0, -0.1, True),
        ("", 0.0, 0.0, True),
        ("はい", 0.0, -0.2, False),
    ],
)
def test_text_on_silence_is_told_by_probabilities(text: str, no_speech: float, logprob: float, expected: bool) -> None:
    assert is_silence(text, no_speech, logprob, GuardParams()) is expected


def test_the_token_cap_grows_with_the_audio_between_its_bounds() -> None:
    params = GuardParams(max_tokens_per_s=10.0, min_token_cap=16, max_tokens=100)
    assert [token_cap(seconds * 16_000, params) for seconds in (0, 1, 2, 5, 30)] == [16, 16, 20, 50, 100]


def test_a_text_is_sparse_when_speech_of_its_length_has_more_tokens() -> None:
    params = GuardParams(sparse_tokens_per_s=2.5, min_sparse_ms=1_500)
    assert [is_sparse(n, 4 * 16_000, params) for n in (0, 9, 10, 40)] == [True, True, False, False]
    assert not is_sparse(0, 23_999, params)
    assert is_sparse(0, 24_000, params)


def decode(tokens: object) -> str:
    assert isinstance(tokens, list | tuple)
    return " ".join(f"w{token}" for token in tokens)


def run_greedy(
    next_tokens: list[int],
    draft: tuple[int, ...],
    no_speech: float = 0.0,
    cap: int = 100,
    max_chars: float | None = None,
) -> TokenSequence:
    """Decode with a model that always says `next_tokens`, feeding at most seven tokens a pass."""
    limits = Limits(cap, frozenset({EOT}), EOT, GuardParams(), max_chars)
    sequence = TokenSequence(Prompt((SOT, 1, 2)), draft, limits, decode)
    while not sequence.is_finished:
        feed = sequence.feed(7)
        places = range(feed.position + feed.pick_from - 2, feed.position + len(feed.tokens) - 2)
        picks = tuple(Pick(next_tokens[place] if place < len(next_tokens) else EOT, -0.25) for place in places)
        start = StartReading(no_speech, {}) if feed.reads_start else None
        sequence.account(feed, RowResult(picks, start))
    return sequence


@settings(max_examples=200, deadline=None)
@given(
    truth=st.lists(st.integers(0, 9), max_size=40),
    cut=st.integers(0, 40),
    noise=st.lists(st.integers(-5, EOT + 5), max_size=50),
    max_chars=st.one_of(st.none(), st.floats(0, 100)),
)
def test_a_draft_changes_nothing_but_the_number_of_passes(
    truth: list[int], cut: int, noise: list[int], max_chars: float | None
) -> None:
    plain = run_greedy(truth, (), max_chars=max_chars)
    drafted = run_greedy(truth, (*truth[:cut], *noise), max_chars=max_chars)
    assert (drafted.tokens, drafted.logprobs, drafted.guard) == (plain.tokens, plain.logprobs, plain.guard)
    assert drafted.average_logprob == plain.average_logprob


def test_a_right_draft_takes_as_many_passes_as_its_tokens_need_and_no_more() -> None:
    truth = list(range(20))
    assert run_greedy(truth, ()).num_passes == 21
    assert run_greedy(truth, tuple(truth)).num_passes == 4  # 23 tokens, 7 a pass


def test_a_loop_ends_decoding_early() -> None:
    sequence = run_greedy([7, *[1, 2, 3] * 70], ())
    assert (sequence.guard, sequence.tokens, sequence.num_passes) == (LOOP, (7, 1, 2, 3), 13)


def test_more_than_anybody_can_speak_is_a_loop_as_soon_as_it_comes_a_second_time() -> None:
    hasty = run_greedy([7, *[1, 2, 3] * 70], (), max_chars=15)
    assert (hasty.guard, hasty.tokens, hasty.num_passes) == (LOOP, (7, 1, 2, 3), 7)
    slow = run_greedy([7, *[1, 2, 3] * 70], (), max_chars=30)
    assert (slow.guard, slow.tokens, slow.num_passes) == (LOOP, (7, 1, 2, 3), 11)
    said_twice = [7, *[1, 2, 3] * 2, 8]
    assert run_greedy(said_twice, (), max_chars=30).guard is None
    assert run_greedy(said_twice, ()).guard is None


def test_nothing_of_a_loop_is_kept_where_no_speech_is_heard() -> None:
    assert run_greedy([7, *[1, 2, 3] * 70], (), no_speech=0.5).tokens == ()


def test_an_endless_text_is_cut_at_the_cap() -> None:
    endless = [token * 37 % 9_973 for token in range(400)]
    sequence = run_greedy(endless, (), cap=50)
    assert (sequence.guard, len(sequence.tokens)) == (TOKEN_CAP, 50)


def test_a_text_that_varies_one_sentence_is_cut_while_it_is_decoded() -> None:
    endless = [token for turn in range(40) for token in (11, 12, 13, 14, 15, 16, 17, 18, 100 + turn)]
    sequence = run_greedy(endless, (), cap=360)
    assert sequence.guard == COMPRESSION
    assert 9 <= len(sequence.tokens) <= 40
    assert sequence.num_passes < 140


def test_silence_has_no_tokens() -> None:
    sequence = run_greedy([], (), no_speech=0.3)
    assert (sequence.guard, sequence.tokens) == (SILENCE, ())


def step_once(sequence: TokenSequence, truth: list[int]) -> None:
    feed = sequence.feed(64)
    places = range(feed.position + feed.pick_from - 2, feed.position + len(feed.tokens) - 2)
    picks = tuple(Pick(truth[place] if place < len(truth) else EOT, -0.25) for place in places)
    sequence.account(feed, RowResult(picks, StartReading(0.0, {}) if feed.reads_start else None))


def test_a_sequence_that_lost_its_memory_feeds_what_it_had_and_ends_the_same() -> None:
    truth = list(range(30))
    sequence = TokenSequence(Prompt((SOT, 1, 2)), (), Limits(100, frozenset({EOT}), EOT, GuardParams()), decode)
    for _ in range(6):
        step_once(sequence, truth)
    assert sequence.tokens == tuple(truth[:6])
    sequence.restart()
    assert sequence.feed(64).tokens == (SOT, 1, 2, *truth[:6])
    while not sequence.is_finished:
        step_once(sequence, truth)
    assert sequence.tokens == tuple(truth)


def test_a_wrong_guess_of_the_language_is_corrected_and_what_was_fed_behind_it_forgotten() -> None:
    german, english, task = 1, 2, 3
    sequence = TokenSequence(
        Prompt((SOT, english, task), (german, english)),
        (40, 41),
        Limits(100, frozenset({EOT}), EOT, GuardParams()),
        decode,
    )
    feed = sequence.feed(64)
    assert feed.tokens == (SOT, english, task, 40, 41)
    wrong = tuple(Pick(token, -0.25) for token in (40, 41, 42))
    sequence.account(feed, RowResult(wrong, StartReading(0.0, {german: 2.0, english: 1.0, 99: 3.0})))
    assert sequence.prompt == (SOT, german, task)
    assert sequence.feed(64).tokens == (german, task, 40, 41)
    assert sequence.tokens == ()
