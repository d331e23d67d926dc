"""Whisper's audio encoder, over windows of any length up to the checkpoint's 30 s.

Two convolutions (the second halves the rate to one position in 20 ms), sinusoidal positions, pre-norm transformer
layers (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2; transformers'
`WhisperEncoder` is the reference). A shorter window uses the first positions of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.models.attention import attend
from pipeline.models.linear import Arithmetic, Int8Linear, Linear, LinearFactory, fast_linear
from pipeline.models.norm import Norm, read_norm
from pipeline.models.whisper.checkpoint import WhisperCheckpoint
from pipeline.models.whisper.log_mel import HOP_SAMPLES

POSITION_SAMPLES = 2 * HOP_SAMPLES
"""One position of the encoder: 320 samples, 20 ms."""

_KERNEL = 3


@dataclass(frozen=True, slots=True)
class _Conv:
    """A convolution over time of kernel 3 and padding 1, as one matrix product.

    Rows of the input lie one behind the other, so three of them in a row are a row of the product's input without
    copying by hand; measured 0 to 20 % faster than `F.conv1d`, and it spares two transpositions.
    """

    linear: Linear  # [out, 3 * in]
    stride: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_windows, num_steps, width = x.shape
        padded = F.pad(x, (0, 0, 1, 1))
        rows = padded.as_strided(
            (num_windows, (num_steps - 1) // self.stride + 1, _KERNEL * width),
            (padded.stride(0), self.stride * width, 1),
        )
        # Copied out, as not every kind of layer reads rows that overlap in memory.
        return self.linear(rows.contiguous())


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Norm
    qkv: Linear  # [3 * width, width]
    attention_out: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear
    num_heads: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention_out(attend(self.qkv(self.attention_norm(x)), self.num_heads))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))


class WhisperEncoder:
    """The encoder of one checkpoint, in one arithmetic, on one device. It holds weights only: no state between calls.

    Args:
        checkpoint: the encoder part (`load_checkpoint(model, "encoder")`).
        device: where it computes.
        arithmetic: float32; bfloat16 throughout; or int8 for the products with weights and float32 for the rest.
    """

    def __init__(
        self,
        checkpoint: WhisperCheckpoint,
        device: torch.device | str = "cpu",
        arithmetic: Arithmetic = "float32",
    ) -> None:
        self.config = checkpoint.config
        self.device = torch.device(device)
        self.arithmetic = arithmetic
        self._dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
        pack: LinearFactory = Int8Linear if arithmetic == "int8" else fast_linear
        tensors = {name: tensor.to(self.device, self._dtype) for name, tensor in checkpoint.tensors.items()}
        self._conv1 = _conv(tensors, "encoder.conv1", pack, stride=1)
        self._conv2 = _conv(tensors, "encoder.conv2", pack, stride=2)
        self._positions = tensors["encoder.embed_positions.weight"]
        self._layers = [
            _layer(tensors, f"encoder.layers.{index}", pack, self.config.encoder_heads)
            for index in range(self.config.encoder_layers)
        ]
        self._norm = read_norm(tensors, "encoder.layer_norm")

    @torch.inference_mode()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of windows of one length.

        Args:
            features: [num_windows, num_steps, num_mels], an even number of steps of 10 ms (`LogMel`).

        Returns:
            [num_windows, num_steps / 2, width], bfloat16 if that is the arithmetic, else float32, on its device.

        Raises:
            ValueError: if the shape is not that, or there are more positions than the checkpoint has.
        """
        if features.dim() != 3 or features.shape[1] % 2 or features.shape[2] != self.config.num_mels:
            raise ValueError(
                f"features have shape {list(features.shape)}, expected [windows, an even number, "
                f"{self.config.num_mels}]"
            )
        num_positions = features.shape[1] // 2
        if not 1 <= num_positions <= len(self._positions):
            raise ValueError(f"the window has {num_positions} positions, the model takes 1 to {len(self._positions)}")
        x = F.gelu(self._conv1(features.to(self.device, self._dtype)))
        x = F.gelu(self._conv2(x)) + self._positions[:num_positions]
        for layer in self._layers:
            x = layer(x)
        return self._norm(x)


def _conv(tensors: dict[str, torch.Tensor], name: str, pack: LinearFactory, *, stride: int) -> _Conv:
    # [out, in, kernel] -> [out, kernel * in]: the order in which the rows of the input lie in memory.
    weight = tensors[f"{name}.weight"].permute(0, 2, 1).flatten(1).contiguous()
    return _Conv(pack(weight, tensors[f"{name}.bias"]), stride)


def _layer(tensors: dict[str, torch.Tensor], name: str, pack: LinearFactory, num_heads: int) -> _Layer:
    def linear(part: str) -> Linear:
        return pack(tensors[f"{name}.{part}.weight"], tensors[f"{name}.{part}.bias"])

    query_bias, value_bias = tensors[f"{name}.self_attn.q_proj.bias"], tensors[f"{name}.self_attn.v_proj.bias"]
    projections = [tensors[f"{name}.self_attn.{part}_proj.weight"] for part in ("q", "k", "v")]
    qkv = pack(
        torch.cat(projections),
        torch.cat([query_bias, torch.zeros_like(query_bias), value_bias]),  # Whisper's keys have no bias
    )
    return _Layer(
        attention_norm=read_norm(tensors, f"{name}.self_attn_layer_norm"),
        qkv=qkv,
        attention_out=linear("self_attn.out_proj"),
        ffn_norm=read_norm(tensors, f"{name}.final_layer_norm"),
        fc1=linear("fc1"),
        fc2=linear("fc2"),
        num_heads=num_heads,
    )
