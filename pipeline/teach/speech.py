"""Speech to learn from: the voices of flite and espeak-ng, and what rooms, noise and distance do to them.

Nothing here starts a process: who owns processes hands in a `Tool` (`actors.speech_tools.run_speech_tool`). Sound is
int16[n], 16 kHz mono; randomness is a `numpy.random.Generator`, and the same one gives the same samples.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MediaError
from pipeline.timebase import SAMPLE_RATE_HZ

Samples = NDArray[np.int16]
Tool = Callable[[Sequence[str], str], bytes]
"""Runs a command with a text on its standard input and returns its standard output; MediaError when it fails."""

Engine = Literal["flite", "espeak-ng"]
NoiseKind = Literal["white", "pink", "hum", "babble"]

_FULL_SCALE = 32_767.0
_STRETCHES = (0.85, 1.2)
_WORDS_PER_MINUTE = (130, 180)
_PITCHES = (30, 70)
_EDGE_S = (0.1, 0.4)
_PAUSE_S = (0.25, 0.8)
_SILENCE_SHARE = 0.01
_MARGIN_S = 0.02
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ROOM_S = 0.3
_LEVELS_DB = (-36.0, -14.0)


@dataclass(frozen=True, slots=True)
class Voice:
    """One voice of one tool; `name` is what the tool calls it. A held-out one is heard in evaluation only."""

    name: str
    engine: Engine
    is_held_out: bool = False


_ACCENTS = ("en-029", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
_VARIANTS = ("", *(f"+f{n}" for n in range(1, 5)), *(f"+m{n}" for n in range(1, 8)))

# British English is "en": espeak-ng 1.51 knows "en-gb" too, but takes no variant of it and says nothing about that.
VOICES: Final = (
    *(Voice(name, "flite") for name in ("slt", "rms", "kal16")),
    Voice("awb", "flite", is_held_out=True),
    *(Voice(accent + variant, "espeak-ng") for accent in ("en-us", "en") for variant in _VARIANTS),
    *(Voice(accent + variant, "espeak-ng") for accent in _ACCENTS for variant in ("", "+f2", "+m3")),
    # timbres that no other voice has, one of them with an accent that no other has
    Voice("en-us+Andrea", "espeak-ng", is_held_out=True),
    Voice("en-gb-scotland+f5", "espeak-ng", is_held_out=True),
)


def training_voices() -> tuple[Voice, ...]:
    """Return the voices that may be trained on."""
    return tuple(voice for voice in VOICES if not voice.is_held_out)


def held_out_voices() -> tuple[Voice, ...]:
    """Return the voices that are for evaluation only."""
    return tuple(voice for voice in VOICES if voice.is_held_out)


def draw_voice(rng: np.random.Generator) -> Voice:
    """Return a voice to train on: flite and espeak-ng are as likely, since flite's few are the more natural ones."""
    engine: Engine = "flite" if rng.random() < 0.5 else "espeak-ng"
    voices = [voice for voice in training_voices() if voice.engine == engine]
    return voices[rng.integers(len(voices))]


def speak(text: str, voice: Voice, rng: np.random.Generator, tool: Tool) -> Samples:
    """Return `text` as spoken by `voice` at a drawn speed (and pitch, where the tool has one).

    Silence at both ends is cut or filled up to a drawn 0.1 to 0.4 s, that between sentences to 0.25 to 0.8 s.

    Raises:
        MediaError: the tool is missing, fails or hangs, or what it wrote is no speech; the message has no text in it.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
    if not sentences:
        raise MediaError("there is no text to speak: give a sentence")
    options = _draw_options(voice, rng)
    pauses = [rng.uniform(*_PAUSE_S) for _ in sentences[1:]]
    edges = [rng.uniform(*_EDGE_S) for _ in range(2)]
    parts = [_silence(edges[0] - _MARGIN_S)]
    for index, sentence in enumerate(sentences):
        is_last = index == len(sentences) - 1
        parts.append(_trim(_say(sentence, voice, options, tool)))
        parts.append(_silence(edges[1] - _MARGIN_S if is_last else pauses[index] - 2 * _MARGIN_S))
    return np.concatenate(parts)


def _draw_options(voice: Voice, rng: np.random.Generator) -> list[str]:
    if voice.engine == "flite":
        return ["--setf", f"duration_stretch={rng.uniform(*_STRETCHES):.3f}"]
    speed = rng.integers(*_WORDS_PER_MINUTE, endpoint=True)
    return ["-s", str(speed), "-p", str(rng.integers(*_PITCHES, endpoint=True))]


def _say(sentence: str, voice: Voice, options: Sequence[str], tool: Tool) -> Samples:
    if voice.engine == "flite":  # it never comes to an end of text on standard input
        written = tool(["flite", "-voice", voice.name, *options, "-t", sentence, "-o", "/dev/stdout"], "")
    else:
        written = tool(["espeak-ng", "-v", voice.name, *options, "--stdin", "--stdout"], sentence)
    rate_hz, samples = _read_wave(written, voice)
    return samples if rate_hz == SAMPLE_RATE_HZ else resample(samples, rate_hz)


def _read_wave(written: bytes, voice: Voice) -> tuple[int, Samples]:
    """Return rate and samples; the sizes in the header are those of an endless file when a tool writes to a pipe."""
    at = written.find(b"data", 12)
    if not written.startswith(b"RIFF") or written[12:16] != b"fmt " or at < 36:
        raise MediaError(f"{voice.engine} wrote no WAV file in voice {voice.name!r}: is the voice installed?")
    _, num_channels, rate_hz, _, _, num_bits = struct.unpack_from("<HHIIHH", written, 20)
    if (num_channels, num_bits) != (1, 16):
        raise MediaError(f"{voice.engine} wrote {num_channels} channels of {num_bits} bits, wanted 1 of 16")
    body = written[at + 8 :]
    samples = np.frombuffer(body[: len(body) // 2 * 2], "<i2").astype(np.int16)
    if not samples.any():
        raise MediaError(f"{voice.engine} said nothing in voice {voice.name!r}: is there a word in the text?")
    return rate_hz, samples


def resample(samples: Samples, rate_hz: int) -> Samples:
    """Return int16 samples of `rate_hz` at 16 kHz: the spectrum is cut, which is exact below 8 kHz."""
    divisor = int(np.gcd(rate_hz, SAMPLE_RATE_HZ))
    blocks = -(-len(samples) // (rate_hz // divisor))
    num_in, num_out = blocks * rate_hz // divisor, blocks * SAMPLE_RATE_HZ // divisor
    spectrum = np.fft.rfft(samples, num_in)[: num_out // 2 + 1]
    return _to_int16(np.fft.irfft(spectrum, num_out) * (num_out / num_in))


def _trim(samples: Samples) -> Samples:
    """Return what lies between the first and the last loud sample, and 20 ms on both sides of it."""
    levels = np.abs(samples.astype(np.int32))
    (loud,) = np.nonzero(levels > _SILENCE_SHARE * levels.max())
    margin = round(_MARGIN_S * SAMPLE_RATE_HZ)
    padded = np.pad(samples, margin)
    return padded[loud[0] : loud[-1] + 2 * margin + 1]


def _silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE_HZ), np.int16)


def _to_int16(wave: NDArray[np.float64]) -> Samples:
    """Round; what would be too loud is made quieter as a whole."""
    peak = float(np.abs(wave).max(initial=0.0))
    return np.rint(wave * min(1.0, _FULL_SCALE / peak) if peak else wave).astype(np.int16)


def with_noise(
    samples: Samples,
    rng: np.random.Generator,
    snr_db: float,
    kind: NoiseKind | None = None,
    others: Sequence[Samples] = (),
) -> Samples:
    """Return int16[n]: `samples` and noise whose mean power is `snr_db` below theirs, made quieter if it would clip.

    Args:
        samples: int16[n]; silence is returned as it is.
        rng: what is drawn from.
        snr_db: mean power of all samples over that of the noise, in dB.
        kind: None: drawn; babble only when there are `others`.
        others: other utterances, of which up to four speak at once in babble.

    Raises:
        ValueError: babble is asked for without any sound in `others`.
    """
    others = [other for other in others if other.any()]
    if kind is None:
        kinds = get_args(NoiseKind) if others else get_args(NoiseKind)[:-1]
        kind = kinds[rng.integers(len(kinds))]
    if kind == "babble" and not others:
        raise ValueError("babble is made of other utterances: give some in `others`")
    speech = samples.astype(np.float64)
    power = float(np.mean(speech**2)) if len(speech) else 0.0
    if power == 0.0:
        return samples.copy()
    noise = _babble(len(speech), rng, others) if kind == "babble" else _noise(kind, len(speech), rng)
    noise_power = float(np.mean(noise**2))
    return _to_int16(speech + noise * np.sqrt(power / noise_power / 10 ** (snr_db / 10)))


def _noise(kind: NoiseKind, num_samples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if kind == "hum":
        times_s = np.arange(num_samples) / SAMPLE_RATE_HZ
        base_hz = rng.choice((50.0, 60.0)) * rng.uniform(0.99, 1.01)
        tones = [np.sin(2 * np.pi * (base_hz * n * times_s + rng.random())) / n for n in range(1, 7)]
        hum: NDArray[np.float64] = np.sum(tones, axis=0) + 0.05 * rng.standard_normal(num_samples)
        return hum
    white = rng.standard_normal(num_samples)
    if kind == "white":
        return white
    spectrum = np.fft.rfft(white)
    spectrum /= np.sqrt(np.maximum(1, np.arange(len(spectrum))))
    return np.fft.irfft(spectrum, num_samples) + 1e-9 * white  # a single sample has no spectrum besides its mean


def _babble(num_samples: int, rng: np.random.Generator, others: Sequence[Samples]) -> NDArray[np.float64]:
    mix = 1e-6 * rng.standard_normal(num_samples)  # never quite silent, as a power of zero cannot be scaled
    for index in rng.permutation(len(others))[:4]:
        other = others[index].astype(np.float64)
        turned = np.roll(other, rng.integers(len(other)))
        mix += np.resize(turned, num_samples) / np.sqrt(np.mean(other**2))
    return mix


def with_room(samples: Samples, rng: np.random.Generator) -> Samples:
    """Return int16[n]: `samples` in a small room, as loud as before.

    The room is an impulse, some early reflections, and noise that falls by 60 dB in a drawn 0.1 to 0.5 s, of which the
    first 0.3 s are heard.
    """
    if not samples.any():
        return samples.copy()
    num_taps = round(_ROOM_S * SAMPLE_RATE_HZ)
    times_s = np.arange(num_taps) / SAMPLE_RATE_HZ
    tail = rng.standard_normal(num_taps) * 10 ** (-3 * times_s / rng.uniform(0.1, 0.5))
    tail[: round(0.003 * SAMPLE_RATE_HZ)] = 0.0
    impulses = tail / np.sqrt(np.sum(tail**2)) * 10 ** (rng.uniform(-12.0, -2.0) / 20)
    for delay in rng.integers(20, 400, size=4):
        impulses[delay] += rng.uniform(-0.3, 0.3)
    impulses[0] = 1.0
    size = 1 << (len(samples) + num_taps - 1).bit_length()
    speech = samples.astype(np.float64)
    heard = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(impulses, size), size)[: len(speech)]
    return _to_int16(heard * np.sqrt(np.sum(speech**2) / np.sum(heard**2)))


def with_level(samples: Samples, rng: np.random.Generator) -> Samples:
    """Return int16[n]: `samples` at a drawn level of -36 to -14 dB of full scale (root mean square), never clipped."""
    if not samples.any():
        return samples.copy()
    speech = samples.astype(np.float64)
    level = 10 ** (rng.uniform(*_LEVELS_DB) / 20) * _FULL_SCALE
    return _to_int16(speech * level / np.sqrt(np.mean(speech**2)))
