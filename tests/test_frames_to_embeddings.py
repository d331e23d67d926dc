"""The vision encoder stage on a tiny Phi-4-multimodal: against its own encoder, and transformers' image path."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import Phi4MultimodalForCausalLM

from pipeline.errors import ModelError
from pipeline.items import Failure, FailureKind, Frame, FrameSet, JobKey, Pictures, TaskKind
from pipeline.models.phi4 import checkpoint
from pipeline.models.phi4.checkpoint import load_config, load_decoder, load_part
from pipeline.models.phi4.crops import cut_crops, lay_out
from pipeline.models.phi4.dtype import phi4_dtype
from pipeline.models.phi4.keys import PREFIXES
from pipeline.models.phi4.siglip import SiglipEncoder, VisionProjection
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.vision.crop_cache import CropCache
from pipeline.vision.frames_to_embeddings import MAX_FRAMES, FramesToEmbeddings
from pipeline.vision.params import VisionParams

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-5
WITHOUT_CACHE = VisionParams(crops_kept=0)

# Width and height in pixels for crops of 56 and patches of 14: with padding at the right, below, and without.
SIZES = ((56, 56), (112, 168), (90, 112), (168, 90), (50, 30), (30, 30), (2_000, 1_500), (40, 500), (112, 56))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("phi4"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelParams:
    return ModelParams(name=str(folder), device="cpu")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SiglipEncoder:
    return SiglipEncoder(load_config(folder).vision, load_part(folder, "vision"))


@pytest.fixture(params=[1, 4], ids=["crop by crop", "batches of 4"])
def stage(model: ModelParams, request: pytest.FixtureRequest) -> FramesToEmbeddings:
    """Without a cache; in batches as on a GPU in bfloat16 too."""
    made = FramesToEmbeddings(model, WITHOUT_CACHE)
    made._batch_crops = request.param
    return made


def noise(width_px: int, height_px: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng((seed, width_px, height_px)).integers(0, 256, (height_px, width_px, 3), np.uint8)


def frames(*pictures: NDArray[np.uint8], number: int = 1) -> FrameSet:
    key = JobKey("stream", TaskKind.DESCRIBE, number)
    return FrameSet(key, tuple(Frame(index, pixels) for index, pixels in enumerate(pictures)))


def pictures_of(outcome: Pictures | Failure) -> Pictures:
    assert isinstance(outcome, Pictures), outcome
    return outcome


def are_equal(ours: Sequence[Pictures | Failure], theirs: Sequence[Pictures | Failure]) -> bool:
    """Whether they are the same, bit for bit."""
    return len(ours) == len(theirs) and all(
        a.key == b.key
        and [picture.layout for picture in a.pictures] == [picture.layout for picture in b.pictures]
        and all(np.array_equal(p.values, q.values) for p, q in zip(a.pictures, b.pictures, strict=True))
        for a, b in zip(map(pictures_of, ours), map(pictures_of, theirs), strict=True)
    )


def direct(encoder: SiglipEncoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what the encoder gives for the crops of one picture in one batch."""
    crops = cut_crops(torch.from_numpy(pixels), encoder.config, WITHOUT_CACHE.max_crops)
    values: NDArray[np.float32] = encoder(crops.pixels, crops.mask).numpy()
    return values


# What it gives


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_frame_gives_what_the_encoder_gives(
    stage: FramesToEmbeddings, encoder: SiglipEncoder, size: tuple[int, int]
) -> None:
    [outcome] = stage.encode([frames(noise(*size))])
    [picture] = pictures_of(outcome).pictures
    assert picture.values.dtype == np.float32
    assert picture.values.flags.c_contiguous
    assert picture.values.shape == (picture.layout.num_crops, 2, 2, encoder.config.width)
    assert np.abs(picture.values - direct(encoder, noise(*size))).max() < CLOSE


def test_pictures_projected_are_what_transformers_gives_the_decoder(folder: Path, stage: FramesToEmbeddings) -> None:
    sets = [frames(*(noise(*size) for size in SIZES[:4])), frames(*(noise(*size) for size in SIZES[4:]), number=2)]
    config = load_config(folder)
    projection = VisionProjection(config.vision, load_decoder(folder).image_projection)
    tokens = [
        projection(torch.from_numpy(picture.values), picture.layout)
        for outcome in stage.encode(sets)
        for picture in pictures_of(outcome).pictures
    ]
    whole = Phi4MultimodalForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    image_embed = whole.model.embed_tokens_extend.image_embed
    # transformers 5.23 computes pictures without padding with causal attention (test_phi4_vision.py).
    for layer in image_embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False
    for size, ours in zip(SIZES, tokens, strict=True):
        crops = cut_crops(torch.from_numpy(noise(*size)), config.vision, WITHOUT_CACHE.max_crops)
        layout = crops.layout
        ids = torch.full((1, layout.num_tokens), config.vision.placeholder_token)
        sizes = torch.tensor([[layout.rows * layout.crop_size, layout.columns * layout.crop_size]])
        empty = torch.zeros(1, layout.num_tokens, config.decoder.width)
        [theirs] = image_embed(ids, empty, crops.pixels[None], sizes, crops.mask[None].float())
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < CLOSE


@given(picked=st.lists(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("batch_crops", [1, 4])
def test_sets_together_are_what_each_is_alone(
    model: ModelParams, batch_crops: int, picked: list[list[tuple[int, int]]]
) -> None:
    stage = FramesToEmbeddings(model, WITHOUT_CACHE)
    stage._batch_crops = batch_crops
    sets = [
        frames(*(noise(*size, seed=number) for size in sizes), number=number) for number, sizes in enumerate(picked)
    ]
    assert are_equal(stage.encode(sets), [stage.encode([item])[0] for item in sets])
    assert are_equal(stage.encode(sets[::-1]), stage.encode(sets)[::-1])


def test_crops_are_encoded_in_batches_of_one_shape_whatever_waits(
    stage: FramesToEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    call = SiglipEncoder.__call__

    def watch(encoder: SiglipEncoder, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        is_full = mask.flatten(1).all(1)
        shapes.append(len(pixels))
        assert is_full.all() or not is_full.any()
        return call(encoder, pixels, mask)

    monkeypatch.setattr(SiglipEncoder, "__call__", watch)
    stage.encode([frames(noise(90, 112), noise(112, 168)), frames(noise(168, 90))])
    assert set(shapes) == {stage._batch_crops}
    # 14 crops without padding, 5 with.
    assert len(shapes) == (14 + 5 if stage._batch_crops == 1 else 4 + 2)


def test_a_call_without_sets_has_no_outcomes(stage: FramesToEmbeddings) -> None:
    assert stage.encode([]) == []


def test_frames_that_nobody_may_write_to_or_that_lie_apart_are_taken(stage: FramesToEmbeddings) -> None:
    pixels = noise(90, 112)
    shared, apart = pixels.copy(), np.zeros((112, 180, 3), np.uint8)[:, ::2]
    shared.flags.writeable = False
    apart[:] = pixels
    expected = stage.encode([frames(pixels)])
    assert are_equal(stage.encode([frames(shared)]), expected)
    assert are_equal(stage.encode([frames(apart)]), expected)


# What it refuses


BAD_FRAMES: dict[str, tuple[NDArray[Any], str]] = {
    "gray": (np.zeros((56, 56), np.uint8), "frame 2 is uint8\\[56, 56\\]"),
    "four channels": (np.zeros((56, 56, 4), np.uint8), "frame 2 is uint8\\[56, 56, 4\\]"),
    "floats": (np.zeros((56, 56, 3), np.float32), "frame 2 is float32"),
    "empty": (np.zeros((0, 56, 3), np.uint8), "expected uint8\\[height, width, 3\\]"),
    "too thin": (np.zeros((2, 2_000, 3), np.uint8), "frame 2: .*cut it into shorter pieces"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_frame_fails_its_own_set_only(stage: FramesToEmbeddings, name: str) -> None:
    pixels, message = BAD_FRAMES[name]
    good = [frames(noise(90, 112), number=1), frames(noise(56, 56), number=3)]
    bad = frames(noise(112, 56), pixels, number=2)
    first, failure, last = stage.encode([good[0], bad, good[1]])
    assert isinstance(failure, Failure)
    assert (failure.key, failure.task, failure.kind) == (bad.key, None, FailureKind.FAILED)
    assert re.search(message, failure.message)
    assert are_equal([first, last], stage.encode(good))


@pytest.mark.parametrize(("num_frames", "is_refused"), [(0, True), (1, False), (MAX_FRAMES, False), (17, True)])
def test_the_number_of_frames_is_bounded(model: ModelParams, num_frames: int, *, is_refused: bool) -> None:
    stage = FramesToEmbeddings(model, VisionParams())
    [outcome] = stage.encode([frames(*[noise(56, 56)] * num_frames)])
    assert isinstance(outcome, Failure) == is_refused
    if isinstance(outcome, Failure):
        assert f"{num_frames} frames, expected 1 to {MAX_FRAMES}" in outcome.message


def test_values_that_are_not_finite_fail_their_set_and_are_not_kept(
    model: ModelParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = FramesToEmbeddings(model, VisionParams())
    white = frames(np.full((56, 56, 3), 255, np.uint8), number=2)
    call = SiglipEncoder.__call__

    def break_white(encoder: SiglipEncoder, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = call(encoder, pixels, mask).clone()
        values[(pixels == 1).flatten(1).all(1)] = torch.nan
        return values

    with monkeypatch.context() as patch:
        patch.setattr(SiglipEncoder, "__call__", break_white)
        good, failure = stage.encode([frames(noise(90, 112)), white])
    assert pictures_of(good)
    assert isinstance(failure, Failure)
    assert "not finite" in failure.message
    assert pictures_of(stage.encode([white])[0])


# What it keeps


def changed(pixels: NDArray[np.uint8], tiles: Iterable[tuple[int, int]], size: int = 56) -> NDArray[np.uint8]:
    result = pixels.copy()
    for row, column in tiles:
        result[row * size + 20 : row * size + 30, column * size + 20 : column * size + 30] ^= 0xFF
    return result


def test_only_the_tile_that_changed_and_the_whole_are_encoded_again(model: ModelParams) -> None:
    stage, without = (FramesToEmbeddings(model, params) for params in (VisionParams(), WITHOUT_CACHE))
    first = noise(112, 168)
    steps = [(first, 7), (first, 0), (changed(first, [(1, 0)]), 2), (changed(first, [(0, 0), (2, 1)]), 3), (first, 0)]
    for pixels, num_new in steps:
        before = stage.num_encoded, stage.num_reused
        outcomes = stage.encode([frames(pixels)])
        assert (stage.num_encoded - before[0], stage.num_reused - before[1]) == (num_new, 7 - num_new)
        assert are_equal(outcomes, without.encode([frames(pixels)]))
    assert without.num_reused == 0


def test_a_crop_that_stands_twice_in_a_call_is_encoded_once(stage: FramesToEmbeddings) -> None:
    pixels = noise(112, 168)
    sets = [frames(pixels, changed(pixels, [(0, 1)])), frames(pixels, number=2)]
    outcomes = stage.encode(sets)
    assert (stage.num_encoded, stage.num_reused) == (7 + 2, 21 - 9)
    assert are_equal(outcomes, [stage.encode([item])[0] for item in sets])


def test_the_whole_of_a_single_crop_is_that_crop(stage: FramesToEmbeddings, encoder: SiglipEncoder) -> None:
    [outcome] = stage.encode([frames(noise(56, 56))])
    assert (stage.num_encoded, stage.num_reused) == (1, 1)
    [picture] = pictures_of(outcome).pictures
    assert np.array_equal(*picture.values)
    assert np.abs(picture.values - direct(encoder, noise(56, 56))).max() < CLOSE


def test_equal_bytes_in_other_grids_are_other_pictures(stage: FramesToEmbeddings, encoder: SiglipEncoder) -> None:
    # The bytes of a grid are [3, height, width], so they say nothing of its shape.
    wide = noise(168, 112)
    tall = wide.transpose(2, 0, 1).reshape(3, 168, 112).transpose(1, 2, 0)
    # White is the same bytes with padding and without.
    white = [np.full((height, width, 3), 255, np.uint8) for width, height in ((56, 56), (56, 30), (30, 56), (90, 112))]
    [outcome] = stage.encode([frames(wide, tall, *white)])
    for picture, pixels in zip(pictures_of(outcome).pictures, (wide, tall, *white), strict=True):
        assert np.abs(picture.values - direct(encoder, np.ascontiguousarray(pixels))).max() < CLOSE


@given(
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    crops_kept=st.sampled_from([1, 2, 5, 64]),
    size=st.sampled_from([(90, 112), (112, 112), (56, 56)]),
)
@settings(max_examples=20, deadline=None)
def test_a_cache_of_any_size_changes_nothing_but_speed(
    model: ModelParams, seeds: list[int], crops_kept: int, size: tuple[int, int]
) -> None:
    stage = FramesToEmbeddings(model, VisionParams(crops_kept=crops_kept))
    without = FramesToEmbeddings(model, WITHOUT_CACHE)
    for seed in seeds:
        sets = [frames(noise(*size, seed=seed), changed(noise(*size, seed=seed), [(0, 0)]))]
        assert are_equal(stage.encode(sets), without.encode(sets))
        assert len(stage._cache) <= crops_kept
    assert stage.num_encoded <= without.num_encoded


def test_what_a_caller_does_to_its_pictures_is_not_kept(model: ModelParams) -> None:
    stage = FramesToEmbeddings(model, VisionParams())
    [first] = stage.encode([frames(noise(90, 112))])
    expected = [picture.values.copy() for picture in pictures_of(first).pictures]
    for picture in pictures_of(first).pictures:
        picture.values[:] = 0
    [again] = stage.encode([frames(noise(90, 112))])
    assert all(map(np.array_equal, (picture.values for picture in pictures_of(again).pictures), expected))


@given(st.integers(0, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_the_cache_keeps_what_was_asked_for_last(max_crops: int, steps: list[tuple[bool, int]]) -> None:
    cache, recent = CropCache(max_crops), list[int]()
    for is_put, number in steps:
        digest = bytes([number])
        if is_put:
            cache.put(digest, np.full(1, number, np.float32))
        else:
            found = cache.get(digest)
            assert (found is not None) == (number in recent)
            assert found is None or found[0] == number
        if is_put or number in recent:
            recent = [*(item for item in recent if item != number), number][-max_crops or len(recent) + 1 :]
        assert len(cache) == len(recent)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_are_the_same_bits_exactly_when_their_digests_are(encoder: SiglipEncoder, size: tuple[int, int]) -> None:
    pictures = [noise(*size), changed(noise(*size), [(0, 0)]), np.zeros((size[1], size[0], 3), np.uint8)]
    crops = [
        (grid.digest(index), grid.crop(index), grid.mask[index])
        for grid in (lay_out(torch.from_numpy(pixels), encoder.config, 6) for pixels in pictures)
        for index in range(grid.layout.num_crops)
    ]
    for one, other in itertools.combinations(crops, 2):
        is_same = torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
        # The whole of a plain picture may be its tile, which no digest tells.
        assert is_same if one[0] == other[0] else not is_same or len(one[1].unique()) == 1


# What it is


def test_only_the_eyes_are_read_and_only_the_encoder_is_kept(
    model: ModelParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, weakref.ref[torch.Tensor]] = {}
    read = checkpoint._read

    def watch(entries: Iterable[checkpoint._Entry]) -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in read(entries):
            seen[key] = weakref.ref(tensor)
            yield key, tensor

    monkeypatch.setattr(checkpoint, "_read", watch)
    stage = FramesToEmbeddings(model, VisionParams())
    gc.collect()
    assert seen
    assert all(key.startswith(PREFIXES["vision"]) for key in seen)
    assert not any(reference() is not None for key, reference in seen.items() if ".img_processor." not in key)
    assert isinstance(stage.encode([frames(noise(56, 56))])[0], Pictures)


def test_it_tells_what_it_is(model: ModelParams) -> None:
    stage = FramesToEmbeddings(model, VisionParams(max_crops=4))
    assert (stage.device, stage.dtype, stage.max_crops) == ("cpu", "float32", 4)
    assert (stage.config.crop_size, stage.config.patch_size) == (56, 14)
    [outcome] = stage.encode([frames(noise(2_000, 1_500))])
    assert pictures_of(outcome).pictures[0].layout.num_crops <= 5
    ticks = itertools.count(step=0.25)
    assert stage.measure_crops_per_s(lambda: float(next(ticks))) == 4.0
    assert stage.num_encoded == pictures_of(outcome).pictures[0].layout.num_crops


def test_a_checkpoint_without_eyes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="whisper"):
        FramesToEmbeddings(ModelParams(name="whisper-base", device="cpu"), VisionParams())
    with pytest.raises(ModelError):
        FramesToEmbeddings(ModelParams(name=str(tmp_path), device="cpu"), VisionParams())


@dataclasses.dataclass(frozen=True)
class Asked:
    """Model parameters whatever values `ModelParams` may have."""

    final_dtype: str
    partial_dtype: str = "auto"

    @property
    def params(self) -> ModelParams:
        return ModelParams.model_construct(final_dtype=self.final_dtype, partial_dtype=self.partial_dtype)


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        (Asked("auto"), "cuda", torch.bfloat16),
        (Asked("auto"), "cpu", torch.float32),
        (Asked("auto", "bfloat16"), "cuda", torch.bfloat16),
        (Asked("float32"), "cuda", torch.float32),
        (Asked("float32", "float32"), "cpu", torch.float32),
        (Asked("bfloat16"), "cpu", torch.bfloat16),
    ],
    ids=str,
)
def test_the_arithmetic_is_what_is_asked_for(asked: Asked, device: str, dtype: torch.dtype) -> None:
    assert phi4_dtype(asked.params, torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("asked", "device"),
    [
        (Asked("int8"), "cpu"),
        (Asked("int8", "int8"), "cpu"),
        (Asked("float32", "int8"), "cpu"),
        (Asked("float32", "bfloat16"), "cuda"),
        (Asked("auto", "bfloat16"), "cpu"),
    ],
    ids=str,
)
def test_arithmetic_that_would_need_other_weights_is_refused(asked: Asked, device: str) -> None:
    with pytest.raises(ModelError, match="_dtype is"):
        phi4_dtype(asked.params, torch.device(device))


def test_in_bfloat16_values_are_float32_on_the_wire_and_near(folder: Path, encoder: SiglipEncoder) -> None:
    model = ModelParams.model_construct(name=str(folder), device="cpu", final_dtype="bfloat16")
    stage = FramesToEmbeddings(model, VisionParams())
    [outcome] = stage.encode([frames(noise(90, 112))])
    [picture] = pictures_of(outcome).pictures
    expected = direct(encoder, noise(90, 112))
    assert (stage.dtype, picture.values.dtype) == ("bfloat16", np.float32)
    assert 0 < np.abs(picture.values - expected).max() < 0.05 * np.abs(expected).max()
