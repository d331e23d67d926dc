from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.bench.media import (
    Clip,
    JoinParams,
    find_reference,
    join_about,
    join_clips,
    load_clips,
    load_stream,
    loop_clip,
    read_samples,
    trim_silence,
    write_looped_wav,
    write_wav,
)
from pipeline.errors import MediaError, SourceNotFound
from pipeline.timebase import SAMPLE_RATE_HZ


def tone(seconds: float, hz: float = 300.0, level: int = 8_000) -> NDArray[np.int16]:
    time = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return np.rint(level * np.sin(2 * np.pi * hz * time)).astype(np.int16)


def with_edges(samples: NDArray[np.int16], seconds: float) -> NDArray[np.int16]:
    edge = np.random.default_rng(0).normal(0, 5, round(seconds * SAMPLE_RATE_HZ)).astype(np.int16)
    return np.concatenate([edge, samples, edge])


CLIPS = [Clip(f"{i}.wav", "en", f"tone number {i}", with_edges(tone(1.0 + i / 4), 0.3)) for i in range(5)]


def test_a_written_file_is_read_back_sample_by_sample(tmp_path: Path) -> None:
    samples = tone(0.5)
    write_wav(tmp_path / "a.wav", samples)
    np.testing.assert_array_equal(read_samples(tmp_path / "a.wav"), samples)


def test_a_missing_or_broken_file_says_which(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"not sound at all" * 10)
    with pytest.raises(SourceNotFound, match=r"none\.wav"):
        read_samples(tmp_path / "none.wav")
    with pytest.raises(MediaError, match=r"bad\.wav cannot be read"):
        read_samples(tmp_path / "bad.wav")


def test_a_manifest_is_read_with_its_files(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(0.2))
    entry = {"file": "a.wav", "language": "de", "text": "ein Ton", "seconds": 0.2}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]), encoding="utf-8")
    (clip,) = load_clips(tmp_path)
    assert (clip.name, clip.language, clip.text, clip.seconds) == ("a.wav", "de", "ein Ton", 0.2)
    reference = find_reference(tmp_path / "a.wav")
    assert reference is not None
    assert reference.text == "ein Ton"


def test_a_text_beside_the_file_is_its_reference(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one two\n", encoding="utf-8")
    reference = find_reference(tmp_path / "b.wav")
    assert reference is not None
    assert reference.text == "one two"
    assert find_reference(tmp_path / "c.wav") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [('[{"file": "a.wav"}]', r"0\.language: Field required"), ("{}", "valid array"), ("[]", "lists no recording")],
)
def test_a_bad_manifest_says_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(MediaError, match=message):
        load_clips(tmp_path)
    with pytest.raises(SourceNotFound, match="no manifest"):
        load_clips(tmp_path / "elsewhere")


def test_joining_is_decided_by_the_seed() -> None:
    params = JoinParams(min_seconds=20, seed=3)
    first, again = (join_clips(CLIPS, params, "j", has_long_speech=True) for _ in range(2))
    np.testing.assert_array_equal(first.samples, again.samples)
    other = join_clips(CLIPS, JoinParams(min_seconds=20, seed=4), "j", has_long_speech=True)
    assert other.text != first.text


def test_a_joined_stream_is_long_enough_and_holds_every_clip_equally_often() -> None:
    joined = join_clips(CLIPS, JoinParams(min_seconds=30), "j", has_long_speech=False)
    assert joined.seconds >= 30
    counts = {joined.text.count(clip.text) for clip in CLIPS}
    assert len(counts) == 1


def test_pauses_lie_within_their_limits() -> None:
    joined = join_clips(CLIPS, JoinParams(min_seconds=30), "j", has_long_speech=False)
    assert all(150 <= pause <= 1_600 for pause in _pauses_ms(joined.samples))
    long_speech = join_clips(CLIPS, JoinParams(min_seconds=30), "j", has_long_speech=True)
    pauses = _pauses_ms(long_speech.samples)
    assert all(pause <= 220 for pause in pauses[4:7])
    assert any(pause > 220 for pause in pauses[:4])


def test_clips_of_two_languages_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"\['de', 'en'\]"):
        join_clips([CLIPS[0], Clip("d", "de", "Ton", tone(1))], JoinParams(), "j", has_long_speech=False)


def test_a_looped_clip_is_repeated_whole() -> None:
    looped = loop_clip(CLIPS[0], 7.0)
    assert looped.seconds >= 7.0
    assert looped.text.count("tone number 0") == 4
    assert loop_clip(CLIPS[0], 0.0).text == CLIPS[0].text


def test_a_looped_file_written_in_pieces_is_the_looped_clip(tmp_path: Path) -> None:
    seconds = write_looped_wav(tmp_path / "loop.wav", CLIPS[0], 7.0)
    looped = loop_clip(CLIPS[0], 7.0)
    assert seconds == looped.seconds
    np.testing.assert_array_equal(read_samples(tmp_path / "loop.wav"), looped.samples)


@pytest.mark.parametrize("seconds", [1.0, 8.0, 9.0, 30.0, 100.0])
def test_a_stream_is_cut_between_the_two_clips_nearest_to_its_length(seconds: float) -> None:
    params = JoinParams(min_seconds=200, seed=5)
    stream = join_about(CLIPS, params, "s", seconds=seconds)
    endless = join_clips(CLIPS, params, "j", has_long_speech=False)
    assert endless.text.startswith(stream.text)
    np.testing.assert_array_equal(endless.samples[: len(stream.samples)], stream.samples)
    longest_with_pause = max(clip.seconds for clip in CLIPS) + 1.5
    assert abs(stream.seconds - seconds) <= longest_with_pause / 2
    spoken = sum(stream.text.count(clip.text) for clip in CLIPS)
    assert len([pause for pause in _pauses_ms(stream.samples) if pause > 150]) == spoken - 1


def test_a_stream_without_a_length_holds_every_clip_once() -> None:
    stream = join_about(CLIPS, JoinParams(), "s", seconds=0)
    assert [stream.text.count(clip.text) for clip in CLIPS] == [1] * len(CLIPS)


def test_a_folder_is_played_in_one_language(tmp_path: Path) -> None:
    clips = [*CLIPS, Clip("d.wav", "de", "ein Ton", with_edges(tone(1), 0.3))]
    for clip in clips:
        write_wav(tmp_path / clip.name, clip.samples)
    entries = [{"file": clip.name, "language": clip.language, "text": clip.text} for clip in clips]
    (tmp_path / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    english, is_known = load_stream(tmp_path, 20.0, "en")
    assert is_known
    assert "Ton" not in english.text
    assert english.language == "en"
    assert abs(english.seconds - 20.0) <= 2.0
    german, _ = load_stream(tmp_path, 0.0, "de")
    assert (german.language, german.text) == ("de", "ein Ton")
    with pytest.raises(MediaError, match=r"no recording in 'fr': give one of de, en"):
        load_stream(tmp_path, 0.0, "fr")


def test_a_file_is_played_whole_and_says_whether_its_text_is_known(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", CLIPS[0].samples)
    clip, is_known = load_stream(tmp_path / "a.wav", 5.0, "en")
    assert (clip.seconds, clip.text, is_known) == (loop_clip(CLIPS[0], 5.0).seconds, "  ", False)
    (tmp_path / "a.txt").write_text("a tone", encoding="utf-8")
    clip, is_known = load_stream(tmp_path / "a.wav", 0.0, "en")
    assert (clip.text, is_known) == ("a tone", True)


def test_silent_edges_are_cut_off() -> None:
    trimmed = trim_silence(CLIPS[0].samples)
    assert 1.0 <= len(trimmed) / SAMPLE_RATE_HZ <= 1.05
    silence = np.zeros(1_600, np.int16)
    assert len(trim_silence(silence)) == len(silence)


def _pauses_ms(samples: NDArray[np.int16]) -> list[float]:
    """Return the lengths of stretches of 20 ms and more in which nothing is loud."""
    loud = np.flatnonzero(np.abs(samples) > 500)
    gaps = np.diff(loud)
    return [float(gap) / 16 for gap in gaps if gap > 320]
