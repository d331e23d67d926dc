"""`surtitle bench phi4 --scaled`: the stages of the phi4 tier against transformers' generate on the whole model.

A random checkpoint of some 120 million parameters with all parts is made for the run. The same sounds go both ways, in
float32, with the same threads, and their tokens must be equal. The stages get all requests at once, as finals: each is
encoded alone, then all are decoded together. The whole model gets one after the other.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from actors.bench.phi4_generate import GeneratePhi4
from actors.bench.phi4_report import Phi4Difference, Phi4Report, StageSeconds
from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.encoders import load_encoder
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams, DecoderParts
from pipeline.decode.guards import GuardParams
from pipeline.decode.prompting import Question
from pipeline.decode.runner import Context, Row, RowResult
from pipeline.decode.scheduler import SchedulerParams
from pipeline.errors import StageError
from pipeline.items import TRANSCRIBE, DecodeRequest, Embeddings, Failure, Hypothesis, Snapshot, SnapshotKey
from pipeline.models.phi4.checkpoint import load_config
from pipeline.models.phi4.runner import Phi4Runner, load_parts
from pipeline.models.phi4.scaled import ScaledSize, make_scaled
from pipeline.models.weights import ModelParams
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ

_LANGUAGE = "en"
_MAX_INSTRUCTION_TOKENS = 64
_SLOT_STEP = 512
_NUM_STEPS = 3  # told besides the repeats
# Random weights repeat themselves, and whatever a guard cut off would be compared with nothing.
_NO_GUARDS = GuardParams(
    min_loop_repeats=64,
    min_loop_tokens=448,
    max_chars_per_s=10_000.0,
    compression_ratio_threshold=100.0,
    no_speech_threshold=1.0,
    certain_no_speech_threshold=1.0,
    faint_no_speech_threshold=1.0,
    loop_no_speech_threshold=1.0,
    max_tokens_per_s=1_000.0,
)

Progress = Callable[[str, int, int], None]
"""Told before each step: what is run, its number from 0, and how many there are."""


@dataclass(frozen=True, slots=True)
class Phi4Options:
    """What is decoded: `num_requests` sounds of `seconds`, up to `max_new_tokens` for each; 0 threads: all cores."""

    num_requests: int = 16
    seconds: float = 5.0
    num_repeats: int = 3
    max_new_tokens: int = 40
    num_threads: int = 0
    seed: int = 1
    size: ScaledSize = field(default_factory=ScaledSize)


class WatchedRunner(Phi4Runner):
    """The runner with a watch: seconds of passes in which a prompt was fed, and of those of single tokens only."""

    def __init__(self, runner: Phi4Runner) -> None:
        self.__dict__.update(runner.__dict__)  # the same runner, not another one
        self.prefill_s = self.decode_s = 0.0
        self.num_passes = 0

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """Run all `rows` as `Phi4Runner` does."""
        started = time.perf_counter()
        results = super().run(rows)
        seconds = time.perf_counter() - started
        self.num_passes += 1
        if any(len(row.tokens) > 1 for row in rows):
            self.prefill_s += seconds
        else:
            self.decode_s += seconds
        return results


@dataclass(frozen=True, slots=True)
class _Run:
    """One way once: a text for each sound."""

    tokens: list[tuple[int, ...]]
    seconds: float
    stages: StageSeconds | None = None


def run_phi4(options: Phi4Options, on_progress: Progress | None = None) -> Phi4Report:
    """Make a checkpoint, decode all sounds both ways once to warm up, then `num_repeats` times in turns.

    Sets torch's thread count.

    Raises:
        ModelError: if transformers is missing or does something else than asked.
        StageError: if a request fails in the encoder or the decoder.
    """
    tell = on_progress or (lambda _what, _num_done, _num_all: None)
    num_all = _NUM_STEPS + options.num_repeats
    tell("making a checkpoint", 0, num_all)
    with tempfile.TemporaryDirectory(prefix="surtitle-bench-") as folder:
        num_parameters = make_scaled(Path(folder), options.size, options.seed)
        tell("loading models", 1, num_all)
        bench = _Bench(options, Path(folder))
    tell("warming up", 2, num_all)
    expected = bench.run_generate(is_checked=True)
    differences = bench.compare(expected, bench.run_engine())
    engine: list[_Run] = []
    generate: list[_Run] = []
    for repeat in range(options.num_repeats):
        tell(f"repeat {repeat + 1}", _NUM_STEPS + repeat, num_all)
        engine.append(bench.run_engine())
        generate.append(bench.run_generate())
        differences += bench.compare(expected, engine[-1]) + bench.compare(expected, generate[-1])
    best = min(engine, key=lambda run: run.seconds)
    return Phi4Report(
        num_parameters=num_parameters,
        num_threads=torch.get_num_threads(),
        num_requests=options.num_requests,
        sound_s=options.seconds,
        max_new_tokens=options.max_new_tokens,
        num_prompt_tokens=len(bench.prompt),
        num_tokens=sum(len(tokens) for tokens in expected.tokens),
        num_different_tokens=len({token for tokens in expected.tokens for token in tokens}),
        engine_s=tuple(run.seconds for run in engine),
        generate_s=tuple(run.seconds for run in generate),
        stages=best.stages or StageSeconds(),
        differences=tuple(dict.fromkeys(differences)),
    )


class _Bench:
    """The sounds, and the loaded models; the checkpoint's folder is not needed any more."""

    def __init__(self, options: Phi4Options, directory: Path) -> None:
        torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
        self._max_new_tokens = options.max_new_tokens
        num_samples = round(options.seconds * SAMPLE_RATE_HZ)
        generator = np.random.default_rng(options.seed)
        self._snapshots = [
            _snapshot(index, make_sound(num_samples, generator)) for index in range(options.num_requests)
        ]
        model = ModelParams(name=str(directory), device="cpu", final_dtype="float32")
        num_places = num_samples // CHUNK_SAMPLES + 1 + _MAX_INSTRUCTION_TOKENS + options.max_new_tokens + 1
        params = DecoderParams(
            guards=_NO_GUARDS.model_copy(
                update={"max_tokens": options.max_new_tokens, "min_token_cap": options.max_new_tokens}
            ),
            scheduler=SchedulerParams(num_slots=options.num_requests, max_waiting=max(256, options.num_requests)),
            slot_tokens=-(-num_places // _SLOT_STEP) * _SLOT_STEP,
        )
        self._encoder = load_encoder(model, EncoderParams(), time.perf_counter)
        parts = load_parts(model, params)
        if not isinstance(parts.runner, Phi4Runner):
            raise StageError(f"the runner is {type(parts.runner).__name__}, expected that of Phi-4-multimodal")
        self._runner = WatchedRunner(parts.runner)
        parts = replace(parts, runner=self._runner)
        self._engine = DecodeEngine(model, params, parts=parts)
        self.prompt = self._find_prompt(parts)
        config = load_config(directory)
        first = parts.prompter.num_text_tokens
        specials = set(range(first, config.decoder.vocab_size)) - set(parts.prompter.ends)
        self._yardstick = GeneratePhi4(directory, sorted(specials))

    def run_engine(self) -> _Run:
        """Give all sounds to the stages at once."""
        runner, engine = self._runner, self._engine
        runner.prefill_s = runner.decode_s = 0.0
        runner.num_passes = 0
        started = time.perf_counter()
        encoded = self._encode(self._snapshots)
        encoder_s = time.perf_counter() - started
        found: dict[object, tuple[int, ...]] = {}
        for snapshot, embeddings in zip(self._snapshots, encoded, strict=True):
            engine.submit(DecodeRequest.of(snapshot), Context(sound=embeddings))
        while engine.has_work:
            for outcome in engine.step():
                if not isinstance(outcome, Hypothesis):
                    raise StageError(f"{outcome.key.stream_id} failed in the decoder: {outcome.message}")
                found[outcome.key] = outcome.tokens
        seconds = time.perf_counter() - started
        other_s = seconds - encoder_s - runner.prefill_s - runner.decode_s
        stages = StageSeconds(encoder_s, runner.prefill_s, runner.decode_s, other_s, runner.num_passes)
        return _Run([found[snapshot.key] for snapshot in self._snapshots], seconds, stages)

    def run_generate(self, *, is_checked: bool = False) -> _Run:
        """Give the sounds to the whole model one by one."""
        generate = self._yardstick.generate_checked if is_checked else self._yardstick.generate
        started = time.perf_counter()
        tokens = [generate(snapshot.samples, self.prompt, self._max_new_tokens) for snapshot in self._snapshots]
        return _Run(tokens, time.perf_counter() - started)

    def compare(self, expected: _Run, run: _Run) -> list[Phi4Difference]:
        """Return where texts are not those expected, and how sure the whole model was there."""
        differences = []
        for index, (tokens, other) in enumerate(zip(expected.tokens, run.tokens, strict=True)):
            if tokens != other:
                pairs = zip(tokens, other, strict=False)
                num_equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                margin = self._yardstick.margin(self._snapshots[index].samples, self.prompt, num_equal)
                differences.append(Phi4Difference(index + 1, num_equal, margin))
        return differences

    def _encode(self, snapshots: Sequence[Snapshot]) -> list[Embeddings]:
        encoded = []
        for snapshot, outcome in zip(snapshots, self._encoder.encode(snapshots), strict=True):
            if isinstance(outcome, Failure):
                raise StageError(f"{snapshot.key.stream_id} cannot be encoded: {outcome.message}")
            encoded.append(outcome)
        return encoded

    def _find_prompt(self, parts: DecoderParts) -> tuple[int, ...]:
        """Return the prompt of every sound: they are equally long."""
        (embeddings,) = self._encode(self._snapshots[:1])
        question = Question(TRANSCRIBE, _LANGUAGE, (), None, "", Context(sound=embeddings), ())
        return parts.prompter.prompt(question).tokens


def make_sound(num_samples: int, generator: np.random.Generator) -> NDArray[np.int16]:
    """Return something that changes as speech does: a gliding voice with overtones and hiss, in syllables."""
    seconds = np.arange(num_samples) / SAMPLE_RATE_HZ
    pitch_hz = generator.uniform(90, 220) * (1 + 0.2 * np.sin(2 * np.pi * generator.uniform(0.3, 1.5) * seconds))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ
    tilt = generator.uniform(0.6, 1.4)
    voice = sum(np.sin(k * phase) / k**tilt for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * generator.uniform(3, 5) * seconds + generator.uniform(0, 6)), 0, None)
    sound = syllables * (voice + 0.3 * generator.standard_normal(num_samples))
    scaled: NDArray[np.int16] = np.round(0.3 * 32_767 * sound / max(1e-9, np.abs(sound).max())).astype(np.int16)
    return scaled


def _snapshot(index: int, samples: NDArray[np.int16]) -> Snapshot:
    # A stream each: one request must never overtake another.
    key = SnapshotKey(f"request {index + 1}", 1, 1)
    return Snapshot(key, 0, True, 0, samples, _LANGUAGE, (), (), (TRANSCRIBE,))
