"""Phi-4-mini, the language model of Phi-4-multimodal, over rows of different requests.

Pre-norm layers with fused projections, grouped-query attention, rotary positions and a gated SiLU (Abdin et al. 2025,
https://arxiv.org/abs/2503.01743; transformers' `Phi4MultimodalModel` is the reference). All linear layers run once over
the concatenated tokens of all rows, adapters over the tokens that want them; attention runs over the rows' own slots,
those with equally many queries and places together.

Exactness, as in pipeline/models/whisper/decoder.py: the attention of a place spans the places up to the next multiple
of 64, those behind it masked to exactly zero, and has at least four queries, so that neither other rows nor the cuts
of a sequence into passes change a result, as far as the linear layers' do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.linear import Linear, LinearFactory, pack_linear
from pipeline.models.phi4.config import DecoderConfig
from pipeline.models.phi4.kv_memory import Phi4KvMemory, Phi4Lease
from pipeline.models.phi4.lora import AdaptedLinear, Adapter, AdapterTokens, LoraWeights
from pipeline.models.phi4.rope import LongRope, needs_long_factors, rotate
from pipeline.models.tensors import CheckedTensors

_MIN_QUERIES = 4
_SPAN = 64


@dataclass(frozen=True, slots=True)
class DecoderRow:
    """What one request feeds in one forward pass.

    `inputs` go to the places of the lease from `position` on: token ids, or embeddings [n, width] of any floating
    dtype (audio and picture positions). Places from `position` on that an earlier pass wrote, such as draft tokens that
    were refused, are overwritten or not looked at.
    """

    lease: Phi4Lease
    position: int
    inputs: tuple[int, ...] | Tensor


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square normalisation, in float32 whatever the dtype."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: _Norm
    qkv: AdaptedLinear  # queries, keys, values
    attention_out: AdaptedLinear
    mlp_norm: _Norm
    gate_up: AdaptedLinear  # gate, up
    down: AdaptedLinear


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces of n rows that attend alike: equally many tokens, which look at equally many places of their slots."""

    slots: list[int]
    tokens: Tensor  # int64[n, queries]: which tokens of the pass ask; those behind `num_tokens` only keep company
    num_tokens: int
    span: int  # they look at the first so many places
    masks: Tensor  # bool[n, queries, 64]: which of the span's last places are not seen; those before them all are


@dataclass(frozen=True, slots=True)
class _Pass:
    """What is the same for every layer of a pass: where its tokens go, int64[tokens] each, and how they attend."""

    slots: Tensor
    places: Tensor
    cos: Tensor
    sin: Tensor
    groups: list[_Group]


class Phi4Decoder:
    """The network and its memory. Not thread-safe.

    Args:
        config: dimensions.
        tensors: the native checkpoint's names below `model.` (`embed_tokens.weight`, `layers.0...`, `norm.weight`), and
            `lm_head.weight`, which is not read if embeddings are tied.
        adapters: what requests can have beside the base.
        num_slots: slots of the memory.
        max_tokens: room of a slot, prompt and new tokens.
        device: where it computes.
        dtype: of weights, memory and results: float32 or bfloat16.
        pack: makes the linear layers; with `pack_linear` in float32 rows do not depend on their neighbours.

    Raises:
        ModelError: if a tensor is missing or of another shape, or the sliding window would be narrower than a slot.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, Tensor],
        adapters: Mapping[Adapter, LoraWeights],
        *,
        num_slots: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        pack: LinearFactory = pack_linear,
    ) -> None:
        if config.sliding_window is not None and config.sliding_window < max_tokens:
            raise ModelError(
                f"sliding_window is {config.sliding_window}, slots hold {max_tokens} tokens; a window that forgets is "
                f"not computed here: use smaller slots"
            )
        self.config = config
        self.device, self.dtype = device, dtype
        self._adapters = frozenset(adapters)
        self._rope = LongRope(config.rope, config.head_width, device)
        weights = CheckedTensors(tensors, device, dtype)
        self._embed_tokens = weights.take("embed_tokens.weight", config.vocab_size, config.width)
        is_tied = config.has_tied_embeddings
        head = self._embed_tokens if is_tied else weights.take("lm_head.weight", config.vocab_size, config.width)
        self._project: Linear = pack(head, None)
        self._layers = [
            _read_layer(config, weights, adapters, f"layers.{index}", pack) for index in range(config.num_layers)
        ]
        self._final_norm = _read_norm(config, weights, "norm")
        # One place sees those before it and itself. The rows behind the last are for queries that only keep company.
        self._unseen = torch.ones((_SPAN + _MIN_QUERIES, _SPAN), dtype=torch.bool, device=device).triu_(1)
        places = math.ceil(max_tokens / _SPAN) * _SPAN
        self.memory = Phi4KvMemory(
            num_slots=num_slots,
            num_layers=config.num_layers,
            num_heads=config.num_kv_heads,
            max_tokens=places,
            head_width=config.head_width,
            device=device,
            dtype=dtype,
        )

    def open(self, slot: int, num_prompt_tokens: int, max_new_tokens: int, adapter: Adapter) -> Phi4Lease:
        """Lease `slot` for a prompt (tokens, audio and picture positions together) and what may come after it.

        Raises:
            StageError: if the request would cross the position where the rotary factors change, or is too long.
            ModelError: if the decoder was made without `adapter`.
            ValueError: if the request is larger than a slot.
            RuntimeError: if the slot is leased already.
        """
        if adapter is not Adapter.NONE and adapter not in self._adapters:
            raise ModelError(f"a request wants the adapter {adapter.value!r}, which was not loaded")
        is_long = needs_long_factors(self.config.rope, num_prompt_tokens, max_new_tokens)
        return self.memory.open(slot, num_prompt_tokens + max_new_tokens, adapter, has_long_factors=is_long)

    def renew(self, lease: Phi4Lease, num_prompt_tokens: int, max_new_tokens: int) -> Phi4Lease | None:
        """Return a lease of the same slot and adapter for another prompt; what is in the slot stays there.

        None, and `lease` as it was, if the other prompt has other rotary factors: no key would fit its queries.

        Raises:
            StageError: if the request would cross the position where the rotary factors change, or is too long.
            ValueError: if it is larger than a slot.
            RuntimeError: if `lease` has ended.
        """
        is_long = needs_long_factors(self.config.rope, num_prompt_tokens, max_new_tokens)
        if is_long != lease.has_long_factors:
            return None
        return self.memory.renew(lease, num_prompt_tokens + max_new_tokens)

    def close(self, lease: Phi4Lease, *, is_spoilt: bool = False) -> None:
        """End a lease; `is_spoilt`: what was computed under it may not be finite."""
        self.memory.close(lease, is_spoilt=is_spoilt)

    @torch.inference_mode()
    def forward(self, rows: Sequence[DecoderRow]) -> Tensor:
        """Feed the inputs of all `rows`; return the final hidden states, [all inputs, width], in their order.

        Raises:
            ValueError: if a row is empty, does not fit its lease, or its embeddings have another width.
            RuntimeError: if a lease has ended.
        """
        for row in rows:
            self._check(row)
        x, alike, adapted = self._embed(rows), self._prepare(rows), self._adapted_tokens(rows)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.attention_norm(x), adapted)
            x = x + layer.attention_out(self._attend(index, qkv, alike), adapted)
            gate, up = layer.gate_up(layer.mlp_norm(x), adapted).chunk(2, -1)
            x = x + layer.down(up * F.silu(gate), adapted)
        return self._final_norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return [m, vocabulary] for those final hidden states [m, width] whose next token is wanted."""
        return self._project(hidden)

    def _check(self, row: DecoderRow) -> None:
        self.memory.check(row.lease)
        num_inputs = len(row.inputs)
        if not num_inputs or row.position < 0 or row.position + num_inputs > row.lease.token_capacity:
            raise ValueError(
                f"{num_inputs} inputs from position {row.position} on do not fit a lease of "
                f"{row.lease.token_capacity} tokens"
            )
        if isinstance(row.inputs, Tensor) and row.inputs.shape[1:] != (self.config.width,):
            raise ValueError(f"embeddings have shape {list(row.inputs.shape)}, expected [n, {self.config.width}]")

    def _embed(self, rows: Sequence[DecoderRow]) -> Tensor:
        # Places of embeddings are looked up as token 0 and overwritten: one look for all rows.
        tokens = [
            token for row in rows for token in ([0] * len(row.inputs) if isinstance(row.inputs, Tensor) else row.inputs)
        ]
        x = self._embed_tokens[torch.tensor(tokens, device=self.device)]
        start = 0
        for row in rows:
            if isinstance(row.inputs, Tensor):
                x[start : start + len(row.inputs)] = row.inputs.to(self.device, self.dtype)
            start += len(row.inputs)
        return x

    def _adapted_tokens(self, rows: Sequence[DecoderRow]) -> tuple[AdapterTokens, ...]:
        wanted = [row.lease.adapter for row in rows for _ in range(len(row.inputs))]
        found = []
        for adapter in Adapter:
            places = [place for place, other in enumerate(wanted) if other is adapter]
            if places and adapter is not Adapter.NONE:
                is_all = len(places) == len(wanted)
                index = None if is_all else torch.tensor(places, device=self.device)
                found.append(AdapterTokens(adapter, index))
        return tuple(found)

    def _prepare(self, rows: Sequence[DecoderRow]) -> _Pass:
        slots = [row.lease.slot for row in rows for _ in range(len(row.inputs))]
        positions = [row.position + i for row in rows for i in range(len(row.inputs))]
        are_long = [row.lease.has_long_factors for row in rows for _ in range(len(row.inputs))]
        cos, sin = self._rope.angles(positions, are_long, self.dtype)
        return _Pass(
            slots=torch.tensor(slots, device=self.device),
            places=torch.tensor(positions, device=self.device),
            cos=cos,
            sin=sin,
            groups=self._groups(rows),
        )

    def _groups(self, rows: Sequence[DecoderRow]) -> list[_Group]:
        """Cut the inputs of `rows` where a place's span changes, and put together what has one shape."""
        pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # by tokens and span: slot, place, first token
        start = 0
        for row in rows:
            place, last = row.position, row.position + len(row.inputs)
            while place < last:
                span = (place // _SPAN + 1) * _SPAN
                cut = min(last, span)
                pieces.setdefault((cut - place, span), []).append((row.lease.slot, place, start))
                start += cut - place
                place = cut
        # Queries of one place are as many as heads share a key; fewer than four get company that is thrown away.
        min_queries = math.ceil(_MIN_QUERIES * self.config.num_kv_heads / self.config.num_heads)
        groups = []
        for (num_tokens, span), found in pieces.items():
            num_queries = max(num_tokens, min_queries)
            first_tokens = torch.tensor([first for _, _, first in found], device=self.device)
            steps = torch.arange(num_queries, device=self.device).clamp_(max=num_tokens - 1)
            masks = [self._unseen[place % _SPAN :][:num_queries] for _, place, _ in found]
            slots = [slot for slot, _, _ in found]
            groups.append(_Group(slots, first_tokens[:, None] + steps, num_tokens, span, torch.stack(masks)))
        return groups

    def _attend(self, index: int, qkv: Tensor, alike: _Pass) -> Tensor:
        config = self.config
        num_shared = config.num_heads // config.num_kv_heads  # queries to a key
        heads = qkv.view(len(qkv), -1, config.head_width)
        num_turned = config.num_heads + config.num_kv_heads
        turned = rotate(heads[:, :num_turned], alike.cos, alike.sin)
        queries = turned[:, : config.num_heads] * config.head_width**-0.5
        all_keys, all_values = self.memory.keys[index], self.memory.values[index]
        all_keys[alike.slots, :, alike.places] = turned[:, config.num_heads :]
        all_values[alike.slots, :, alike.places] = heads[:, num_turned:]
        result = qkv.new_empty((len(qkv), config.width))
        for group in alike.groups:
            (num_rows, num_queries), span = group.tokens.shape, group.span
            keys, values = (_seen(memory, group.slots, span) for memory in (all_keys, all_values))
            # [rows, queries, kv heads * shared, width] -> [rows * kv heads, queries * shared, width]: a key serves its
            # heads at once.
            own = queries[group.tokens].view(num_rows, num_queries, config.num_kv_heads, num_shared, -1)
            own = own.transpose(1, 2).reshape(num_rows * config.num_kv_heads, num_queries * num_shared, -1)
            scores = torch.bmm(own, keys.transpose(1, 2))
            scores = scores.view(num_rows, config.num_kv_heads, num_queries, num_shared, span)
            scores[..., span - _SPAN :].masked_fill_(group.masks[:, None, :, None], -torch.inf)
            weights = scores.softmax(-1, dtype=torch.float32).to(qkv.dtype).view(*own.shape[:2], span)
            attended = torch.bmm(weights, values).view(num_rows, config.num_kv_heads, num_queries, num_shared, -1)
            attended = attended.transpose(1, 2).reshape(num_rows, num_queries, -1)
            result[group.tokens[:, : group.num_tokens]] = attended[:, : group.num_tokens]
        return result


def _seen(memory: Tensor, slots: list[int], span: int) -> Tensor:
    """Return the first `span` places of `slots` in `memory` [slots, kv heads, places, width], a head after the other.

    [slots * kv heads, span, width]: a view of one slot, copies of several.
    """
    seen = memory[slots[0] : slots[0] + 1, :, :span] if len(slots) == 1 else memory[slots, :, :span]
    return seen.flatten(0, 1)


def _read_norm(config: DecoderConfig, weights: CheckedTensors, name: str) -> _Norm:
    return _Norm(weights.take(f"{name}.weight", config.width), config.norm_eps)


def _read_layer(
    config: DecoderConfig,
    weights: CheckedTensors,
    adapters: Mapping[Adapter, LoraWeights],
    name: str,
    pack: LinearFactory,
) -> _Layer:
    def linear(part: str, num_outputs: int, num_inputs: int) -> AdaptedLinear:
        return AdaptedLinear(weights, f"{name}.{part}", (num_outputs, num_inputs), adapters=adapters, pack=pack)

    num_kept = 2 * config.num_kv_heads * config.head_width
    return _Layer(
        attention_norm=_read_norm(config, weights, f"{name}.input_layernorm"),
        qkv=linear("self_attn.qkv_proj", config.width + num_kept, config.width),
        attention_out=linear("self_attn.o_proj", config.width, config.width),
        mlp_norm=_read_norm(config, weights, f"{name}.post_attention_layernorm"),
        gate_up=linear("mlp.gate_up_proj", 2 * config.ffn, config.width),
        down=linear("mlp.down_proj", config.width, config.ffn),
    )
