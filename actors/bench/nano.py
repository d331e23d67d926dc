"""`surtitle bench phi4 --nano`: what a checkpoint is worth that was taught the closed world of `pipeline.teach`.

Sentences and pictures are held out, drawn by seed; speech is made now, by flite and espeak-ng. Scores, live text
against offline text, drafts in live series, and, where it is asked for, how many live streams this machine holds.
What the figures mean: docs/performance.md.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from actors.bench.decode_requests import SpokenUtterance, find_spoken_utterances
from actors.bench.engine_runs import EngineRuns, Item, Run
from actors.bench.media import Clip
from actors.bench.nano_report import LONGEST_SAYINGS, DraftDifference, LiveDifference, NanoReport, SpokenSeries
from actors.bench.nano_streams import StreamOptions, sweep_streams
from actors.bench.sweep import SweepReport
from actors.settings import Settings
from actors.speech_tools import check_speech_tools, run_speech_tool
from actors.threads import choose_num_threads
from pipeline.audio.encoders import load_encoder
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.loading import load_parts
from pipeline.errors import MediaError
from pipeline.items import TRANSCRIBE, Snapshot, SnapshotKey
from pipeline.local import LocalModels, caption_samples, serve_snapshots
from pipeline.models.tier import phi4_directory
from pipeline.records import FinalRecord
from pipeline.teach.evaluate import Examiner, Scores
from pipeline.teach.speech import Samples, speak, training_voices
from pipeline.teach.world import draw_saying
from pipeline.timebase import SAMPLE_RATE_HZ, ms_to_samples

LANGUAGE = "en"

_SILENCE_MS = 700
"""Behind an utterance: longer than the detector waits before it ends one."""
_BREATH_MS = 300
"""Between sentences of one utterance: shorter than that."""
_NUM_STEPS = 6

Progress = Callable[[str, int, int], None]
"""Told before each step: what is run, its number from 0, and how many there are."""


@dataclass(frozen=True, slots=True)
class NanoOptions:
    """What is measured: `num_items` of each kind, drawn by `seed`; `streams` None: no sweep.

    The model is that of `settings`; it computes on the CPU, in float32, with `num_threads` (0: as a service's decoder).
    """

    settings: Settings
    num_items: int = 100
    seed: int = 1
    num_threads: int = 0
    streams: StreamOptions | None = None


def run_nano(options: NanoOptions, on_progress: Progress | None = None) -> NanoReport:
    """Measure the checkpoint. Sets torch's thread count.

    Raises:
        MediaError: if flite or espeak-ng is missing or fails.
        WeightsHashError: if a weight file is not the pinned one.
        ModelError: if the checkpoint cannot be used.
        StageError: if a request fails in the encoder or the decoder.
        ServiceError, StoreError: of a sweep, if the service does not start, or breaks.
    """
    check_speech_tools()
    return _Bench(options, on_progress or (lambda _what, _num_done, _num_all: None)).run()


class _Bench:
    """The loaded models, and one measurement after the other."""

    def __init__(self, options: NanoOptions, on_progress: Progress) -> None:
        self._options = options
        self._on_progress = on_progress
        self._num_told = 0
        self._tell("loading models")
        # Products of so small a model are over before a second thread has woken up.
        self._num_threads = choose_num_threads(options.num_threads, "decoder")
        torch.set_num_threads(self._num_threads)
        model = options.settings.model
        self._examiner = Examiner(phi4_directory(model), run_speech_tool, options.seed)
        exact = model.model_copy(update={"device": "cpu", "partial_dtype": "float32", "final_dtype": "float32"})
        scheduler = options.settings.decoder.scheduler
        most = max(scheduler.max_waiting, LONGEST_SAYINGS * options.num_items)
        params = options.settings.decoder.model_copy(
            update={"scheduler": scheduler.model_copy(update={"max_waiting": most})}
        )
        ears = load_encoder(exact, options.settings.encoder, None)
        self._models = LocalModels(ears, DecodeEngine(exact, params, parts=load_parts(exact, params)), "phi4")
        self._runs = EngineRuns(ears, self._models.engine, LANGUAGE)

    def run(self) -> NanoReport:
        started = time.perf_counter()
        scores = self._score()
        self._tell("live and offline")
        live_differences = self._compare_live()
        self._tell("drafts")
        differences: list[DraftDifference] = []
        series = {
            num_sayings: self._run_series(num_sayings, differences) for num_sayings in range(1, LONGEST_SAYINGS + 1)
        }
        options = self._options
        return NanoReport(
            model=options.settings.model.name,
            num_threads=self._num_threads,
            seed=options.seed,
            scores=scores,
            live_differences=live_differences,
            series=series,
            draft_differences=tuple(differences),
            seconds=time.perf_counter() - started,
            sweep=self._sweep(),
        )

    def _score(self) -> Scores:
        num_items = self._options.num_items
        found: dict[str, float] = {}
        for what, ask in (
            ("listening", self._examiner.hear),
            ("looking", self._examiner.see),
            ("answering", self._examiner.see_and_hear),
        ):
            self._tell(what)
            found |= ask(num_items)
        return Scores(num_items, **found)

    def _compare_live(self) -> tuple[LiveDifference, ...]:
        """Return the utterances whose finals, heard live, are not what the whole of the sound gives at once."""
        params = self._options.settings.stream_params()
        captions = params.captions.model_copy(update={"language": LANGUAGE, "translate_to": ()})
        params = params.model_copy(update={"captions": captions, "summary": None, "scenes": None})
        differences = []
        for index in range(self._options.num_items):
            text, samples = self._draw_speech("live", index, 1)
            samples = np.concatenate([samples, np.zeros(ms_to_samples(_SILENCE_MS), np.int16)])
            records = caption_samples(samples[np.newaxis], params, self._models, f"live-{index}")
            live = " ".join(record.text for record in records if isinstance(record, FinalRecord) and record.text)
            offline = self._transcribe(samples, index)
            if live != offline:
                differences.append(LiveDifference(text, live, offline))
        return tuple(differences)

    def _transcribe(self, samples: Samples, index: int) -> str:
        """Return what the whole of `samples` gives in one go."""
        key = SnapshotKey(f"offline-{index}", 1, 1)
        snapshot = Snapshot(key, 0, True, 0, samples, LANGUAGE, (), (), (TRANSCRIBE,))
        # A failure is no text, live and here.
        return " ".join(getattr(outcome, "text", "") for outcome in serve_snapshots([snapshot], self._models))

    def _run_series(self, num_sayings: int, differences: list[DraftDifference]) -> SpokenSeries:
        """Decode utterances of so many sentences live, with drafts and without; add to `differences`."""
        utterances: list[SpokenUtterance] = []
        for index in range(-(-self._options.num_items // LONGEST_SAYINGS)):
            text, samples = self._draw_speech("drafts", index, num_sayings)
            clip = Clip(f"recording {index + 1} of {num_sayings} sentences", LANGUAGE, text, in_one_breath(samples))
            utterances += find_spoken_utterances(clip, self._options.settings.vad)
        if not utterances:
            raise MediaError("the voice detector hears nobody in what flite and espeak-ng say: look at vad")
        counts = self._runs.run_series(utterances, lambda *round_: differences.extend(_differences(*round_)))
        return SpokenSeries(len(utterances), sum(len(found.samples) for found in utterances) / SAMPLE_RATE_HZ, counts)

    def _draw_speech(self, what: str, index: int, num_sayings: int) -> tuple[str, Samples]:
        """Return held-out sentences and how a voice that the model knows says them."""
        rng = random.Random(f"{self._options.seed}/{what}/{index}")  # noqa: S311 - repeatable on purpose
        text = " ".join(draw_saying(rng, held_out=True).text for _ in range(num_sayings))
        voice, generator = rng.choice(training_voices()), np.random.default_rng(rng.getrandbits(63))
        return text, speak(text, voice, generator, run_speech_tool)

    def _sweep(self) -> SweepReport | None:
        if self._options.streams is None:
            return None
        self._tell("live streams")
        clips = [
            Clip(f"{index + 1}.wav", LANGUAGE, *self._draw_speech("streams", index, 1))
            for index in range(self._options.streams.num_sentences)
        ]
        with tempfile.TemporaryDirectory(prefix="surtitle-bench-") as folder:
            return sweep_streams(clips, Path(folder), self._options.settings, self._options.streams, self._tell_more)

    def _tell(self, what: str) -> None:
        self._num_told += 1
        self._tell_more(what)

    def _tell_more(self, what: str) -> None:
        self._on_progress(what, self._num_told - 1, _NUM_STEPS + (self._options.streams is not None))


def in_one_breath(samples: Samples) -> Samples:
    """Return int16[n] without what is over 300 ms of each silence (all zeros) between two sounds."""
    most = ms_to_samples(_BREATH_MS)
    is_kept = np.ones(len(samples), np.bool_)
    (sounds,) = np.nonzero(samples)
    for index in np.flatnonzero(np.diff(sounds) > most + 1):
        is_kept[sounds[index] + 1 + most : sounds[index + 1]] = False
    return samples[is_kept]


def _differences(items: Sequence[Item], plain: Run, drafted: Run) -> list[DraftDifference]:
    """Return the texts of a round that are not the same with drafts."""
    found = []
    for index, item in enumerate(items):
        tokens, others = plain.tokens[index], drafted.tokens[index]
        if (tokens, plain.guards[index]) != (others, drafted.guards[index]):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False))
            found.append(DraftDifference(item.name, sum(1 for _ in same)))
    return found
