from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.items import Hypothesis, SnapshotKey
from pipeline.models.whisper.alignment import median_filter, token_times, warp, words_from_times
from pipeline.models.whisper.tokenizer import WordTokens
from tests.media import read_pcm
from tests.models import answer, base_engine, encode, request

RATE_HZ = 16_000


def warp_by_loops(cost: NDArray[np.float32]) -> list[int]:
    """OpenAI's `dtw_cpu` and `backtrace` of whisper/timing.py, then the first column of each row."""
    rows, columns = cost.shape
    totals = np.full((rows + 1, columns + 1), np.inf)
    trace = np.full((rows + 1, columns + 1), -1)
    totals[0, 0] = 0
    for j in range(1, columns + 1):
        for i in range(1, rows + 1):
            c0, c1, c2 = totals[i - 1, j - 1], totals[i - 1, j], totals[i, j - 1]
            if c0 < c1 and c0 < c2:
                c, t = c0, 0
            elif c1 < c0 and c1 < c2:
                c, t = c1, 1
            else:
                c, t = c2, 2
            totals[i, j], trace[i, j] = cost[i - 1, j - 1] + c, t
    i, j = rows, columns
    trace[0, :], trace[:, 0] = 2, 1
    path = []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        i, j = {0: (i - 1, j - 1), 1: (i - 1, j), 2: (i, j - 1)}[int(trace[i, j])]
    return [min(column for row, column in path if row == wanted and column >= 0) for wanted in range(rows)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_the_warping_path_is_that_of_the_plain_algorithm(rows: int, columns: int, seed: int) -> None:
    cost = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    assert warp(cost).tolist() == warp_by_loops(cost)


@pytest.mark.parametrize("length", [1, 3, 4, 7, 50])
def test_the_median_filter_is_a_running_median_reflected_at_its_ends(length: int) -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, length)).astype(np.float32)
    if length <= 3:
        assert np.array_equal(median_filter(values), values)
        return
    padded = np.pad(values, [(0, 0), (0, 0), (3, 3)], mode="reflect")
    expected = np.median(np.stack([padded[..., i : i + length] for i in range(7)]), axis=0)
    assert np.array_equal(median_filter(values), expected)


def test_tokens_begin_where_the_attention_moves_to_them() -> None:
    begins = [0, 12, 20, 55, 70]  # of four tokens, and of the end
    attention = np.full((3, 4 + 4, 80), 1e-3, np.float32)
    for row, (start, end) in enumerate(zip(begins, [*begins[1:], 80], strict=True)):
        attention[:, 3 + row, start:end] = 0.5
    times = token_times(attention, num_prompt_tokens=4)
    assert all(abs(int(time_) - begin) <= 1 for time_, begin in zip(times, begins, strict=True))


def test_a_usual_alignment_takes_a_few_milliseconds() -> None:
    attention = np.random.default_rng(0).random((8, 44, 600), dtype=np.float32)
    durations_s = []
    for _ in range(7):
        started = time.process_time()
        token_times(attention, 4)
        durations_s.append(time.process_time() - started)
    assert min(durations_s) < 0.02


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=2, max_size=20), st.integers(0, 160_000))
def test_words_are_in_order_apart_and_inside_the_audio(times: list[int], num_samples: int) -> None:
    words = [WordTokens(f" w{i}", (i,), (i,)) for i in range(len(times) - 1)]
    result = words_from_times(words, np.array(times), [-0.5] * len(words), num_samples)
    assert len(result) == len(words)
    ends = [0, *(word.end_sample for word in result)]
    assert all(end <= word.start_sample <= word.end_sample for end, word in zip(ends, result, strict=False))
    assert ends[-1] <= num_samples
    assert all(word.probability == pytest.approx(math.exp(-0.5)) for word in result)
    assert [word.text for word in result] == [f"w{i}" for i in range(len(words))]


def test_words_of_speech_are_where_the_sound_is(speech: Path) -> None:
    samples = read_pcm(speech)[: 8 * RATE_HZ]
    (final,) = answer(base_engine(), request(SnapshotKey("s", 1, 1)), encode(samples, SnapshotKey("s", 1, 1)))
    assert isinstance(final, Hypothesis)
    assert " ".join(word.text for word in final.words) == final.text
    assert len(final.words) > 8

    def level(start: int, end: int) -> float:
        return float(np.sqrt(np.mean(samples[start:end].astype(np.float64) ** 2))) if end > start else 0.0

    levels = [level(word.start_sample, word.end_sample) for word in final.words]
    assert sum(word_level > 0.2 * np.median(levels) for word_level in levels) >= 0.9 * len(levels)


def test_word_times_move_with_the_sound(speech: Path) -> None:
    samples = read_pcm(speech)[: 6 * RATE_HZ]
    key = SnapshotKey("s", 1, 1)
    shift = RATE_HZ
    (plain,) = answer(base_engine(), request(key), encode(samples, key))
    (later,) = answer(base_engine(), request(key), encode(np.concatenate([np.zeros(shift, np.int16), samples]), key))
    assert isinstance(plain, Hypothesis)
    assert isinstance(later, Hypothesis)
    assert plain.tokens == later.tokens
    moved = [b.end_sample - a.end_sample for a, b in zip(plain.words, later.words, strict=True)]
    assert sum(abs(distance - shift) <= 0.15 * RATE_HZ for distance in moved) >= 0.8 * len(moved)
