"""Whisper's decoder network over rows of different requests.

All linear layers run once over the concatenated tokens of all rows; attention runs row by row over views of the row's
own slot. Nothing is copied or allocated per step but activations.

Exactness: a token's result has the same bits whatever runs beside it and however its sequence was cut into passes.
Linear layers see to it themselves (pipeline/models/linear.py). The text attention of a place always spans the places up
to the next multiple of 64, those behind it masked to exactly zero, so that its shape depends on the place alone. And
attention has at least four queries, padded if need be: batched products of four or more rows were measured to give each
row the same bits for any number of them, those of one to three did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.decode.kv_cache import KvMemory, KvShape
from pipeline.decode.runner import Lease, Row
from pipeline.models.linear import Linear, pack_linear
from pipeline.models.whisper.checkpoint import WhisperCheckpoint

_MIN_QUERIES = 4
_SPAN = 64


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer. Scaling of the queries is folded into their projections."""

    self_norm: _Norm
    self_qkv: Linear  # [3 * width]: queries, keys, values
    self_out: Linear
    cross_norm: _Norm
    cross_q: Linear
    cross_out: Linear
    cross_kv: Linear  # of the context: keys, values
    mlp_norm: _Norm
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


class WhisperDecoder:
    """The network and its memory. Not thread-safe."""

    def __init__(
        self, checkpoint: WhisperCheckpoint, num_slots: int, max_context_positions: int, device: torch.device
    ) -> None:
        config, tensors = checkpoint.config, checkpoint.tensors
        self.config = config
        self._device = device
        self._head_width = config.width // config.decoder_heads
        self._embed_tokens = tensors["decoder.embed_tokens.weight"].to(device)
        self._embed_positions = tensors["decoder.embed_positions.weight"].to(device)
        self._layers = _build_layers(checkpoint, device)
        self._final_norm = _norm(tensors, "decoder.layer_norm", device)
        self._project = pack_linear(self._embed_tokens)
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

    def open(self, slot: int, context: Tensor, token_capacity: int) -> Lease:
        """Lease `slot` and write the keys and values of `context`, float32[positions, width], to it."""
        lease = self.memory.open(slot, token_capacity, context.shape[0])
        num_positions = context.shape[0]
        for index, layer in enumerate(self._layers):
            projected = layer.cross_kv(context).view(num_positions, 2, -1, self._head_width)
            self.memory.context_keys[index, slot, :, :, :num_positions] = projected[:, 0].permute(1, 2, 0)
            self.memory.context_values[index, slot, :, :num_positions] = projected[:, 1].transpose(0, 1)
        return lease

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Feed the tokens of all `rows`; return the final hidden states, float32[all tokens, width], in their order."""
        for row in rows:
            self.memory.check(row.lease)
        tokens = torch.tensor([token for row in rows for token in row.tokens], device=self._device)
        places = torch.tensor([row.position + i for row in rows for i in range(len(row.tokens))], device=self._device)
        x = self._embed_tokens[tokens] + self._embed_positions[places]
        segments = _segments(rows)
        for index, layer in enumerate(self._layers):
            qkv = layer.self_qkv(layer.self_norm(x))
            x = x + layer.self_out(self._self_attention(index, qkv, segments))
            queries = layer.cross_q(layer.cross_norm(x))
            x = x + layer.cross_out(self._cross_attention(index, queries, rows))
            x = x + layer.mlp_down(F.gelu(layer.mlp_up(layer.mlp_norm(x))))
        return self._final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32[m, vocabulary] for final hidden states float32[m, width]."""
        return self._project(hidden)

    def attention(self, lease: Lease, num_tokens: int, num_positions: int) -> Tensor:
        """Return the alignment heads' cross-attention, float32[heads, num_tokens, num_positions].

        Softmax over the first `num_positions` only: silence behind the speech takes no share. Heads are in the order of
        their layers.
        """
        self.memory.check(lease)
        found = []
        for index, layer in enumerate(self._layers):
            if len(layer.kept_heads):
                keys = self.memory.context_keys[index, lease.slot, layer.kept_heads, :, :num_positions]
                queries = self.memory.queries[layer.kept, lease.slot, :num_tokens]
                found.append(torch.bmm(queries, keys).softmax(-1))
        return torch.cat(found)

    def _self_attention(self, index: int, qkv: Tensor, segments: Sequence[_Segment]) -> Tensor:
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
        return result

    def _cross_attention(self, index: int, q: Tensor, rows: Sequence[Row]) -> Tensor:
        layer = self._layers[index]
        queries = q.view(q.shape[0], -1, self._head_width).transpose(0, 1)
        result = torch.empty_like(q)
        start = 0
        for row in rows:
            lease, num_tokens = row.lease, len(row.tokens)
            end = start + num_tokens
            if len(layer.kept_heads):
                kept = self.memory.queries[layer.kept, lease.slot]
                kept[:, row.position : row.position + num_tokens] = queries[layer.kept_heads, start:end]
            slot_keys = self.memory.context_keys[index, lease.slot, :, :, : lease.num_context_positions]
            slot_values = self.memory.context_values[index, lease.slot, :, : lease.num_context_positions]
            attended = torch.bmm(torch.bmm(_padded(queries[:, start:end]), slot_keys).softmax(-1), slot_values)
            result[start:end] = attended[:, :num_tokens].transpose(0, 1).reshape(num_tokens, -1)
            start = end
        return result


def _segments(rows: Sequence[Row]) -> list[_Segment]:
    """Cut the tokens of `rows` where a place's span changes."""
    segments, start = [], 0
    for row in rows:
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


def _norm(tensors: dict[str, Tensor], name: str, device: torch.device) -> _Norm:
    return _Norm(tensors[f"{name}.weight"].to(device), tensors[f"{name}.bias"].to(device))


def _build_layers(checkpoint: WhisperCheckpoint, device: torch.device) -> list[_Layer]:
    config, tensors = checkpoint.config, checkpoint.tensors
    scale = (config.width // config.decoder_heads) ** -0.5

    def linear(names: Sequence[str], scales: Sequence[float] = ()) -> Linear:
        factors = scales or [1.0] * len(names)
        weights = [tensors[f"{name}.weight"] * factor for name, factor in zip(names, factors, strict=True)]
        biases = [
            tensors.get(f"{name}.bias", torch.zeros(weight.shape[0])) * factor
            for name, weight, factor in zip(names, weights, factors, strict=True)
        ]  # keys have none
        return pack_linear(torch.cat(weights).to(device), torch.cat(biases).to(device))

    layers, num_kept = [], 0
    for index in range(config.decoder_layers):
        name = f"decoder.layers.{index}"
        own, cross = f"{name}.self_attn", f"{name}.encoder_attn"
        kept_heads = [head for layer, head in config.alignment_heads if layer == index]
        layers.append(
            _Layer(
                self_norm=_norm(tensors, f"{own}_layer_norm", device),
                self_qkv=linear([f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"], [scale, 1.0, 1.0]),
                self_out=linear([f"{own}.out_proj"]),
                cross_norm=_norm(tensors, f"{cross}_layer_norm", device),
                cross_q=linear([f"{cross}.q_proj"], [scale]),
                cross_out=linear([f"{cross}.out_proj"]),
                cross_kv=linear([f"{cross}.k_proj", f"{cross}.v_proj"]),
                mlp_norm=_norm(tensors, f"{name}.final_layer_norm", device),
                mlp_up=linear([f"{name}.fc1"]),
                mlp_down=linear([f"{name}.fc2"]),
                kept_heads=torch.tensor(kept_heads, dtype=torch.int64, device=device),
                kept=slice(num_kept, num_kept + len(kept_heads)),
            )
        )
        num_kept += len(kept_heads)
    return layers
