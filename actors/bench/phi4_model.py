"""`surtitle bench phi4 --random-weights`: memory and speed of each part, and the streams they make on paper.

On cuda the model has its real size and its weights are made there, in bfloat16, from nothing; on a CPU the same code
measures a scaled one in float32. Speed does not depend on what weights are, but text does: nothing is said about that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from actors.bench.phi4_capacity import TOKENS_PER_S, Load, Projection, Speeds, project
from pipeline.models.device import choose_device, synchronize
from pipeline.models.phi4.config import Phi4Config, read_config
from pipeline.models.phi4.conformer import TOKEN_STEPS, ConformerEncoder
from pipeline.models.phi4.decoder import DecoderRow, Phi4Decoder
from pipeline.models.phi4.keys import ADAPTERS, PREFIXES, Part, Shapes, adapter_shapes, expected_shapes
from pipeline.models.phi4.kv_memory import Phi4Lease
from pipeline.models.phi4.lora import Adapter, LoraWeights
from pipeline.models.phi4.scaled import ScaledSize, adapter_settings, random_tensors, real_config, scaled_config
from pipeline.models.phi4.siglip import SiglipEncoder
from pipeline.models.weights import ModelParams

if TYPE_CHECKING:
    from rich.console import RenderableType

_STREAMS = (1, 8, 64)
_SLOT_TOKENS = 256
_PROMPT_TOKENS = 92  # of five seconds of sound and an instruction, with a draft
_TOKENS_PER_STEP = 512
_CLIP_S = 5
_NUM_CLIPS = {"cpu": 2, "cuda": 8}
_NUM_CROPS = {"cpu": 1, "cuda": 7}
_NUM_TURNS = {"cpu": 2, "cuda": 20}
_MIB = 2**20
_NUM_TOLD = 6

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Where to measure ("cpu" or "cuda"), how often, with how many threads (0: all cores), and the size on a CPU."""

    device: str = "cpu"
    num_repeats: int = 3
    num_threads: int = 0
    size: ScaledSize = field(default_factory=ScaledSize)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """Memory by part in bytes (`device_bytes`: what the device says it gave; None on a CPU), and speeds."""

    device: str
    dtype: str
    num_parameters: int
    weight_bytes: dict[str, int]
    kv_bytes_per_token: int
    device_bytes: int | None
    encoder_ms_per_audio_s: float
    crops_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]
    projection: Projection

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        projection = self.projection
        return {
            "mode": "random_weights",
            "device": self.device,
            "dtype": self.dtype,
            "num_parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "device_bytes": self.device_bytes,
            "encoder_ms_per_audio_s": round(self.encoder_ms_per_audio_s, 4),
            "crops_per_s": round(self.crops_per_s, 3),
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 1),
            "decode_tokens_per_s": {str(key): round(value, 2) for key, value in self.decode_tokens_per_s.items()},
            "projection": {
                "assumptions": asdict(Load()),
                "usable_share": projection.usable_share,
                "encoder_s_per_stream_s": round(projection.encoder_s, 6),
                "prefill_s_per_stream_s": round(projection.prefill_s, 6),
                "decode_s_per_stream_s": round(projection.decode_s, 6),
                "scenes_s_per_stream_s": round(projection.scenes_s, 6),
                "num_streams": round(projection.num_streams, 2),
                "num_streams_with_video": round(projection.num_streams_with_video, 2),
            },
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        title = f"Random weights, {self.num_parameters / 1e6:,.0f} million parameters, {self.device}, {self.dtype}"
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        for name, num_bytes in self.weight_bytes.items():
            table.add_row(f"weights: {name}", f"{num_bytes / _MIB:,.0f} MiB")
        table.add_row("keys and values of a token", f"{self.kv_bytes_per_token / 1024:,.0f} KiB")
        if self.device_bytes is not None:
            table.add_row("on the device, with memory for 64 streams", f"{self.device_bytes / _MIB:,.0f} MiB")
        table.add_row("audio encoder, a second of sound", f"{self.encoder_ms_per_audio_s:,.2f} ms")
        table.add_row("vision encoder", f"{self.crops_per_s:,.1f} crops/s")
        table.add_row("decoder, prompts", f"{self.prefill_tokens_per_s:,.0f} tokens/s")
        for num_streams, speed in self.decode_tokens_per_s.items():
            table.add_row(f"decoder, single tokens of {num_streams} streams", f"{speed:,.1f} tokens/s")
        return Group(table, Text("\n".join(self._lines())))

    def _lines(self) -> list[str]:
        load, found = Load(), self.projection
        return [
            f"projected, not played: {found.num_streams:.1f} live streams, {found.num_streams_with_video:.1f} with "
            f"video, at {found.usable_share:.0%} of the device",
            f"a stream: {load.speech_share:.0%} speech, a partial every {load.cadence_s:g} s over {load.window_s:g} s "
            f"of sound, {load.num_prompt_tokens:.0f} tokens fed with the draft, {load.num_new_tokens:g} passes behind; "
            f"a scene of {load.num_crops} crops every {load.scene_s:g} s",
            f"seconds of the device for a second of a stream: encoder {found.encoder_s:.2g}, prompts "
            f"{found.prefill_s:.2g}, single tokens {found.decode_s:.2g}, scenes {found.scenes_s:.2g}",
        ]


def run_phi4_model(options: ModelOptions, on_progress: Progress | None = None) -> ModelReport:
    """Make the parts one after the other and measure each.

    Sets torch's thread count.

    Raises:
        ModelError: if cuda is asked for and there is none.
    """
    return _Bench(options, on_progress or (lambda _what, _num_done, _num_all: None)).run()


class _Bench:
    """The dimensions and where they are measured; parts live only as long as they are."""

    def __init__(self, options: ModelOptions, on_progress: Progress) -> None:
        torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
        self._device = choose_device(ModelParams(device="cuda" if options.device == "cuda" else "cpu"))
        is_cuda = self._device.type == "cuda"
        self._dtype = torch.bfloat16 if is_cuda else torch.float32
        self._config: Phi4Config = read_config(real_config() if is_cuda else scaled_config(options.size))
        self._generator = torch.Generator(self._device).manual_seed(0)
        self._num_repeats = options.num_repeats
        self._num_turns = _NUM_TURNS[self._device.type]
        self._on_progress = on_progress
        self._num_told = 0
        self._num_parameters = 0
        self._weight_bytes: dict[str, int] = {}

    def run(self) -> ModelReport:
        """Measure everything."""
        encoder_ms = self._measure_encoder()
        crops_per_s = self._measure_vision()
        self._tell("making the decoder")
        decoder = self._make_decoder()
        memory = decoder.memory.keys[:, 0, :, 0]
        num_bytes = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None
        self._tell("decoder, prompts")
        leases = [self._open(decoder, slot) for slot in range(max(_STREAMS))]
        prefill = self._measure_prefill(decoder, leases)
        self._tell("decoder, single tokens")
        decode = {number: self._measure_decode(decoder, leases[:number]) for number in _STREAMS}
        speeds = Speeds(encoder_ms / 1e3, crops_per_s, prefill, max(decode.values()))
        self._tell("done")
        return ModelReport(
            device=self._device.type,
            dtype=str(self._dtype).removeprefix("torch."),
            num_parameters=self._num_parameters,
            weight_bytes=self._weight_bytes,
            kv_bytes_per_token=2 * memory.numel() * memory.element_size(),
            device_bytes=num_bytes,
            encoder_ms_per_audio_s=encoder_ms,
            crops_per_s=crops_per_s,
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
            projection=project(speeds),
        )

    def _measure_encoder(self) -> float:
        """Return milliseconds for each second of sound, clips together."""
        self._tell("audio encoder")
        encoder = ConformerEncoder(self._config.audio, self._part("audio"), self._device, self._dtype)
        num_clips, num_steps = _NUM_CLIPS[self._device.type], round(_CLIP_S * TOKENS_PER_S) * TOKEN_STEPS
        shape = (num_steps, self._config.audio.num_mels)
        clips = [self._random(*shape).mul_(4).add_(8) for _ in range(num_clips)]
        return 1e3 * self._seconds(lambda: encoder(clips)) / (num_clips * _CLIP_S)

    def _measure_vision(self) -> float:
        self._tell("vision encoder")
        vision = self._config.vision
        encoder = SiglipEncoder(vision, self._part("vision"), self._device, self._dtype)
        num_crops, side = _NUM_CROPS[self._device.type], vision.crop_size // vision.patch_size
        pixels = self._random(num_crops, vision.num_channels, vision.crop_size, vision.crop_size).clamp_(-1, 1)
        mask = torch.ones((num_crops, side, side), dtype=torch.bool)
        return num_crops / self._seconds(lambda: encoder(pixels, mask))

    def _make_decoder(self) -> Phi4Decoder:
        settings = adapter_settings(self._config)
        adapters: dict[Adapter, LoraWeights] = {}
        for name in ADAPTERS:
            shapes = adapter_shapes(self._config, settings[name]["r"])
            tensors = self._make(f"adapter {name}", shapes, PREFIXES["decoder"])
            adapters[Adapter(name)] = LoraWeights(tensors, float(settings[name]["lora_alpha"]))
        return Phi4Decoder(
            self._config.decoder,
            self._part("decoder"),
            adapters,
            num_slots=max(_STREAMS),
            max_tokens=_SLOT_TOKENS,
            device=self._device,
            dtype=self._dtype,
        )

    def _open(self, decoder: Phi4Decoder, slot: int) -> Phi4Lease:
        return decoder.open(slot, _PROMPT_TOKENS, _SLOT_TOKENS - _PROMPT_TOKENS, Adapter.SPEECH)

    def _measure_prefill(self, decoder: Phi4Decoder, leases: Sequence[Phi4Lease]) -> float:
        """Return tokens a second of passes over as many prompts as a step of the scheduler takes."""
        prompt = self._random(_PROMPT_TOKENS, self._config.decoder.width)
        rows = [DecoderRow(lease, 0, prompt) for lease in leases[: _TOKENS_PER_STEP // _PROMPT_TOKENS]]
        return len(rows) * _PROMPT_TOKENS / self._seconds(lambda: decoder.forward(rows))

    def _measure_decode(self, decoder: Phi4Decoder, leases: Sequence[Phi4Lease]) -> float:
        """Return tokens a second of passes with one token of each stream; picks are made, and not waited for."""
        rows = [DecoderRow(lease, _PROMPT_TOKENS, (index,)) for index, lease in enumerate(leases)]
        return len(rows) / self._seconds(lambda: decoder.logits(decoder.forward(rows)).argmax(-1))

    def _seconds(self, run: Callable[[], object]) -> float:
        """Return what one `run` takes in a series of them: the best series of all, after one to warm up."""
        found = []
        run()
        for _ in range(self._num_repeats):
            synchronize(self._device)
            started = time.perf_counter()
            for _ in range(self._num_turns):
                run()
            synchronize(self._device)
            found.append((time.perf_counter() - started) / self._num_turns)
        return min(found)

    def _part(self, part: Part) -> dict[str, Tensor]:
        return self._make(part, expected_shapes(self._config, part), PREFIXES[part])

    def _make(self, name: str, shapes: Shapes, prefix: str) -> dict[str, Tensor]:
        tensors = random_tensors(shapes, self._generator, self._device, self._dtype)
        num_parameters = sum(tensor.numel() for tensor in tensors.values())
        self._num_parameters += num_parameters
        self._weight_bytes[name] = num_parameters * self._dtype.itemsize
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)

    def _tell(self, what: str) -> None:
        self._on_progress(what, self._num_told, _NUM_TOLD)
        self._num_told += 1
