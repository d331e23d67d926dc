"""The traps of Phi-4-multimodal in transformers 5.23 and PEFT 0.21: what the reference does, and what is done here.

docs/phi4.md has the list and names the tests. Those of this module show the reference as released, on the tiny random
checkpoint: that an effect is there, not how large it is with real weights. A release that repairs one makes its test
fail, and the note about it can go.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Phi4MultimodalForCausalLM
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioModel

from pipeline.errors import ModelError, StageError
from pipeline.models.phi4.checkpoint import load_adapter, load_config, load_part
from pipeline.models.phi4.config import Phi4Config
from pipeline.models.phi4.conformer import AudioProjection, ConformerEncoder, Projector, num_tokens
from pipeline.models.phi4.crops import cut_crops
from pipeline.models.phi4.decoder import DecoderRow, Phi4Decoder
from pipeline.models.phi4.lora import Adapter
from pipeline.models.phi4.tiny import make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL = 256  # positions with short factors of the tiny checkpoint
WINDOW_STEPS = 4_000  # 500 tokens
CLOSE = 2e-5
CLOSE_ADAPTED = 1e-3
FAR = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("phi4"))


@pytest.fixture(scope="module")
def config(folder: Path) -> Phi4Config:
    return load_config(folder)


@pytest.fixture(scope="module")
def released(folder: Path) -> Phi4MultimodalForCausalLM:
    """The reference, with nothing patched."""
    return load_reference(folder)


@pytest.fixture(scope="module")
def conformer(folder: Path, config: Phi4Config) -> ConformerEncoder:
    tensors = load_part(folder, "audio")
    return ConformerEncoder(
        config.audio, {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if "encoder." in name}
    )


def load_reference(folder: Path) -> Phi4MultimodalForCausalLM:
    return Phi4MultimodalForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def audio_model(model: Phi4MultimodalForCausalLM) -> Phi4MultimodalAudioModel:
    return model.model.embed_tokens_extend.audio_embed.encoder


def steps(num_steps: int) -> Tensor:
    return 8 + 4 * torch.randn(num_steps, 80, generator=torch.Generator().manual_seed(num_steps))


def text(num_tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_decoder(folder: Path, config: Phi4Config) -> Phi4Decoder:
    return Phi4Decoder(
        config.decoder,
        load_part(folder, "decoder"),
        {Adapter.SPEECH: load_adapter(folder, "speech")},
        num_slots=2,
        max_tokens=2 * ORIGINAL,
        device=torch.device("cpu"),
    )


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


# 3. A batch with a clip of more than 500 tokens


def test_transformers_cannot_batch_clips_longer_than_a_window(
    released: Phi4MultimodalForCausalLM, conformer: ConformerEncoder
) -> None:
    clips = [steps(WINDOW_STEPS + 400), steps(WINDOW_STEPS + 400)]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="view size is not compatible"):
        audio_model(released)(torch.stack(clips), torch.ones(2, WINDOW_STEPS + 400, dtype=torch.bool))
    with torch.inference_mode():
        alone = [audio_model(released)(clip[None], None)[0] for clip in clips]
    assert max(far(ours, theirs) for ours, theirs in zip(conformer(clips), alone, strict=True)) < CLOSE


# 4. The last window of a long clip


@torch.inference_mode()
def last_window(model: Phi4MultimodalAudioModel, clip: Tensor, *, is_padded: bool) -> Tensor:
    """Return the reference's embeddings of the window behind the first, its tokens padded with zeros or not."""
    tokens, _, _ = model.forward_embeddings(model.encoder_embedding(clip[None]), None)
    tail = tokens[:, 500:]
    count = tail.shape[1]
    x = F.pad(tail, (0, 0, 0, 500 - count)) if is_padded else tail
    bias = 1 + model.relative_attention_bias_layer(x)
    for layer in model.encoders:
        x = layer(x, bias)
    return x[0, :count]


def test_the_zeros_behind_the_last_window_are_attended_to_as_in_transformers(
    released: Phi4MultimodalForCausalLM, conformer: ConformerEncoder
) -> None:
    clip, model = steps(WINDOW_STEPS + 400), audio_model(released)
    found = conformer([clip])[0][500:]
    assert far(found, last_window(model, clip, is_padded=True)) < CLOSE
    assert far(found, last_window(model, clip, is_padded=False)) > FAR


# 5. Position 4,096 (256 here)


def test_transformers_goes_on_wrongly_across_the_change_of_factors(
    released: Phi4MultimodalForCausalLM, folder: Path, config: Phi4Config
) -> None:
    ids, num_new = text(ORIGINAL - 4), 16
    placeholders = [config.vision.placeholder_token, config.audio.placeholder_token]
    generate = {
        "max_new_tokens": num_new,
        "min_new_tokens": num_new,
        "do_sample": False,
        "suppress_tokens": placeholders,
    }
    with torch.inference_mode():
        cached = released.generate(torch.tensor([ids]), **generate)[0, len(ids) :].tolist()
        uncached = released.generate(torch.tensor([ids]), use_cache=False, **generate)[0, len(ids) :].tolist()
    assert cached[:4] == uncached[:4]
    assert cached != uncached
    with pytest.raises(StageError, match=f"cross position {ORIGINAL}"):
        make_decoder(folder, config).open(0, len(ids), num_new, Adapter.NONE)


# 6. Factors by the longest of a batch


def test_transformers_gives_a_short_row_the_factors_of_a_long_neighbour(
    released: Phi4MultimodalForCausalLM, folder: Path, config: Phi4Config
) -> None:
    short, long = text(30, 1), text(ORIGINAL + 20, 2)
    ids = torch.tensor([short + [0] * (len(long) - len(short)), long])
    mask = torch.ones_like(ids)
    mask[0, len(short) :] = 0
    with torch.inference_mode():
        alone = released(torch.tensor([short])).logits[0]
        batched = released(ids, attention_mask=mask).logits[0, : len(short)]
    assert far(batched, alone) > FAR
    decoder = make_decoder(folder, config)
    rows = [
        DecoderRow(decoder.open(slot, len(tokens), 0, Adapter.NONE), 0, tuple(tokens))
        for slot, tokens in enumerate((short, long))
    ]
    ours = decoder.logits(decoder.forward(rows))[: len(short)]
    assert far(ours, alone) < CLOSE


# 7. The projector by the batch


def test_transformers_gives_sound_without_pictures_the_projector_of_its_neighbour(
    released: Phi4MultimodalForCausalLM, conformer: ConformerEncoder, folder: Path, config: Phi4Config
) -> None:
    clip = steps(97)
    count = num_tokens(len(clip))
    pixels = torch.randint(0, 256, (100, 130, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = cut_crops(pixels, config.vision, 6)
    layout = crops.layout
    heard = [config.audio.placeholder_token] * count + [0] * (layout.num_tokens - count)
    seen = [config.vision.placeholder_token] * layout.num_tokens
    picture = {
        "image_pixel_values": crops.pixels[None],
        "image_sizes": torch.tensor([[layout.rows * layout.crop_size, layout.columns * layout.crop_size]]),
        "image_attention_mask": crops.mask[None].float(),
    }
    with torch.inference_mode():
        encoded = conformer([clip])[0]
        sound: dict[str, Tensor] = {"audio_input_features": clip[None], "audio_embed_sizes": torch.tensor([count])}
        alone = embed(released, [heard], **sound)[0, :count]
        beside = embed(released, [heard, seen], **sound, **picture)[0, :count]
    project = AudioProjection(config, load_part(folder, "audio"))
    assert far(project(encoded, Projector.SPEECH), alone) < CLOSE
    assert far(project(encoded, Projector.VISION_SPEECH), beside) < CLOSE
    assert far(beside, alone) > FAR


def embed(model: Phi4MultimodalForCausalLM, ids: list[list[int]], **arguments: Tensor) -> Tensor:
    tokens = torch.tensor(ids)
    merged: Tensor = model.model.embed_tokens_extend(tokens, model.model.embed_tokens(tokens), **arguments)
    return merged


# 8. Adapters with and without PEFT's prefix


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT still asks for it
def test_peft_loads_nothing_of_an_adapter_in_the_native_layout(tmp_path: Path, config: Phi4Config) -> None:
    peft = pytest.importorskip("peft")
    folder = make_tiny(tmp_path)
    released = load_reference(folder)
    ids = torch.tensor([text(20)])

    def logits() -> Tensor:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # that keys are missing is all that it says
            model = peft.PeftModel.from_pretrained(copy.deepcopy(released), folder / "speech-lora").eval()
            result: Tensor = model(ids).logits[0]
            return result

    with torch.inference_mode():
        base = released(ids).logits[0]
    assert torch.equal(logits(), base)
    path = folder / "speech-lora" / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor for key, tensor in load_file(path).items()}, path)
    decoder = make_decoder(folder, config)  # reads both spellings
    ours = decoder.logits(
        decoder.forward([DecoderRow(decoder.open(0, 20, 0, Adapter.SPEECH), 0, tuple(ids[0].tolist()))])
    )
    assert far(ours, logits()) < CLOSE_ADAPTED
    assert far(ours, base) > FAR


# 9. Adapters' lists of targets


def test_an_adapter_is_for_the_decoder_whatever_its_list_of_targets_says(tmp_path: Path) -> None:
    expected = load_adapter(make_tiny(tmp_path), "speech")
    settings_path = tmp_path / "speech-lora" / "adapter_config.json"
    listed: dict[str, Any] = json.loads(settings_path.read_text())
    listed["target_modules"] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    settings_path.write_text(json.dumps(listed))
    found = load_adapter(tmp_path, "speech")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    # What such a list makes PEFT train and save besides is refused.
    path = tmp_path / "speech-lora" / "adapter_model.safetensors"
    strange = "model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.o_proj.lora_A.weight"
    save_file({**load_file(path), strange: torch.zeros(5, 32)}, path)
    with pytest.raises(ModelError, match=r"audio_embed\.encoder\.encoders\.0\.self_attn\.o_proj"):
        load_adapter(tmp_path, "speech")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_list_of_endings_makes_peft_adapt_the_audio_encoder_too(released: Phi4MultimodalForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    endings = peft.LoraConfig(r=2, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    names = [name for name, _ in peft.get_peft_model(copy.deepcopy(released), endings).named_modules()]
    assert any("audio_embed" in name and name.endswith("lora_A") for name in names)


# 10. Encoding while sound comes in


def test_a_window_moves_as_a_whole_while_it_grows_and_stays_when_it_is_full(
    released: Phi4MultimodalForCausalLM, conformer: ConformerEncoder
) -> None:
    clip = steps(WINDOW_STEPS + 800)
    with torch.inference_mode():
        short, grown = (audio_model(released)(clip[None, :count], None)[0] for count in (160, 320))
    assert far(grown[:10], short[:10]) > FAR  # tokens whose convolutions have seen all that they see
    ours_short, ours_grown, *longer = (
        conformer([clip[:count]])[0] for count in (160, 320, WINDOW_STEPS, WINDOW_STEPS + 320, WINDOW_STEPS + 800)
    )
    assert far(ours_short, short) < CLOSE
    assert far(ours_grown, grown) < CLOSE
    full = longer[0]
    assert all(far(each[:500], full) < CLOSE for each in longer[1:])
