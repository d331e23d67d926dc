"""Sounds in teaching: the features of what was said, joined, cut and made to sound otherwise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.models.phi4.conformer import TOKEN_STEPS
from pipeline.teach.augment import augment
from pipeline.teach.grammar import all_sentences
from pipeline.teach.language import MAX_SAYINGS, MIN_SAYINGS
from pipeline.teach.speech import Voice, draw_voice, with_level, with_room
from pipeline.teach.world import draw_report, draw_saying

_FULL_SCALE = 32_768.0
_SAMPLE_RATE_HZ = 16_000
_NOISE_SECONDS = 30
_NOISE_PEAK = 8_000
_SLOPES = (0.0, 0.25, 0.5, 0.75)  # from white to beyond pink
_HUMS_HZ = (50.0, 60.0)
_BABBLE_SHARE = 0.2
_DB = math.log(10) / 10

_GAIN = (-3.5, 1.5)  # of the natural logarithm of power, beside that of `augment`
_NOISY_SHARE, _SNR_DB = 0.5, (5.0, 35.0)
_ROOM_SHARE, _REPORTED_SHARE = 0.25, 0.35
_MAX_SILENCE_STEPS = 30
_GAP_STEPS = (8, 50)


@dataclass(slots=True)
class Clip:
    """One sentence, said once.

    Args:
        text: what is said.
        features: float16[steps, mels], of 10 ms.
        voice: who says it.
        report: the number of the report that it is part of, in the order of the clips; -1: none.
        ends: where each of its words ends, as a share of the steps; empty while nobody knows.
    """

    text: str
    features: Tensor
    voice: str
    report: int = -1
    ends: tuple[float, ...] = field(default=())

    @property
    def num_tokens(self) -> int:
        """Positions of the decoder that it takes."""
        return -(-len(self.features) // TOKEN_STEPS)


def features_of(samples: NDArray[np.int16], front_end: AudioFeatures) -> Tensor:
    """Return the features of `samples`, 16 kHz, float16[steps, mels]."""
    return front_end(torch.from_numpy(samples.astype(np.float32)) / _FULL_SCALE).half()


def joined(clips: Sequence[Clip], rng: random.Random) -> Tensor:
    """Return the features of `clips` one behind the other, with pauses between them."""
    parts: list[Tensor] = []
    for clip in clips:
        if parts:
            parts.append(torch.zeros(rng.randint(*_GAP_STEPS), clip.features.shape[1]))
        parts.append(clip.features.float())
    return torch.cat(parts)


class Distortion:
    """Makes each sound another one: `augment`, silence around it, noise, another level. All on features.

    Noise is added to the power of each band, which is what noise beside the sound adds but for their phases.
    """

    def __init__(self, front_end: AudioFeatures, seed: int) -> None:
        generator = np.random.default_rng(seed)
        count = _NOISE_SECONDS * _SAMPLE_RATE_HZ
        times_s = np.arange(count) / _SAMPLE_RATE_HZ
        self._noises: list[Tensor] = []
        for slope in _SLOPES:
            spectrum = np.fft.rfft(generator.standard_normal(count))
            wave = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1.0) ** slope, count)
            self._noises.append(_noise_of(wave, front_end))
        for base_hz in _HUMS_HZ:
            hum = sum(np.sin(2 * np.pi * (base_hz * n * times_s + generator.random())) / n for n in range(1, 7))
            self._noises.append(_noise_of(hum + 0.05 * generator.standard_normal(count), front_end))

    def __call__(
        self, features: Tensor, rng: random.Random, others: Sequence[Clip] = (), strength: float = 1.0
    ) -> tuple[Tensor, int, float]:
        """Return other features, how many steps of silence stand before the sound, and how much it was stretched.

        `others` are those who may babble in the background; `strength` is the share of sounds that are distorted.
        """
        if rng.random() >= strength:
            return features.float(), 0, 1.0
        x = augment(features, torch.Generator().manual_seed(rng.getrandbits(62)))
        stretch = len(x) / len(features)
        before, behind = (rng.randint(0, _MAX_SILENCE_STEPS) for _ in range(2))
        if rng.random() < _NOISY_SHARE:
            level = _level(x)
            x = self._with_noise(F.pad(x, (0, 0, before, behind)), level, rng, others)
        else:
            x = F.pad(x, (0, 0, before, behind))
        return (x + rng.uniform(*_GAIN)).clamp_min(0.0), before, stretch

    def _with_noise(self, x: Tensor, level: float, rng: random.Random, others: Sequence[Clip] = ()) -> Tensor:
        if others and rng.random() < _BABBLE_SHARE:
            parts = [_resized(rng.choice(others).features.float(), len(x), rng) for _ in range(3)]
            noise = torch.stack([part - _level(part) for part in parts]).logsumexp(0)
        else:
            noise = _resized(rng.choice(self._noises), len(x), rng)
        return torch.logaddexp(x, noise - _level(noise) + level - rng.uniform(*_SNR_DB) * _DB)

    def silence(self, num_steps: int, rng: random.Random) -> Tensor:
        """Return sound in which nobody speaks."""
        quiet = torch.zeros(num_steps, self._noises[0].shape[1])
        return self._with_noise(quiet, rng.uniform(0.0, 12.0), rng).clamp_min(0.0)


def _noise_of(wave: NDArray[np.float64], front_end: AudioFeatures) -> Tensor:
    return features_of((wave / np.abs(wave).max() * _NOISE_PEAK).astype(np.int16), front_end).float()


def _level(x: Tensor) -> float:
    """Return the logarithm of the mean power."""
    return float(torch.logsumexp(x.flatten(), 0)) - math.log(x.numel())


def _resized(x: Tensor, num_steps: int, rng: random.Random) -> Tensor:
    """Return `num_steps` steps from anywhere in `x`, which begins again where it ends."""
    return x[(torch.arange(num_steps) + rng.randrange(len(x))) % len(x)]


@dataclass(frozen=True, slots=True)
class Spoken:
    """What is to be spoken by whom. Sentences of one report have one voice and one `report`; those of none have -1."""

    text: str
    voice: Voice
    report: int = -1


def draw_spoken(seed: int, num_clips: int) -> list[Spoken]:
    """Return `num_clips` sentences or a few more, none held out: every question, reports, and sentences alone."""
    rng = random.Random(f"{seed}/spoken")  # noqa: S311 - repeatable on purpose
    voice_rng = np.random.default_rng(rng.getrandbits(63))
    questions = sorted(sentence.text for sentence in all_sentences() if sentence.rule.kind == "question")
    found = [Spoken(text, draw_voice(voice_rng)) for text in questions]
    num_reported = len(found) + _REPORTED_SHARE * (num_clips - len(found))
    number = 0
    while len(found) < num_reported:
        voice = draw_voice(voice_rng)
        report = draw_report(rng, rng.randint(MIN_SAYINGS, MAX_SAYINGS), held_out=False)
        found += [Spoken(saying.text, voice, number) for saying in report.sayings]
        number += 1
    while len(found) < num_clips:
        found.append(Spoken(draw_saying(rng, held_out=False).text, draw_voice(voice_rng)))
    return found


def clips_of(
    spoken: Sequence[Spoken], samples_of: Callable[[int], NDArray[np.int16]], num_mels: int, seed: int
) -> list[Clip]:
    """Return clips of what was spoken, some in a room, each at a level of its own; `samples_of` tells the n-th's."""
    front_end = AudioFeatures(num_mels)
    clips = []
    for index, each in enumerate(spoken):
        rng, samples = np.random.default_rng([seed, index]), samples_of(index)
        heard = with_room(samples, rng) if rng.random() < _ROOM_SHARE else samples
        features = features_of(with_level(heard, rng), front_end)
        clips.append(Clip(each.text, features, each.voice.name, each.report))
    return clips
