"""Phi-4-mini against transformers' network of random weights, and PEFT's adapters where it is installed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalVisionConfig,
)

from pipeline.errors import ModelError, StageError
from pipeline.models.phi4.config import DecoderConfig, read_config
from pipeline.models.phi4.decoder import DecoderRow, Phi4Decoder
from pipeline.models.phi4.kv_memory import Phi4Lease
from pipeline.models.phi4.lora import Adapter, LoraWeights
from pipeline.models.phi4.rope import LongRope

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL = 160  # positions with short factors
CLOSE = 1e-5
NOT_TEXT = (0, 1, 10, 11)  # padding, end, picture, sound
CPU = torch.device("cpu")
LORA_TARGETS = r"(?:.*\.)?model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
RANKS = {Adapter.SPEECH: 4, Adapter.VISION: 3}


def make_reference(*, is_tied: bool = False) -> Phi4MultimodalForCausalLM:
    """Six heads share two keys; all weights are spread out, norms too, so that a wrong one shows."""
    torch.manual_seed(0)
    config = Phi4MultimodalConfig(
        vocab_size=128, hidden_size=96, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=ORIGINAL * 32, original_max_position_embeddings=ORIGINAL,
        tie_word_embeddings=is_tied, sliding_window=262_144, bos_token_id=0, eos_token_id=[1], pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 32.0,
            "original_max_position_embeddings": ORIGINAL,
            "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.0 + i for i in range(6)],
        },
        audio_config=Phi4MultimodalAudioConfig(
            hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2, nemo_conv_channels=8,
            ext_pw_out_channel=16, depthwise_separable_out_channel=16, audio_token_id=11),
        vision_config=Phi4MultimodalVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            crop_size=28, image_token_id=10),
    )  # fmt: skip
    model = Phi4MultimodalForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens.weight" in name:
            # Tied, it is the output too: logits of one magnitude, so that one tolerance means the same for both.
            weight.copy_(noise * (0.1 if is_tied else 0.5))
        elif weight.dim() == 1 and "norm" in name:
            weight.copy_(1 + noise * 0.2)
        elif weight.dim() > 1:
            weight.copy_(noise / math.sqrt(weight[0].numel()))
    return model


def decoder_config(model: Phi4MultimodalForCausalLM) -> DecoderConfig:
    return read_config(model.config.to_dict()).decoder


def tensors_of(model: Phi4MultimodalForCausalLM) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def make_adapters(config: DecoderConfig) -> dict[Adapter, LoraWeights]:
    generator = torch.Generator().manual_seed(2)
    kept = 2 * config.num_kv_heads * config.head_width
    shapes = {
        "self_attn.qkv_proj": (config.width + kept, config.width),
        "self_attn.o_proj": (config.width, config.width),
        "mlp.gate_up_proj": (2 * config.ffn, config.width),
        "mlp.down_proj": (config.width, config.ffn),
    }
    adapters = {}
    for adapter, rank in RANKS.items():
        tensors = {}
        for layer in range(config.num_layers):
            for part, (outputs, inputs) in shapes.items():
                name = f"layers.{layer}.{part}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
                tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
        adapters[adapter] = LoraWeights(tensors, alpha=2.0 * rank)
    return adapters


def merged(model: Phi4MultimodalForCausalLM, adapter: LoraWeights, rank: int) -> Phi4MultimodalForCausalLM:
    """transformers' network with an adapter added into its weights."""
    model = copy.deepcopy(model)
    weights = dict(model.named_parameters())
    for name, down in adapter.tensors.items():
        if name.endswith("lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            up = adapter.tensors[f"{stem}.lora_B.weight"]
            weights[f"model.{stem}.weight"].add_(up @ down * (adapter.alpha / rank))
    return model


def make_decoder(
    model: Phi4MultimodalForCausalLM,
    adapters: Mapping[Adapter, LoraWeights] | None = None,
    *,
    num_slots: int = 4,
    max_tokens: int = 2 * ORIGINAL,
    dtype: torch.dtype = torch.float32,
) -> Phi4Decoder:
    return Phi4Decoder(
        decoder_config(model),
        tensors_of(model),
        adapters or {},
        num_slots=num_slots,
        max_tokens=max_tokens,
        device=CPU,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def reference() -> Phi4MultimodalForCausalLM:
    return make_reference()


@pytest.fixture(scope="module")
def adapters(reference: Phi4MultimodalForCausalLM) -> dict[Adapter, LoraWeights]:
    return make_adapters(decoder_config(reference))


@pytest.fixture
def decoder(reference: Phi4MultimodalForCausalLM, adapters: dict[Adapter, LoraWeights]) -> Phi4Decoder:
    return make_decoder(reference, adapters)


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """No token that stands for a picture, sound or the end."""
    return tuple(torch.randint(12, 128, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist())


@torch.inference_mode()
def expected_logits(model: Phi4MultimodalForCausalLM, tokens: tuple[int, ...]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0]


def run(decoder: Phi4Decoder, *rows: tuple[Phi4Lease, int, tuple[int, ...] | Tensor]) -> list[Tensor]:
    """Feed one pass; return each row's logits."""
    hidden = decoder.forward([DecoderRow(*row) for row in rows])
    return list(decoder.logits(hidden).split([len(inputs) for _, _, inputs in rows]))


def run_alone(decoder: Phi4Decoder, tokens: tuple[int, ...], adapter: Adapter = Adapter.NONE, slot: int = 0) -> Tensor:
    lease = decoder.open(slot, len(tokens), 0, adapter)
    (logits,) = run(decoder, (lease, 0, tokens))
    decoder.close(lease)
    return logits


def picks(logits: Tensor) -> list[int]:
    return logits.index_fill(1, torch.tensor(NOT_TEXT), -torch.inf).argmax(-1).tolist()


def greedy(decoder: Phi4Decoder, lease: Phi4Lease, tokens: tuple[int, ...], num_new: int) -> list[int]:
    found, fed, position = [], tokens, 0
    while len(found) < num_new:
        found.append(picks(run(decoder, (lease, position, fed))[0])[-1])
        position, fed = position + len(fed), (found[-1],)
    return found


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 150, ORIGINAL])
def test_text_has_transformers_logits(num_tokens: int, is_tied: bool) -> None:
    model = make_reference(is_tied=is_tied)
    decoder = make_decoder(model)
    tokens = prompt(num_tokens)
    assert (run_alone(decoder, tokens) - expected_logits(model, tokens)).abs().max() < CLOSE


@pytest.mark.parametrize("cuts", [(1, 2, 3), (63, 64, 65), (10, 120), tuple(range(1, 150))])
def test_a_prompt_in_pieces_gives_the_bits_of_a_whole_one(decoder: Phi4Decoder, cuts: tuple[int, ...]) -> None:
    tokens = prompt(150)
    whole = run_alone(decoder, tokens, Adapter.SPEECH)
    lease = decoder.open(1, len(tokens), 0, Adapter.SPEECH)
    pieces = [
        run(decoder, (lease, start, tokens[start:end]))[0]
        for start, end in zip((0, *cuts), (*cuts, len(tokens)), strict=True)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_greedy_tokens_are_those_of_generate(decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM) -> None:
    for seed in range(3):
        tokens = prompt(30, seed)
        lease = decoder.open(seed, len(tokens), 60, Adapter.NONE)
        expected = reference.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), min_new_tokens=60, max_new_tokens=60,
            do_sample=False, suppress_tokens=list(NOT_TEXT),
        )  # fmt: skip
        ids = expected[0, len(tokens) :].tolist()
        found = greedy(decoder, lease, tokens, 60)
        assert found == ids


def test_rows_with_different_adapters_are_as_alone_and_as_merged_weights(
    decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM, adapters: dict[Adapter, LoraWeights]
) -> None:
    kinds = [Adapter.SPEECH, Adapter.NONE, Adapter.VISION, Adapter.SPEECH]
    prompts = [prompt(num_tokens, num_tokens) for num_tokens in (20, 90, 70, 1)]
    alone = [run_alone(decoder, tokens, kind) for tokens, kind in zip(prompts, kinds, strict=True)]
    leases = [decoder.open(slot, len(prompts[slot]), 0, kind) for slot, kind in enumerate(kinds)]
    together = run(decoder, *((lease, 0, tokens) for lease, tokens in zip(leases, prompts, strict=True)))
    models = {kind: merged(reference, adapters[kind], rank) for kind, rank in RANKS.items()}
    for kind, tokens, expected, found in zip(kinds, prompts, alone, together, strict=True):
        assert torch.equal(found, expected)
        assert (found - expected_logits(models.get(kind, reference), tokens)).abs().max() < 2 * CLOSE
    base = run_alone(make_decoder(reference), prompts[0])
    assert (together[0] - base).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT still asks for it
def test_rows_with_different_adapters_are_as_in_one_batch_of_peft(
    decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM, adapters: dict[Adapter, LoraWeights]
) -> None:
    import peft  # noqa: PLC0415 - it takes seconds, for one test

    model = copy.deepcopy(reference)
    for adapter, rank in RANKS.items():
        lora = peft.LoraConfig(
            r=rank, lora_alpha=adapters[adapter].alpha, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        )
        if adapter is Adapter.SPEECH:
            model = peft.get_peft_model(model, lora, adapter_name=adapter.value)
        else:
            model.add_adapter(adapter.value, lora)
        # PEFT loads nothing, and says nothing, without its prefix before the native names.
        prefixed = {f"base_model.model.model.{name}": tensor for name, tensor in adapters[adapter].tensors.items()}
        peft.set_peft_model_state_dict(model, prefixed, adapter_name=adapter.value)
    model.eval()
    kinds, tokens = [Adapter.VISION, Adapter.SPEECH, Adapter.NONE], [prompt(80, seed) for seed in range(3)]
    names = [kind.value if kind is not Adapter.NONE else "__base__" for kind in kinds]
    with torch.inference_mode():
        embeddings = reference.model.embed_tokens(torch.tensor(tokens))
        expected = model(inputs_embeds=embeddings, adapter_names=names).logits
    leases = [decoder.open(slot, 80, 0, kind) for slot, kind in enumerate(kinds)]
    found = run(decoder, *((lease, 0, row) for lease, row in zip(leases, tokens, strict=True)))
    assert (torch.stack(found) - expected).abs().max() < 2 * CLOSE


def test_interleaved_requests_are_each_as_alone(decoder: Phi4Decoder) -> None:
    kinds = [Adapter.NONE, Adapter.SPEECH, Adapter.VISION]
    prompts = [prompt(num_tokens, num_tokens) for num_tokens in (30, 70, 5)]
    alone = [run_alone(decoder, tokens, kind, slot=3) for tokens, kind in zip(prompts, kinds, strict=True)]
    leases = [decoder.open(slot, len(prompts[slot]), 0, kind) for slot, kind in enumerate(kinds)]
    found: list[list[Tensor]] = [[], [], []]
    fed = [0, 0, 0]
    step = 0
    while any(fed[i] < len(prompts[i]) for i in range(3)):
        chosen = [i for i in range(3) if fed[i] < len(prompts[i]) and (step + i) % 3]  # now these, now those
        sizes = {i: 1 + (step * (i + 3)) % 7 for i in chosen}
        rows = [(leases[i], fed[i], prompts[i][fed[i] : fed[i] + sizes[i]]) for i in reversed(chosen)]
        for i, logits in zip(reversed(chosen), run(decoder, *rows) if rows else [], strict=True):
            found[i].append(logits)
            fed[i] += len(logits)
        step += 1
    for pieces, expected in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(pieces), expected)


def test_draft_tokens_in_one_pass_are_verified_as_step_by_step(decoder: Phi4Decoder) -> None:
    tokens = prompt(60)
    lease = decoder.open(0, 60, 20, Adapter.NONE)
    steps = greedy(decoder, lease, tokens, 20)
    other = decoder.open(1, 60, 20, Adapter.NONE)
    assert picks(run(decoder, (other, 0, tokens))[0])[-1] == steps[0]
    wrong = (*steps[:5], *(token % 100 + 13 for token in steps[5:15]))
    (logits,) = run(decoder, (other, 60, wrong))
    assert picks(logits)[:5] == steps[1:6]
    # Refused from the sixth on: the rest goes over it, also a single token with refused ones behind it.
    assert picks(run(decoder, (other, 65, (steps[5],)))[0]) == [steps[6]]
    (logits,) = run(decoder, (other, 66, tuple(steps[6:19])))
    assert picks(logits) == steps[7:20]


def test_embeddings_give_what_their_tokens_give(
    decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM, adapters: dict[Adapter, LoraWeights]
) -> None:
    tokens = prompt(90)
    expected = run_alone(decoder, tokens, Adapter.SPEECH)
    embeddings = reference.model.embed_tokens.weight[torch.tensor(tokens)]
    lease, text = decoder.open(0, 90, 0, Adapter.SPEECH), decoder.open(1, 90, 0, Adapter.SPEECH)
    first, beside = run(decoder, (lease, 0, embeddings[:50]), (text, 0, tokens))
    rest = run(decoder, (lease, 50, tokens[50:60]), (lease, 60, embeddings[60:]))
    assert torch.equal(torch.cat([first, *rest]), expected)
    assert torch.equal(beside, expected)


def test_embeddings_of_no_token_are_taken(decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM) -> None:
    embeddings = torch.randn(40, reference.config.hidden_size, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = reference(inputs_embeds=embeddings[None]).logits[0]
    (logits,) = run(decoder, (decoder.open(0, 40, 0, Adapter.NONE), 0, embeddings))
    assert (logits - expected).abs().max() < CLOSE


def test_a_used_slot_gives_what_a_fresh_one_gives(decoder: Phi4Decoder) -> None:
    tokens = prompt(40)
    fresh = run_alone(decoder, tokens)
    run_alone(decoder, prompt(300, 7), Adapter.VISION)
    assert torch.equal(run_alone(decoder, tokens), fresh)
    lease = decoder.open(0, 100, 0, Adapter.NONE)
    run(decoder, (lease, 0, torch.full((100, decoder.config.width), torch.inf)))
    decoder.close(lease, is_spoilt=True)
    assert torch.equal(run_alone(decoder, tokens), fresh)


@pytest.mark.parametrize(("num_prompt", "num_new"), [(ORIGINAL, 1), (1, ORIGINAL), (100, 61), (ORIGINAL - 1, 2)])
def test_a_request_across_the_change_of_factors_is_refused(decoder: Phi4Decoder, num_prompt: int, num_new: int) -> None:
    with pytest.raises(StageError, match=f"cross position {ORIGINAL}.* at most {ORIGINAL - num_prompt} new"):
        decoder.open(0, num_prompt, num_new, Adapter.NONE)
    assert decoder.memory.num_open == 0


def test_a_request_up_to_the_change_has_short_factors_and_one_from_beyond_it_long_ones(decoder: Phi4Decoder) -> None:
    assert not decoder.open(0, ORIGINAL, 0, Adapter.NONE).has_long_factors
    assert not decoder.open(1, 60, 100, Adapter.NONE).has_long_factors
    assert decoder.open(2, ORIGINAL + 1, 0, Adapter.NONE).has_long_factors


def test_a_request_from_beyond_the_change_is_as_transformers_beside_short_ones(
    decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM
) -> None:
    long, short = prompt(ORIGINAL + 40, 1), prompt(80, 2)
    lease = decoder.open(0, len(long), 10, Adapter.NONE)
    other = decoder.open(1, len(short), 10, Adapter.NONE)
    # Below the change, too, its keys have the long factors.
    first, beside = run(decoder, (lease, 0, long[:90]), (other, 0, short))
    (rest,) = run(decoder, (lease, 90, long[90:]))
    assert (torch.cat([first, rest]) - expected_logits(reference, long)).abs().max() < 2 * CLOSE
    assert (beside - expected_logits(reference, short)).abs().max() < CLOSE
    expected = reference.generate(
        torch.tensor([long]), attention_mask=torch.ones(1, len(long)), min_new_tokens=10, max_new_tokens=10,
        do_sample=False, suppress_tokens=list(NOT_TEXT),
    )  # fmt: skip
    assert greedy(decoder, lease, long, 10) == expected[0, len(long) :].tolist()


def test_the_scale_of_the_real_model_is_the_published_one(reference: Phi4MultimodalForCausalLM) -> None:
    rope = replace(decoder_config(reference).rope, original_max_positions=4_096, max_positions=131_072)
    cos, sin = LongRope(rope, 16, CPU).angles([0], [False], torch.float32)
    assert cos.unique().item() == pytest.approx(1.190_24, abs=1e-5)
    assert sin.unique().item() == 0


def test_bfloat16_is_near_float32(decoder: Phi4Decoder, reference: Phi4MultimodalForCausalLM) -> None:
    rough = make_decoder(reference, dtype=torch.bfloat16)
    tokens = prompt(80)
    logits = run_alone(rough, tokens)
    assert logits.dtype == rough.memory.keys.dtype == torch.bfloat16
    exact = run_alone(decoder, tokens)
    theirs = expected_logits(copy.deepcopy(reference).to(torch.bfloat16), tokens).float()
    assert (logits.float() - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_what_does_not_fit_a_lease_is_refused(decoder: Phi4Decoder) -> None:
    lease = decoder.open(0, 10, 5, Adapter.NONE)
    for position, inputs in ((15, (20,)), (10, (20,) * 6), (0, ()), (-1, (20,))):
        with pytest.raises(ValueError, match="do not fit a lease of 15 tokens"):
            decoder.forward([DecoderRow(lease, position, inputs)])
    with pytest.raises(ValueError, match=r"shape \[2, 95\], expected \[n, 96\]"):
        decoder.forward([DecoderRow(lease, 0, torch.zeros(2, 95))])
    with pytest.raises(RuntimeError, match="slot 0 is leased already"):
        decoder.open(0, 10, 5, Adapter.NONE)
    decoder.close(lease)
    with pytest.raises(RuntimeError, match="has ended"):
        decoder.forward([DecoderRow(lease, 0, (20,))])


def test_a_request_larger_than_a_slot_or_the_model_is_refused(reference: Phi4MultimodalForCausalLM) -> None:
    decoder = make_decoder(reference)
    with pytest.raises(ValueError, match="400 tokens do not fit a slot of 320"):
        decoder.open(0, 400, 0, Adapter.NONE)
    with pytest.raises(StageError, match=f"more than the model's {ORIGINAL * 32} positions"):
        decoder.open(0, ORIGINAL * 32, 1, Adapter.NONE)
    with pytest.raises(ModelError, match="'speech', which was not loaded"):
        decoder.open(0, 10, 0, Adapter.SPEECH)


def test_weights_of_another_configuration_are_refused(
    reference: Phi4MultimodalForCausalLM, adapters: dict[Adapter, LoraWeights]
) -> None:
    config, tensors = decoder_config(reference), tensors_of(reference)

    def build(config: DecoderConfig, tensors: Mapping[str, Tensor], adapters: Mapping[Adapter, LoraWeights]) -> None:
        Phi4Decoder(config, tensors, adapters, num_slots=1, max_tokens=64, device=CPU)

    without = {name: tensor for name, tensor in tensors.items() if name != "layers.1.mlp.down_proj.weight"}
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight is missing, expected \[96, 80\]"):
        build(config, without, {})
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is of shape \[128, 96\], expected \[129, 96\]"):
        build(replace(config, vocab_size=129), tensors, {})
    with pytest.raises(ModelError, match="sliding_window is 63, slots hold 64 tokens"):
        build(replace(config, sliding_window=63), tensors, {})
    speech = adapters[Adapter.SPEECH]
    for end in ("lora_A.weight", "lora_B.weight"):
        partial = {
            name: tensor for name, tensor in speech.tensors.items() if name != f"layers.2.self_attn.o_proj.{end}"
        }
        with pytest.raises(ModelError, match=rf"layers\.2\.self_attn\.o_proj\.{end} is missing"):
            build(config, tensors, {Adapter.SPEECH: LoraWeights(partial, speech.alpha)})
