"""The seam between the decode engine and a model: rows in, picked tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.items import Word


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
    on (none if that is the number of tokens); the first of them starts a text if `is_begin`. `reads_start`: tokens[0]
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


class DecodeRunner(Protocol):
    """A decoder network with its key/value memory. Single-threaded."""

    @property
    def num_slots(self) -> int:
        """Slots of the memory."""
        ...

    @property
    def max_tokens(self) -> int:
        """Prompt and text tokens of a slot."""
        ...

    @property
    def max_context_positions(self) -> int:
        """Positions of embeddings that a slot holds."""
        ...

    @property
    def context_width(self) -> int:
        """Width of the embeddings."""
        ...

    @property
    def context_positions_per_token(self) -> int:
        """How many positions of context cost about as much to take in as one token."""
        ...

    @property
    def partial_dtype(self) -> str:
        """The arithmetic under leases that are not exact: "float32", "bfloat16" or "int8"."""
        ...

    @property
    def final_dtype(self) -> str:
        """The arithmetic under exact leases: "float32" or "int8"."""
        ...

    def open(self, slot: int, embeddings: NDArray[np.float32], num_tokens: int, *, is_exact: bool) -> Lease:
        """Lease `slot` for up to `num_tokens` tokens over `embeddings` float32[positions, width].

        The slot stays free when this raises.
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
