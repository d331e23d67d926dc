"""The weights run the way they were published: whole recordings, padded 30 s windows, no snapshots. The yardstick.

Nothing of the live path is used but the network itself: no VAD, no shortened windows, no drafts, no guards, no shared
engine. Up to 28 s are one window, decoded greedily without timestamps. Longer sound goes through OpenAI's sequential
windows (`whisper/transcribe.py` and `ApplyTimestampRules` in `whisper/decoding.py`): greedy with timestamps, and the
next window begins at the last timestamp of this one. Windows do not see the text before them, and there is no second
try at a higher temperature: that samples, and captions are to be the same on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.decode.runner import Lease, Row
from pipeline.models.device import choose_device
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import WhisperConfig, load_checkpoint
from pipeline.models.whisper.decoder import WhisperDecoder
from pipeline.models.whisper.encoder import POSITION_SAMPLES, WhisperEncoder
from pipeline.models.whisper.log_mel import HOP_SAMPLES, LogMel
from pipeline.models.whisper.tokenizer import WhisperTokenizer, load_tokenizer
from pipeline.timebase import SAMPLE_RATE_HZ

ONE_WINDOW_SAMPLES = 28 * SAMPLE_RATE_HZ
"""Longest sound that is decoded as one window: two seconds of silence stay behind it."""

_FULL_SCALE = 32_768.0
_MAX_INITIAL_TIMESTAMP = 50  # of 20 ms: text begins within the first second of a window


@dataclass(frozen=True, slots=True)
class OfflineText:
    """What was recognised. `language` is that of the first window."""

    text: str
    language: str
    num_windows: int


class OfflineWhisper:
    """One checkpoint, loaded for transcribing whole recordings one after the other. Not thread-safe.

    Raises:
        WeightsHashError: if a weight file is not the pinned one.
        ModelError: if the checkpoint cannot be used.
    """

    def __init__(self, model: ModelParams) -> None:
        self._device = choose_device(model)
        encoder, decoder = load_checkpoint(model, "encoder"), load_checkpoint(model, "decoder")
        self._config: WhisperConfig = encoder.config
        self._log_mel = LogMel(self._config.num_mels, self._device)
        self._encoder = WhisperEncoder(encoder, self._device)
        self._decoder = WhisperDecoder(decoder, 1, self._config.max_source_positions, self._device)
        self._tokenizer = load_tokenizer(model)
        self._rules = _TokenRules(self._config, self._tokenizer)
        self._window_samples = self._config.max_source_positions * POSITION_SAMPLES

    @torch.inference_mode()
    def transcribe(self, samples: NDArray[np.int16], language: str | None) -> OfflineText:
        """Return the text of a whole recording, int16[n] at 16 kHz; `language` None: detected in the first window."""
        if len(samples) <= ONE_WINDOW_SAMPLES:
            lease = self._open(self._features(samples, self._window_samples))
            try:
                language = language or self._detect(lease)
                tokens = self._decode(lease, language, has_timestamps=False)
            finally:
                self._decoder.memory.close(lease)
            return OfflineText(self._tokenizer.decode(tokens).strip(), language, 1)
        return self._transcribe_windows(samples, language)

    def _transcribe_windows(self, samples: NDArray[np.int16], language: str | None) -> OfflineText:
        # The front end's floor follows the loudest sound of the whole recording, as in OpenAI's.
        features = self._features(samples, -(-len(samples) // HOP_SAMPLES) * HOP_SAMPLES)
        num_steps = self._window_samples // HOP_SAMPLES
        texts: list[str] = []
        begin, num_windows = 0, 0
        while begin < len(features):
            window = features[begin : begin + num_steps]
            lease = self._open(F.pad(window, (0, 0, 0, num_steps - len(window))))
            try:
                language = language or self._detect(lease)
                tokens = self._decode(lease, language, has_timestamps=True)
            finally:
                self._decoder.memory.close(lease)
            kept, num_positions = self._rules.cut_at_last_timestamp(tokens)
            texts.append(self._tokenizer.decode(kept).strip())
            begin += num_positions * POSITION_SAMPLES // HOP_SAMPLES if num_positions else len(window)
            num_windows += 1
        return OfflineText(" ".join(text for text in texts if text), language or "en", num_windows)

    def _features(self, samples: NDArray[np.int16], num_samples: int) -> Tensor:
        """Return float32[num_samples / 160, mels] of `samples` with digital silence behind them up to `num_samples`."""
        padded = np.zeros(num_samples, np.float32)
        padded[: len(samples)] = samples / _FULL_SCALE
        return self._log_mel(torch.from_numpy(padded)[None].to(self._device))[0]

    def _open(self, features: Tensor) -> Lease:
        """Encode a window, float32[3000, mels], and give its embeddings to the decoder."""
        return self._decoder.open(0, self._encoder(features[None])[0], self._config.max_target_positions)

    def _detect(self, lease: Lease) -> str:
        languages = self._tokenizer.language_tokens
        if not languages:
            return "en"
        logits = self._feed(lease, 0, (self._tokenizer.sot,))
        return self._tokenizer.language_of(max(languages, key=lambda token: float(logits[token])))

    def _decode(self, lease: Lease, language: str, *, has_timestamps: bool) -> list[int]:
        """Return the tokens of the window, timestamps among them where asked for, without end-of-text."""
        prompt = self._rules.prompt(language, has_timestamps=has_timestamps)
        tokens: list[int] = []
        logits = self._feed(lease, 0, prompt)
        # As in OpenAI's decoder a window's text takes at most half of the places.
        while len(tokens) < self._config.max_target_positions // 2:
            token = int(self._rules.allowed(logits, tokens, has_timestamps=has_timestamps).argmax())
            if token == self._tokenizer.eot:
                break
            tokens.append(token)
            logits = self._feed(lease, len(prompt) + len(tokens) - 1, (token,))
        return tokens

    def _feed(self, lease: Lease, position: int, tokens: tuple[int, ...]) -> Tensor:
        """Return float32[vocabulary]: the logits after the last of `tokens`."""
        row = Row(lease, position, tokens, pick_from=len(tokens) - 1, is_begin=False, reads_start=False)
        return self._decoder.logits(self._decoder.forward([row])[-1:])[0]


class _TokenRules:
    """Which tokens may follow, with and without timestamps, and where a window's text is cut."""

    def __init__(self, config: WhisperConfig, tokenizer: WhisperTokenizer) -> None:
        self._tokenizer = tokenizer
        self._suppressed = list(config.suppress_tokens)
        self._suppressed_at_begin = list(config.begin_suppress_tokens)

    def prompt(self, language: str, *, has_timestamps: bool) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        tokens = [tokenizer.sot]
        if tokenizer.is_multilingual:
            tokens += [tokenizer.language_token(language), tokenizer.transcribe]
        return (*tokens,) if has_timestamps else (*tokens, tokenizer.no_timestamps)

    def allowed(self, logits: Tensor, tokens: Sequence[int], *, has_timestamps: bool) -> Tensor:
        """Return `logits` with minus infinity for every token that may not follow `tokens`."""
        eot, first = self._tokenizer.eot, self._tokenizer.timestamp_begin
        logits = logits.clone()
        logits[self._suppressed] = -torch.inf
        logits[eot + 1 : first] = -torch.inf
        if not tokens:
            logits[self._suppressed_at_begin] = -torch.inf
        if not has_timestamps:
            logits[first:] = -torch.inf
            return logits
        self._apply_timestamp_rules(logits, tokens)
        return logits

    def _apply_timestamp_rules(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Change `logits` so that timestamps come in pairs, never go back, and win when they are likelier in all."""
        eot, first = self._tokenizer.eot, self._tokenizer.timestamp_begin
        is_last = bool(tokens) and tokens[-1] >= first
        is_second_last = len(tokens) < 2 or tokens[-2] >= first
        if is_last and is_second_last:
            logits[first:] = -torch.inf
        elif is_last:
            logits[:eot] = -torch.inf
        timestamps = [token for token in tokens if token >= first]
        if timestamps:
            earliest = timestamps[-1] if is_last and not is_second_last else timestamps[-1] + 1
            logits[first:earliest] = -torch.inf
        if not tokens:
            logits[:first] = -torch.inf
            logits[first + _MAX_INITIAL_TIMESTAMP + 1 :] = -torch.inf
        logprobs = logits.log_softmax(0)
        if float(logprobs[first:].logsumexp(0)) > float(logprobs[:first].max()):
            logits[:first] = -torch.inf

    def cut_at_last_timestamp(self, tokens: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return the tokens of the window's finished segments, and where in it the next window begins.

        The second value is in positions of 20 ms; 0 means: behind the window, all of it is done.
        """
        first = self._tokenizer.timestamp_begin
        pairs = [i for i in range(1, len(tokens)) if tokens[i - 1] >= first and tokens[i] >= first]
        ends_with_single = len(tokens) >= 2 and tokens[-1] >= first > tokens[-2]
        if not pairs or ends_with_single:
            return tokens, 0
        cut = pairs[-1]
        return tokens[:cut], tokens[cut - 1] - first
