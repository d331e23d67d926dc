"""Guards against what a speech decoder invents: loops, text on silence, and more tokens than anybody can speak.

Plain Python over tokens, text and probabilities; no word lists. Thresholds of the compression ratio and of silence are
those of OpenAI's `whisper/transcribe.py`, with two more pairs for silence: by Whisper base, noise of several kinds had
no-speech probabilities of 0.23 to 0.91, speech under noise louder than itself 0.05 at most (measured). There, a loop is
decoded to its end and then tried again at a higher temperature; here it is noticed while it is decoded, and cut.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from pydantic import Field

from pipeline.params import Params
from pipeline.timebase import SAMPLE_RATE_HZ

LOOP = "loop"
"""An n-gram of tokens came again and again; the text ends after its first occurrence."""
COMPRESSION = "compression_ratio"
"""The text compresses like no speech does; it ends where it began to repeat itself."""
SILENCE = "silence"
"""The model itself says that nobody speaks; there is no text."""
TOKEN_CAP = "token_cap"  # noqa: S105 - the name of a guard, not a secret
"""More tokens than speech of that length can have; the text ends at the cap."""


class GuardParams(Params):
    """When a hypothesis is not believed."""

    min_loop_repeats: int = Field(
        default=4, ge=2, le=64, description="consecutive occurrences of the same tokens that make a loop"
    )
    min_loop_tokens: int = Field(
        default=12, ge=2, le=448, description="tokens that all occurrences together must have to make a loop"
    )
    min_hasty_loop_tokens: int = Field(
        default=6,
        ge=2,
        le=448,
        description="tokens of two occurrences that make a loop in a partial with more text than anybody can speak",
    )
    max_chars_per_s: float = Field(
        default=25.0, gt=0.0, le=10_000.0, description="characters of text a second of audio that somebody may speak"
    )
    max_loop_period_tokens: int = Field(
        default=32, ge=1, le=224, description="length of the longest run of tokens whose repetition is looked for"
    )
    compression_ratio_threshold: float = Field(
        default=2.4, gt=1.0, le=100.0, description="zlib ratio above which a text repeats itself"
    )
    kept_compression_ratio: float = Field(
        default=1.5, gt=1.0, le=100.0, description="a repetitive text is cut to its longest start below this ratio"
    )
    min_repeated_tokens: int = Field(
        default=6, ge=2, le=448, description="tokens at the end of a repetitive text that make up a repetition"
    )
    min_compression_chars: int = Field(
        default=80, ge=1, le=10_000, description="shorter texts are not judged by their compression ratio"
    )
    no_speech_threshold: float = Field(
        default=0.6, ge=0.0, le=1.0, description="probability of no speech above which an unsure text is dropped"
    )
    logprob_threshold: float = Field(
        default=-1.0, le=0.0, description="average log-probability below which a text is unsure"
    )
    certain_no_speech_threshold: float = Field(
        default=0.9, ge=0.0, le=1.0, description="probability of no speech above which only a sure text is kept"
    )
    certain_logprob_threshold: float = Field(
        default=-0.6, le=0.0, description="average log-probability below which a text is not sure"
    )
    faint_no_speech_threshold: float = Field(
        default=0.2, ge=0.0, le=1.0, description="probability of no speech above which a very unsure text is dropped"
    )
    faint_logprob_threshold: float = Field(
        default=-1.5, le=0.0, description="average log-probability below which a text is very unsure"
    )
    loop_no_speech_threshold: float = Field(
        default=0.4, ge=0.0, le=1.0, description="probability of no speech above which nothing of a loop is kept"
    )
    max_tokens_per_s: float = Field(
        default=24.0, gt=0.0, le=1_000.0, description="text tokens a second of audio, at most"
    )
    min_token_cap: int = Field(default=16, ge=1, le=448, description="text tokens allowed whatever the length of audio")
    max_tokens: int = Field(default=224, ge=1, le=4_096, description="text tokens of one hypothesis, at most")
    sparse_tokens_per_s: float = Field(
        default=2.5,
        ge=0.0,
        le=100.0,
        description="text tokens a second of audio below which speech may have been passed over",
    )
    min_sparse_ms: int = Field(default=1_500, ge=0, le=30_000, description="shorter audio is never called sparse")


class LoopDetector:
    """Finds the n-gram that a growing sequence of tokens repeats at its end: one comparison per period and token."""

    def __init__(self, params: GuardParams) -> None:
        self._params = params
        self._tokens: list[int] = []
        # [p]: how many of the last tokens each equal the one p places before them.
        self._num_matching = [0] * (params.max_loop_period_tokens + 1)

    def push(self, token: int) -> int | None:
        """Add `token`; if a loop is now complete, return how many tokens to keep (up to its first occurrence's end)."""
        tokens, matching = self._tokens, self._num_matching
        tokens.append(token)
        for period in range(1, min(len(tokens), len(matching))):
            matching[period] = matching[period] + 1 if token == tokens[-1 - period] else 0
        return self.find(self._params.min_loop_repeats, self._params.min_loop_tokens)

    def find(self, min_repeats: int, min_tokens: int) -> int | None:
        """Return how many tokens to keep if the end is `min_repeats` occurrences of something, `min_tokens` in all."""
        for period in range(1, min(len(self._tokens), len(self._num_matching))):
            if self._num_matching[period] + period >= max(min_repeats * period, min_tokens):
                return len(self._tokens) - self._num_matching[period]
        return None


def compression_ratio(text: str) -> float:
    """Return how many times shorter zlib makes `text`.

    Characters are numbered first, one byte each, so that scripts of several bytes a character do not seem repetitive.
    """
    if not text:
        return 0.0
    alphabet = {character: index % 256 for index, character in enumerate(sorted(set(text)))}
    raw = bytes(alphabet[character] for character in text)
    return len(raw) / len(zlib.compress(raw))


def is_repetitive(text: str, params: GuardParams) -> bool:
    """Whether `text` is long enough to be judged and compresses too well for speech."""
    return len(text) >= params.min_compression_chars and compression_ratio(text) > params.compression_ratio_threshold


def num_tokens_before_repetition(tokens: Sequence[int], texts: Sequence[str], params: GuardParams) -> int:
    """Return how many tokens of a repetitive text to keep; `texts[i]` is the text of the first i + 1 tokens.

    Where its end repeats what stands before it, token by token and whatever the period, the text is kept up to the end
    of the first occurrence. Otherwise it is cut to its longest start that compresses like speech.
    """
    num_repeated = max((_num_repeated(tokens, period) for period in range(1, len(tokens) // 2 + 1)), default=0)
    if num_repeated >= params.min_repeated_tokens:
        return len(tokens) - num_repeated
    kept = (i + 1 for i, text in enumerate(texts) if compression_ratio(text) <= params.kept_compression_ratio)
    return max(kept, default=0)


def _num_repeated(tokens: Sequence[int], period: int) -> int:
    """Return how many of the last tokens each equal the one `period` places before."""
    count = 0
    while count + period < len(tokens) and tokens[-1 - count] == tokens[-1 - count - period]:
        count += 1
    return count


def is_silence(text: str, no_speech_probability: float, average_logprob: float, params: GuardParams) -> bool:
    """Whether a hypothesis is text on silence: no letter or digit, or no speech heard and unsure of the text."""
    if not any(character.isalnum() for character in text):
        return True
    pairs = (
        (params.faint_no_speech_threshold, params.faint_logprob_threshold),
        (params.no_speech_threshold, params.logprob_threshold),
        (params.certain_no_speech_threshold, params.certain_logprob_threshold),
    )
    return any(no_speech_probability > floor and average_logprob < ceiling for floor, ceiling in pairs)


def is_sparse(num_tokens: int, num_audio_samples: int, params: GuardParams) -> bool:
    """Whether a text has so few tokens for so many samples of 16 kHz audio that it may pass over speech."""
    seconds = num_audio_samples / SAMPLE_RATE_HZ
    return seconds * 1_000 >= params.min_sparse_ms and num_tokens < seconds * params.sparse_tokens_per_s


def token_cap(num_audio_samples: int, params: GuardParams) -> int:
    """Return how many text tokens `num_audio_samples` of 16 kHz audio may give."""
    by_length = round(num_audio_samples / SAMPLE_RATE_HZ * params.max_tokens_per_s)
    return min(params.max_tokens, max(params.min_token_cap, by_length))


def max_chars_of(num_audio_samples: int, params: GuardParams) -> float:
    """Return how many characters of text somebody may speak in `num_audio_samples` of 16 kHz audio."""
    return num_audio_samples / SAMPLE_RATE_HZ * params.max_chars_per_s
