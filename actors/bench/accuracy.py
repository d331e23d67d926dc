"""`surtitle bench accuracy`: what the live path costs in words, against the same weights over whole recordings.

The live path is driven by samples (snapshots, partials with drafts, finals), every snapshot answered before the next
chunk is heard: its texts depend on neither the machine's load nor on luck. Those of partials depend on the arithmetic
that a service on this machine would choose for them (docs/performance.md).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actors.bench.latency import count_stable_words
from actors.bench.media import Clip, JoinParams, join_clips, load_clips
from actors.bench.offline import OfflineText, OfflineWhisper
from actors.bench.wer import Difference, WordErrors, count_errors, find_differences, pool
from actors.settings import Settings
from actors.threads import choose_num_threads
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.errors import MediaError
from pipeline.items import Hypothesis, Outcome
from pipeline.local import LocalModels, caption_items
from pipeline.models.device import choose_device, choose_partial_arithmetic
from pipeline.records import BaseRecord, ErrorRecord, FinalRecord, PartialRecord
from pipeline.stream_params import AUTO, StreamParams

if TYPE_CHECKING:
    from rich.console import RenderableType

POOLED_LANGUAGE = "en"
Progress = Callable[[str, int, int], None]
"""Told before each step: what is run, its number from 0, and how many there are."""


@dataclass(frozen=True, slots=True)
class AccuracyOptions:
    """What to measure. `language`: auto detects it, live and offline; given takes the manifest's for both."""

    media: Path
    settings: Settings = field(default_factory=Settings)
    language: Literal["auto", "given"] = "auto"
    join: JoinParams = field(default_factory=JoinParams)
    num_joined: int = 2


@dataclass(slots=True)
class LiveCounts:
    """What happened on the live path besides words."""

    num_partials: int = 0
    num_finals: int = 0
    num_errors: int = 0
    num_hypotheses: int = 0
    num_guarded: Counter[str] = field(default_factory=Counter)
    num_passes: int = 0
    num_tokens: int = 0
    num_stable_words: int = 0
    num_stable_words_lost: int = 0
    close_reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: LiveCounts) -> None:
        """Put another stream's counts to these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Return the counts and the shares that are made of them."""
        num_guarded = sum(self.num_guarded.values())
        return {
            "num_partials": self.num_partials,
            "num_finals": self.num_finals,
            "num_errors": self.num_errors,
            "num_hypotheses": self.num_hypotheses,
            "num_guarded": dict(self.num_guarded),
            "guarded_share": _share(num_guarded, self.num_hypotheses),
            "num_passes": self.num_passes,
            "num_tokens": self.num_tokens,
            "passes_per_token": _share(self.num_passes, self.num_tokens),
            "num_stable_words": self.num_stable_words,
            "num_stable_words_lost": self.num_stable_words_lost,
            "close_reasons": dict(self.close_reasons),
        }


@dataclass(frozen=True, slots=True)
class FileResult:
    """One recording, or one joined stream."""

    file: str
    language: str
    seconds: float
    live: WordErrors
    offline: WordErrors
    live_differences: tuple[Difference, ...]
    offline_differences: tuple[Difference, ...]
    live_languages: tuple[str, ...]
    offline_language: str
    counts: LiveCounts

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values; differences as [reference, heard]."""
        return {
            "file": self.file,
            "language": self.language,
            "seconds": round(self.seconds, 2),
            "num_words": self.live.num_reference_words,
            "live_wer": round(self.live.rate, 5),
            "offline_wer": round(self.offline.rate, 5),
            "live_errors": self.live.num_errors,
            "offline_errors": self.offline.num_errors,
            "live_differences": [[item.reference, item.hypothesis] for item in self.live_differences],
            "offline_differences": [[item.reference, item.hypothesis] for item in self.offline_differences],
            "live_languages": list(self.live_languages),
            "offline_language": self.offline_language,
            "close_reasons": dict(self.counts.close_reasons),
            "guards": dict(self.counts.num_guarded),
        }


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """All rows. Figures in all are over the English single recordings; the other rows stand apart."""

    model: str
    arithmetic: str
    language: str
    files: tuple[FileResult, ...]
    joined: tuple[FileResult, ...]

    @property
    def pooled(self) -> tuple[WordErrors, WordErrors]:
        """Live and offline errors over the English single recordings."""
        return _pool([row for row in self.files if row.language == POOLED_LANGUAGE])

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        live, offline = self.pooled
        joined_live, joined_offline = _pool(self.joined)
        counts = LiveCounts()
        for row in (*self.files, *self.joined):
            counts.add(row.counts)
        return {
            "model": self.model,
            "arithmetic": self.arithmetic,
            "language": self.language,
            "live_wer": round(live.rate, 5),
            "offline_wer": round(offline.rate, 5),
            "num_words": live.num_reference_words,
            "joined_live_wer": round(joined_live.rate, 5) if self.joined else None,
            "joined_offline_wer": round(joined_offline.rate, 5) if self.joined else None,
            "files": [row.to_json() for row in self.files],
            "joined": [row.to_json() for row in self.joined],
            "live": counts.to_json(),
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        from actors.bench.tables import accuracy_table  # noqa: PLC0415 - tables know the reports, not the other way

        return accuracy_table(self)


def run_accuracy(options: AccuracyOptions, on_progress: Progress | None = None) -> AccuracyReport:
    """Run live path and yardstick over all recordings of the manifest, and over streams joined of them.

    Takes about as long as the sound itself on one core. Sets torch's thread count.

    Raises:
        MediaError: if the manifest or a recording cannot be used, or nothing in it is English.
        ModelError: if the models cannot be used.
    """
    settings = options.settings
    clips = load_clips(options.media)
    english = [clip for clip in clips if clip.language == POOLED_LANGUAGE]
    if not english:
        raise MediaError(f"{options.media} lists no English recording: figures in all are over English")
    joined = [
        join_clips(
            english,
            options.join.model_copy(update={"seed": options.join.seed + index}),
            f"joined-{index + 1} ({'long speech' if index % 2 else 'pauses'})",
            has_long_speech=index % 2 == 1,
        )
        for index in range(options.num_joined)
    ]
    # Both stages share this process's count; passes of the decoder are many and short and lose most by too many.
    torch.set_num_threads(choose_num_threads(settings.model.decoder_threads, "decoder"))
    measure = _Measurement(options, len(clips) + len(joined), on_progress)
    return AccuracyReport(
        model=settings.model.name,
        arithmetic=measure.arithmetic,
        language=options.language,
        files=tuple(measure.run(clip) for clip in clips),
        joined=tuple(measure.run(clip) for clip in joined),
    )


class _Measurement:
    """The loaded models, and one recording after the other through both paths."""

    def __init__(self, options: AccuracyOptions, num_clips: int, on_progress: Progress | None) -> None:
        self._options = options
        self._num_clips = num_clips
        self._num_done = 0
        self._on_progress = on_progress
        self._tell("loading models")
        settings = options.settings
        self._models = load_models(settings)
        engine = self._models.engine
        self.arithmetic = f"partials in {engine.partial_dtype}, finals in {engine.final_dtype}"
        self._offline = OfflineWhisper(settings.model)

    def run(self, clip: Clip) -> FileResult:
        self._tell(clip.name)
        given = clip.language if self._options.language == "given" else None
        params = self._options.settings.stream_params()
        captions = params.captions.model_copy(update={"language": given or AUTO, "translate_to": ()})
        records, counts = caption_live(clip.samples, params.model_copy(update={"captions": captions}), self._models)
        offline = self._offline.transcribe(clip.samples, given)
        self._num_done += 1
        return _compare(clip, records, counts, offline)

    def _tell(self, what: str) -> None:
        if self._on_progress is not None:
            self._on_progress(what, self._num_done, self._num_clips)


def load_models(settings: Settings) -> LocalModels:
    """Return encoder and decoder with the arithmetic of partials that a service would choose on this machine."""
    # Chosen once: two probes on a busy machine might not agree, and the figures are of one arithmetic.
    chosen = choose_partial_arithmetic(settings.model, choose_device(settings.model), time.perf_counter)
    model = settings.model.model_copy(update={"partial_dtype": chosen})
    return LocalModels(UtterancesToEmbeddings(model, settings.encoder), DecodeEngine(model, settings.decoder))


def caption_live(
    samples: NDArray[np.int16], params: StreamParams, models: LocalModels
) -> tuple[list[BaseRecord], LiveCounts]:
    """Return the records of int16[n] heard live, driven by samples as in `pipeline.local`, and what happened."""
    outcomes: list[Outcome] = []
    records = caption_items([samples[np.newaxis]], params, models, "bench", on_outcome=outcomes.append)
    return records, _count(records, outcomes)


def _count(records: Sequence[BaseRecord], outcomes: Sequence[Outcome]) -> LiveCounts:
    counts = LiveCounts()
    partials: dict[int, list[PartialRecord]] = {}
    for outcome in outcomes:
        if isinstance(outcome, Hypothesis):
            counts.num_hypotheses += 1
            counts.num_passes += outcome.num_passes
            # What it takes without drafts: a pass for every token, the first of them that of the prompt, and the end.
            counts.num_tokens += len(outcome.tokens) + 1
            if outcome.guard is not None:
                counts.num_guarded[outcome.guard] += 1
    for record in records:
        if isinstance(record, PartialRecord):
            counts.num_partials += 1
            partials.setdefault(record.utterance, []).append(record)
        elif isinstance(record, FinalRecord):
            counts.num_finals += 1
            counts.close_reasons[record.close_reason] += 1
            num_stable, num_lost = count_stable_words(partials.pop(record.utterance, []), record)
            counts.num_stable_words += num_stable
            counts.num_stable_words_lost += num_lost
        elif isinstance(record, ErrorRecord):
            counts.num_errors += 1
    return counts


def _compare(clip: Clip, records: Sequence[BaseRecord], counts: LiveCounts, offline: OfflineText) -> FileResult:
    finals = [record for record in records if isinstance(record, FinalRecord) and record.text]
    live_text = " ".join(final.text for final in finals)
    return FileResult(
        file=clip.name,
        language=clip.language,
        seconds=clip.seconds,
        live=count_errors(clip.text, live_text, clip.language),
        offline=count_errors(clip.text, offline.text, clip.language),
        live_differences=tuple(find_differences(clip.text, live_text, clip.language)),
        offline_differences=tuple(find_differences(clip.text, offline.text, clip.language)),
        live_languages=tuple(dict.fromkeys(final.language for final in finals)),
        offline_language=offline.language,
        counts=counts,
    )


def _pool(rows: Sequence[FileResult]) -> tuple[WordErrors, WordErrors]:
    return pool(row.live for row in rows), pool(row.offline for row in rows)


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
