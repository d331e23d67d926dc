"""Phi-4-multimodal's audio encoder and its projections, over clips of any length.

Normalised log-mel features, three strided convolutions (one token in 80 ms), conformer blocks whose attention shares
one table of relative biases, and a two-layer network into the decoder's width (Microsoft 2025, "Phi-4-Mini Technical
Report", section 2.2, https://arxiv.org/abs/2503.01743). The reference is transformers' `Phi4MultimodalAudioEmbedding`
run on each clip alone: in a batch it lets clips see each other's padding, and refuses those longer than a window.

Clips are cut into windows of `AudioConfig.window_tokens`, and windows are what a batch consists of: eight at most, so
that a clip of half an hour needs no more memory than one of five minutes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.attention import attend
from pipeline.models.linear import PlainLinear
from pipeline.models.norm import Norm
from pipeline.models.phi4.config import AudioConfig, Phi4Config
from pipeline.models.tensors import CheckedTensors

TOKEN_STEPS = 8
"""Steps of 10 ms in one token of 80 ms."""

_NUM_HALVINGS = 3
# A full window of the real model needs 100 MB in float32, its scores among them. A fixed number: results have the same
# bits only at the same shapes.
_MAX_WINDOWS = 8
_SUBSAMPLING_KERNEL = 3


def num_tokens(num_steps: int) -> int:
    """Return how many tokens a clip of `num_steps` steps of 10 ms has; the last one may be cut short."""
    return -(-num_steps // TOKEN_STEPS)


class Projector(enum.Enum):
    """Which network leads from the encoder to the decoder. It belongs to a request, never to a batch of them."""

    SPEECH = "speech"
    """The request has sound and no picture."""

    VISION_SPEECH = "vision_speech"
    """The request has a picture too."""


@dataclass(frozen=True, slots=True)
class _FeedForward:
    norm: Norm
    gate_up: PlainLinear
    down: PlainLinear

    def __call__(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


@dataclass(frozen=True, slots=True)
class _Attention:
    qkv: PlainLinear  # [3 * width, width]
    out: PlainLinear
    num_heads: int

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.out(attend(self.qkv(x), self.num_heads, bias))


@dataclass(frozen=True, slots=True)
class _Convolution:
    """Gated, and seeing only what is to its left: what follows a window never changes it."""

    norm: Norm
    gate: PlainLinear  # [2 * width, width]
    value_bias: Tensor
    gate_bias: Tensor
    depthwise: Tensor  # [width, 1, kernel]
    depthwise_bias: Tensor
    pointwise: PlainLinear
    out: PlainLinear

    def __call__(self, x: Tensor) -> Tensor:
        value, gate = self.gate(self.norm(x)).chunk(2, dim=-1)
        x = (value + self.value_bias) * F.silu(gate + self.gate_bias)
        padded = F.pad(x.transpose(1, 2), (self.depthwise.shape[-1] - 1, 0))
        mixed = F.conv1d(padded, self.depthwise, self.depthwise_bias, groups=len(self.depthwise))
        return self.out(F.silu(self.pointwise(mixed.transpose(1, 2))))


@dataclass(frozen=True, slots=True)
class _Block:
    ffn_in: _FeedForward
    attention_norm: Norm
    attention: _Attention
    convolution: _Convolution
    ffn_out: _FeedForward
    norm: Norm

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + 0.5 * self.ffn_in(x)
        x = x + self.attention(self.attention_norm(x), bias)
        x = x + self.convolution(x)
        return self.norm(x + 0.5 * self.ffn_out(x))


class _Subsampling:
    """Three convolutions over time and mels that each halve both (NeMo's `dw_striding`), and a linear layer."""

    def __init__(self, config: AudioConfig, weights: CheckedTensors) -> None:
        channels, kernel = config.conv_channels, (_SUBSAMPLING_KERNEL, _SUBSAMPLING_KERNEL)
        self._first = weights.take("embed.conv.0.weight", channels, 1, *kernel)
        self._first_bias = weights.take("embed.conv.0.bias", channels)
        # The numbers are those of transformers' `Sequential`: depthwise, pointwise and ReLU in turn.
        self._halvings = [
            (
                weights.take(f"embed.conv.{index}.weight", channels, 1, *kernel),
                weights.take(f"embed.conv.{index}.bias", channels),
                weights.take(f"embed.conv.{index + 1}.weight", channels, channels, 1, 1),
                weights.take(f"embed.conv.{index + 1}.bias", channels),
            )
            for index in range(2, 2 + 3 * (_NUM_HALVINGS - 1), 3)
        ]
        mels = config.num_mels
        for _ in range(_NUM_HALVINGS):
            mels = (mels + 1) // 2
        self._out = _linear(weights, "embed.out", channels * mels, config.width)

    def __call__(self, features: Tensor) -> Tensor:
        """Return [num_tokens(num_steps), width] for `features` [num_steps, num_mels]: zeros lie around them."""
        x = F.relu(F.conv2d(features[None, None], self._first, self._first_bias, stride=2, padding=1))
        for depthwise, depthwise_bias, pointwise, pointwise_bias in self._halvings:
            x = F.conv2d(x, depthwise, depthwise_bias, stride=2, padding=1, groups=len(depthwise))
            x = F.relu(F.conv2d(x, pointwise, pointwise_bias))
        return self._out(x[0].transpose(0, 1).flatten(1))


class ConformerEncoder:
    """The encoder of one checkpoint, in one dtype, on one device. It holds weights only: no state between calls.

    Args:
        config: its dimensions.
        tensors: the checkpoint's tensors below `model.embed_tokens_extend.audio_embed.encoder.`, in any dtype.
        device: where it computes.
        dtype: what it computes in; the reference rounds features to it before it normalises them, and so does this.

    Raises:
        ModelError: naming the tensor that is missing or has another shape than `config` says.
    """

    def __init__(
        self,
        config: AudioConfig,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        weights = CheckedTensors(tensors, self.device, dtype)
        self._mean = weights.take("encoder_embedding.global_mean", config.num_mels)
        self._inverse_std = weights.take("encoder_embedding.global_invstd", config.num_mels)
        self._subsampling = _Subsampling(config, weights)
        self._bias = _relative_bias(config, weights)
        self._blocks = [_read_block(config, weights, f"encoders.{index}") for index in range(config.num_blocks)]

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings of clips, each as if it were alone.

        Args:
            clips: each [num_steps, num_mels], 1 or more steps of 10 ms (`AudioFeatures`); they may differ in length.

        Returns:
            For each clip [num_tokens(num_steps), width] in its dtype, on its device.

        Raises:
            ValueError: if there is no clip or a shape is not that.
        """
        if not clips:
            raise ValueError("there are no clips to encode")
        windows = [window for clip in clips for window in self._windows(clip)]
        batches = (windows[first : first + _MAX_WINDOWS] for first in range(0, len(windows), _MAX_WINDOWS))
        found = (row for batch in batches for row in self._attend(batch))
        return [self._join(found, num_tokens(len(clip))) for clip in clips]

    def _attend(self, windows: Sequence[Tensor]) -> Tensor:
        """Return [windows, longest, width]: what the blocks make of windows, which see only themselves."""
        bias = self._masked_bias([len(window) for window in windows])
        padded = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True)
        for block in self._blocks:
            padded = block(padded, bias)
        return padded

    def _windows(self, clip: Tensor) -> list[Tensor]:
        """Return the tokens of a clip before the blocks, cut into windows.

        Each piece is convolved alone, since the reference alone has zeros where a batch has other clips' padding, and
        since a minute of convolved sound needs half a gigabyte of the real model in float32.
        """
        if clip.dim() != 2 or not len(clip) or clip.shape[1] != self.config.num_mels:
            raise ValueError(f"a clip has shape {list(clip.shape)}, expected [1 or more, {self.config.num_mels}]")
        normalised = (clip.to(self.device, self.dtype) - self._mean) * self._inverse_std
        window_steps = self.config.window_tokens * TOKEN_STEPS
        if len(clip) <= window_steps:
            return [self._subsampling(normalised)]
        windows = []
        for start in range(0, len(clip), window_steps):
            # A token sees 7 steps to its left and none beyond its own to its right. The token of context goes again.
            num_context = 1 if start else 0
            piece = normalised[start - num_context * TOKEN_STEPS : start + window_steps]
            window = self._subsampling(piece)[num_context:]
            # The last window of a long clip attends to the zeros it is filled up with: the reference does, alone.
            windows.append(F.pad(window, (0, 0, 0, self.config.window_tokens - len(window))))
        return windows

    def _join(self, windows: Iterator[Tensor], count: int) -> Tensor:
        """Return the first `count` tokens of the next windows."""
        num_windows = -(-count // self.config.window_tokens)
        return torch.cat([next(windows) for _ in range(num_windows)])[:count]

    def _masked_bias(self, lengths: list[int]) -> Tensor:
        """Return what is added to the scores, [1 or windows, heads, longest, longest]: keys past a window get -inf."""
        longest = max(lengths)
        bias = self._bias[None, :, :longest, :longest]
        if min(lengths) == longest:
            return bias
        positions = torch.arange(longest, device=self.device)
        is_past = positions >= torch.tensor(lengths, device=self.device)[:, None]
        return bias.masked_fill(is_past[:, None, None, :], float("-inf"))


class AudioProjection:
    """The two networks from the encoder's width to the decoder's. They hold weights only.

    Args:
        config: the dimensions of the whole model.
        tensors: the checkpoint's tensors below `model.embed_tokens_extend.audio_embed.`, in any dtype.
        device: where it computes.
        dtype: what it computes in.

    Raises:
        ModelError: naming the tensor that is missing or has another shape than `config` says.
    """

    def __init__(
        self,
        config: Phi4Config,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weights = CheckedTensors(tensors, torch.device(device), dtype)
        inner, outer = config.audio.width, config.decoder.width
        self._layers = {
            projector: (
                _linear(weights, f"up_proj_for_{projector.value}", inner, outer),
                _linear(weights, f"down_proj_for_{projector.value}", outer, outer),
            )
            for projector in Projector
        }

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, projector: Projector) -> Tensor:
        """Return the decoder's inputs, [..., decoder width], for `embeddings` [..., width] of one kind of request.

        Raises:
            ValueError: if `projector` is no member of `Projector`, whatever its name.
        """
        if not isinstance(projector, Projector):
            raise ValueError(f"projector is {projector!r}, expected one of {list(Projector)}")  # noqa: TRY004
        up, down = self._layers[projector]
        return down(F.gelu(up(embeddings)))


def _linear(weights: CheckedTensors, name: str, inputs: int, outputs: int) -> PlainLinear:
    return PlainLinear(weights.take(f"{name}.weight", outputs, inputs), weights.take(f"{name}.bias", outputs))


def _pointwise(weights: CheckedTensors, name: str, inputs: int, outputs: int) -> PlainLinear:
    """Return a convolution of kernel 1, which is a linear layer at every position."""
    kernel = weights.take(f"{name}.weight", outputs, inputs, 1)
    return PlainLinear(kernel[..., 0], weights.take(f"{name}.bias", outputs))


def _norm(weights: CheckedTensors, name: str, width: int) -> Norm:
    return Norm(weights.take(f"{name}.weight", width), weights.take(f"{name}.bias", width))


def _relative_bias(config: AudioConfig, weights: CheckedTensors) -> Tensor:
    """Return the bias of every query and key in a full window, [heads, window, window]; shorter ones use a corner.

    The reference adds its mask of kept keys, as 1, to every bias. A softmax does not see that in exact arithmetic, but
    the sum is rounded to bfloat16, so it belongs to the result.
    """
    distance = config.bias_max_distance
    num_buckets = distance if config.is_bias_symmetric else 2 * distance
    if config.is_bias_symmetric and config.window_tokens > distance:
        raise ModelError(f"bias_max_distance is {distance}, expected {config.window_tokens} or more when symmetric")
    table = weights.take("relative_attention_bias_layer.bias_values.weight", num_buckets, config.num_heads) + 1
    positions = torch.arange(config.window_tokens, device=weights.device)
    offsets = (positions - positions[:, None]).clamp(-distance, distance - 1)  # key - query
    buckets = offsets.abs() if config.is_bias_symmetric else offsets + distance
    return table.t()[:, buckets]


def _read_block(config: AudioConfig, weights: CheckedTensors, name: str) -> _Block:
    width = config.width

    def feed_forward(part: str) -> _FeedForward:
        return _FeedForward(
            norm=_norm(weights, f"{name}.{part}.layer_norm", width),
            gate_up=_linear(weights, f"{name}.{part}.gate_up_proj", width, 2 * config.ffn),
            down=_linear(weights, f"{name}.{part}.down_proj", config.ffn, width),
        )

    return _Block(
        ffn_in=feed_forward("feed_forward_in"),
        attention_norm=_norm(weights, f"{name}.layer_norm_att", width),
        attention=_read_attention(config, weights, f"{name}.self_attn"),
        convolution=_read_convolution(config, weights, f"{name}.conv"),
        ffn_out=feed_forward("feed_forward_out"),
        norm=_norm(weights, f"{name}.layer_norm", width),
    )


def _read_attention(config: AudioConfig, weights: CheckedTensors, name: str) -> _Attention:
    width = config.width
    parts = [f"{name}.{part}_proj" for part in ("q", "k", "v")]
    qkv = PlainLinear(
        torch.cat([weights.take(f"{part}.weight", width, width) for part in parts]),
        torch.cat([weights.take(f"{part}.bias", width) for part in parts]),
    )
    return _Attention(qkv, _linear(weights, f"{name}.o_proj", width, width), config.num_heads)


def _read_convolution(config: AudioConfig, weights: CheckedTensors, name: str) -> _Convolution:
    width, gated = config.width, config.pointwise_channels
    depthwise = f"{name}.dw_sep_conv_1d.dw_conv"
    return _Convolution(
        norm=_norm(weights, f"{name}.layer_norm", width),
        gate=_pointwise(weights, f"{name}.glu.ext_pw_conv_1d", width, 2 * gated),
        value_bias=weights.take(f"{name}.glu.b1", 1, gated, 1).flatten(),
        gate_bias=weights.take(f"{name}.glu.b2", 1, gated, 1).flatten(),
        depthwise=weights.take(f"{depthwise}.weight", width, 1, config.kernel_size),
        depthwise_bias=weights.take(f"{depthwise}.bias", width),
        pointwise=_pointwise(weights, f"{name}.dw_sep_conv_1d.pw_conv", width, config.depthwise_channels),
        out=_pointwise(weights, f"{name}.ext_pw_conv_1d", config.depthwise_channels, gated),
    )
