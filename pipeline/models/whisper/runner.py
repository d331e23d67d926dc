"""Whisper's decoder as a runner of the decode engine: picks, suppressed tokens, start readings, leases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode.prompting import DecoderParts
from pipeline.decode.runner import Context, Lease, Pick, Row, RowResult, StartReading, TimedText
from pipeline.errors import StageError
from pipeline.items import Word
from pipeline.models.device import Clock, check_final_arithmetic, choose_device, choose_partial_arithmetic
from pipeline.models.linear import Arithmetic
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.alignment import token_times, words_from_times
from pipeline.models.whisper.checkpoint import WhisperCheckpoint, load_checkpoint
from pipeline.models.whisper.decoder import WhisperDecoder
from pipeline.models.whisper.encoder import POSITION_SAMPLES
from pipeline.models.whisper.prompts import WhisperPrompter
from pipeline.models.whisper.tokenizer import WhisperTokenizer, load_tokenizer


class WhisperRunner:
    """Implements `pipeline.decode.runner.DecodeRunner`; every row of an exact lease is exact (decoder.py)."""

    def __init__(
        self,
        checkpoint: WhisperCheckpoint,
        tokenizer: WhisperTokenizer,
        num_slots: int,
        *,
        max_context_positions: int | None = None,
        device: torch.device | None = None,
        partial_arithmetic: Arithmetic = "float32",
        final_arithmetic: Arithmetic = "float32",
    ) -> None:
        config = checkpoint.config
        self._device = device or torch.device("cpu")
        self.decoder = WhisperDecoder(
            checkpoint,
            num_slots,
            max_context_positions or config.max_source_positions,
            self._device,
            partial_arithmetic=partial_arithmetic,
            exact_arithmetic=final_arithmetic,
        )
        self.partial_dtype: str = partial_arithmetic
        self.final_dtype: str = final_arithmetic
        self._tokenizer = tokenizer
        self._no_speech = tokenizer.no_speech
        # Of all special tokens and timestamps, only end-of-text may be picked; it is the first of them.
        self._num_pickable = tokenizer.eot + 1
        self._suppressed = self._pickable(config.suppress_tokens)
        self._suppressed_at_begin = self._pickable((*config.suppress_tokens, *config.begin_suppress_tokens))
        self.num_slots = num_slots
        self.has_one_arithmetic = False  # never supposed: finals are bounded in what may go along with them
        self._max_tokens = config.max_target_positions
        self._max_context_positions = max_context_positions or config.max_source_positions
        self._context_width = config.width
        # A token takes attention, twice, and an MLP of every layer; a position of context two projections.
        self._context_positions_per_token = max(1, (6 * config.width + 2 * config.decoder_ffn) // (2 * config.width))

    def check(self, context: Context) -> None:
        """Check that there is sound, float32[n, width] of finite numbers that fit a slot, and nothing else.

        Raises:
            ValueError: if not.
        """
        if context.sound is None or context.pictures is not None:
            raise ValueError("Whisper hears sound and sees no pictures")
        values = context.sound.values
        if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != self._context_width:
            raise ValueError(
                f"the embeddings are {values.dtype}{list(values.shape)}, expected float32[n, {self._context_width}]"
            )
        if not 1 <= len(values) <= self._max_context_positions:
            raise ValueError(
                f"{len(values)} positions of embeddings, the decoder takes 1 to {self._max_context_positions}"
            )
        if not np.isfinite(values).all():
            raise ValueError("the embeddings have values that are not finite")

    def context_cost(self, context: Context) -> int:
        """Return what it costs to project `context` to keys and values, in tokens' worth."""
        num_positions = 0 if context.sound is None else len(context.sound.values)
        return math.ceil(num_positions / self._context_positions_per_token)

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """Return how many tokens the model has places for behind a prompt of `num_prompt_tokens`."""
        return self._max_tokens - num_prompt_tokens

    def open(
        self, slot: int, context: Context, num_prompt_tokens: int, max_new_tokens: int, *, is_exact: bool
    ) -> Lease:
        """Lease `slot` and project the sound's embeddings to its context keys and values.

        Raises:
            ValueError: if something does not fit the slot, or there is no sound.
        """
        if context.sound is None:
            raise ValueError("Whisper needs sound")
        with torch.inference_mode():
            # Copied: what arrives from another process may be read-only, which torch warns of.
            positions = torch.tensor(context.sound.values, device=self._device)
            return self.decoder.open(slot, positions, num_prompt_tokens + max_new_tokens, is_exact=is_exact)

    def renew(self, lease: Lease, num_prompt_tokens: int, max_new_tokens: int) -> Lease | None:
        """Return `lease` itself if it has room for that, else None."""
        return lease if num_prompt_tokens + max_new_tokens <= lease.token_capacity else None

    def close(self, lease: Lease, *, is_spoilt: bool = False) -> None:
        """End `lease`; `is_spoilt`: what was computed under it may not be finite."""
        self.decoder.memory.close(lease, is_spoilt=is_spoilt)

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """Run all `rows`, the exact ones in one forward pass and the others in another.

        Logits are computed for the wanted tokens only.

        Raises:
            StageError: if logits are not finite.
        """
        results: dict[int, RowResult] = {}
        for is_exact in (True, False):
            chosen = [index for index, row in enumerate(rows) if row.lease.is_exact == is_exact]
            if chosen:
                results |= zip(chosen, self._run([rows[index] for index in chosen]), strict=True)
        return [results[index] for index in range(len(rows))]

    def _run(self, rows: Sequence[Row]) -> list[RowResult]:
        with torch.inference_mode():
            hidden = self.decoder.forward(rows)
            wanted, start = [], 0
            for row in rows:
                wanted += [start] if row.reads_start else []
                wanted += range(start + row.pick_from, start + len(row.tokens))
                start += len(row.tokens)
            if not wanted:
                return [RowResult((), None) for _ in rows]
            chosen = hidden[wanted] if len(wanted) < start else hidden
            logits = self.decoder.logits(chosen, is_exact=rows[0].lease.is_exact).cpu().numpy()
        return self._results(rows, logits)

    def words(self, lease: Lease, text: TimedText, num_audio_samples: int) -> tuple[Word, ...]:
        """Return the words of `text` with times from the alignment heads' attention over the real audio."""
        if not text.tokens:
            return ()
        num_positions = min(lease.num_context_positions, max(1, math.ceil(num_audio_samples / POSITION_SAMPLES)))
        with torch.inference_mode():
            num_tokens = len(text.prompt) + len(text.tokens)
            attention = self.decoder.attention(lease, num_tokens, num_positions).cpu().numpy()
        times = token_times(attention, len(text.prompt))
        words = self._tokenizer.split_to_words(text.tokens, text.language)
        return words_from_times(words, times, text.logprobs, num_audio_samples)

    def _results(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> list[RowResult]:
        results, index = [], 0
        for row in rows:
            start = None
            if row.reads_start:
                start = self._read_start(logits[index])
                index += 1
            num_picks = len(row.tokens) - row.pick_from
            picks = [self._pick(logits[index + i], is_begin=row.is_begin and i == 0) for i in range(num_picks)]
            index += num_picks
            results.append(RowResult(tuple(picks), start))
        return results

    def _pick(self, logits: NDArray[np.float32], *, is_begin: bool) -> Pick:
        allowed = logits[: self._num_pickable]
        allowed[self._suppressed_at_begin if is_begin else self._suppressed] = -np.inf
        token = int(allowed.argmax())
        return Pick(token, _logprob(allowed, token))

    def _read_start(self, logits: NDArray[np.float32]) -> StartReading:
        probability = math.exp(_logprob(logits, self._no_speech))
        return StartReading(probability, {token: float(logits[token]) for token in self._tokenizer.language_tokens})

    def _pickable(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        return np.array(sorted({token for token in tokens if token < self._num_pickable}), dtype=np.int64)


def _logprob(logits: NDArray[np.float32], token: int) -> float:
    """Return the log-probability of `token`; one row at a time, so that its rounding cannot depend on other rows."""
    relative = logits - logits[token]
    with np.errstate(over="ignore"):
        logprob = -float(np.log(np.exp(relative).sum(dtype=np.float64)))
    if not math.isfinite(logprob):
        raise StageError("the decoder's logits are not finite; its input is unusable")
    return logprob


def load_parts(model: ModelParams, num_slots: int, clock: Clock | None = None) -> DecoderParts:
    """Read the decoder and the tokenizer of `model`; return them on the device that it asks for.

    With a `clock`, "auto" measures which arithmetic partials get.

    Raises:
        WeightsHashError: if a pinned file is not the right one.
        ModelError: if the checkpoint is missing or unusable.
    """
    tokenizer = load_tokenizer(model)
    device = choose_device(model)
    runner = WhisperRunner(
        load_checkpoint(model, "decoder"),
        tokenizer,
        num_slots,
        device=device,
        partial_arithmetic=choose_partial_arithmetic(model, device, clock),
        final_arithmetic=check_final_arithmetic(model, device),
    )
    return DecoderParts(runner, WhisperPrompter(tokenizer))
