"""Phi-4-multimodal in parts, each loaded by itself from a checkpoint, against the whole model in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Phi4MultimodalForCausalLM

from pipeline.models.phi4.checkpoint import load_adapter, load_config, load_decoder, load_part
from pipeline.models.phi4.config import Phi4Config
from pipeline.models.phi4.conformer import AudioProjection, ConformerEncoder, Projector
from pipeline.models.phi4.crops import PictureCrops, cut_crops
from pipeline.models.phi4.decoder import DecoderRow, Phi4Decoder
from pipeline.models.phi4.keys import AdapterName
from pipeline.models.phi4.lora import Adapter
from pipeline.models.phi4.siglip import SiglipEncoder, VisionProjection
from pipeline.models.phi4.tiny import make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS = 97
NUM_NEW = 12
NO_END = 10**6  # no token: so many are compared, whatever they are
ADAPTERS: tuple[AdapterName, ...] = ("speech", "vision")
# Of logits of about 15. The tiny adapters' products are large: in float32 both sides are then 1e-4 from float64.
CLOSE = 2e-5
CLOSE_ADAPTED = 1e-3


class Split:
    """The parts as actors hold them."""

    def __init__(self, folder: Path) -> None:
        self.config: Phi4Config = load_config(folder)
        decoder = load_decoder(folder)
        self.conformer = ConformerEncoder(self.config.audio, load_part(folder, "audio"))
        self.audio_projection = AudioProjection(self.config, decoder.audio_projection)
        self.siglip = SiglipEncoder(self.config.vision, load_part(folder, "vision"))
        self.vision_projection = VisionProjection(self.config.vision, decoder.image_projection)
        self.decoder = Phi4Decoder(
            self.config.decoder,
            decoder.language,
            {Adapter(name): load_adapter(folder, name) for name in ADAPTERS},
            num_slots=2,
            max_tokens=250,
            device=torch.device("cpu"),
        )
        self.embeddings = decoder.language["embed_tokens.weight"]

    def merge(self, ids: tuple[int, ...], sound: Tensor | None, picture: Tensor | None) -> Tensor:
        merged = self.embeddings[list(ids)].clone()
        tokens = torch.tensor(ids)
        if sound is not None:
            merged[tokens == self.config.audio.placeholder_token] = sound
        if picture is not None:
            merged[tokens == self.config.vision.placeholder_token] = picture
        return merged

    def greedy(self, inputs: Tensor, adapter: Adapter, slot: int = 0) -> tuple[Tensor, list[int]]:
        """Return the logits of the prompt's places, and what follows it."""
        lease = self.decoder.open(slot, len(inputs), NUM_NEW, adapter)
        logits = self.decoder.logits(self.decoder.forward([DecoderRow(lease, 0, inputs)]))
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < NUM_NEW:
            row = DecoderRow(lease, len(inputs) + len(tokens) - 1, (tokens[-1],))
            tokens.append(int(self.decoder.logits(self.decoder.forward([row]))[0].argmax()))
        self.decoder.close(lease)
        return logits, tokens


@dataclass(frozen=True)
class Request:
    ids: tuple[int, ...]
    steps: Tensor | None
    crops: PictureCrops | None
    adapter: Adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("phi4"))


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    return Split(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Phi4MultimodalForCausalLM:
    model = Phi4MultimodalForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    # transformers 5.23 computes pictures without padding with causal attention (test_phi4_vision.py).
    for layer in model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False
    return model


def request_of(split: Split, kind: str) -> Request:
    generator = torch.Generator().manual_seed(7)
    audio, vision = split.config.audio, split.config.vision
    steps = 8 + 4 * torch.randn(NUM_STEPS, audio.num_mels, generator=generator) if "audio" in kind else None
    picture = torch.randint(0, 256, (100, 130, 3), dtype=torch.uint8, generator=generator)
    crops = cut_crops(picture, vision, 6) if "image" in kind else None
    ids = [65, 66]
    ids += [vision.placeholder_token] * (0 if crops is None else crops.layout.num_tokens)
    ids += [audio.placeholder_token] * (0 if steps is None else -(-NUM_STEPS // 8))
    adapter = Adapter.VISION if crops is not None else Adapter.SPEECH if steps is not None else Adapter.NONE
    return Request((*ids, 67, 68, 69), steps, crops, adapter)


def inputs_of(split: Split, request: Request) -> Tensor:
    sound = picture = None
    if request.steps is not None:
        projector = Projector.SPEECH if request.crops is None else Projector.VISION_SPEECH
        [encoded] = split.conformer([request.steps])
        sound = split.audio_projection(encoded, projector)
    if request.crops is not None:
        features = split.siglip(request.crops.pixels, request.crops.mask)
        picture = split.vision_projection(features, request.crops.layout)
    return split.merge(request.ids, sound, picture)


def with_adapter(
    whole: Phi4MultimodalForCausalLM, folder: Path, adapter: Adapter
) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Add an adapter's products to the weights of `whole`; return what was there."""
    if adapter is Adapter.NONE:
        return []
    found = load_adapter(folder, "speech" if adapter is Adapter.SPEECH else "vision")
    before = []
    for name, weight in whole.model.named_parameters():
        a, b = (found.tensors.get(name.replace(".weight", f".lora_{side}.weight")) for side in "AB")
        if a is not None and b is not None:
            before.append((weight, weight.detach().clone()))
            weight.data += found.scale * (b.double() @ a.double()).float()
    return before


@pytest.mark.parametrize("is_adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("kind", ["text", "audio", "image", "image+audio"])
def test_the_parts_together_are_the_whole(
    split: Split, whole: Phi4MultimodalForCausalLM, folder: Path, kind: str, *, is_adapted: bool
) -> None:
    request = request_of(split, kind)
    adapter = request.adapter if is_adapted else Adapter.NONE
    logits, tokens = split.greedy(inputs_of(split, request), adapter)
    arguments: dict[str, Tensor] = {}
    if request.steps is not None:
        arguments |= {
            "audio_input_features": request.steps[None],
            "audio_embed_sizes": torch.tensor([-(-NUM_STEPS // 8)]),
        }
    if request.crops is not None:
        layout = request.crops.layout
        arguments |= {
            "image_pixel_values": request.crops.pixels[None],
            "image_sizes": torch.tensor([[layout.rows * layout.crop_size, layout.columns * layout.crop_size]]),
            "image_attention_mask": request.crops.mask[None].float(),
        }
    ids = torch.tensor([request.ids])
    before = with_adapter(whole, folder, adapter)
    try:
        with torch.inference_mode():
            expected = whole(ids, **arguments).logits[0]
            generated = whole.generate(ids, **arguments, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=NO_END)
    finally:
        for weight, value in before:
            weight.data.copy_(value)
    assert len(before) == (0 if adapter is Adapter.NONE else 4 * split.config.decoder.num_layers)
    assert (logits - expected).abs().max() < (CLOSE if adapter is Adapter.NONE else CLOSE_ADAPTED)
    assert tokens == generated[0, len(request.ids) :].tolist()


def test_requests_of_every_kind_in_one_pass_equal_each_alone(split: Split) -> None:
    requests = [request_of(split, kind) for kind in ("image+audio", "audio")]
    inputs = [inputs_of(split, request) for request in requests]
    alone = [split.greedy(item, request.adapter)[0] for item, request in zip(inputs, requests, strict=True)]
    leases = [
        split.decoder.open(slot, len(item), 1, request.adapter)
        for slot, (item, request) in enumerate(zip(inputs, requests, strict=True))
    ]
    rows = [DecoderRow(lease, 0, item) for lease, item in zip(leases, inputs, strict=True)]
    together = split.decoder.logits(split.decoder.forward(rows))
    for lease in leases:
        split.decoder.close(lease)
    assert torch.equal(together, torch.cat(alone))
