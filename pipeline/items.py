"""The items that travel along the DAG.

Frozen dataclasses: they carry no behaviour beyond derived values, and nothing else crosses an actor
boundary. Arrays are contiguous numpy arrays whose dtype is asserted once, in `ingest/normalize.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.timebase import CHUNK_SAMPLES
from pipeline.vision.crop_layout import CropLayout


class TaskKind(StrEnum):
    """What the decoder is asked to do with a context."""

    TRANSCRIBE = "transcribe"
    TRANSLATE = "translate"
    SUMMARISE = "summarise"  # a text, or sound
    DESCRIBE = "describe"  # one picture, or several
    ANSWER = "answer"  # a question, spoken or typed, about sound and pictures


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to decode from a context. `target_language` (ISO 639-1) is set for translations only."""

    kind: TaskKind
    target_language: str | None = None


TRANSCRIBE = Task(TaskKind.TRANSCRIBE)

UNDETERMINED = "und"
"""The language of speech, of which nobody says what it is (BCP 47)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """80 ms of one channel. `gap_samples` of them were not heard and are filled with zeros."""

    channel: int
    index: int
    samples: NDArray[np.int16]  # [1280]
    gap_samples: int = 0

    @property
    def start_sample(self) -> int:
        """Media time of its first sample."""
        return self.index * CHUNK_SAMPLES

    @property
    def end_sample(self) -> int:
        """Media time behind its last sample."""
        return (self.index + 1) * CHUNK_SAMPLES


@dataclass(frozen=True, slots=True)
class Gap:
    """Sound that was lost between two samples of the media clock (all channels)."""

    start_sample: int
    end_sample: int
    reason: str


class CloseReason(StrEnum):
    """Why an utterance ended."""

    PAUSE = "pause"  # the hangover passed without speech
    LONG = "long"  # over the soft limit, closed at a short pause
    LIMIT = "limit"  # at the hard limit, cut in the longest pause of its end, or where it is quietest
    END = "end"  # the stream ended or was flushed


@dataclass(frozen=True, slots=True)
class UtteranceOpened:
    """Speech began. `start_sample` includes the pre-roll; `onset_sample` is where the detector heard speech."""

    channel: int
    start_sample: int
    onset_sample: int


@dataclass(frozen=True, slots=True)
class UtteranceClosed:
    """The utterance that is open on `channel` ended at `end_sample` (exclusive).

    `last_speech_sample` is the end of the last window that the detector called speech.
    """

    channel: int
    end_sample: int
    last_speech_sample: int
    reason: CloseReason


@dataclass(frozen=True, slots=True)
class SnapshotKey:
    """Identity of a snapshot: which stream, utterance and revision."""

    stream_id: str
    utterance: int
    revision: int


@dataclass(frozen=True, slots=True)
class JobKey:
    """Identity of a job: which stream (or request of its own), what kind of work, and which one of these, from 1."""

    stream_id: str
    kind: TaskKind
    number: int

    @property
    def utterance(self) -> int:
        """0: a job is about no utterance."""
        return 0

    @property
    def revision(self) -> int:
        """Its number: a newer job of its kind has a higher one."""
        return self.number


RequestKey = SnapshotKey | JobKey
"""Identity of whatever the stages are asked."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An utterance at one moment, self-contained: any replica can serve it.

    `samples` is int16[n] from `start_sample` on: of a final the whole utterance (or a stretch of it that is looked at
    again), of a partial a window of what was heard so far. `language` None means: detect it, among `languages` if that
    is not empty. `prefix` holds text tokens that are known to stand at the beginning of these samples: the hypothesis
    goes on from them. `draft` holds the tokens of the last transcription behind the prefix, to be verified; it changes
    speed, never text. `wants_words`: word times are wanted of a partial too.
    """

    key: RequestKey
    channel: int
    is_final: bool
    start_sample: int
    samples: NDArray[np.int16]
    language: str | None
    languages: tuple[str, ...]
    draft: tuple[int, ...]
    tasks: tuple[Task, ...]
    prefix: tuple[int, ...] = ()
    wants_words: bool = False

    @property
    def end_sample(self) -> int:
        """Media time behind its last sample."""
        return self.start_sample + len(self.samples)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What the audio encoder made of one snapshot: float32[num_positions, width].

    A position is 20 ms for Whisper, 80 ms for Phi-4-multimodal (there what its conformer gives, not yet projected).
    """

    key: RequestKey
    values: NDArray[np.float32]
    num_audio_samples: int  # without the silence behind them


@dataclass(frozen=True, slots=True)
class Frame:
    """A video frame (or a still picture): RGB, uint8[height, width, 3], seen at `start_sample` of the media clock."""

    start_sample: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do besides captions, self-contained: describe, summarise or answer.

    Of `frames`, `samples` (int16[n], 16 kHz) and `text` it has what its task is about: a description has frames, a
    summary a text or samples, an answer the typed question in `text` or the spoken one in `samples`.
    """

    key: JobKey
    task: Task
    text: str = ""
    frames: tuple[Frame, ...] = ()
    samples: NDArray[np.int16] | None = None

    @property
    def snapshot(self) -> Snapshot | None:
        """Its sound as the audio encoder takes it; None without sound."""
        if self.samples is None:
            return None
        return Snapshot(self.key, 0, True, 0, self.samples, None, (), (), (self.task,))


@dataclass(frozen=True, slots=True)
class FrameSet:
    """The frames of one job, for the vision encoder."""

    key: JobKey
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as the vision encoder gives it, the crop of the whole first.

    `values` is float32[layout.num_crops, side, side, width], a token each, not yet projected nor separated by rows.
    """

    layout: CropLayout
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the vision encoder made of a job's frames, in their order."""

    key: JobKey
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What the decoder needs of a snapshot or a job besides its embeddings (no samples, no frames).

    `text` is what is to be summarised, or a typed question. `deadline_in_ms` counts from the moment the decoder gets
    it, as clocks of processes differ. A partial whose deadline has passed fails as EXPIRED; finals are only ordered by
    theirs.
    """

    key: RequestKey
    is_final: bool
    language: str | None
    languages: tuple[str, ...]
    draft: tuple[int, ...]
    tasks: tuple[Task, ...]
    deadline_in_ms: float | None = None
    prefix: tuple[int, ...] = ()
    wants_words: bool = False
    text: str = ""

    @classmethod
    def of(cls, snapshot: Snapshot, deadline_in_ms: float | None = None) -> Self:
        """Return what the decoder needs to know of `snapshot`."""
        return cls(
            key=snapshot.key,
            is_final=snapshot.is_final,
            language=snapshot.language,
            languages=snapshot.languages,
            draft=snapshot.draft,
            prefix=snapshot.prefix,
            wants_words=snapshot.wants_words,
            tasks=snapshot.tasks,
            deadline_in_ms=deadline_in_ms,
        )

    @classmethod
    def of_job(cls, job: Job) -> Self:
        """Return what the decoder needs to know of `job`."""
        return cls(job.key, True, None, (), (), (job.task,), text=job.text)


@dataclass(frozen=True, slots=True)
class Word:
    """One word, made of `num_tokens` text tokens; times are samples relative to the snapshot's first sample."""

    text: str
    start_sample: int
    end_sample: int
    probability: float
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What the decoder answers for one snapshot (or job) and one task.

    `tokens` are text tokens only, the prefix included (they are the next draft). `words` is filled for transcriptions:
    of finals, and of partials of which words are wanted or that have so few tokens that they may pass over speech.
    `guard` names the guard that fired: the text is then already cut (or empty), and the tokens must not become a draft.
    """

    key: RequestKey
    task: Task
    text: str
    tokens: tuple[int, ...]
    words: tuple[Word, ...]
    language: str
    average_logprob: float
    no_speech_probability: float
    num_passes: int
    guard: str | None = None


class FailureKind(StrEnum):
    """Why there is no hypothesis."""

    SUPERSEDED = "superseded"  # a newer snapshot of the same utterance overtook this partial
    EXPIRED = "expired"  # the deadline of this partial passed: its answer would be stale
    FAILED = "failed"  # this snapshot cannot be served; trying again will not help
    UNAVAILABLE = "unavailable"  # the stage died under it; it may be submitted again


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of a snapshot (or of one of its tasks) that has no hypothesis. `task` None means all of them."""

    key: RequestKey
    task: Task | None
    kind: FailureKind
    message: str


Outcome = Hypothesis | Failure


def tasks_of(translate_to: Sequence[str], *, is_final: bool) -> tuple[Task, ...]:
    """Return the tasks of a snapshot: a transcription, and for finals one translation per language asked for."""
    if not is_final:
        return (TRANSCRIBE,)
    return (TRANSCRIBE, *(Task(TaskKind.TRANSLATE, language) for language in translate_to))
