"""The vision encoder as an actor holds it: real threads around a tiny Phi-4-multimodal of random weights."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.stages import EyesInfo
from actors.vision_encoder import VisionEncoder
from pipeline.errors import ModelError, StageUnavailable
from pipeline.items import Failure, FailureKind, Frame, FrameSet, JobKey, Pictures, TaskKind
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.vision.frames_to_embeddings import FramesToEmbeddings
from pipeline.vision.params import VisionParams

Outcomes = list[Pictures | Failure]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelParams:
    name = str(make_tiny(tmp_path_factory.mktemp("phi4")))
    return ModelParams(name=name, device="cpu", encoder_threads=1)


@pytest.fixture
async def encoder(model: ModelParams) -> AsyncIterator[VisionEncoder]:
    made = await asyncio.to_thread(VisionEncoder, model, VisionParams(max_crops=4))
    yield made
    await made.aclose()


def frame_set(number: int, width_px: int = 90, height_px: int = 112) -> FrameSet:
    pixels = np.random.default_rng(number).integers(0, 256, (height_px, width_px, 3), np.uint8)
    return FrameSet(JobKey("stream", TaskKind.DESCRIBE, number), (Frame(0, pixels),))


def crashing(number: int) -> FrameSet:
    """Return what is no frame at all: the stage raises, where a bad frame only has a failure as its outcome."""
    return FrameSet(JobKey("stream", TaskKind.DESCRIBE, number), (Frame(0, [0]),))  # type: ignore[arg-type]


def are_equal(ours: Sequence[Pictures | Failure], theirs: Sequence[Pictures | Failure]) -> bool:
    return len(ours) == len(theirs) and all(
        isinstance(a, Pictures)
        and isinstance(b, Pictures)
        and a.key == b.key
        and all(np.array_equal(p.values, q.values) for p, q in zip(a.pictures, b.pictures, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


async def test_calls_at_once_get_what_each_gets_alone(model: ModelParams, encoder: VisionEncoder) -> None:
    calls = [[frame_set(number), frame_set(number + 1, 112, 56)] for number in range(1, 13)]
    answers = await asyncio.gather(*(encoder.encode(call) for call in calls))
    torch.set_num_threads(1)
    alone = FramesToEmbeddings(model, VisionParams(max_crops=4, crops_kept=0))
    for call, answer in zip(calls, answers, strict=True):
        assert are_equal(answer, [alone.encode([item])[0] for item in call])
    encoder.check_health()


async def test_it_tells_what_it_is(encoder: VisionEncoder) -> None:
    info = encoder.info()
    assert (info.device, info.dtype, info.num_threads) == ("cpu", "float32", 1)
    assert info.eyes == EyesInfo(crop_size=56, patch_size=14, max_crops=4)
    assert info.crops_per_s > 0


async def test_what_crashes_inside_is_a_failure_of_its_own(encoder: VisionEncoder) -> None:
    good = [frame_set(1), frame_set(3)]
    expected = await encoder.encode(good)
    first, failure, last = await encoder.encode([good[0], crashing(2), good[1]])
    assert isinstance(failure, Failure)
    assert (failure.key, failure.task, failure.kind) == (crashing(2).key, None, FailureKind.FAILED)
    assert failure.message.startswith("the vision encoder failed: ")
    assert are_equal([first, last], expected)


async def test_one_that_fails_again_and_again_says_so_until_it_does_not(encoder: VisionEncoder) -> None:
    refused = FrameSet(frame_set(9).key, ())
    await encoder.encode([crashing(1), crashing(2), frame_set(3), crashing(4)])
    await encoder.encode([crashing(5)])
    encoder.check_health()
    # A set that is refused shows that the encoder works.
    assert isinstance((await encoder.encode([refused]))[0], Failure)
    await encoder.encode([crashing(number) for number in range(1, 3)])
    encoder.check_health()
    await encoder.encode([crashing(3)])
    with pytest.raises(StageUnavailable, match="3 times in a row"):
        encoder.check_health()
    assert isinstance((await encoder.encode([frame_set(1)]))[0], Pictures)
    encoder.check_health()


async def test_one_that_hangs_says_so_and_is_left_behind(model: ModelParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.vision_encoder._MAX_CALL_S", 0.0)
    has_begun, is_over = threading.Event(), threading.Event()
    encode = FramesToEmbeddings.encode

    def hang(stage: FramesToEmbeddings, frame_sets: Sequence[FrameSet]) -> Outcomes:
        has_begun.set()
        is_over.wait()
        return encode(stage, frame_sets)

    monkeypatch.setattr(FramesToEmbeddings, "encode", hang)
    encoder = await asyncio.to_thread(VisionEncoder, model, VisionParams())
    async with asyncio.timeout(60):
        call = asyncio.create_task(encoder.encode([frame_set(1)]))
        try:
            await asyncio.to_thread(has_begun.wait)
            with pytest.raises(StageUnavailable, match="more than 0 s"):
                encoder.check_health()
            await encoder.aclose()
        finally:
            is_over.set()
        assert isinstance((await call)[0], Pictures)


async def test_what_is_being_encoded_when_it_closes_is_answered(
    model: ModelParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()
    encode = FramesToEmbeddings.encode

    def wait(stage: FramesToEmbeddings, frame_sets: Sequence[FrameSet]) -> Outcomes:
        has_begun.set()
        may_go_on.wait()
        return encode(stage, frame_sets)

    monkeypatch.setattr(FramesToEmbeddings, "encode", wait)
    encoder = await asyncio.to_thread(VisionEncoder, model, VisionParams())
    call = asyncio.create_task(encoder.encode([frame_set(1)]))
    async with asyncio.timeout(60):
        await asyncio.to_thread(has_begun.wait)
        closing = asyncio.create_task(encoder.aclose())
        await asyncio.sleep(0)
        may_go_on.set()
        await closing
        assert isinstance((await call)[0], Pictures)
        await encoder.aclose()
        with pytest.raises(StageUnavailable, match="the vision encoder was closed"):
            await encoder.encode([frame_set(1)])


def test_a_model_without_eyes_is_refused_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with pytest.raises(ModelError):
        VisionEncoder(ModelParams(name="whisper-base", device="cpu"), VisionParams())
    left = {thread for thread in threading.enumerate() if thread.name.startswith("vision-encoder")} - before
    for thread in left:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in left)


def test_deploying_it_imports_no_torch() -> None:
    code = "import sys, actors.vision_encoder, actors.audio_encoder; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
