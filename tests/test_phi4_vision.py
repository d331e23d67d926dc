"""Crops and vision encoder of Phi-4-multimodal against transformers: its image processor's own source, and its classes
with random weights."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Phi4MultimodalConfig, Phi4MultimodalVisionConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalImageEmbedding

from pipeline.errors import MediaError, ModelError
from pipeline.models.phi4.config import VisionConfig
from pipeline.models.phi4.crops import PictureCrops, cut_crops
from pipeline.models.phi4.siglip import SiglipEncoder, VisionProjection
from pipeline.vision.crop_layout import plan_crops

pytestmark = pytest.mark.usefixtures("one_thread")

PLACEHOLDER = 10
DECODER_WIDTH = 64
CLOSE = 1e-5
ENCODER_PREFIX = "img_processor."

# Sides in pixels for crops of 56 and patches of 14. Together they are every way in which padding can fall.
PICTURES = {
    "exactly one crop": (56, 56),
    "one crop, enlarged": (30, 30),
    "one crop, padded": (50, 30),
    "tiled exactly": (168, 112),
    "padded at the right": (90, 112),
    "padded below, an odd number of patches": (168, 90),
    "less than a patch of padding": (112, 105),
    "tall": (40, 500),
    "reduced to fit": (2_000, 1_500),
}


def vision_config(reference: Phi4MultimodalVisionConfig) -> VisionConfig:
    return VisionConfig(
        width=reference.hidden_size,
        ffn=reference.intermediate_size,
        num_layers=reference.num_hidden_layers,
        num_used_layers=reference.num_hidden_layers + 1 + reference.feature_layer,
        num_heads=reference.num_attention_heads,
        num_channels=reference.num_channels,
        crop_size=reference.crop_size,
        patch_size=reference.patch_size,
        norm_eps=reference.layer_norm_eps,
        placeholder_token=reference.image_token_id,
    )


REAL = vision_config(Phi4MultimodalVisionConfig())


def tiny_config(crop_size: int = 56) -> Phi4MultimodalConfig:
    return Phi4MultimodalConfig(
        hidden_size=DECODER_WIDTH,
        vision_config=Phi4MultimodalVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=crop_size,
            crop_size=crop_size,
            image_token_id=PLACEHOLDER,
        ),
    )


def make_reference(crop_size: int = 56, *, is_causal: bool) -> Phi4MultimodalImageEmbedding:
    """Return transformers' module with random weights that are large enough to tell errors from rounding."""
    model = Phi4MultimodalImageEmbedding(tiny_config(crop_size)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("extensor") or "position_embedding" in name:
                scale = 0.5
            elif parameter.dim() > 1:
                scale = 1 / math.sqrt(parameter[0].numel())
            else:
                scale = 0.1
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
    for layer in model.img_processor.encoder.layers:
        layer.self_attn.is_causal = is_causal
    return model


@pytest.fixture(scope="module")
def reference() -> Phi4MultimodalImageEmbedding:
    return make_reference(is_causal=False)


@pytest.fixture(scope="module")
def released() -> Phi4MultimodalImageEmbedding:
    """The reference as transformers has it."""
    return make_reference(is_causal=True)


class Eyes:
    """Our encoder and projection with the reference's weights."""

    def __init__(self, reference: Phi4MultimodalImageEmbedding, dtype: torch.dtype = torch.float32) -> None:
        tensors = dict(reference.state_dict())
        self.config = vision_config(reference.config.vision_config)
        below = {
            name.removeprefix(ENCODER_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(ENCODER_PREFIX)
        }
        self.encoder = SiglipEncoder(self.config, below, dtype=dtype)
        self.projection = VisionProjection(self.config, tensors, dtype=dtype)

    def features(self, pictures: Sequence[PictureCrops]) -> tuple[torch.Tensor, ...]:
        """Encode all crops in one batch."""
        features = self.encoder(
            torch.cat([picture.pixels for picture in pictures]), torch.cat([picture.mask for picture in pictures])
        )
        return features.split([picture.layout.num_crops for picture in pictures])

    def tokens(self, pictures: Sequence[PictureCrops]) -> list[torch.Tensor]:
        return [
            self.projection(features, picture.layout)
            for features, picture in zip(self.features(pictures), pictures, strict=True)
        ]


@pytest.fixture(scope="module")
def eyes(reference: Phi4MultimodalImageEmbedding) -> Eyes:
    return Eyes(reference)


def noise(width_px: int, height_px: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width_px * 10_000 + height_px)
    return torch.randint(0, 256, (height_px, width_px, 3), dtype=torch.uint8, generator=generator)


def cut(name: str, config: VisionConfig, max_crops: int = 36) -> PictureCrops:
    return cut_crops(noise(*PICTURES[name]), config, max_crops)


@torch.inference_mode()
def reference_tokens(model: Phi4MultimodalImageEmbedding, pictures: Sequence[PictureCrops]) -> list[torch.Tensor]:
    """Return what the reference puts in the placeholders' places; pictures are padded to as many crops, as it does."""
    counts = [picture.layout.num_tokens for picture in pictures]
    max_crops = max(picture.layout.num_crops for picture in pictures)
    pixels, masks = [], []
    for picture in pictures:
        missing = max_crops - picture.layout.num_crops
        pixels.append(F.pad(picture.pixels, (0, 0, 0, 0, 0, 0, 0, missing)))
        masks.append(F.pad(picture.mask, (0, 0, 0, 0, 0, missing), value=True))
    sizes = [
        [picture.layout.rows * picture.layout.crop_size, picture.layout.columns * picture.layout.crop_size]
        for picture in pictures
    ]
    ids = torch.full((1, sum(counts)), PLACEHOLDER)
    empty = torch.zeros(1, sum(counts), DECODER_WIDTH, dtype=model.img_projection_up.weight.dtype)
    mask = torch.stack(masks).float()
    return list(model(ids, empty, torch.stack(pixels), torch.tensor(sizes), mask)[0].split(counts))


def far(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest difference."""
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# Crops


def resize(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def pad(image: torch.Tensor, sides: Sequence[int], fill: Sequence[int]) -> torch.Tensor:
    return F.pad(image, (0, sides[2], 0, sides[3]), value=fill[0])


def resize_whole(image: torch.Tensor, size: SimpleNamespace, *, antialias: bool, **_: object) -> torch.Tensor:
    shape = (size.height, size.width)
    return F.interpolate(image[None], size=shape, mode="bicubic", align_corners=False, antialias=antialias)[0]


def leave(image: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return image


def image_processor(**operations: Callable[..., torch.Tensor]) -> SimpleNamespace:
    """Return the methods of transformers' image processor, from its source, on these operations.

    Its module needs torchvision, which this project does without. What torchvision would do for it is one call each.
    """
    found = find_spec("transformers.models.phi4_multimodal")
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "image_processing_phi4_multimodal.py").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    methods: list[ast.stmt] = [
        node
        for node in classes[-1].body
        if isinstance(node, ast.FunctionDef) and node.name not in {"__init__", "preprocess"}
    ]
    future = ast.parse("from __future__ import annotations").body
    names: dict[str, Any] = {
        "torch": torch,
        "math": math,
        "BatchFeature": lambda data, **_: data,
        "tvF": SimpleNamespace(**operations),
    }
    exec(compile(ast.Module(future + methods, []), "image_processing", "exec"), names)  # noqa: S102 - of transformers
    processor = SimpleNamespace(
        resize=resize_whole, rescale_and_normalize=lambda image, *_: (image.float() - 127.5) / 127.5
    )
    for method in methods:
        assert isinstance(method, ast.FunctionDef)
        setattr(processor, method.name, names[method.name].__get__(processor))
    return processor


PROCESSOR = image_processor(resize=resize, pad=pad)
WITHOUT_PIXELS = image_processor(resize=leave, pad=leave)


def their_crops(picture: torch.Tensor, max_crops: int) -> dict[str, Any]:
    made: dict[str, Any] = PROCESSOR._preprocess(
        [picture.permute(2, 0, 1)], True, SimpleNamespace(height=448, width=448), None, True, 1 / 255, True,
        None, None, patch_size=14, dynamic_hd=max_crops, return_tensors=None,
    )  # fmt: skip
    return made


@pytest.mark.parametrize("max_crops", [36, 6, 1])
@pytest.mark.parametrize("size_px", [(448, 448), (300, 200), (449, 447), (640, 480), (1_280, 720), (37, 500)], ids=str)
def test_crops_are_those_of_transformers_image_processor_bit_for_bit(size_px: tuple[int, int], max_crops: int) -> None:
    picture = noise(*size_px)
    ours, theirs = cut_crops(picture, REAL, max_crops), their_crops(picture, max_crops)
    assert torch.equal(ours.pixels, theirs["image_pixel_values"][0])
    assert torch.equal(ours.mask, theirs["image_attention_mask"][0].bool())
    assert [ours.layout.num_tokens] == theirs["num_img_tokens"]


@given(st.integers(1, 9_000), st.integers(1, 9_000), st.sampled_from([36, 16, 6, 4, 1]))
@example(5, 9_000, 36)
@example(9_000, 30, 6)
@settings(max_examples=100, deadline=None)
def test_a_picture_of_any_size_is_laid_out_as_the_image_processor_does(width: int, height: int, max_crops: int) -> None:
    empty = torch.empty(1).expand(3, height, width)
    try:
        _, mask = WITHOUT_PIXELS.dynamic_preprocess(empty, 448, 14, 32, max_crops)
    except ValueError as refusal:
        assert "extreme" in str(refusal)
        with pytest.raises(MediaError, match="cut it into shorter pieces"):
            plan_crops(width, height, REAL.crop_size, REAL.patch_size, max_crops)
        return
    layout = plan_crops(width, height, REAL.crop_size, REAL.patch_size, max_crops)
    assert tuple(mask.shape) == (layout.rows * 32, layout.columns * 32)
    assert (layout.valid_rows, layout.valid_columns) == (int(mask[:, 0].sum()), int(mask[0].sum()))
    assert layout.rows * layout.columns <= max_crops
    assert (layout.rows - 1) * 32 < layout.valid_rows and (layout.columns - 1) * 32 < layout.valid_columns


@pytest.mark.parametrize(
    ("size_px", "num_tokens"),
    [
        ((448, 448), 545),
        ((640, 480), 1_065),
        ((1_280, 720), 1_596),
        ((1_344, 896), 1_841),
        ((896, 1_344), 1_857),
        ((1_920, 1_080), 3_918),
        ((4_000, 3_000), 3_393),
        ((2_688, 2_688), 9_585),
        ((448, 16_128), 10_065),
    ],
)
def test_the_real_model_has_the_published_number_of_tokens(size_px: tuple[int, int], num_tokens: int) -> None:
    assert plan_crops(*size_px, REAL.crop_size, REAL.patch_size).num_tokens == num_tokens


def test_fewer_crops_cost_fewer_tokens() -> None:
    layout = plan_crops(1_920, 1_080, REAL.crop_size, REAL.patch_size, max_crops=6)
    assert layout.num_crops <= 7
    assert layout.num_tokens < 1_900


@pytest.mark.parametrize("arguments", [(0, 10), (10, 0), (10, 10, 0)], ids=str)
def test_sizes_below_one_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="all must be >= 1"):
        plan_crops(arguments[0], arguments[1], REAL.crop_size, REAL.patch_size, *arguments[2:])


@pytest.mark.parametrize("picture", [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, 3)], ids=["CHW", "f32"])
def test_what_is_no_rgb_picture_is_refused(picture: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        cut_crops(picture, REAL)


# Encoder and projection


def test_the_pictures_are_padded_in_every_way() -> None:
    config = vision_config(tiny_config().vision_config)
    layouts = {name: plan_crops(*size, config.crop_size, config.patch_size) for name, size in PICTURES.items()}
    valid = {name: (layout.valid_columns, layout.valid_rows) for name, layout in layouts.items()}
    assert valid == {
        "exactly one crop": (4, 4),
        "one crop, enlarged": (4, 4),
        "one crop, padded": (4, 3),
        "tiled exactly": (12, 8),
        "padded at the right": (7, 8),
        "padded below, an odd number of patches": (12, 7),
        "less than a patch of padding": (8, 8),
        "tall": (3, 36),
        "reduced to fit": (16, 12),
    }


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_gives_the_references_tokens(eyes: Eyes, reference: Phi4MultimodalImageEmbedding, name: str) -> None:
    picture = cut(name, eyes.config)
    (tokens,) = eyes.tokens([picture])
    assert tokens.shape == (picture.layout.num_tokens, DECODER_WIDTH)
    assert far([tokens], reference_tokens(reference, [picture])) < CLOSE


def test_an_odd_number_of_columns_of_tokens_gives_the_references_tokens() -> None:
    # Crops of 84 pixels have 3 x 3 tokens.
    reference = make_reference(84, is_causal=False)
    eyes = Eyes(reference)
    pictures = [cut_crops(noise(*size), eyes.config, 6) for size in ((200, 130), (84, 168), (70, 20))]
    assert far(eyes.tokens(pictures), reference_tokens(reference, pictures)) < CLOSE


def test_crops_of_the_real_size_give_the_references_features_wherever_padding_begins() -> None:
    reference = make_reference(448, is_causal=False)
    valid = [(1, 32), (5, 27), (11, 22), (13, 19), (23, 10), (29, 4), (31, 7), (32, 32)]
    mask = torch.zeros(len(valid), 32, 32, dtype=torch.bool)
    for crop, (rows, columns) in zip(mask, valid, strict=True):
        crop[:rows, :columns] = True
    pixels = torch.randn(len(valid), 3, 448, 448, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = reference.get_img_features(pixels, mask)
    assert far([Eyes(reference).encoder(pixels, mask).flatten(1, 2)], [expected]) < CLOSE


def test_pictures_in_one_batch_give_the_references_tokens(eyes: Eyes, reference: Phi4MultimodalImageEmbedding) -> None:
    pictures = [cut(name, eyes.config, max_crops=6) for name in PICTURES]
    assert far(eyes.tokens(pictures), reference_tokens(reference, pictures)) < CLOSE


def test_a_picture_is_the_same_alone_and_among_others_and_crop_by_crop(eyes: Eyes) -> None:
    pictures = [cut(name, eyes.config, max_crops=6) for name in PICTURES]
    for picture, features in zip(pictures, eyes.features(pictures), strict=True):
        (alone,) = eyes.features([picture])
        crops = [eyes.encoder(picture.pixels[i : i + 1], picture.mask[i : i + 1])[0] for i in range(len(alone))]
        scale = alone.abs().max().item()
        assert far([features], [alone]) <= 1e-6 * max(1.0, scale)
        assert far(crops, list(alone)) <= 1e-6 * max(1.0, scale)


def test_every_patch_sees_every_other(eyes: Eyes) -> None:
    picture = cut("exactly one crop", eyes.config)
    changed = picture.pixels.clone()
    changed[:, :, -14:, -14:] += 0.5
    before, after = (eyes.encoder(pixels, picture.mask) for pixels in (picture.pixels, changed))
    assert (before - after).abs()[:, 0, 0].amax(1).min() > 1e-3


def test_padding_is_not_attended_to(eyes: Eyes) -> None:
    picture = cut("padded below, an odd number of patches", eyes.config)
    crop = torch.arange(picture.layout.num_crops)[~picture.mask.flatten(1).all(1)]
    pixels, mask = picture.pixels[crop], picture.mask[crop]
    rows = int(mask[0, :, 0].sum())
    changed = pixels.clone()
    changed[:, :, rows * 14 :] += 0.5
    whole_tokens = rows // 2  # the next row of tokens is averaged with padding, as in the reference
    assert torch.equal(eyes.encoder(pixels, mask)[:, :whole_tokens], eyes.encoder(changed, mask)[:, :whole_tokens])


@pytest.mark.parametrize("name", ["exactly one crop", "tiled exactly", "less than a patch of padding"])
def test_transformers_as_released_is_causal_where_nothing_is_padded(
    eyes: Eyes, released: Phi4MultimodalImageEmbedding, name: str
) -> None:
    tiled, padded = cut(name, eyes.config), cut("one crop, padded", eyes.config)
    ours = eyes.tokens([tiled, padded])
    assert far(ours[:1], reference_tokens(released, [tiled])) > 0.1
    # One padded picture in the batch, and it computes what the model was trained for.
    assert far(ours, reference_tokens(released, [tiled, padded])) < CLOSE


def test_bfloat16_gives_the_references_tokens_in_bfloat16() -> None:
    reference = make_reference(is_causal=False).to(torch.bfloat16)
    eyes = Eyes(reference, torch.bfloat16)
    pictures = [cut(name, eyes.config, max_crops=6) for name in ("tiled exactly", "one crop, padded")]
    tokens = eyes.tokens(pictures)
    assert tokens[0].dtype == torch.bfloat16
    assert far(tokens, reference_tokens(reference, pictures)) < 0.05


def test_layers_that_are_not_used_need_no_weights(reference: Phi4MultimodalImageEmbedding, eyes: Eyes) -> None:
    last = eyes.config.num_layers - 1
    tensors = {
        name: tensor
        for name, tensor in reference.img_processor.state_dict().items()
        if not name.startswith((f"encoder.layers.{last}.", "post_layernorm.", "head."))
    }
    picture = cut("tall", eyes.config)
    again = SiglipEncoder(eyes.config, tensors)(picture.pixels, picture.mask)
    assert torch.equal(again, eyes.encoder(picture.pixels, picture.mask))


def test_missing_and_mis_shaped_tensors_are_named(reference: Phi4MultimodalImageEmbedding, eyes: Eyes) -> None:
    tensors = dict(reference.img_processor.state_dict())
    name = "encoder.layers.1.mlp.fc1.weight"
    with pytest.raises(ModelError, match=rf"{name} is of shape \[2\]"):
        SiglipEncoder(eyes.config, tensors | {name: torch.zeros(2)})
    del tensors[name]
    with pytest.raises(ModelError, match=f"{name} is missing"):
        SiglipEncoder(eyes.config, tensors)
    with pytest.raises(ModelError, match=r"img_projection_up\.weight is missing"):
        VisionProjection(eyes.config, {})


def test_inputs_of_other_shapes_are_refused(eyes: Eyes) -> None:
    picture = cut("one crop, padded", eyes.config)
    with pytest.raises(ValueError, match="pixels have shape"):
        eyes.encoder(picture.pixels[:, :2], picture.mask)
    with pytest.raises(ValueError, match="the mask is"):
        eyes.encoder(picture.pixels, picture.mask.float())
    with pytest.raises(ValueError, match="drop empty crops"):
        eyes.encoder(picture.pixels, torch.zeros_like(picture.mask))
    with pytest.raises(ValueError, match="features have shape"):
        eyes.projection(eyes.encoder(picture.pixels, picture.mask)[1:], picture.layout)
