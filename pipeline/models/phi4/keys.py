"""Names and shapes of every tensor of a Phi-4-multimodal checkpoint, by the part that computes with it.

A part is what one process holds: the audio encoder, the vision encoder, or the decoder with the networks that lead into
it (both audio projections, the image projection and the separators). Every tensor belongs to one part or to none.

Names are those of transformers' native `Phi4MultimodalForCausalLM` ("native keys"). The layout in which the model was
first published (`model_type: phi4mm`, "original keys") differs in twelve places, wraps the projections of the decoder
(`base_layer.`) and keeps the adapters beside them; `native_key` and `native_config` translate, after transformers'
`convert_phi4_multimodal_weights_to_hf.py`. No code that comes with a checkpoint is needed for that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pipeline.errors import ModelError
from pipeline.models.phi4.config import MODEL_TYPE, AudioConfig, DecoderConfig, Phi4Config, VisionConfig

Part = Literal["audio", "vision", "decoder"]
AdapterName = Literal["speech", "vision"]
Shapes = dict[str, tuple[int, ...]]

ORIGINAL_MODEL_TYPE = "phi4mm"
PARTS: tuple[Part, ...] = ("audio", "vision", "decoder")
ADAPTERS: tuple[AdapterName, ...] = ("speech", "vision")
HEAD_KEY = "lm_head.weight"
PREFIXES: dict[Part, str] = {
    "audio": "model.embed_tokens_extend.audio_embed.encoder.",
    "vision": "model.embed_tokens_extend.image_embed.img_processor.",
    "decoder": "model.",
}
"""What every key of a part begins with, but for the decoder's `lm_head.weight`."""
AUDIO_PROJECTION_PREFIX = "embed_tokens_extend.audio_embed."
"""What the audio projections' keys begin with below the decoder's prefix."""
IMAGE_PROJECTION_PREFIX = "embed_tokens_extend.image_embed."
"""What the keys of the image projection and of the separators begin with below the decoder's prefix."""


# Shapes


def expected_shapes(config: Phi4Config, part: Part) -> Shapes:
    """Return the shape of every tensor that is computed with in `part`, by native key.

    The decoder has its own `lm_head.weight` only where the embeddings are not tied.
    """
    shapes = {
        "audio": lambda: _audio_shapes(config.audio),
        "vision": lambda: _vision_shapes(config.vision),
        "decoder": lambda: _decoder_shapes(config.decoder) | _projection_shapes(config),
    }[part]()
    found = {f"{PREFIXES[part]}{name}": shape for name, shape in shapes.items()}
    if part == "decoder" and not config.decoder.has_tied_embeddings:
        found[HEAD_KEY] = (config.decoder.vocab_size, config.decoder.width)
    return found


def unused_shapes(config: Phi4Config) -> Shapes:
    """Return the shape of every tensor that a checkpoint may hold and nothing computes with, by native key.

    These are the layers of the vision encoder behind the one whose output counts, its last norm and its pooling head,
    and the output projection where it is the embedding.
    """
    vision = config.vision
    width, head = vision.width, "head"
    shapes: Shapes = {}
    for index in range(vision.num_used_layers, vision.num_layers):
        shapes |= _vision_layer_shapes(f"encoder.layers.{index}", vision)
    shapes |= _pair("post_layernorm", (width,))
    shapes[f"{head}.probe"] = (1, 1, width)
    shapes[f"{head}.attention.in_proj_weight"] = (3 * width, width)
    shapes[f"{head}.attention.in_proj_bias"] = (3 * width,)
    shapes |= _pair(f"{head}.attention.out_proj", (width, width)) | _pair(f"{head}.layernorm", (width,))
    shapes |= _pair(f"{head}.mlp.fc1", (vision.ffn, width)) | _pair(f"{head}.mlp.fc2", (width, vision.ffn))
    found = {f"{PREFIXES['vision']}{name}": shape for name, shape in shapes.items()}
    if config.decoder.has_tied_embeddings:
        found[HEAD_KEY] = (config.decoder.vocab_size, config.decoder.width)
    return found


def adapter_shapes(config: Phi4Config, rank: int) -> Shapes:
    """Return the shape of every tensor of an adapter of `rank`: `lora_A` [rank, in] and `lora_B` [out, rank]."""
    shapes: Shapes = {}
    for name, (num_outputs, num_inputs) in _projections(config.decoder).items():
        shapes[f"{PREFIXES['decoder']}{name}.lora_A.weight"] = (rank, num_inputs)
        shapes[f"{PREFIXES['decoder']}{name}.lora_B.weight"] = (num_outputs, rank)
    return shapes


def _pair(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _audio_shapes(audio: AudioConfig) -> Shapes:
    width, channels = audio.width, audio.conv_channels
    shapes: Shapes = {f"encoder_embedding.global_{name}": (audio.num_mels,) for name in ("mean", "invstd")}
    shapes |= _pair("embed.conv.0", (channels, 1, 3, 3))
    # The numbers left out are those of the ReLUs.
    for depthwise, pointwise in ((2, 3), (5, 6)):
        shapes |= _pair(f"embed.conv.{depthwise}", (channels, 1, 3, 3))
        shapes |= _pair(f"embed.conv.{pointwise}", (channels, channels, 1, 1))
    num_bands = audio.num_mels
    for _ in range(3):
        num_bands = (num_bands - 1) // 2 + 1
    shapes |= _pair("embed.out", (width, channels * num_bands))
    num_buckets = audio.bias_max_distance * (1 if audio.is_bias_symmetric else 2)
    shapes["relative_attention_bias_layer.bias_values.weight"] = (num_buckets, audio.num_heads)
    for index in range(audio.num_blocks):
        shapes |= _audio_block_shapes(f"encoders.{index}", audio)
    return shapes


def _audio_block_shapes(block: str, audio: AudioConfig) -> Shapes:
    width, pointwise = audio.width, audio.pointwise_channels
    shapes = _pair(f"{block}.layer_norm_att", (width,)) | _pair(f"{block}.layer_norm", (width,))
    for name in ("feed_forward_in", "feed_forward_out"):
        shapes |= _pair(f"{block}.{name}.layer_norm", (width,))
        shapes |= _pair(f"{block}.{name}.gate_up_proj", (2 * audio.ffn, width))
        shapes |= _pair(f"{block}.{name}.down_proj", (width, audio.ffn))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes |= _pair(f"{block}.self_attn.{name}", (width, width))
    conv = f"{block}.conv"
    shapes |= _pair(f"{conv}.layer_norm", (width,))
    shapes |= {f"{conv}.glu.{name}": (1, pointwise, 1) for name in ("b1", "b2")}
    shapes |= _pair(f"{conv}.glu.ext_pw_conv_1d", (2 * pointwise, width, 1))
    shapes |= _pair(f"{conv}.dw_sep_conv_1d.dw_conv", (width, 1, audio.kernel_size))
    shapes |= _pair(f"{conv}.dw_sep_conv_1d.pw_conv", (audio.depthwise_channels, width, 1))
    return shapes | _pair(f"{conv}.ext_pw_conv_1d", (pointwise, width, 1))


def _vision_shapes(vision: VisionConfig) -> Shapes:
    width, patch = vision.width, vision.patch_size
    shapes = _pair("embeddings.patch_embedding", (width, vision.num_channels, patch, patch))
    shapes["embeddings.position_embedding.weight"] = ((vision.crop_size // patch) ** 2, width)
    for index in range(vision.num_used_layers):
        shapes |= _vision_layer_shapes(f"encoder.layers.{index}", vision)
    return shapes


def _vision_layer_shapes(layer: str, vision: VisionConfig) -> Shapes:
    width = vision.width
    shapes = _pair(f"{layer}.layer_norm1", (width,)) | _pair(f"{layer}.layer_norm2", (width,))
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _pair(f"{layer}.self_attn.{name}", (width, width))
    return shapes | _pair(f"{layer}.mlp.fc1", (vision.ffn, width)) | _pair(f"{layer}.mlp.fc2", (width, vision.ffn))


def _projection_shapes(config: Phi4Config) -> Shapes:
    """Return the shapes of what leads from either encoder into the decoder."""
    outer, audio_width, image_width = config.decoder.width, config.audio.width, config.vision.width
    shapes: Shapes = {}
    for mode in ("speech", "vision_speech"):
        shapes |= _pair(f"{AUDIO_PROJECTION_PREFIX}up_proj_for_{mode}", (outer, audio_width))
        shapes |= _pair(f"{AUDIO_PROJECTION_PREFIX}down_proj_for_{mode}", (outer, outer))
    shapes[f"{IMAGE_PROJECTION_PREFIX}global_img_feature_extensor"] = (1, 1, image_width)
    shapes[f"{IMAGE_PROJECTION_PREFIX}sub_img_feature_extensor"] = (1, 1, 1, image_width)
    shapes |= _pair(f"{IMAGE_PROJECTION_PREFIX}img_projection_up", (outer, image_width))
    return shapes | _pair(f"{IMAGE_PROJECTION_PREFIX}img_projection_down", (outer, outer))


def _decoder_shapes(decoder: DecoderConfig) -> Shapes:
    shapes: Shapes = {"embed_tokens.weight": (decoder.vocab_size, decoder.width), "norm.weight": (decoder.width,)}
    for index in range(decoder.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{index}.{norm}.weight"] = (decoder.width,)
    return shapes | {f"{name}.weight": shape for name, shape in _projections(decoder).items()}


def _projections(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the linear layers that adapters change."""
    width, queries = decoder.width, decoder.num_heads * decoder.head_width
    shapes = {
        "self_attn.qkv_proj": (queries + 2 * decoder.num_kv_heads * decoder.head_width, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_up_proj": (2 * decoder.ffn, width),
        "mlp.down_proj": (width, decoder.ffn),
    }
    return {f"layers.{index}.{name}": shape for index in range(decoder.num_layers) for name, shape in shapes.items()}


# The original layout

_TO_NATIVE: tuple[tuple[str, str], ...] = (
    (r"(\.feed_forward_(?:in|out))\.net\.0\.linear\.", r"\1.gate_up_proj."),
    (r"(\.feed_forward_(?:in|out))\.net\.2\.", r"\1.down_proj."),
    (r"\.self_attn\.linear_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
    (r"\.img_projection\.0\.", ".img_projection_up."),
    (r"\.img_projection\.2\.", ".img_projection_down."),
    (r"\.glb_GN$", ".global_img_feature_extensor"),
    (r"\.sub_GN$", ".sub_img_feature_extensor"),
    (r"\.audio_projection\.speech\.0\.", ".up_proj_for_speech."),
    (r"\.audio_projection\.speech\.2\.", ".down_proj_for_speech."),
    (r"\.audio_projection\.vision\.0\.", ".up_proj_for_vision_speech."),
    (r"\.audio_projection\.vision\.2\.", ".down_proj_for_vision_speech."),
)
# The names of the conformer are also those of the decoder and of the vision encoder, so its block has to be named.
_BLOCK = r"(\.audio_embed\.encoder\.encoders\.\d+"
_TO_ORIGINAL: tuple[tuple[str, str], ...] = (
    (_BLOCK + r"\.feed_forward_(?:in|out))\.gate_up_proj\.", r"\1.net.0.linear."),
    (_BLOCK + r"\.feed_forward_(?:in|out))\.down_proj\.", r"\1.net.2."),
    (_BLOCK + r"\.self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (_BLOCK + r"\.self_attn)\.o_proj\.", r"\1.linear_out."),
    (r"\.img_projection_up\.", ".img_projection.0."),
    (r"\.img_projection_down\.", ".img_projection.2."),
    (r"\.global_img_feature_extensor$", ".glb_GN"),
    (r"\.sub_img_feature_extensor$", ".sub_GN"),
    (r"\.up_proj_for_speech\.", ".audio_projection.speech.0."),
    (r"\.down_proj_for_speech\.", ".audio_projection.speech.2."),
    (r"\.up_proj_for_vision_speech\.", ".audio_projection.vision.0."),
    (r"\.down_proj_for_vision_speech\.", ".audio_projection.vision.2."),
)
_FIRST_END, _TURN_END = 199_999, 200_020
# What the code of the original layout fixes, for its config.json says nothing of it: SigLIP-400M, and the placeholders.
_ORIGINAL_VISION: dict[str, Any] = {
    "hidden_size": 1_152,
    "intermediate_size": 4_304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "image_token_id": 200_010,
    "feature_layer": -2,
}
_ORIGINAL_AUDIO_TOKEN = 200_011
_AUDIO_RENAMES = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "linear_units": "intermediate_size",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
}
_AUDIO_FIXED: dict[str, Any] = {
    "input_layer": "nemo_conv",
    "causal": True,
    "batch_norm": False,
    "bias_in_glu": True,
    "ext_pw_kernel_size": 1,
}
_IMAGE_FIXED: dict[str, Any] = {
    "use_hd_transform": True,
    "hd_transform_order": "sub_glb",
    "with_learnable_separator": True,
    "image_token_compression_cls": "avg_pool_2d",
    "projection_cls": "mlp",
}
_DECODER_FIXED: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False}
_ORIGINAL_ONLY = frozenset(
    {"_name_or_path", "architectures", "auto_map", "embd_layer", "audio_processor", "speech_lora", "vision_lora"}
    | {"rope_scaling", "rope_theta", "partial_rotary_factor", "transformers_version", "model_type"}
    | _DECODER_FIXED.keys()
)


def native_key(original: str) -> tuple[AdapterName | None, str]:
    """Return the adapter to which a key of the original layout belongs, or None, and the native key."""
    for name in ADAPTERS:
        for matrix in ("lora_A", "lora_B"):
            if original.endswith(f".{matrix}.{name}.weight"):
                return name, f"{original.removesuffix(f'.{name}.weight')}.weight"
    for pattern, replacement in _TO_NATIVE:
        key, num_replaced = re.subn(pattern, replacement, original)
        if num_replaced:
            return None, key
    return None, original.replace(".base_layer.", ".")


def original_key(native: str, adapted: Collection[str]) -> str:
    """Return what the original layout calls `native`; `adapted` are the native names of the layers with adapters."""
    for pattern, replacement in _TO_ORIGINAL:
        key, num_replaced = re.subn(pattern, replacement, native)
        if num_replaced:
            return key
    layer, _, ending = native.rpartition(".")
    return f"{layer}.base_layer.{ending}" if layer in adapted else native


def native_config(original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the native `config.json` of a checkpoint in the original layout.

    The original file does not tell the dimensions of the vision encoder nor the placeholder tokens; those of the
    published model stand in, unless the file has `vision_config` or `audio_processor.config.audio_token_id`.

    Raises:
        ModelError: naming the key that is missing or asks for what is not computed here.
    """
    if original.get("model_type") != ORIGINAL_MODEL_TYPE:
        raise ModelError(f"model_type is {original.get('model_type')!r}, expected {ORIGINAL_MODEL_TYPE!r}")
    _require("config.json", original, _DECODER_FIXED)
    image = _section(original, "embd_layer", "image_embd_layer")
    _require("embd_layer.image_embd_layer", image, _IMAGE_FIXED)
    native = {key: value for key, value in original.items() if key not in _ORIGINAL_ONLY}
    scaling = _section(original, "rope_scaling")
    native["rope_parameters"] = {
        "rope_type": scaling.get("rope_type", scaling.get("type")),
        "rope_theta": original.get("rope_theta"),
        "partial_rotary_factor": original.get("partial_rotary_factor"),
        "short_factor": scaling.get("short_factor"),
        "long_factor": scaling.get("long_factor"),
        "original_max_position_embeddings": original.get("original_max_position_embeddings"),
        **{key: scaling[key] for key in ("factor", "attention_factor") if scaling.get(key) is not None},
    }
    if original.get("eos_token_id") == _FIRST_END:
        # The published file tells one of the two tokens that end a text.
        native["eos_token_id"] = [_FIRST_END, _TURN_END]
    native["audio_config"] = _native_audio(original)
    crop = {"crop_size": image.get("crop_size")}
    native["vision_config"] = {**_ORIGINAL_VISION, **crop, **(original.get("vision_config") or {})}
    return {**native, "model_type": MODEL_TYPE}


def _native_audio(original: Mapping[str, Any]) -> dict[str, Any]:
    audio = _section(original, "audio_processor", "config")
    _require("audio_processor.config", audio, _AUDIO_FIXED)
    bias = _section(audio, "relative_attention_bias_args")
    _require("relative_attention_bias_args", bias, {"type": "t5"})
    dropped = {"nemo_conv_settings", "relative_attention_bias_args", "encoder_embedding_config", "cnn_layer_norm"}
    dropped |= {"activation_checkpointing"} | _AUDIO_FIXED.keys()
    native = {_AUDIO_RENAMES.get(key, key): value for key, value in audio.items() if key not in dropped}
    native["nemo_conv_channels"] = _section(audio, "nemo_conv_settings").get("conv_channels")
    native["bias_max_distance"] = bias.get("t5_bias_max_distance")
    native["bias_symmetric"] = bias.get("t5_bias_symmetric", False)
    native["downsample_rate"] = _section(original, "embd_layer", "audio_embd_layer").get("downsample_rate", 1)
    native.setdefault("audio_token_id", _ORIGINAL_AUDIO_TOKEN)
    return native


def _section(raw: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    found: Any = raw
    for key in path:
        found = found.get(key)
        if not isinstance(found, Mapping):
            raise ModelError(f"{'.'.join(path)}: {key} is {type(found).__name__}, expected an object")
    return found  # type: ignore[no-any-return]


def _require(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise ModelError(f"{where}: {key} is {found[key]!r}; only {value!r} is computed here")
