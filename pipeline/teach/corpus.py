"""Utterances spoken once and kept: all samples in one file, mapped into memory.

    DIRECTORY/speech-KEY/samples.i16    int16 samples, one utterance behind the other
    DIRECTORY/speech-KEY/ends.i64       for each, the sample at which it ends
    DIRECTORY/speech-KEY/index.json     texts and voices; written last: a corpus without it is not complete

KEY is a hash of texts, voices, seed and recipe. Utterance `i` depends on those alone, so a run that was interrupted
goes on behind the last utterance that is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MediaError
from pipeline.teach.speech import VOICES, Samples, Tool, Voice, speak

RECIPE: Final = 1
"""Raised whenever the same text, voice and seed would give other samples."""

OnProgress = Callable[[int, int], None]
"""Told how many utterances there are already, and how many there will be."""

_SAMPLES, _ENDS, _INDEX, _LOCK = "samples.i16", "ends.i64", "index.json", "lock"
_WAITING_PER_PROCESS = 4
_SAVE_EVERY = 64


class Corpus:
    """A complete corpus; `corpus[i]` is int16[n], 16 kHz mono, read from the file when it is used."""

    def __init__(self, directory: Path) -> None:
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            self._ends: NDArray[np.int64] = np.fromfile(directory / _ENDS, np.int64)
            self._samples: NDArray[np.int16] = np.memmap(directory / _SAMPLES, np.int16, mode="r")
        except (OSError, ValueError) as exc:
            raise MediaError(
                f"cannot read the speech in {directory}: {exc}; remove the folder, it is made again"
            ) from exc
        self.texts: tuple[str, ...] = tuple(index["texts"])
        by_name = {voice.name: voice for voice in VOICES}
        self.voices: tuple[Voice, ...] = tuple(by_name[name] for name in index["voices"])
        if len(self._ends) != len(self.texts) or self._ends[-1] != len(self._samples):
            raise MediaError(f"the speech in {directory} is not whole: remove the folder, it is made again")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Samples:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)}")
        return self._samples[self._ends[index - 1] if index else 0 : self._ends[index]]

    @property
    def num_samples(self) -> int:
        """Samples of all utterances together."""
        return len(self._samples)


def make_corpus(
    texts_and_voices: Sequence[tuple[str, Voice]],
    directory: Path,
    num_processes: int,
    on_progress: OnProgress,
    *,
    tool: Tool,
    seed: int = 0,
) -> Corpus:
    """Return the corpus of these utterances, spoken now as far as an earlier run has not done it.

    Args:
        texts_and_voices: what is said, and by whom; at least one.
        directory: where corpora are kept; each has a folder of its own there.
        num_processes: how many tools speak at once; only some utterances for each of them are in memory.
        on_progress: told at the start, after every 64 utterances, and at the end.
        tool: runs a command (`actors.speech_tools.run_speech_tool`).
        seed: of speeds, pitches and pauses.

    Raises:
        MediaError: a tool is missing, fails or hangs (the message has the number of the text, not the text); a file
            cannot be written or is damaged; or another run is writing the same corpus. What is whole is kept.
        ValueError: there is no text, or a voice that is not in VOICES.
    """
    if not texts_and_voices:
        raise ValueError("a corpus has one utterance at least")
    if unknown := {voice.name for _, voice in texts_and_voices} - {voice.name for voice in VOICES}:
        raise ValueError(f"no such voices: {sorted(unknown)}")  # flite would take another one, and say nothing
    folder = directory / f"speech-{corpus_key(texts_and_voices, seed)}"
    total = len(texts_and_voices)
    if not (folder / _INDEX).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fill(folder, texts_and_voices, num_processes, on_progress, tool=tool, seed=seed)
        except OSError as exc:
            raise MediaError(f"cannot write speech to {folder}: {exc}") from exc
    corpus = Corpus(folder)
    on_progress(total, total)
    return corpus


def corpus_key(texts_and_voices: Sequence[tuple[str, Voice]], seed: int) -> str:
    """Return 16 hexadecimal digits of what determines a corpus."""
    lines = [[text, voice.engine, voice.name] for text, voice in texts_and_voices]
    return hashlib.sha256(json.dumps([RECIPE, seed, lines]).encode()).hexdigest()[:16]


def _fill(
    folder: Path,
    texts_and_voices: Sequence[tuple[str, Voice]],
    num_processes: int,
    on_progress: OnProgress,
    *,
    tool: Tool,
    seed: int,
) -> None:
    total = len(texts_and_voices)
    with ExitStack() as files:
        _lock(files.enter_context((folder / _LOCK).open("w")).fileno(), folder)
        done, end = _cut_to_whole(folder)
        samples_file = files.enter_context((folder / _SAMPLES).open("ab"))
        ends_file = files.enter_context((folder / _ENDS).open("ab"))
        on_progress(done, total)
        ends: list[int] = []
        for samples in _spoken(texts_and_voices, done, num_processes, tool, seed):
            samples_file.write(samples.tobytes())
            end += len(samples)
            ends.append(end)
            done += 1
            if len(ends) == _SAVE_EVERY or done == total:
                # samples first: an end that is on the disk has its samples there
                samples_file.flush()
                os.fsync(samples_file.fileno())
                ends_file.write(np.array(ends, np.int64).tobytes())
                ends_file.flush()
                os.fsync(ends_file.fileno())
                ends.clear()
                if done < total:
                    on_progress(done, total)
        index = {
            "texts": [text for text, _ in texts_and_voices],
            "voices": [voice.name for _, voice in texts_and_voices],
        }
        partial = folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(index), encoding="utf-8")
        partial.replace(folder / _INDEX)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MediaError(f"another run is writing {folder}: wait for it") from None


def _cut_to_whole(folder: Path) -> tuple[int, int]:
    """Cut both files behind the last whole utterance; return how many there are and where the last one ends."""
    for name in (_SAMPLES, _ENDS):
        (folder / name).touch()
    written = (folder / _ENDS).read_bytes()
    ends = np.frombuffer(written[: len(written) // 8 * 8], np.int64)
    ends = ends[ends <= (folder / _SAMPLES).stat().st_size // 2]
    end = int(ends[-1]) if len(ends) else 0
    os.truncate(folder / _ENDS, 8 * len(ends))
    os.truncate(folder / _SAMPLES, 2 * end)
    return len(ends), end


def _spoken(
    texts_and_voices: Sequence[tuple[str, Voice]], first: int, num_processes: int, tool: Tool, seed: int
) -> Iterator[Samples]:
    """Yield the utterances from `first` on, in order. Threads, since the work is in the tools' processes."""
    total = len(texts_and_voices)

    def one(index: int) -> Samples:
        text, voice = texts_and_voices[index]
        try:
            return speak(text, voice, np.random.default_rng([seed, index]), tool)
        except MediaError as exc:
            raise MediaError(f"utterance {index} of {total}, voice {voice.name!r}: {exc}") from exc

    with ThreadPoolExecutor(num_processes, "speech") as pool:
        waiting: deque[Future[Samples]] = deque()
        try:
            for index in range(first, total):
                waiting.append(pool.submit(one, index))
                if len(waiting) >= num_processes * _WAITING_PER_PROCESS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
