"""Speech to learn from, by the real flite and espeak-ng; noise, rooms, the corpus, and variants of features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.speech_tools import check_speech_tools, run_speech_tool
from pipeline.errors import MediaError
from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.teach.augment import augment, mask_bands, mask_steps, shift_bands, stretch_time
from pipeline.teach.corpus import Corpus, corpus_key, make_corpus
from pipeline.teach.speech import (
    VOICES,
    NoiseKind,
    Samples,
    Voice,
    draw_voice,
    held_out_voices,
    resample,
    speak,
    training_voices,
    with_level,
    with_noise,
    with_room,
)

TEXT = "Pump three is hot."
SLT, ESPEAK = Voice("slt", "flite"), Voice("en-us+f3", "espeak-ng")
LINES = [(f"Valve {word} is open.", voice) for word in ("one", "two", "three") for voice in (SLT, ESPEAK)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def power(samples: np.ndarray) -> float:
    return float(np.mean(samples.astype(np.float64) ** 2))


@pytest.fixture(scope="module")
def spoken() -> Samples:
    return speak(TEXT, SLT, rng(), run_speech_tool)


def test_held_out_voices_are_never_among_those_for_training() -> None:
    held_out = {voice.name for voice in held_out_voices()}
    assert held_out == {"awb", "en-us+Andrea", "en-gb-scotland+f5"}
    assert not held_out & {voice.name for voice in training_voices()}
    assert len({voice.name for voice in VOICES}) == len(VOICES)
    source = rng()
    drawn = [draw_voice(source) for _ in range(500)]
    assert not any(voice.is_held_out for voice in drawn)
    assert {voice.engine for voice in drawn} == {"flite", "espeak-ng"}


def test_every_voice_speaks_and_none_is_another_ones_fallback() -> None:
    spoken = {voice.name: speak("Pump three stopped.", voice, rng(), run_speech_tool) for voice in VOICES}
    assert all(12_000 < len(samples) < 60_000 for samples in spoken.values())
    assert len({samples.tobytes() for samples in spoken.values()}) == len(VOICES)


@pytest.mark.parametrize("voice", [SLT, ESPEAK], ids=lambda voice: voice.engine)
def test_a_seed_determines_what_is_spoken(voice: Voice) -> None:
    first = speak(TEXT, voice, rng(1), run_speech_tool)
    assert np.array_equal(first, speak(TEXT, voice, rng(1), run_speech_tool))
    assert len({len(speak(TEXT, voice, rng(seed), run_speech_tool)) for seed in range(4)}) > 1


@pytest.mark.parametrize("voice", [SLT, ESPEAK], ids=lambda voice: voice.engine)
def test_silence_at_both_ends_is_a_tenth_to_four_tenths_of_a_second(voice: Voice) -> None:
    edges = []
    for seed in range(6):
        samples = speak(TEXT, voice, rng(seed), run_speech_tool)
        (loud,) = np.nonzero(np.abs(samples.astype(int)) > 0.01 * np.abs(samples.astype(int)).max())
        edges += [loud[0] / 16_000, (len(samples) - 1 - loud[-1]) / 16_000]
    assert 0.099 <= min(edges) < max(edges) <= 0.401


def test_the_sentences_of_a_report_have_pauses_between_them() -> None:
    samples = speak(f"{TEXT} {TEXT} {TEXT}", SLT, rng(), run_speech_tool)
    quiet = np.array([not block.any() for block in np.array_split(samples, len(samples) // 160)])
    starts = np.flatnonzero(np.diff(quiet.astype(int)) == 1)
    pauses = [int(np.argmin(quiet[start + 1 :])) for start in starts if not quiet[start + 1 :].all()]
    assert sum(pause >= 19 for pause in pauses) == 2


def test_a_tone_keeps_its_pitch_and_level_at_another_rate() -> None:
    tone = np.rint(8_000 * np.sin(2 * np.pi * 1_000 * np.arange(22_050) / 22_050)).astype(np.int16)
    resampled = resample(tone, 22_050)
    assert len(resampled) == 16_000
    assert int(np.argmax(np.abs(np.fft.rfft(resampled)))) == 1_000
    assert np.sqrt(power(resampled)) == pytest.approx(8_000 / np.sqrt(2), rel=0.01)


@pytest.mark.parametrize("kind", ["white", "pink", "hum", "babble"])
@pytest.mark.parametrize("snr_db", [0.0, 10.0, 25.0])
def test_noise_has_the_wanted_level(spoken: Samples, kind: NoiseKind, snr_db: float) -> None:
    quiet = (spoken // 8).astype(np.int16)  # so that nothing is scaled, and the noise is the difference
    noisy = with_noise(quiet, rng(), snr_db, kind, others=[spoken[::-1]])
    noise = noisy.astype(np.float64) - quiet
    assert 10 * np.log10(power(quiet) / power(noise)) == pytest.approx(snr_db, abs=0.5)
    assert np.array_equal(noisy, with_noise(quiet, rng(), snr_db, kind, others=[spoken[::-1]]))


def test_loud_noise_makes_speech_quieter_and_never_clips(spoken: Samples) -> None:
    noisy = with_noise(spoken, rng(), -20.0, "white")
    assert noisy.dtype == np.int16
    assert np.count_nonzero(np.abs(noisy.astype(int)) >= 32_767) <= 1


def test_babble_needs_others_and_silence_stays_silence() -> None:
    with pytest.raises(ValueError, match="others"):
        with_noise(np.ones(800, np.int16), rng(), 10.0, "babble")
    silence = np.zeros(800, np.int16)
    assert not with_noise(silence, rng(), 10.0).any()
    assert not with_room(silence, rng()).any()
    assert not with_level(silence, rng()).any()


def test_a_room_adds_a_tail_and_keeps_length_and_loudness(spoken: Samples) -> None:
    click = np.zeros(8_000, np.int16)
    click[1_000] = 20_000
    heard = with_room(click, rng())
    assert not heard[:999].any()
    assert power(heard[1_100:5_000]) > 0
    room = with_room((spoken // 2).astype(np.int16), rng())
    assert len(room) == len(spoken)
    assert power(room) == pytest.approx(power(spoken // 2), rel=0.02)
    assert np.array_equal(room, with_room((spoken // 2).astype(np.int16), rng()))


def test_levels_are_drawn_from_their_range(spoken: Samples) -> None:
    levels = [10 * np.log10(power(with_level(spoken, rng(seed))) / 32_767**2) for seed in range(12)]
    assert -36.5 < min(levels) < max(levels) < -13.5
    assert max(levels) - min(levels) > 8


def test_speech_has_features(spoken: Samples) -> None:
    features = AudioFeatures(80)(torch.from_numpy(spoken.astype(np.float32) / 32_768))
    assert features.shape == ((len(spoken) - 400) // 160 + 1, 80)


class Counted:
    """The real tools, counted; stops the run at one call, as Ctrl-C does."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.num_calls = 0
        self._stop_at = stop_at

    def __call__(self, command: Sequence[str], text: str) -> bytes:
        self.num_calls += 1
        if self.num_calls == self._stop_at:
            raise KeyboardInterrupt
        return run_speech_tool(command, text)


def test_a_second_run_speaks_nothing_again(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tool = Counted()
    corpus = make_corpus(LINES, tmp_path, 2, lambda done, total: told.append((done, total)), tool=tool)
    assert tool.num_calls == len(LINES)
    assert told == [(0, 6), (6, 6)]
    again = make_corpus(LINES, tmp_path, 1, lambda *_: None, tool=tool)
    assert tool.num_calls == len(LINES)
    assert again.texts == tuple(text for text, _ in LINES)
    assert again.voices == tuple(voice for _, voice in LINES)
    for index, (text, voice) in enumerate(LINES):
        expected = speak(text, voice, rng([0, index]), run_speech_tool)  # type: ignore[arg-type]
        assert np.array_equal(corpus[index], expected)
        assert np.array_equal(again[index], expected)
    assert corpus.num_samples == sum(len(corpus[index]) for index in range(len(corpus)))


def test_a_corpus_has_a_key_of_all_that_it_depends_on() -> None:
    keys = {corpus_key(LINES, 0), corpus_key(LINES, 1), corpus_key(LINES[:-1], 0), corpus_key(LINES[::-1], 0)}
    assert len(keys) == 4


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.teach.corpus._SAVE_EVERY", 2)
    whole = make_corpus(LINES, tmp_path / "whole", 1, lambda *_: None, tool=run_speech_tool)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(LINES, tmp_path / "cut", 1, lambda *_: None, tool=Counted(stop_at=6))
    (folder,) = (tmp_path / "cut").iterdir()
    assert not (folder / "index.json").exists()
    with (folder / "samples.i16").open("ab") as file:
        file.write(b"half an utterance")
    with (folder / "ends.i64").open("ab") as file:
        file.write(b"cut")
    told: list[int] = []
    tool = Counted()
    resumed = make_corpus(LINES, tmp_path / "cut", 1, lambda done, _: told.append(done), tool=tool)
    assert told[0] == 4
    assert tool.num_calls == 2
    assert all(np.array_equal(resumed[index], whole[index]) for index in range(len(LINES)))


def test_a_damaged_corpus_is_an_error(tmp_path: Path) -> None:
    make_corpus(LINES[:2], tmp_path, 1, lambda *_: None, tool=run_speech_tool)
    (folder,) = tmp_path.iterdir()
    with (folder / "samples.i16").open("ab") as file:
        file.write(b"12")
    with pytest.raises(MediaError, match="not whole"):
        Corpus(folder)


def test_a_tool_that_fails_is_an_error_with_the_number_of_the_text_and_not_the_text(tmp_path: Path) -> None:
    lines = [(TEXT, SLT), ("The secret door is open.", ESPEAK)]

    def broken(command: Sequence[str], text: str) -> bytes:
        return run_speech_tool(["false", "secret"] if "secret" in text else command, text)

    with pytest.raises(
        MediaError, match=r"utterance 1 of 2, voice 'en-us\+f3': false failed with exit status 1"
    ) as raised:
        make_corpus(lines, tmp_path, 1, lambda *_: None, tool=broken)
    assert "secret" not in str(raised.value)
    with pytest.raises(ValueError, match="nobody"):
        make_corpus([(TEXT, Voice("nobody", "flite"))], tmp_path, 1, lambda *_: None, tool=run_speech_tool)


def test_a_tool_that_hangs_is_ended() -> None:
    with pytest.raises(MediaError, match=r"was ended after 0\.2 s"):
        run_speech_tool([sys.executable, "-c", "import threading; threading.Event().wait()"], "", timeout_s=0.2)


def test_missing_tools_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_speech_tools()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MediaError, match="apt-get install flite espeak-ng"):
        check_speech_tools()
    with pytest.raises(MediaError, match="apt-get install flite"):
        speak(TEXT, SLT, rng(), run_speech_tool)


def test_a_text_without_words_is_an_error() -> None:
    with pytest.raises(MediaError, match="no text"):
        speak("  ", SLT, rng(), run_speech_tool)


def test_variants_of_features_keep_their_bands_and_depend_on_the_seed_only() -> None:
    features = torch.randn(200, 80, generator=torch.Generator().manual_seed(0))
    before = features.clone()
    variants = [augment(features, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert torch.equal(features, before)
    assert torch.equal(variants[3], augment(features, torch.Generator().manual_seed(3)))
    assert all(variant.shape[1] == 80 and 170 <= len(variant) <= 236 for variant in variants)
    assert len({len(variant) for variant in variants}) > 5
    assert all(variant.isfinite().all() for variant in variants)
    assert augment(features[:1].half(), torch.Generator()).dtype == torch.float32


def test_each_change_of_features_does_what_it_says() -> None:
    features = torch.arange(100 * 80, dtype=torch.float32).reshape(100, 80)
    assert stretch_time(features, 1.1).shape == (110, 80)
    assert stretch_time(features[:42], 0.85).shape == (40, 80)
    assert torch.equal(shift_bands(features, 3)[:, 3:], features[:, :-3])
    assert torch.equal(shift_bands(features, -2)[:, -1], features[:, -1])
    masked = mask_bands(features, 10, 5)
    assert (masked[:, 10:15] == features.mean()).all()
    assert torch.equal(masked[:, 15:], features[:, 15:])
    assert (mask_steps(features, 0, 4)[:4] == features.mean()).all()
