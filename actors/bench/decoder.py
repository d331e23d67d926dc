"""`surtitle bench decoder`: the shared decoder against itself without drafts and batches, and against transformers.

The same requests with the same encoder states, in float32, go every way, and their tokens must be equal; once more they
go as partials, in the arithmetic that a service on this machine would choose. What the figures mean:
docs/performance.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch

from actors.bench.decode_report import DecoderReport, Difference, WayResult
from actors.bench.decode_requests import choose_cuts, find_spoken_utterances, load_recordings
from actors.bench.engine_runs import EngineRuns, Item, Run, request_key
from actors.bench.generate import GenerateWhisper
from actors.settings import Settings
from actors.threads import choose_num_threads
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.guards import token_cap
from pipeline.decode.prompting import Question
from pipeline.decode.runner import Context
from pipeline.items import TRANSCRIBE
from pipeline.models.whisper.runner import load_parts
from pipeline.stream_params import AUTO

ENGINE = "engine"
WITHOUT_DRAFTS = "without_drafts"
ONE_BY_ONE = "one_by_one"
ONE_BY_ONE_WITH_DRAFTS = "one_by_one_with_drafts"
GENERATE = "generate"
REDUCED = "reduced_precision"
SERIES = "series_with_drafts"

_NUM_STEPS = 5  # told besides the repeats

Progress = Callable[[str, int, int], None]
"""Told before each step: what is run, its number from 0, and how many there are."""


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """What to decode: `media` is a sound file, a folder with a manifest, or None for the project's demo."""

    media: Path | None = None
    num_requests: int = 16
    num_repeats: int = 3
    seed: int = 1
    settings: Settings = field(default_factory=Settings)


def run_decoder(options: DecoderOptions, on_progress: Progress | None = None) -> DecoderReport:
    """Decode the requests every way: once to warm up, then `num_repeats` times in turns; then the live series.

    Sets torch's thread count.

    Raises:
        MediaError: if the media cannot be used or give too few requests.
        ModelError: if the model cannot be used, or transformers is missing or does something else than asked.
        StageError: if a request fails in the encoder or the decoder.
    """
    return _Bench(options, on_progress or (lambda _what, _num_done, _num_all: None)).run()


class _Bench:
    """The cuts, the loaded models, and every way over them."""

    def __init__(self, options: DecoderOptions, on_progress: Progress) -> None:
        self._options = options
        self._on_progress = on_progress
        self._num_told = 0
        self._differences: list[Difference] = []
        settings = options.settings
        self._tell("finding utterances")
        clips = load_recordings(options.media)
        utterances = [found for clip in clips for found in find_spoken_utterances(clip, settings.vad)]
        self._cuts = choose_cuts(utterances, options.num_requests, options.seed)
        self._tell("loading models")
        self._encoder = UtterancesToEmbeddings(settings.model, settings.encoder)
        scheduler = settings.decoder.scheduler
        num_slots = max(scheduler.num_slots, options.num_requests)
        scheduler = scheduler.model_copy(update={"num_slots": num_slots})
        self._params = settings.decoder.model_copy(update={"scheduler": scheduler})
        # The arithmetic of partials is chosen with the threads of a service's decoder; then both sides have all cores.
        torch.set_num_threads(choose_num_threads(settings.model.decoder_threads, "decoder"))
        parts = load_parts(settings.model, num_slots, time.perf_counter)
        self._num_threads = settings.model.decoder_threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self._num_threads)
        self._prompter = parts.prompter
        self._engine = DecodeEngine(settings.model, self._params, parts=parts)
        asked = settings.captions.language
        self._runs = EngineRuns(self._encoder, self._engine, None if asked == AUTO else asked)
        self._yardstick = GenerateWhisper(settings.model, parts.prompter.num_text_tokens)

    def run(self) -> DecoderReport:
        self._tell("encoding")
        items = self._prepare()
        ways, num_guarded = self._measure(items)
        utterances = list({id(cut.utterance): cut.utterance for cut in self._cuts}.values())
        self._tell("live series")
        series = self._runs.run_series(
            utterances, lambda asked, plain, drafted: self._compare(asked, SERIES, plain, drafted)
        )
        return DecoderReport(
            model=self._options.settings.model.name,
            device=self._encoder.device,
            dtype=self._engine.final_dtype,
            partial_dtype=self._engine.partial_dtype,
            num_threads=self._num_threads,
            num_requests=len(items),
            num_utterances=len(utterances),
            num_drafts=sum(bool(item.draft) for item in items),
            num_guarded=num_guarded,
            num_positions=sum(len(item.embeddings.values) for item in items),
            ways=tuple(way for way in ways if way.name != REDUCED),
            reduced=next((way for way in ways if way.name == REDUCED), None),
            series=series,
            differences=tuple(self._differences),
        )

    # -- requests ---------------------------------------------------------------------------------

    def _prepare(self) -> list[Item]:
        """Encode all cuts, and decode what was heard 640 ms before them for their drafts."""
        before = [(index, cut.previous) for index, cut in enumerate(self._cuts)]
        earlier = [self._runs.item(index, cut, ()) for index, cut in before if cut is not None]
        drafts = {
            hypothesis.key: hypothesis.tokens
            for hypothesis in self._runs.decode(earlier)[0]
            if hypothesis.guard is None  # the tokens of others must not become a draft
        }
        return [self._runs.item(index, cut, drafts.get(request_key(index), ())) for index, cut in enumerate(self._cuts)]

    # -- ways -------------------------------------------------------------------------------------

    def _measure(self, items: Sequence[Item]) -> tuple[list[WayResult], int]:
        """Return the results of all ways, and how many texts a guard has cut."""
        expected = self._runs.run(items, has_drafts=False, is_batched=False)
        ways: dict[str, Callable[[], Run]] = {
            ENGINE: lambda: self._runs.run(items, has_drafts=True, is_batched=True),
            WITHOUT_DRAFTS: lambda: self._runs.run(items, has_drafts=False, is_batched=True),
            ONE_BY_ONE: lambda: self._runs.run(items, has_drafts=False, is_batched=False),
            ONE_BY_ONE_WITH_DRAFTS: lambda: self._runs.run(items, has_drafts=True, is_batched=False),
            GENERATE: lambda: self._run_generate(items, expected),
        }
        if self._engine.partial_dtype != self._engine.final_dtype:
            ways[REDUCED] = lambda: self._runs.run(items, has_drafts=True, is_batched=True, is_final=False)
        self._tell("warming up")
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        self._compare(items, GENERATE, expected, self._run_generate(items, expected, is_checked=True))
        for name, run in ways.items():
            if name != GENERATE:
                self._take(items, name, expected, run())
        for repeat in range(self._options.num_repeats):
            self._tell(f"repeat {repeat + 1}")
            for name, run in ways.items():
                runs[name].append(self._take(items, name, expected, run()))
        return [_result(name, taken, expected) for name, taken in runs.items()], expected.num_guarded

    def _take(self, items: Sequence[Item], way: str, expected: Run, run: Run) -> Run:
        if way != REDUCED:  # what differs there is a figure, not a fault
            self._compare(items, way, expected, run)
        return run

    def _run_generate(self, items: Sequence[Item], expected: Run, *, is_checked: bool = False) -> Run:
        generate = self._yardstick.generate_checked if is_checked else self._yardstick.generate
        asked = []
        for item, tokens, guard in zip(items, expected.tokens, expected.guards, strict=True):
            prompt = self._prompter.prompt(Question(TRANSCRIBE, item.language, (), None, "", Context())).tokens
            cap = token_cap(item.embeddings.num_audio_samples, self._params.guards)
            room = self._yardstick.max_tokens - len(prompt)
            # What a guard has cut off is nobody's work here: generate is stopped there.
            asked.append((item.embeddings.values, prompt, min(room, cap + 1 if guard is None else max(1, len(tokens)))))
        started = time.perf_counter()
        found = [generate(*arguments) for arguments in asked]
        seconds = time.perf_counter() - started
        num_passes = sum(min(len(tokens) + 1, most) for tokens, (_, _, most) in zip(found, asked, strict=True))
        pairs = zip(found, expected.tokens, expected.guards, strict=True)
        kept = [tokens if guard is None else tokens[: len(ours)] for tokens, ours, guard in pairs]
        return Run(kept, expected.guards, num_passes, num_passes, seconds)

    def _compare(self, items: Sequence[Item], way: str, expected: Run, run: Run) -> None:
        """Note the items whose text is not that of the engine without drafts and batches."""
        for index, item in enumerate(items):
            if (run.tokens[index], run.guards[index]) != (expected.tokens[index], expected.guards[index]):
                difference = Difference(item.name, way, _num_equal(run.tokens[index], expected.tokens[index]))
                if difference not in self._differences:
                    self._differences.append(difference)

    def _tell(self, what: str) -> None:
        self._on_progress(what, self._num_told, _NUM_STEPS + self._options.num_repeats)
        self._num_told += 1


def _result(name: str, runs: Sequence[Run], expected: Run) -> WayResult:
    run = runs[-1]
    return WayResult(
        name=name,
        seconds=tuple(run.seconds for run in runs),
        num_tokens=run.num_tokens,
        num_passes=run.num_passes,
        num_steps=run.num_steps,
        num_different=sum(mine != theirs for mine, theirs in zip(run.tokens, expected.tokens, strict=True)),
    )


def _num_equal(tokens: Sequence[int], expected: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, expected, strict=False)))
