"""Models that several test files use, loaded once per session, and short ways to ask them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams, DecoderParts
from pipeline.decode.guards import GuardParams
from pipeline.decode.runner import Context
from pipeline.decode.scheduler import SchedulerParams
from pipeline.items import TRANSCRIBE, DecodeRequest, Embeddings, Hypothesis, Outcome, Snapshot, SnapshotKey, Task
from pipeline.models.device import has_int8_units
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.runner import load_parts

needs_int8 = pytest.mark.skipif(
    not has_int8_units(torch.device("cpu")),
    reason="this processor has no instructions for 8-bit integers (VNNI, AMX, i8mm), so int8 is refused",
)

NO_GUARDS = GuardParams(
    min_loop_repeats=64,
    min_loop_tokens=448,
    max_chars_per_s=10_000.0,
    compression_ratio_threshold=100.0,
    no_speech_threshold=1.0,
    certain_no_speech_threshold=1.0,
    faint_no_speech_threshold=1.0,
    loop_no_speech_threshold=1.0,
)


@functools.cache
def base_encoder() -> UtterancesToEmbeddings:
    """The encoder of whisper-base."""
    return UtterancesToEmbeddings(ModelParams(), EncoderParams())


@functools.cache
def base_parts() -> DecoderParts:
    """The decoder of whisper-base with the default slots; engines that share it must run one after the other."""
    return load_parts(ModelParams(), SchedulerParams().num_slots)


def base_engine(params: DecoderParams | None = None) -> DecodeEngine:
    """A new engine over `base_parts`."""
    return DecodeEngine(ModelParams(), params or DecoderParams(), parts=base_parts())


def encode(samples: NDArray[np.int16], key: SnapshotKey, *, is_final: bool = True) -> Embeddings:
    """The embeddings of an utterance by whisper-base."""
    snapshot = Snapshot(key, 0, is_final, 0, samples, None, (), (), (TRANSCRIBE,))
    (embeddings,) = base_encoder().encode([snapshot])
    assert isinstance(embeddings, Embeddings), embeddings
    return embeddings


def request(
    key: SnapshotKey,
    *,
    is_final: bool = True,
    language: str | None = "en",
    languages: tuple[str, ...] = (),
    draft: Iterable[int] = (),
    tasks: tuple[Task, ...] = (TRANSCRIBE,),
) -> DecodeRequest:
    """A request with the defaults that most tests want."""
    return DecodeRequest(key, is_final, language, languages, tuple(draft), tasks)


def run_dry(engine: DecodeEngine, max_steps: int = 2_000) -> list[Outcome]:
    """Step `engine` until it has no work; return its outcomes in their order."""
    outcomes: list[Outcome] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return outcomes
        outcomes += engine.step()
    raise AssertionError(f"the engine has work after {max_steps} steps")


def answer(engine: DecodeEngine, asked: DecodeRequest, embeddings: Embeddings) -> list[Outcome]:
    """What `engine` answers to one request alone."""
    engine.submit(asked, Context(replace(embeddings, key=asked.key)))
    return run_dry(engine)


def content(hypothesis: Outcome) -> Outcome:
    """A hypothesis without how it was come by: all else must not depend on drafts and neighbours."""
    return replace(hypothesis, num_passes=0) if isinstance(hypothesis, Hypothesis) else hypothesis
