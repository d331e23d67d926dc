"""Word times from the cross-attention of Whisper's alignment heads.

After OpenAI's `whisper/timing.py` (`find_alignment`): normalised, median-filtered attention, a path through it by
dynamic time warping, and a word for each run of tokens. Differences: the attention is that of decoding itself, so no
pass is needed for it, and a word's probability is the mean of its tokens' probabilities among the allowed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.items import Word
from pipeline.models.whisper.encoder import POSITION_SAMPLES
from pipeline.models.whisper.tokenizer import WordTokens

_MEDIAN_WIDTH = 7
# Compare-exchanges after which element 3 of 7 is the median (N. Devillard, "Fast median search", opt_med7).
_MEDIAN_OF_7 = (
    (0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4),
)  # fmt: skip


def token_times(attention: NDArray[np.float32], num_prompt_tokens: int) -> NDArray[np.int64]:
    """Return the position at which each text token begins, and behind them that of end-of-text: int64[num_text + 1].

    `attention` is float32[heads, num_prompt_tokens + num_text, positions], softmax over the positions.
    """
    mean = attention.mean(axis=1, keepdims=True)
    deviation = attention.std(axis=1, keepdims=True)
    normalised = (attention - mean) / np.maximum(deviation, np.float32(1e-10))
    matrix = median_filter(normalised).mean(axis=0)
    # A token is announced by the query of the place before it: the first of the text by the last of the prompt.
    return warp(-matrix[num_prompt_tokens - 1 :])


def median_filter(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the running median of 7 over the last axis, reflected at its ends; as it is when that is too short."""
    half = _MEDIAN_WIDTH // 2
    if values.shape[-1] <= half:
        return values
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(half, half)], mode="reflect")
    shifted = [padded[..., i : i + values.shape[-1]] for i in range(_MEDIAN_WIDTH)]
    for a, b in _MEDIAN_OF_7:
        shifted[a], shifted[b] = np.minimum(shifted[a], shifted[b]), np.maximum(shifted[a], shifted[b])
    return shifted[half]


def warp(cost: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the first column of each row on the cheapest monotone path through `cost` [rows, columns]: int64[rows].

    The path goes from the first to the last cell by steps right, down or both. A row's totals follow from those above
    without a loop over columns: total[j] = cost[j] + min(above[j], above[j-1], total[j-1]) is, less the row's running
    sum of costs, a running minimum.
    """
    num_rows, num_columns = cost.shape
    totals = np.empty((num_rows + 1, num_columns + 1))
    totals[0], totals[:, 0] = np.inf, np.inf
    totals[0, 0] = 0.0
    for row in range(num_rows):
        best_above = np.minimum(totals[row, 1:], totals[row, :-1])
        running = np.concatenate(([0.0], np.cumsum(cost[row], dtype=np.float64)))
        totals[row + 1, 1:] = running[1:] + np.minimum.accumulate(best_above - running[:-1])
    firsts = np.zeros(num_rows, dtype=np.int64)
    row, column = num_rows, num_columns
    while row > 0 and column > 0:
        firsts[row - 1] = column - 1
        diagonal, up, left = totals[row - 1, column - 1], totals[row - 1, column], totals[row, column - 1]
        if diagonal < up and diagonal < left:
            row, column = row - 1, column - 1
        elif up < diagonal and up < left:
            row -= 1
        else:
            column -= 1
    return firsts


def words_from_times(
    words: Sequence[WordTokens], times: NDArray[np.int64], logprobs: Sequence[float], num_audio_samples: int
) -> tuple[Word, ...]:
    """Return `words` with times in samples, in order, without overlap, within [0, num_audio_samples].

    `times` and `logprobs` are those of the tokens that the words index; `times` has one more, the end.
    """
    result: list[Word] = []
    earliest = 0
    for word in words:
        start = int(times[word.timed_indices[0]]) * POSITION_SAMPLES
        end = int(times[word.timed_indices[-1] + 1]) * POSITION_SAMPLES
        start = min(max(start, earliest), num_audio_samples)
        end = min(max(end, start), num_audio_samples)
        probability = sum(math.exp(logprobs[i]) for i in word.token_indices) / len(word.token_indices)
        num_tokens = len(word.token_indices)
        result.append(Word(word.text.strip(), start, end, min(1.0, probability), num_tokens))
        earliest = end
    return tuple(result)
