"""The recordings that benchmarks play: files with a manifest of what is said in them, joined and looped by seed."""

from __future__ import annotations

import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pipeline.errors import MediaError, SourceNotFound
from pipeline.params import Params
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples

MANIFEST_NAME = "manifest.json"
LOOP_PAUSE_MS = 800
"""Between two turns of a recording that is repeated."""

_WINDOW_SAMPLES = ms_to_samples(10)
_EDGE_WINDOWS = 2  # kept on both sides of what is louder than silence
_SILENCE_RATIO = 0.03  # of the loud windows' level


class ManifestEntry(BaseModel):
    """One recording of a manifest. Further keys (source, licence, seconds) are notes and not read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    file: str
    language: str = Field(min_length=2)
    text: str


@dataclass(frozen=True, slots=True)
class Clip:
    """Sound and what is said in it: int16[n] at 16 kHz."""

    name: str
    language: str
    text: str
    samples: NDArray[np.int16]

    @property
    def seconds(self) -> float:
        """How long the sound is."""
        return len(self.samples) / SAMPLE_RATE_HZ


class JoinParams(Params):
    """How clips are joined into long streams."""

    min_seconds: float = Field(default=180.0, ge=1.0, le=36_000.0, description="length that a stream reaches at least")
    min_pause_ms: int = Field(default=200, ge=0, le=10_000, description="shortest pause between two clips")
    max_pause_ms: int = Field(default=1_500, ge=0, le=10_000, description="longest pause between two clips")
    max_tight_pause_ms: int = Field(default=140, ge=0, le=1_000, description="longest pause within long speech")
    num_tight_clips: int = Field(default=4, ge=1, le=100, description="clips that follow each other without a pause")
    seed: int = Field(default=1, ge=0, description="of order and pauses")

    @model_validator(mode="after")
    def _check_pauses(self) -> JoinParams:
        if self.min_pause_ms > self.max_pause_ms:
            raise ValueError(f"min_pause_ms={self.min_pause_ms} is above max_pause_ms={self.max_pause_ms}")
        return self


def read_samples(path: Path) -> NDArray[np.int16]:
    """Return the whole sound of a file as int16[n], 16 kHz mono.

    Raises:
        SourceNotFound: if there is no such file.
        MediaError: if it cannot be read as sound.
    """
    if not path.is_file():
        raise SourceNotFound(f"no file {path}: give the path of a sound file")
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MediaError(f"{path} has no audio track")
            resampled = [piece for sound in container.decode(audio=0) for piece in resampler.resample(sound)]
            resampled += resampler.resample(None)
    except av.FFmpegError as exc:
        raise MediaError(f"{path} cannot be read as sound: {exc.strerror}") from exc
    runs = [piece.to_ndarray().reshape(-1) for piece in resampled]
    samples: NDArray[np.int16] = np.concatenate(runs).astype(np.int16, copy=False) if runs else np.zeros(0, np.int16)
    if not len(samples):
        raise MediaError(f"{path} holds no sound")
    return samples


def write_wav(path: Path, samples: NDArray[np.int16]) -> None:
    """Write int16[n] as a 16 kHz mono WAV file."""
    with _open_wav(path) as out:
        _write_samples(out, samples)


def _open_wav(path: Path) -> wave.Wave_write:
    out = wave.open(str(path), "wb")  # noqa: SIM115 - the caller's `with` closes it
    out.setnchannels(1)
    out.setsampwidth(2)
    out.setframerate(SAMPLE_RATE_HZ)
    return out


def _write_samples(out: wave.Wave_write, samples: NDArray[np.int16]) -> None:
    out.writeframesraw(samples.astype("<i2", copy=False).tobytes())


def read_manifest(folder: Path) -> list[ManifestEntry]:
    """Return the entries of the manifest in `folder`: a JSON list of objects with file, language and text.

    Raises:
        SourceNotFound: if there is none.
        MediaError: if it is not such a list, or empty.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise SourceNotFound(
            f"no {MANIFEST_NAME} in {folder}: it lists the recordings as [{{file, language, text}}, …]"
        )
    try:
        entries = TypeAdapter(list[ManifestEntry]).validate_json(path.read_bytes())
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MediaError(f"{path} is not a manifest: {place or 'document'}: {first['msg']}") from exc
    if not entries:
        raise MediaError(f"{path} lists no recording")
    return entries


def load_clips(folder: Path) -> list[Clip]:
    """Return all recordings of the manifest in `folder`, in its order.

    Raises:
        SourceNotFound: if the manifest or a file in it is missing.
        MediaError: if one cannot be used.
    """
    return [
        Clip(entry.file, entry.language, entry.text, read_samples(folder / entry.file))
        for entry in read_manifest(folder)
    ]


def find_reference(path: Path) -> ManifestEntry | None:
    """Return what is said in the file at `path`: from the manifest beside it, else from FILE.txt (taken as English)."""
    if (path.parent / MANIFEST_NAME).is_file():
        for entry in read_manifest(path.parent):
            if entry.file == path.name:
                return entry
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return ManifestEntry(file=path.name, language="en", text=beside.read_text(encoding="utf-8").strip())
    return None


def join_clips(clips: Sequence[Clip], params: JoinParams, name: str, *, has_long_speech: bool) -> Clip:
    """Return one long stream of `clips` in shuffled order, again and again until it is long enough.

    Clips lose their silent edges; between two lies a pause of `min_pause_ms` to `max_pause_ms`. With `has_long_speech`
    every other run of `num_tight_clips` clips has pauses of `max_tight_pause_ms` at most: speech without a breath.
    Pauses are filled with noise at the level of the clip before, as in a room, not with digital silence.

    Raises:
        ValueError: without clips, or when they are not of one language.
    """
    pieces = _shuffle(clips, params, has_long_speech=has_long_speech)
    taken: list[_Piece] = []
    num_samples = 0
    while num_samples < params.min_seconds * SAMPLE_RATE_HZ:
        for _ in clips:  # every clip is in it equally often
            taken.append(next(pieces))
            num_samples += len(taken[-1].samples)
    return _concatenate(taken, name, clips[0].language)


def join_about(clips: Sequence[Clip], params: JoinParams, name: str, *, seconds: float) -> Clip:
    """Return `clips` joined as by `join_clips` with pauses, cut behind the clip whose end is nearest to `seconds`.

    One clip at least; with `seconds` 0 every clip once. `params.min_seconds` is not used.

    Raises:
        ValueError: without clips, or when they are not of one language.
    """
    pieces = _shuffle(clips, params, has_long_speech=False)
    if not seconds:
        return _concatenate([next(pieces) for _ in clips], name, clips[0].language)
    taken: list[_Piece] = []
    num_missing = round(seconds * SAMPLE_RATE_HZ)
    while num_missing > 0:
        piece = next(pieces)
        if taken and len(piece.samples) - num_missing > num_missing:
            break  # the stream is nearer to its length without this one
        taken.append(piece)
        num_missing -= len(piece.samples)
    return _concatenate(taken, name, clips[0].language)


def load_stream(media: Path, seconds: float, language: str, params: JoinParams | None = None) -> tuple[Clip, bool]:
    """Return what a stream plays, about `seconds` long, and whether its text is known.

    A file is repeated as a whole until it is long enough, and never cut: its text is that of the whole. Of a folder
    with a manifest the recordings of `language` are joined, by the seed, and cut between two of them; the pauses are
    no shorter than those of a repeated file, so that speakers do not run into each other.

    Raises:
        SourceNotFound: if there is no such file, or no manifest in the folder.
        MediaError: if the media cannot be used, or none of the folder's is of that language.
    """
    if not media.is_dir():
        reference = find_reference(media)
        known, text = (language, "") if reference is None else (reference.language, reference.text)
        clip = Clip(media.name, known, text, read_samples(media))
        return loop_clip(clip, seconds), reference is not None
    languages = sorted({entry.language for entry in read_manifest(media)})
    if language not in languages:
        raise MediaError(f"{media} lists no recording in {language!r}: give one of {', '.join(languages)}")
    clips = [clip for clip in load_clips(media) if clip.language == language]
    params = params or JoinParams(min_pause_ms=LOOP_PAUSE_MS)
    return join_about(clips, params, f"{media.name} ({language})", seconds=seconds), True


def loop_clip(clip: Clip, min_seconds: float, pause_ms: int = LOOP_PAUSE_MS) -> Clip:
    """Return `clip` repeated as a whole, with pauses between, until it lasts `min_seconds`; once at least."""
    pause = _room_noise(clip.samples, ms_to_samples(pause_ms), np.random.default_rng(0))
    runs, num_samples = [clip.samples], len(clip.samples)
    while num_samples < min_seconds * SAMPLE_RATE_HZ:
        runs += [pause, clip.samples]
        num_samples += len(pause) + len(clip.samples)
    times = (len(runs) + 1) // 2
    return Clip(clip.name, clip.language, " ".join([clip.text] * times), np.concatenate(runs))


def write_looped_wav(path: Path, clip: Clip, min_seconds: float, pause_ms: int = LOOP_PAUSE_MS) -> float:
    """Write what `loop_clip` returns as a WAV file, piece by piece: one turn is held at a time. Return its seconds."""
    pause = _room_noise(clip.samples, ms_to_samples(pause_ms), np.random.default_rng(0))
    with _open_wav(path) as out:
        _write_samples(out, clip.samples)
        while out.tell() < min_seconds * SAMPLE_RATE_HZ:
            _write_samples(out, pause)
            _write_samples(out, clip.samples)
        return out.tell() / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class _Piece:
    """One clip without its silent edges, and the pause behind it."""

    text: str
    samples: NDArray[np.int16]


def _shuffle(clips: Sequence[Clip], params: JoinParams, *, has_long_speech: bool) -> Iterator[_Piece]:
    """Return an endless iterator: all clips in an order made by seed, then all again in another."""
    if len({clip.language for clip in clips}) != 1:
        raise ValueError(f"expected clips of one language, got {sorted({clip.language for clip in clips})}")

    def pieces() -> Iterator[_Piece]:
        chance = np.random.default_rng(params.seed)
        num_made = 0
        while True:
            for index in chance.permutation(len(clips)):
                clip = clips[index]
                is_tight = has_long_speech and num_made // params.num_tight_clips % 2 == 1
                limits = (0, params.max_tight_pause_ms) if is_tight else (params.min_pause_ms, params.max_pause_ms)
                pause = _room_noise(clip.samples, ms_to_samples(chance.uniform(*limits)), chance)
                yield _Piece(clip.text, np.concatenate([trim_silence(clip.samples), pause]))
                num_made += 1

    return pieces()


def _concatenate(pieces: Sequence[_Piece], name: str, language: str) -> Clip:
    text = " ".join(piece.text for piece in pieces)
    return Clip(name, language, text, np.concatenate([piece.samples for piece in pieces]))


def trim_silence(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return `samples` without the edges that are quieter than 3 % of its loud windows (30 dB below)."""
    levels = _levels(samples)
    if not len(levels):
        return samples
    loud = np.flatnonzero(levels > _SILENCE_RATIO * np.percentile(levels, 95))
    if not len(loud):
        return samples
    first = max(0, int(loud[0]) - _EDGE_WINDOWS) * _WINDOW_SAMPLES
    return samples[first : (int(loud[-1]) + 1 + _EDGE_WINDOWS) * _WINDOW_SAMPLES]


def _levels(samples: NDArray[np.int16]) -> NDArray[np.float64]:
    """Return the root mean square of every whole window of 10 ms."""
    num_windows = len(samples) // _WINDOW_SAMPLES
    windows = samples[: num_windows * _WINDOW_SAMPLES].reshape(num_windows, _WINDOW_SAMPLES).astype(np.float64)
    levels: NDArray[np.float64] = np.sqrt((windows**2).mean(axis=1))
    return levels


def _room_noise(samples: NDArray[np.int16], num_samples: int, noise: np.random.Generator) -> NDArray[np.int16]:
    levels = _levels(samples)
    level = float(np.percentile(levels, 5)) if len(levels) else 0.0
    return np.clip(np.rint(noise.normal(0.0, max(level, 1.0), num_samples)), -32_768, 32_767).astype(np.int16)
