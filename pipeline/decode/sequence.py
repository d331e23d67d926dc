"""One task of one request while it is decoded: what to feed next, what was accepted, when it ends. Plain Python.

The draft is fed behind the prompt in the same pass. Every fed token gives a pick for the place behind it; as long as
the next fed token is that pick, it was right and its own pick counts too; from the first other token on, what was fed
is forgotten, and the rest of the draft is fed again once a pick is found in its beginning. So the accepted tokens are
those of greedy decoding without a draft, in fewer passes. A language that is not known is verified the same way: the
guess is fed as if it were known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from pipeline.decode.guards import (
    COMPRESSION,
    LOOP,
    SILENCE,
    TOKEN_CAP,
    GuardParams,
    LoopDetector,
    is_repetitive,
    is_silence,
    num_tokens_before_repetition,
)
from pipeline.decode.runner import Pick, RowResult, StartReading

# The compression test needs the text; it is made at the end and whenever so many tokens were added.
_COMPRESSION_TEST_TOKENS = 16
_LANGUAGE_PLACE = 1
_HASTY_REPEATS = 2
# How far behind the place where a draft was left its text is looked for again: two or three words.
_RESUME_WITHIN = 6


@dataclass(frozen=True, slots=True)
class Prompt:
    """The special tokens before the text: start, language, task.

    If `language_choices` is not empty, the language is to be detected among these; the one in `tokens` is a guess.
    `prefix` holds text tokens that are given: the text goes on from them. `draft` holds those with which the text
    probably begins, if whoever made the prompt knows.
    """

    tokens: tuple[int, ...]
    language_choices: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Feed:
    """What a sequence feeds next; the fields are those of `pipeline.decode.runner.Row`."""

    position: int
    tokens: tuple[int, ...]
    pick_from: int
    is_begin: bool
    reads_start: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a sequence: how many text tokens it may have, which tokens end it, which are text, and the guards.

    Tokens below `num_text_tokens` are text. With more than `max_chars` of text two occurrences of something are a loop;
    None: always as many as the guards say.
    """

    max_new_tokens: int
    ends: frozenset[int]
    num_text_tokens: int
    guards: GuardParams
    max_chars: float | None = None


class TokenSequence:
    """Greedy decoding of one task with draft verification and guards.

    `num_cached` places at the start of the prompt are in the key/value memory already; then `start` is what was read
    there. `decode` gives the text of tokens. `num_before_text` tells how many of the tokens stand before what was asked
    for: a translation may say again what the transcript before it says, which is no repetition.
    """

    def __init__(
        self,
        prompt: Prompt,
        draft: Sequence[int],
        limits: Limits,
        decode: Callable[[Sequence[int]], str],
        *,
        num_cached: int = 0,
        start: StartReading | None = None,
        num_before_text: Callable[[Sequence[int]], int] | None = None,
    ) -> None:
        self._num_before_text = num_before_text or (lambda _tokens: 0)
        self._prompt = list(prompt.tokens)
        self._prefix = _text_only(prompt.prefix, limits)
        self._choices = prompt.language_choices
        self._draft = _text_only(draft, limits)[: limits.max_new_tokens]
        self._limits = limits
        self._decode = decode
        self._start = start
        self.num_passes = 0
        self._position = num_cached
        self._pending: list[int] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._sum_logprob = 0.0
        self._num_decoded = 0
        self._guard: str | None = None
        self._is_finished = False
        self._begin(num_cached)

    @property
    def is_finished(self) -> bool:
        """Whether end-of-text or a guard was reached."""
        return self._is_finished

    @property
    def num_pending(self) -> int:
        """Tokens to feed next."""
        return len(self._pending)

    @property
    def num_resume_tokens(self) -> int:
        """Tokens to feed if the memory is lost (`restart`)."""
        return len(self._prompt) + len(self._prefix) + len(self._next_draft)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the text that is decoded: the prompt and the prefix."""
        return len(self._prompt) + len(self._prefix)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt; its language is final once a pass has run."""
        return tuple(self._prompt)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prefix and the text tokens accepted, without what a guard cut off."""
        return (*self._prefix, *self._tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The log-probability of each of `tokens`; that of the prefix is 0."""
        return (*(0.0 for _ in self._prefix), *self._logprobs)

    @property
    def guard(self) -> str | None:
        """The guard that fired."""
        return self._guard

    @property
    def average_logprob(self) -> float:
        """Mean log-probability of all decoded tokens, end-of-text included, as in OpenAI's `whisper/decoding.py`."""
        return self._sum_logprob / (self._num_decoded + 1)

    @property
    def start(self) -> StartReading | None:
        """What the model thought at the start token; None before it was fed."""
        return self._start

    def feed(self, num_tokens: int) -> Feed:
        """Return the next up to `num_tokens` tokens to feed."""
        tokens = tuple(self._pending[:num_tokens])
        last_prompt_place = len(self._prompt) + len(self._prefix) - 1
        pick_from = min(len(tokens), max(0, last_prompt_place - self._position))
        is_begin = not self._prefix and self._position + pick_from == last_prompt_place
        return Feed(self._position, tokens, pick_from, is_begin, reads_start=self._position == 0)

    def account(self, feed: Feed, result: RowResult) -> None:
        """Take the result of feeding `feed`, which must be what `feed` returned last."""
        self.num_passes += 1
        if feed.reads_start:
            self._start = result.start
            if self._choices and not self._settle_language():
                return
        for index, pick in enumerate(result.picks, start=feed.pick_from):
            self._accept(pick)
            if self._is_finished:
                return
            behind = index + 1
            if behind >= len(self._pending) or self._pending[behind] != pick.token:
                self._position += behind
                self._go_on(pick.token, self._pending[behind:] or self._rest)
                return
        self._position += len(feed.tokens)
        del self._pending[: len(feed.tokens)]

    def restart(self) -> None:
        """Begin again with an empty memory; what was accepted so far and what is left of the draft become the draft."""
        self._draft = self._next_draft
        self._begin(0)

    @property
    def _next_draft(self) -> list[int]:
        if not self._tokens:
            return self._draft
        # What is pending begins with the last token accepted.
        return [*self._tokens, *self._pending[1:], *self._rest][: self._limits.max_new_tokens]

    def _begin(self, num_cached: int) -> None:
        self._position = num_cached
        self._pending = (self._prompt + self._prefix)[num_cached:] + self._draft
        self._tokens, self._logprobs = [], []
        self._sum_logprob = 0.0
        self._num_decoded = 0
        self._rest: list[int] = []  # of a draft that was left: it may fit again
        self._loops = LoopDetector(self._limits.guards)
        self._guard = None
        self._is_finished = False

    def _go_on(self, token: int, rest: list[int]) -> None:
        """Feed `token` next and, if it is the beginning of what is left of the draft, what follows it there.

        A word that became another one costs a pass or two, not the draft of all that follows. What would pass the cap
        could never be accepted, and has no place in the memory.
        """
        if token in rest[:_RESUME_WITHIN]:
            behind = rest.index(token) + 1
            num_left = self._limits.max_new_tokens - self._num_decoded
            self._pending, self._rest = [token, *rest[behind : behind + num_left]], []
        else:
            self._pending, self._rest = [token], rest

    def _settle_language(self) -> bool:
        """Put the detected language into the prompt; return whether it is the one that was fed."""
        scores = self._start.language_logits if self._start is not None else {}
        language = max(self._choices, key=lambda token: scores[token])
        self._choices = ()
        was_right = self._prompt[_LANGUAGE_PLACE] == language
        if not was_right:
            self._prompt[_LANGUAGE_PLACE] = language
            self._begin(_LANGUAGE_PLACE)
        return was_right

    def _accept(self, pick: Pick) -> None:
        self._sum_logprob += pick.logprob
        if pick.token in self._limits.ends:
            self._finish()
            return
        self._tokens.append(pick.token)
        self._logprobs.append(pick.logprob)
        self._num_decoded += 1
        num_kept = self._loops.push(pick.token)
        if num_kept is None:
            num_kept = self._find_hasty_loop()
        if num_kept is not None:
            self._cut(num_kept, LOOP)
        elif self._num_decoded > self._limits.max_new_tokens:
            # The token too many is dropped: whatever is kept has been fed, draft or not, as word times need it.
            self._cut(self._limits.max_new_tokens, TOKEN_CAP)
        elif self._num_decoded % _COMPRESSION_TEST_TOKENS == 0:
            self._test_compression()

    def _find_hasty_loop(self) -> int | None:
        """Return how many tokens to keep if the end comes a second time and nobody can speak so much in the time."""
        if self._limits.max_chars is None:
            return None
        num_kept = self._loops.find(_HASTY_REPEATS, self._limits.guards.min_hasty_loop_tokens)
        if num_kept is None or len(self._decode(self.tokens)) <= self._limits.max_chars:
            return None
        return num_kept

    def _finish(self) -> None:
        self._is_finished = True
        self._test_compression()
        text = self._decode(self.tokens)
        if is_silence(text, self._no_speech_probability, self.average_logprob, self._limits.guards):
            self._prefix = []
            self._cut(0, SILENCE)

    @property
    def _no_speech_probability(self) -> float:
        return self._start.no_speech_probability if self._start is not None else 0.0

    def _test_compression(self) -> None:
        num_before = self._num_before_text(self._tokens)
        tokens = self._tokens[num_before:]
        if is_repetitive(self._decode(tokens), self._limits.guards):
            texts = [self._decode(tokens[: i + 1]) for i in range(len(tokens))]
            self._cut(num_before + num_tokens_before_repetition(tokens, texts, self._limits.guards), COMPRESSION)

    def _cut(self, num_kept: int, guard: str) -> None:
        if self._no_speech_probability > self._limits.guards.loop_no_speech_threshold:
            num_kept = 0
        del self._tokens[num_kept:], self._logprobs[num_kept:]
        self._guard = guard
        self._is_finished = True


def _text_only(tokens: Sequence[int], limits: Limits) -> list[int]:
    """Return `tokens` up to the first that cannot be text."""
    return list(takewhile(lambda token: 0 <= token < limits.num_text_tokens, tokens))
