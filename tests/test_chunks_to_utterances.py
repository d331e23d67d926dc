from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.audio.chunks_to_utterances import Checkpoint, ChunksToUtterances, VadParams
from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.audio.speech_detector import SpeechDetector, high_pass_taps
from pipeline.items import Chunk, CloseReason, UtteranceClosed, UtteranceOpened
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ, SAMPLES_PER_MS, ms_to_samples
from tests.media import read_pcm

Event = UtteranceOpened | UtteranceClosed
PARAMS = VadParams()
QUIET = 30  # standard deviation of the room noise that tests put around speech


def chunks_of(samples: NDArray[np.int16], channel: int = 0) -> list[Chunk]:
    stage = SamplesToChunks(1)
    chunks = stage.push(samples[np.newaxis])
    return [Chunk(channel, chunk.index, chunk.samples, chunk.gap_samples) for chunk in chunks + stage.flush()]


def boundaries(samples: NDArray[np.int16], params: VadParams = PARAMS) -> list[Event]:
    stage = ChunksToUtterances(params, 0)
    events: list[Event] = [event for chunk in chunks_of(samples) for event in stage.push(chunk)]
    return events + stage.flush(len(samples))


def spans(events: list[Event]) -> list[tuple[UtteranceOpened, UtteranceClosed]]:
    pairs = list(zip(events[::2], events[1::2], strict=True))
    assert all(isinstance(a, UtteranceOpened) and isinstance(b, UtteranceClosed) for a, b in pairs)
    return pairs  # type: ignore[return-value]


def in_a_room(samples: NDArray[np.int16], seed: int = 0) -> NDArray[np.int16]:
    noise = np.random.default_rng(seed).normal(0, QUIET, len(samples))
    return np.clip(samples + noise, -32_768, 32_767).astype(np.int16)


def seconds(value: float) -> NDArray[np.int16]:
    return np.zeros(round(value * SAMPLE_RATE_HZ), np.int16)


@pytest.fixture(scope="module")
def story(speech: Path) -> NDArray[np.int16]:
    return in_a_room(read_pcm(speech))


@pytest.fixture(scope="module")
def endless(media: Path) -> NDArray[np.int16]:
    return in_a_room(read_pcm(media / "long.wav"))


def test_every_sentence_of_the_story_is_one_utterance_with_its_first_sound(
    speech: Path, story: NDArray[np.int16]
) -> None:
    clean = read_pcm(speech)
    found = spans(boundaries(story))
    sentences = speech.with_suffix(".txt").read_text().count(".")
    assert len(found) == sentences
    assert {closed.reason for _, closed in found} == {CloseReason.PAUSE}
    loud = np.abs(clean.astype(np.int32)) > 300
    for opened, closed in found:
        loud[opened.start_sample : closed.end_sample] = False
    assert not loud.any(), "a part of a sentence lies in no utterance"


@pytest.mark.parametrize("window_ms", [10, 20, 30])
def test_boundaries_are_ordered_disjoint_and_on_the_grid(story: NDArray[np.int16], window_ms: int) -> None:
    params = VadParams(window_ms=window_ms)
    found = spans(boundaries(story, params))
    assert len(found) >= 8
    for opened, closed in found:
        assert opened.start_sample <= opened.onset_sample < closed.last_speech_sample <= closed.end_sample
        for sample in (opened.start_sample, opened.onset_sample, closed.last_speech_sample):
            assert sample % (window_ms * SAMPLES_PER_MS) == 0
    for (_, before), (after, _) in pairwise(found):
        assert before.end_sample <= after.start_sample


def test_a_close_is_told_as_soon_as_the_hangover_has_passed(story: NDArray[np.int16]) -> None:
    stage = ChunksToUtterances(PARAMS, 0)
    for chunk in chunks_of(story):
        for event in stage.push(chunk):
            if isinstance(event, UtteranceClosed):
                waited = chunk.end_sample - event.last_speech_sample
                assert waited < ms_to_samples(PARAMS.hangover_ms) + CHUNK_SAMPLES + ms_to_samples(PARAMS.window_ms)


@pytest.mark.parametrize("window_ms", [20, 30])
def test_endless_speech_is_cut_before_the_hard_limit_and_goes_on_at_the_cut(
    endless: NDArray[np.int16], window_ms: int
) -> None:
    params = VadParams(window_ms=window_ms)
    found = spans(boundaries(endless, params))
    reasons = [closed.reason for _, closed in found]
    assert len(endless) > 20 * SAMPLE_RATE_HZ
    assert CloseReason.LIMIT in reasons
    for opened, closed in found:
        assert closed.end_sample - opened.start_sample <= ms_to_samples(params.hard_limit_ms)
    for (opened, before), (after, _) in pairwise(found):
        if before.reason is CloseReason.LIMIT:
            assert (after.start_sample, after.onset_sample) == (before.end_sample, before.end_sample)
            assert before.end_sample - opened.start_sample >= ms_to_samples(params.hard_limit_ms - params.cut_search_ms)


def test_a_cut_and_the_opening_behind_it_come_together(endless: NDArray[np.int16]) -> None:
    stage = ChunksToUtterances(PARAMS, 0)
    for chunk in chunks_of(endless):
        events = stage.push(chunk)
        if any(isinstance(event, UtteranceClosed) and event.reason is CloseReason.LIMIT for event in events):
            assert [type(event) for event in events[-2:]] == [UtteranceClosed, UtteranceOpened]
            return
    pytest.fail("nothing was cut")


@pytest.mark.parametrize(
    "params",
    [PARAMS, VadParams(window_ms=30), VadParams(window_ms=10, renew_ms=5_000), VadParams(mode=3, warm_up_ms=300)],
    ids=["defaults", "30 ms", "10 ms, often renewed", "short warm-up"],
)
def test_replay_from_any_checkpoint_finds_the_same_boundaries(
    story: NDArray[np.int16], endless: NDArray[np.int16], params: VadParams
) -> None:
    fan = (np.random.default_rng(5).normal(0, 300, 20 * SAMPLE_RATE_HZ)).astype(np.int16)
    samples = np.concatenate([story[: 15 * SAMPLE_RATE_HZ], fan, endless, fan[: 6 * SAMPLE_RATE_HZ], story[:200_000]])
    chunks = chunks_of(samples)
    stage = ChunksToUtterances(params, 0)
    events: list[Event] = []
    taken: list[Checkpoint] = []
    for chunk in chunks:
        events += stage.push(chunk)
        if stage.checkpoint not in taken:
            taken.append(stage.checkpoint)
    events += stage.flush(len(samples))
    assert any(checkpoint.is_open for checkpoint in taken)
    assert any(checkpoint.start_sample > checkpoint.previous_end_sample for checkpoint in taken), "none in silence"

    for checkpoint in taken:
        first = max(0, checkpoint.start_sample - ms_to_samples(params.warm_up_ms)) // CHUNK_SAMPLES
        again = ChunksToUtterances(params, 0, checkpoint)
        replayed: list[Event] = [event for chunk in chunks[first:] for event in again.push(chunk)]
        replayed += again.flush(len(samples))
        assert replayed == [event for event in events if ends_behind(event, events, checkpoint)]


def ends_behind(event: Event, events: list[Event], checkpoint: Checkpoint) -> bool:
    """Return whether the utterance that `event` belongs to ends behind `checkpoint`."""
    index = events.index(event)
    closed = event if isinstance(event, UtteranceClosed) else events[index + 1]
    assert isinstance(closed, UtteranceClosed)
    return closed.end_sample > checkpoint.start_sample


def test_the_end_of_a_final_is_a_checkpoint(story: NDArray[np.int16]) -> None:
    events = boundaries(story)
    closed = events[5]
    assert isinstance(closed, UtteranceClosed)
    checkpoint = Checkpoint.behind(closed.end_sample, closed.reason)
    again = ChunksToUtterances(PARAMS, 0, checkpoint)
    first = (checkpoint.start_sample - ms_to_samples(PARAMS.warm_up_ms)) // CHUNK_SAMPLES
    replayed: list[Event] = [event for chunk in chunks_of(story)[first:] for event in again.push(chunk)]
    assert replayed + again.flush(len(story)) == events[6:]


def test_checkpoints_come_in_silence_too_and_memory_stays_bounded() -> None:
    params = VadParams(renew_ms=5_000)
    stage = ChunksToUtterances(params, 0)
    fan = in_a_room(seconds(60))
    for chunk in chunks_of(fan):
        assert stage.push(chunk) == []
        assert chunk.end_sample - stage.checkpoint.start_sample <= ms_to_samples(params.renew_ms) + CHUNK_SAMPLES
        assert stage.num_held_samples <= ms_to_samples(params.cut_search_ms + params.warm_up_ms) + 2 * CHUNK_SAMPLES


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 3.0), st.integers(0, 8_000)), max_size=8), st.sampled_from([10, 20, 30]))
def test_any_bursts_give_ordered_boundaries(bursts: list[tuple[float, int]], window_ms: int) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.normal(0, loud + 1, round(length * SAMPLE_RATE_HZ)).astype(np.int16) for length, loud in bursts]
    samples = np.clip(np.concatenate([np.zeros(10, np.int16), *parts]), -32_768, 32_767).astype(np.int16)
    found = spans(boundaries(samples, VadParams(window_ms=window_ms)))
    for opened, closed in found:
        assert 0 <= opened.start_sample <= opened.onset_sample <= closed.last_speech_sample
        assert closed.last_speech_sample <= closed.end_sample <= len(samples)
    for (_, before), (after, _) in pairwise(found):
        assert before.end_sample <= after.start_sample


def test_two_channels_interleaved_equal_each_alone(story: NDArray[np.int16], endless: NDArray[np.int16]) -> None:
    stages = [ChunksToUtterances(PARAMS, channel) for channel in range(2)]
    together: list[list[Event]] = [[], []]
    for pair in zip(chunks_of(story, 0), chunks_of(endless, 1), strict=False):
        for stage, chunk in zip(stages, pair, strict=True):
            together[chunk.channel].extend(stage.push(chunk))
    for channel, samples in enumerate((story, endless)):
        stage = ChunksToUtterances(PARAMS, channel)
        alone = [event for chunk in chunks_of(samples, channel) for event in stage.push(chunk)]
        assert together[channel] == alone[: len(together[channel])]
        assert together[channel]


def test_lost_sound_is_not_speech(story: NDArray[np.int16]) -> None:
    gap_start = 40_000  # inside the first sentence
    chunker, stage = SamplesToChunks(1), ChunksToUtterances(PARAMS, 0)
    items = chunker.push(story[np.newaxis, :gap_start]) + chunker.push_gap(SAMPLE_RATE_HZ, "lost")
    events = [event for chunk in items if isinstance(chunk, Chunk) for event in stage.push(chunk)]
    closed = events[-1]
    assert isinstance(closed, UtteranceClosed)
    assert gap_start - 2 * 320 < closed.last_speech_sample <= gap_start + 320


def test_the_noise_of_a_fan_opens_nothing(media: Path) -> None:
    assert boundaries(read_pcm(media / "noise.wav")) == []


def test_loud_rumble_opens_nothing_while_the_detector_does_not_hear_it() -> None:
    rng = np.random.default_rng(0)
    white = rng.normal(0, 1, 8 * SAMPLE_RATE_HZ)
    rumble = np.convolve(white, np.hanning(161), mode="same")  # almost all of it below 200 Hz
    samples = (rumble / rumble.std() * 6_000).astype(np.int16)
    assert boundaries(samples, VadParams(high_pass_hz=0)) != []
    assert boundaries(samples) == []


def test_digital_silence_opens_nothing() -> None:
    assert boundaries(seconds(3)) == []


def test_one_short_word_is_an_utterance(story: NDArray[np.int16]) -> None:
    word = story[10_500:16_000]
    room = in_a_room(seconds(2))
    (pair,) = spans(boundaries(np.concatenate([room, word, room])))
    assert pair[0].start_sample <= len(room) <= pair[1].last_speech_sample


def test_the_end_of_the_stream_closes_where_the_sound_ends(story: NDArray[np.int16]) -> None:
    cut_off = story[:40_123]  # inside the first sentence, no whole number of chunks
    events = boundaries(cut_off)
    closed = events[-1]
    assert isinstance(closed, UtteranceClosed)
    assert (closed.reason, closed.end_sample) == (CloseReason.END, len(cut_off))
    assert closed.last_speech_sample <= closed.end_sample


def test_the_filter_lets_speech_through_and_stops_rumble() -> None:
    taps = high_pass_taps(400)
    assert taps.sum() == 0
    response = np.abs(np.fft.rfft(taps, 16_000)) / 32_768  # one bin a hertz
    assert response[:250].max() < 0.02
    assert abs(response[600:8_000] - 1).max() < 0.02


@pytest.mark.parametrize("window_samples", [160, 320, 480])
def test_the_filter_is_exact_at_full_scale_however_the_sound_is_grouped(window_samples: int) -> None:
    taps = high_pass_taps(400)
    rng = np.random.default_rng(1)
    noise = rng.integers(-32_768, 32_768, 40 * window_samples, np.int16)
    square = np.where(np.arange(40 * window_samples) % 37 < 18, 32_767, -32_768).astype(np.int16)
    worst = np.resize(np.where(taps[::-1] > 0, 32_767, -32_768).astype(np.int16), 40 * window_samples)
    for sound in (noise, square, worst):
        sums = np.convolve(np.concatenate((np.zeros(256), sound)), taps, mode="valid")
        exact = np.clip(np.floor(sums / 32_768), -32_768, 32_767)
        energies = [float(window @ window) for window in exact.reshape(-1, window_samples)]
        windows = sound.reshape(-1, window_samples)
        alone, grouped, whole = (SpeechDetector(2, 400) for _ in range(3))
        one_by_one = [alone.hear(windows[i : i + 1])[0] for i in range(len(windows))]
        in_groups = [judged for i in range(0, len(windows), 7) for judged in grouped.hear(windows[i : i + 7])]
        assert [energy for _, energy in one_by_one] == energies
        assert one_by_one == in_groups == whole.hear(windows)


def test_the_newest_speech_is_known_while_somebody_speaks(story: NDArray[np.int16]) -> None:
    stage = ChunksToUtterances(PARAMS, 0)
    newest, is_open = 0, False
    for chunk in chunks_of(story[: 4 * SAMPLE_RATE_HZ]):
        for event in stage.push(chunk):
            if isinstance(event, UtteranceClosed):
                assert event.last_speech_sample == newest
                return
            is_open = True
        if is_open:
            assert newest <= stage.last_speech_sample <= chunk.end_sample
            newest = stage.last_speech_sample
    pytest.fail("nothing was closed")


def test_misuse_is_refused() -> None:
    chunk, later = Chunk(0, 0, seconds(0.08)), Chunk(0, 2, seconds(0.08))
    stage = ChunksToUtterances(PARAMS, 0)
    stage.push(chunk)
    with pytest.raises(ValueError, match="does not follow"):
        stage.push(later)
    with pytest.raises(ValueError, match="expected channel 1"):
        ChunksToUtterances(PARAMS, 1).push(chunk)
    with pytest.raises(ValueError, match="behind the checkpoint"):
        ChunksToUtterances(PARAMS, 0).push(later)
    with pytest.raises(ValueError, match="not on the grid"):
        ChunksToUtterances(PARAMS, 0, Checkpoint(100, 0))
    assert stage.flush() == []
    assert stage.flush() == []
    with pytest.raises(RuntimeError, match="after flush"):
        stage.push(Chunk(0, 1, seconds(0.08)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", 4),
        ("window_ms", 25),
        ("post_roll_ms", 500),
        ("soft_pause_ms", 500),
        ("hangover_ms", 5_000),
        ("pre_roll_ms", 1_500),
        ("soft_limit_ms", 16_000),
        ("cut_search_ms", 8_000),
        ("onset", 3),
    ],
)
def test_impossible_parameters_are_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValidationError, match=field):
        VadParams(**{field: value})
