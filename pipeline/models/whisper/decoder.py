"""Whisper's decoder network over rows of different requests.

All linear layers run once over the concatenated tokens of all rows; attention runs row by row over views of the row's
own slot. Nothing is copied or allocated per step but activations.

There are two kinds of lease, each with an arithmetic for the products with weights: exact ones (finals), in float32 or,
on request, int8; and others (partials), mostly in a reduced one, whose rows of one token attend all at once, over views
of the memory.

Exactness: the result of a token under an exact lease has the same bits whatever runs beside it and however its
sequence was cut into passes. Linear layers see to it themselves (pipeline/models/linear.py). The text attention of a
place always spans the places up to the next multiple of 64, those behind it masked to exactly zero, so that its shape
depends on the place alone. And attention has at least four queries, padded if need be: batched products of four or
more rows were measured to give each row the same bits for any number of them, those of one to three did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.decode.kv_cache import KvMemory, KvShape
from pipeline.decode.runner import Lease, Row
from pipeline.models.linear import Arithmetic, Linear, LinearFactory, pack_linear, reduced_linear
from pipeline.models.norm import Norm, read_norm
from pipeline.models.whisper.checkpoint import WhisperCheckpoint

_MIN_QUERIES = 4
_MIN_SINGLES = 2  # fewer rows of one token gain nothing by attending together
_SPAN = 64


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer. Scaling of the queries is folded into their projections."""

    self_norm: Norm
    self_qkv: Linear  # [3 * width]: queries, keys, values
    self_out: Linear
    cross_norm: Norm
    cross_q: Linear
    cross_out: Linear
    mlp_norm: Norm
    mlp_up: Linear
    mlp_down: Linear
    kept_heads: Tensor  # int64: cross-attention heads whose queries are kept, perhaps none
    kept: slice  # their places in the memory's `queries`


@dataclass(frozen=True, slots=True)
class _Segment:
    """Tokens `start`..`end` of a pass, which go to the places of `slot` from `place` on and have one span."""

    slot: int
    place: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Network:
    """The linear layers in one arithmetic, and the norms between them."""

    layers: tuple[_Layer, ...]
    context_kv: Linear  # of the context: keys and values of every layer behind each other
    project: Linear  # to the vocabulary


@dataclass(frozen=True, slots=True)
class _Singles:
    """The rows of a pass that feed one token each, for attention over all slots up to the last of theirs at once."""

    index: Tensor  # int64[rows]: their tokens in the pass
    slots: Tensor  # int64[rows]
    places: Tensor  # int64[rows]
    text_mask: Tensor  # [num_slots, 1, 1, places of text looked at]
    context_mask: Tensor  # [num_slots, 1, 1, positions]


class WhisperDecoder:
    """The network and its memory. Not thread-safe.

    Args:
        checkpoint: the decoder part.
        num_slots: slots of the memory.
        max_context_positions: room of a slot for the encoder's positions.
        device: where it computes.
        partial_arithmetic: of the products with weights under leases that are not exact. "float32" for both kinds makes
            all leases exact.
        exact_arithmetic: the same under exact leases: float32, or int8, whose rows do not depend on others either.
    """

    def __init__(
        self,
        checkpoint: WhisperCheckpoint,
        num_slots: int,
        max_context_positions: int,
        device: torch.device,
        *,
        partial_arithmetic: Arithmetic = "float32",
        exact_arithmetic: Arithmetic = "float32",
    ) -> None:
        config, tensors = checkpoint.config, checkpoint.tensors
        self.config = config
        self._device = device
        self._head_width = config.width // config.decoder_heads
        self._embed_tokens = tensors["decoder.embed_tokens.weight"].to(device)
        self._embed_positions = tensors["decoder.embed_positions.weight"].to(device)
        self._final_norm = read_norm(tensors, "decoder.layer_norm", device)
        exact_linear = pack_linear if exact_arithmetic == "float32" else reduced_linear(exact_arithmetic)
        self._exact = _build_network(checkpoint, device, exact_linear)
        self._reduced = (
            self._exact
            if partial_arithmetic == exact_arithmetic
            else _build_network(checkpoint, device, reduced_linear(partial_arithmetic))
        )
        self._has_rough_leases = partial_arithmetic != "float32" or exact_arithmetic != "float32"
        places = math.ceil(config.max_target_positions / _SPAN) * _SPAN
        self.memory = KvMemory(
            KvShape(
                num_slots=num_slots,
                num_layers=config.decoder_layers,
                num_heads=config.decoder_heads,
                head_width=self._head_width,
                max_tokens=places,
                max_context_positions=max_context_positions,
                num_kept_queries=len(config.alignment_heads),
            ),
            device,
        )
        # One place of a sequence sees those before it and itself. The rows behind the last are for padded queries.
        self._mask = torch.full((places + _MIN_QUERIES, places), -torch.inf, device=device).triu_(1)

    def open(self, slot: int, context: Tensor, token_capacity: int, *, is_exact: bool = True) -> Lease:
        """Lease `slot` and write the keys and values of `context`, float32[positions, width], to it.

        The slot stays free when this raises.
        """
        num_positions = context.shape[0]
        is_exact = is_exact or not self._has_rough_leases
        lease = self.memory.open(slot, token_capacity, num_positions, is_exact=is_exact)
        try:
            projected = self._network(lease).context_kv(context)
            projected = projected.view(num_positions, len(self._exact.layers), 2, -1, self._head_width)
            self.memory.context_keys[:, slot, :, :, :num_positions] = projected[:, :, 0].permute(1, 2, 3, 0)
            self.memory.context_values[:, slot, :, :num_positions] = projected[:, :, 1].permute(1, 2, 0, 3)
        except BaseException:
            self.memory.close(lease, is_spoilt=True)
            raise
        return lease

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Feed the tokens of all `rows`; return the final hidden states, float32[all tokens, width], in their order.

        The leases of all rows are of one kind, exact or not.
        """
        for row in rows:
            self.memory.check(row.lease)
        network = self._network(rows[0].lease)
        tokens = torch.tensor([token for row in rows for token in row.tokens], device=self._device)
        places = torch.tensor([row.position + i for row in rows for i in range(len(row.tokens))], device=self._device)
        x = self._embed_tokens[tokens] + self._embed_positions[places]
        singles = None if rows[0].lease.is_exact else self._find_singles(rows)
        segments = _segments(rows, without_singles=singles is not None)
        for index, layer in enumerate(network.layers):
            qkv = layer.self_qkv(layer.self_norm(x))
            x = x + layer.self_out(self._self_attention(index, qkv, segments, singles))
            queries = layer.cross_q(layer.cross_norm(x))
            x = x + layer.cross_out(self._cross_attention(index, queries, rows, singles))
            x = x + layer.mlp_down(F.gelu(layer.mlp_up(layer.mlp_norm(x))))
        return self._final_norm(x)

    def logits(self, hidden: Tensor, *, is_exact: bool = True) -> Tensor:
        """Return float32[m, vocabulary] for final hidden states float32[m, width]."""
        return (self._exact if is_exact else self._reduced).project(hidden)

    def attention(self, lease: Lease, num_tokens: int, num_positions: int) -> Tensor:
        """Return the alignment heads' cross-attention, float32[heads, num_tokens, num_positions].

        Softmax over the first `num_positions` only: silence behind the speech takes no share. Heads are in the order of
        their layers.
        """
        self.memory.check(lease)
        found = []
        for index, layer in enumerate(self._exact.layers):
            if len(layer.kept_heads):
                keys = self.memory.context_keys[index, lease.slot, layer.kept_heads, :, :num_positions]
                queries = self.memory.queries[layer.kept, lease.slot, :num_tokens]
                found.append(torch.bmm(queries, keys).softmax(-1))
        return torch.cat(found)

    def _network(self, lease: Lease) -> _Network:
        return self._exact if lease.is_exact else self._reduced

    def _find_singles(self, rows: Sequence[Row]) -> _Singles | None:
        """Return the rows of one token, if there are enough of them to attend together."""
        starts = accumulate((len(row.tokens) for row in rows), initial=0)
        chosen = [(start, row) for start, row in zip(starts, rows, strict=False) if len(row.tokens) == 1]
        if len(chosen) < _MIN_SINGLES:
            return None
        slots = torch.tensor([row.lease.slot for _, row in chosen], device=self._device)
        places = torch.tensor([row.position for _, row in chosen], device=self._device)
        num_slots = max(row.lease.slot for _, row in chosen) + 1
        span = (max(row.position for _, row in chosen) // _SPAN + 1) * _SPAN
        num_positions = max(row.lease.num_context_positions for _, row in chosen)
        # Slots of others compute along and are thrown away: they see everything, so that their numbers stay finite.
        text_mask = torch.zeros((num_slots, 1, 1, span), device=self._device)
        text_mask[slots, 0, 0] = self._mask[places, :span]
        context_mask = torch.zeros((num_slots, 1, 1, num_positions), device=self._device)
        for _, row in chosen:
            context_mask[row.lease.slot, :, :, row.lease.num_context_positions :] = -torch.inf
        index = torch.tensor([start for start, _ in chosen], device=self._device)
        return _Singles(index, slots, places, text_mask, context_mask)

    def _self_attention(
        self, index: int, qkv: Tensor, segments: Sequence[_Segment], singles: _Singles | None
    ) -> Tensor:
        queries, keys, values = qkv.view(qkv.shape[0], 3, -1, self._head_width).permute(1, 2, 0, 3)
        result = torch.empty_like(qkv[:, : self.config.width])
        for segment in segments:
            start, end, place = segment.start, segment.end, segment.place
            slot_keys = self.memory.keys[index, segment.slot]
            slot_values = self.memory.values[index, segment.slot]
            slot_keys[:, place : place + end - start] = keys[:, start:end]
            slot_values[:, place : place + end - start] = values[:, start:end]
            span = (place // _SPAN + 1) * _SPAN
            padded = _padded(queries[:, start:end])
            mask = self._mask[place : place + padded.shape[1], :span]
            scores = torch.bmm(padded, slot_keys[:, :span].transpose(1, 2)).add_(mask)
            attended = torch.bmm(scores.softmax(-1), slot_values[:, :span])
            result[start:end] = attended[:, : end - start].transpose(0, 1).reshape(end - start, -1)
        if singles is not None:
            own = qkv[singles.index].view(len(singles.index), 3, -1, self._head_width)
            all_keys, all_values = self.memory.keys[index], self.memory.values[index]
            all_keys[singles.slots, :, singles.places] = own[:, 1]
            all_values[singles.slots, :, singles.places] = own[:, 2]
            num_slots, span = singles.text_mask.shape[0], singles.text_mask.shape[3]
            seen_keys, seen_values = all_keys[:num_slots, :, :span], all_values[:num_slots, :, :span]
            attended = _attend_together(own[:, 0], seen_keys.transpose(2, 3), seen_values, singles.text_mask, singles)
            result[singles.index] = attended
        return result

    def _cross_attention(self, index: int, q: Tensor, rows: Sequence[Row], singles: _Singles | None) -> Tensor:
        layer = self._exact.layers[index]
        queries = q.view(q.shape[0], -1, self._head_width).transpose(0, 1)
        result = torch.empty_like(q)
        end = 0
        for row in rows:
            lease, num_tokens = row.lease, len(row.tokens)
            start, end = end, end + num_tokens
            if singles is not None and num_tokens == 1:
                continue
            if len(layer.kept_heads):
                kept = self.memory.queries[layer.kept, lease.slot]
                kept[:, row.position : row.position + num_tokens] = queries[layer.kept_heads, start:end]
            slot_keys = self.memory.context_keys[index, lease.slot, :, :, : lease.num_context_positions]
            slot_values = self.memory.context_values[index, lease.slot, :, : lease.num_context_positions]
            attended = torch.bmm(torch.bmm(_padded(queries[:, start:end]), slot_keys).softmax(-1), slot_values)
            result[start:end] = attended[:, :num_tokens].transpose(0, 1).reshape(num_tokens, -1)
        if singles is not None:
            own = q[singles.index].view(len(singles.index), -1, self._head_width)
            if len(layer.kept_heads):
                kept = self.memory.queries[layer.kept]
                kept[:, singles.slots, singles.places] = own[:, layer.kept_heads].transpose(0, 1)
            num_slots, num_positions = singles.context_mask.shape[0], singles.context_mask.shape[3]
            seen_keys = self.memory.context_keys[index, :num_slots, :, :, :num_positions]
            seen_values = self.memory.context_values[index, :num_slots, :, :num_positions]
            result[singles.index] = _attend_together(own, seen_keys, seen_values, singles.context_mask, singles)
        return result


def _attend_together(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, singles: _Singles) -> Tensor:
    """Return what one query a slot attends to, [rows, width].

    `queries` [rows, heads, head width] go to their slots of `keys` [slots, heads, head width, places] and `values`
    [slots, heads, places, head width], which are views of the memory: nothing of it is copied.
    """
    placed = queries.new_zeros((mask.shape[0], *queries.shape[1:]))
    placed[singles.slots] = queries
    weights = torch.matmul(placed.unsqueeze(2), keys).add_(mask).softmax(-1)
    return torch.matmul(weights, values)[singles.slots].flatten(1)


def _segments(rows: Sequence[Row], *, without_singles: bool) -> list[_Segment]:
    """Cut the tokens of `rows`, perhaps without those of one token, where a place's span changes."""
    segments, start = [], 0
    for row in rows:
        if without_singles and len(row.tokens) == 1:
            start += 1
            continue
        place, last = row.position, row.position + len(row.tokens)
        while place < last:
            cut = min(last, (place // _SPAN + 1) * _SPAN)
            segments.append(_Segment(row.lease.slot, place, start, start + cut - place))
            start += cut - place
            place = cut
    return segments


def _padded(queries: Tensor) -> Tensor:
    """Return contiguous `queries` [heads, n, head width] with n of at least four, zeros behind."""
    missing = _MIN_QUERIES - queries.shape[1]
    return F.pad(queries, (0, 0, 0, missing)) if missing > 0 else queries.contiguous()


def _build_network(checkpoint: WhisperCheckpoint, device: torch.device, pack: LinearFactory) -> _Network:
    config, tensors = checkpoint.config, checkpoint.tensors
    scale = (config.width // config.decoder_heads) ** -0.5

    def linear(names: Sequence[str], scales: Sequence[float] = ()) -> Linear:
        factors = scales or [1.0] * len(names)
        weights = [tensors[f"{name}.weight"] * factor for name, factor in zip(names, factors, strict=True)]
        biases = [
            tensors.get(f"{name}.bias", torch.zeros(weight.shape[0])) * factor
            for name, weight, factor in zip(names, weights, factors, strict=True)
        ]  # keys have none
        return pack(torch.cat(weights).to(device), torch.cat(biases).to(device))

    layers, num_kept = [], 0
    for index in range(config.decoder_layers):
        name = f"decoder.layers.{index}"
        own, cross = f"{name}.self_attn", f"{name}.encoder_attn"
        kept_heads = [head for layer, head in config.alignment_heads if layer == index]
        layers.append(
            _Layer(
                self_norm=read_norm(tensors, f"{own}_layer_norm", device),
                self_qkv=linear([f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"], [scale, 1.0, 1.0]),
                self_out=linear([f"{own}.out_proj"]),
                cross_norm=read_norm(tensors, f"{cross}_layer_norm", device),
                cross_q=linear([f"{cross}.q_proj"], [scale]),
                cross_out=linear([f"{cross}.out_proj"]),
                mlp_norm=read_norm(tensors, f"{name}.final_layer_norm", device),
                mlp_up=linear([f"{name}.fc1"]),
                mlp_down=linear([f"{name}.fc2"]),
                kept_heads=torch.tensor(kept_heads, dtype=torch.int64, device=device),
                kept=slice(num_kept, num_kept + len(kept_heads)),
            )
        )
        num_kept += len(kept_heads)
    attentions = [f"decoder.layers.{index}.encoder_attn" for index in range(config.decoder_layers)]
    context_kv = linear([f"{name}.{part}_proj" for name in attentions for part in ("k", "v")])
    return _Network(tuple(layers), context_kv, pack(tensors["decoder.embed_tokens.weight"].to(device), None))
