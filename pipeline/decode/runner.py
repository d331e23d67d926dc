"""The seam between the decode engine and a model: rows in, picked tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.items import Embeddings, Pictures, Word


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use a slot until it is closed, for up to `token_capacity` tokens.

    What is computed under an exact lease does not depend on what else is computed; other leases may be quicker.
    """

    slot: int
    generation: int
    token_capacity: int
    num_context_positions: int
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """What one request feeds in one forward pass.

    `tokens` go to the places of the lease from `position` on. A pick is wanted after each token from index `pick_from`
    on (none if that is the number of tokens); the first of them starts a text if `is_begin`. Tokens that stand for
    positions of the context (placeholders) are replaced by what is there. `reads_start`: tokens[0]
    is the start token at place 0, and what the model thinks there of silence and language is wanted.
    """

    lease: Lease
    position: int
    tokens: tuple[int, ...]
    pick_from: int
    is_begin: bool
    reads_start: bool


@dataclass(frozen=True, slots=True)
class Pick:
    """The most probable next token among those allowed, and its log-probability among those."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class StartReading:
    """What the model thinks at the start token: probability of no speech, and logits of the language tokens."""

    no_speech_probability: float
    language_logits: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class TimedText:
    """A decoded text whose words are wanted: its tokens, their log-probabilities, and the prompt before them."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    language: str


@dataclass(frozen=True, slots=True)
class RowResult:
    """Picks for tokens[pick_from:], in order, and the start reading if one was wanted."""

    picks: tuple[Pick, ...]
    start: StartReading | None


@dataclass(frozen=True, slots=True)
class Context:
    """What a request is about: sound, pictures, both or (a text is in the prompt) neither."""

    sound: Embeddings | None = None
    pictures: Pictures | None = None


class DecodeRunner(Protocol):
    """A decoder network with its key/value memory. Single-threaded."""

    @property
    def num_slots(self) -> int:
        """Slots of the memory."""
        ...

    @property
    def has_one_arithmetic(self) -> bool:
        """Whether rows of finals and of others can share a pass: they are computed in the same way."""
        ...

    @property
    def partial_dtype(self) -> str:
        """The arithmetic under leases that are not exact: "float32", "bfloat16" or "int8"."""
        ...

    @property
    def final_dtype(self) -> str:
        """The arithmetic under exact leases: "float32" or "int8"."""
        ...

    def check(self, context: Context) -> None:
        """Check that the model can be asked about `context`.

        Raises:
            ValueError: if its shape, size or values cannot be used; the message says what is wrong.
        """
        ...

    def context_cost(self, context: Context) -> int:
        """Return what it costs to take `context` in when a slot is opened, in tokens' worth of arithmetic."""
        ...

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """Return how many tokens can follow a prompt of `num_prompt_tokens`; below 1: it does not fit at all."""
        ...

    def open(
        self, slot: int, context: Context, num_prompt_tokens: int, max_new_tokens: int, *, is_exact: bool
    ) -> Lease:
        """Lease `slot` for a request about `context` whose prompts and texts have up to so many tokens.

        The slot stays free when this raises.
        """
        ...

    def renew(self, lease: Lease, num_prompt_tokens: int, max_new_tokens: int) -> Lease | None:
        """Return the lease for another prompt of the same request; what both prompts begin with is kept.

        None: nothing of it can be kept; `lease` is as it was, to be closed.
        """
        ...

    def close(self, lease: Lease, *, is_spoilt: bool = False) -> None:
        """End a lease; `is_spoilt`: what was computed under it may not be finite."""
        ...

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """Run all `rows` in one forward pass; the result of each exact one is as if it had run alone.

        Running a row again gives the same result and leaves the same memory.

        Raises:
            StageError: if a row's numbers are not finite.
        """
        ...

    def words(self, lease: Lease, text: TimedText, num_audio_samples: int) -> tuple[Word, ...]:
        """Return the words of a text that was decoded in `lease`, in order, within [0, num_audio_samples]."""
        ...
