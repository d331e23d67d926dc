"""Dimensions of a Phi-4-multimodal checkpoint, read from its native `config.json` (`model_type: phi4_multimodal`).

Names are those of transformers' `Phi4MultimodalConfig` where a number is the same, and ours where units say more. What
this project does not compute (other activations, dropout, chunked attention) is refused instead of ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ModelError

MODEL_TYPE = "phi4_multimodal"
_TIME_REDUCTION = 8
_MIN_POSITIONS = 2  # the scale of cos and sin is divided by their logarithm
_SAME = 1e-6  # of a number that a file may round


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The conformer encoder and what stands before it.

    A window of `window_tokens` (80 ms each) is attended to as a whole, and nothing across windows.
    """

    width: int
    ffn: int
    num_blocks: int
    num_heads: int
    num_mels: int
    conv_channels: int  # of the subsampling
    pointwise_channels: int  # of the convolution module in a block
    depthwise_channels: int
    kernel_size: int
    bias_max_distance: int
    is_bias_symmetric: bool
    placeholder_token: int
    window_tokens: int = 500


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """SigLIP and the cropping. `num_layers` counts all of the checkpoint; `num_used_layers` those that are computed."""

    width: int
    ffn: int
    num_layers: int
    num_used_layers: int
    num_heads: int
    num_channels: int
    crop_size: int
    patch_size: int
    norm_eps: float
    placeholder_token: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions with one set of factors up to `original_max_positions` and another beyond (LongRoPE)."""

    theta: float
    rotary_share: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    max_positions: int


def attention_factor(rope: RopeConfig) -> float:
    """Return by what cos and sin are scaled, at all lengths: sqrt(1 + ln(max / original) / ln(original)), 1 or more."""
    stretch = rope.max_positions / rope.original_max_positions
    return math.sqrt(1 + math.log(stretch) / math.log(rope.original_max_positions)) if stretch > 1 else 1.0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The language model."""

    width: int
    ffn: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    norm_eps: float
    has_tied_embeddings: bool
    sliding_window: int | None
    rope: RopeConfig

    @property
    def head_width(self) -> int:
        """Numbers in one head's query."""
        return self.width // self.num_heads


@dataclass(frozen=True, slots=True)
class Phi4Config:
    """The whole model. A text ends at any of `end_tokens`."""

    audio: AudioConfig
    vision: VisionConfig
    decoder: DecoderConfig
    end_tokens: tuple[int, ...]


def read_config(raw: Mapping[str, Any]) -> Phi4Config:
    """Return the dimensions that a native `config.json` tells.

    Raises:
        ModelError: naming the key that is missing, of the wrong type, or asks for what is not computed here.
    """
    if raw.get("model_type") != MODEL_TYPE:
        raise ModelError(f"model_type is {raw.get('model_type')!r}, expected {MODEL_TYPE!r}")
    audio, vision = _Section(raw, "audio_config"), _Section(raw, "vision_config")
    decoder = _Section({"decoder": dict(raw)}, "decoder")
    end_tokens = raw.get("eos_token_id")
    ends = [end_tokens] if isinstance(end_tokens, int) else end_tokens
    if not isinstance(ends, list) or not ends or not all(isinstance(token, int) for token in ends):
        raise ModelError(f"eos_token_id is {end_tokens!r}, expected a token or a list of tokens")
    return Phi4Config(_read_audio(audio), _read_vision(vision), _read_decoder(decoder), tuple(ends))


class _Section:
    """Part of the file; every look names the key when it fails."""

    def __init__(self, raw: Mapping[str, Any], name: str) -> None:
        found = raw.get(name)
        if not isinstance(found, Mapping):
            raise ModelError(f"{name} is {type(found).__name__}, expected an object")
        self._raw: Mapping[str, Any] = found
        self._name = name

    def count(self, key: str) -> int:
        """Return a positive whole number."""
        value = self._raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self._name}.{key} is {value!r}, expected a positive whole number")
        return value

    def number(self, key: str) -> float:
        """Return a number above 0."""
        value = self._raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelError(f"{self._name}.{key} is {value!r}, expected a number above 0")
        return float(value)

    def factors(self, key: str, num_factors: int) -> tuple[float, ...]:
        """Return `num_factors` numbers above 0."""
        value = self._raw.get(key)
        is_list = isinstance(value, list) and all(isinstance(item, int | float) and item > 0 for item in value)
        if not isinstance(value, list) or not is_list or len(value) != num_factors:
            raise ModelError(f"{self._name}.{key} must be {num_factors} numbers above 0")
        return tuple(float(item) for item in value)

    def get(self, key: str, default: Any = None) -> Any:
        """Return what is there, whatever it is."""
        value = self._raw.get(key)
        return default if value is None else value

    def require(self, **expected: Any) -> None:
        """Refuse other values than these; a missing key is fine."""
        for key, value in expected.items():
            if self._raw.get(key, value) != value:
                raise ModelError(f"{self._name}.{key} is {self._raw[key]!r}; only {value!r} is computed here")

    def require_close(self, **expected: float) -> None:
        """Refuse other numbers than these; a missing key is fine."""
        for key, value in expected.items():
            if self._raw.get(key) is not None and not math.isclose(self.number(key), value, rel_tol=_SAME):
                raise ModelError(f"{self._name}.{key} is {self._raw[key]!r}; only {value:.6g} is computed here")

    def section(self, key: str) -> _Section:
        """Return a part of this part."""
        return _Section(self._raw, key)


def _read_audio(raw: _Section) -> AudioConfig:
    raw.require(
        activation="swish",
        conv_activation="swish",
        conv_glu_type="swish",
        nemo_activation="relu",
        chunk_size=-1,
        time_reduction=_TIME_REDUCTION,
        depthwise_multiplier=1,
        downsample_rate=1,
    )
    return AudioConfig(
        width=raw.count("hidden_size"),
        ffn=raw.count("intermediate_size"),
        num_blocks=raw.count("num_blocks"),
        num_heads=raw.count("num_attention_heads"),
        num_mels=raw.count("input_size"),
        conv_channels=raw.count("nemo_conv_channels"),
        pointwise_channels=raw.count("ext_pw_out_channel"),
        depthwise_channels=raw.count("depthwise_separable_out_channel"),
        kernel_size=raw.count("kernel_size"),
        bias_max_distance=raw.count("bias_max_distance"),
        is_bias_symmetric=bool(raw.get("bias_symmetric", default=False)),
        placeholder_token=raw.count("audio_token_id"),
    )


def _read_vision(raw: _Section) -> VisionConfig:
    raw.require(hidden_act="gelu_pytorch_tanh")
    num_layers, feature_layer = raw.count("num_hidden_layers"), raw.get("feature_layer", default=-2)
    # hidden_states[k] is what comes out of layer k; [0] are the patches.
    num_used = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
    if not 1 <= num_used <= num_layers:
        raise ModelError(f"vision_config.feature_layer is {feature_layer}, of {num_layers} layers")
    return VisionConfig(
        width=raw.count("hidden_size"),
        ffn=raw.count("intermediate_size"),
        num_layers=num_layers,
        num_used_layers=num_used,
        num_heads=raw.count("num_attention_heads"),
        num_channels=raw.count("num_channels"),
        crop_size=raw.count("crop_size"),
        patch_size=raw.count("patch_size"),
        norm_eps=raw.number("layer_norm_eps"),
        placeholder_token=raw.count("image_token_id"),
    )


def _read_decoder(raw: _Section) -> DecoderConfig:
    raw.require(hidden_act="silu")
    width, num_heads = raw.count("hidden_size"), raw.count("num_attention_heads")
    return DecoderConfig(
        width=width,
        ffn=raw.count("intermediate_size"),
        num_layers=raw.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.count("num_key_value_heads"),
        vocab_size=raw.count("vocab_size"),
        norm_eps=raw.number("rms_norm_eps"),
        has_tied_embeddings=bool(raw.get("tie_word_embeddings", default=False)),
        sliding_window=raw.get("sliding_window"),
        rope=_read_rope(raw, width // num_heads),
    )


def _read_rope(raw: _Section, head_width: int) -> RopeConfig:
    rope = raw.section("rope_parameters")
    rope.require(rope_type="longrope")
    share = rope.number("partial_rotary_factor")
    num_factors = int(head_width * share) // 2
    has_own = rope.get("original_max_position_embeddings") is not None
    found = RopeConfig(
        theta=rope.number("rope_theta"),
        rotary_share=share,
        short_factors=rope.factors("short_factor", num_factors),
        long_factors=rope.factors("long_factor", num_factors),
        original_max_positions=(rope if has_own else raw).count("original_max_position_embeddings"),
        max_positions=raw.count("max_position_embeddings"),
    )
    if found.original_max_positions < _MIN_POSITIONS:
        raise ModelError(f"original_max_position_embeddings is {found.original_max_positions}, expected 2 or more")
    # The reference takes these where they are set, and works them out where they are not. Only what it works out is
    # computed here (`LongRope`), so a file may say the same and nothing else.
    stretch = found.max_positions / found.original_max_positions
    rope.require_close(factor=stretch, attention_factor=attention_factor(found))
    return found
