"""Phi-4-multimodal's decoder as a runner of the decode engine: contexts, picks, leases.

Sound and pictures arrive as their encoders gave them. They are projected to the decoder's width when a slot is opened,
which is when the mix of the request is known: it decides the adapter and the audio projection (technical report,
https://arxiv.org/abs/2503.01743, section 2; docs/phi4.md). A prompt has a placeholder token for each of their
positions, those of one kind side by side.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import DecoderParts
from pipeline.decode.runner import Context, Lease, Pick, Row, RowResult, TimedText
from pipeline.errors import ModelError, StageError
from pipeline.items import Embeddings, Pictures, Word
from pipeline.models.device import choose_device
from pipeline.models.linear import PlainLinear, pack_linear
from pipeline.models.phi4.checkpoint import load_adapter, load_config, load_decoder
from pipeline.models.phi4.config import Phi4Config
from pipeline.models.phi4.conformer import AudioProjection, Projector
from pipeline.models.phi4.decoder import DecoderRow, Phi4Decoder
from pipeline.models.phi4.dtype import phi4_dtype
from pipeline.models.phi4.keys import ADAPTERS
from pipeline.models.phi4.kv_memory import Phi4Lease
from pipeline.models.phi4.lora import Adapter, LoraWeights
from pipeline.models.phi4.prompts import Phi4Prompter
from pipeline.models.phi4.siglip import VisionProjection
from pipeline.models.phi4.tokenizer import load_tokenizer
from pipeline.models.tier import phi4_directory
from pipeline.models.weights import ModelParams


@dataclass(slots=True)
class _Taken:
    """A context in the decoder's width, by placeholder token, and the places where its positions begin."""

    positions: dict[int, torch.Tensor]  # [n, width]
    first_places: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Projections:
    """What brings sound and pictures to the decoder's width."""

    audio: AudioProjection
    vision: VisionProjection


class Phi4Runner:
    """Implements `pipeline.decode.runner.DecodeRunner`; in float32 every row is exact (decoder.py).

    Args:
        config: of the whole model.
        decoder: the language model with its adapters and memory.
        projections: of sound and pictures.
        num_text_tokens: tokens below this are text; of all others only those of `ends` may be picked.
        ends: the tokens that end a text.
    """

    has_one_arithmetic = True

    def __init__(
        self,
        config: Phi4Config,
        decoder: Phi4Decoder,
        projections: Projections,
        *,
        num_text_tokens: int,
        ends: Collection[int],
    ) -> None:
        self._config = config
        self._projections = projections
        self._taken: dict[int, _Taken] = {}  # by slot
        self.decoder = decoder
        self.num_slots = decoder.memory.num_slots
        self.partial_dtype = self.final_dtype = str(decoder.dtype).removeprefix("torch.")
        is_pickable = torch.zeros(config.decoder.vocab_size, dtype=torch.bool)
        is_pickable[:num_text_tokens] = True
        is_pickable[list(ends)] = True
        self._not_pickable = (~is_pickable).to(decoder.device)

    def check(self, context: Context) -> None:
        """Check that sound and pictures have the model's widths and finite values.

        Raises:
            ValueError: if not.
        """
        if context.sound is not None:
            values, width = context.sound.values, self._config.audio.width
            if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != width or not len(values):
                raise ValueError(f"the sound is {values.dtype}{list(values.shape)}, expected float32[n, {width}]")
            _check_finite("sound", values)
        if context.pictures is not None:
            vision = self._config.vision
            for picture in context.pictures.pictures:
                layout, values = picture.layout, picture.values
                side = layout.side_patches // 2
                expected = (layout.num_crops, side, side, vision.width)
                if (layout.crop_size, layout.patch_size) != (vision.crop_size, vision.patch_size):
                    raise ValueError(f"crops of {layout.crop_size} pixels, the model's have {vision.crop_size}")
                if values.dtype != np.float32 or values.shape != expected:
                    raise ValueError(f"a picture is {values.dtype}{list(values.shape)}, expected float32{expected}")
                _check_finite("pictures", values)

    def context_cost(self, context: Context) -> int:  # noqa: ARG002 - its positions are tokens of the prompt
        """Return 0: projecting a position costs a three-hundredth of what its token costs in the decoder."""
        return 0

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """Return how many tokens fit a slot behind a prompt without crossing the place where rotary factors change."""
        rope, room = self._config.decoder.rope, self.decoder.memory.max_tokens - num_prompt_tokens
        limit = rope.original_max_positions
        return min(room, limit - num_prompt_tokens) if num_prompt_tokens <= limit else room

    def open(
        self, slot: int, context: Context, num_prompt_tokens: int, max_new_tokens: int, *, is_exact: bool
    ) -> Lease:
        """Lease `slot` and bring sound and pictures to the decoder's width. Every lease is exact in the same way.

        Raises:
            ValueError: if the request is larger than a slot, or a picture does not fit the model.
            StageError: if it would cross the place where rotary factors change.
        """
        del is_exact
        adapter, projector = Adapter.NONE, Projector.SPEECH
        if context.pictures is not None:
            adapter, projector = Adapter.VISION, Projector.VISION_SPEECH
        elif context.sound is not None:
            adapter = Adapter.SPEECH
        lease = self.decoder.open(slot, num_prompt_tokens, max_new_tokens, adapter)
        try:
            self._taken[slot] = _Taken(self._project(context.sound, context.pictures, projector))
        except BaseException:
            self.decoder.close(lease)
            raise
        return lease

    def renew(self, lease: Lease, num_prompt_tokens: int, max_new_tokens: int) -> Lease | None:
        """Return a lease of the same slot, with what is in it; None if the other prompt has other rotary factors."""
        if not isinstance(lease, Phi4Lease):
            raise TypeError(f"a lease of another runner: {type(lease).__name__}")
        return self.decoder.renew(lease, num_prompt_tokens, max_new_tokens)

    def close(self, lease: Lease, *, is_spoilt: bool = False) -> None:
        """End a lease; `is_spoilt`: what was computed under it may not be finite."""
        self.decoder.memory.close(lease, is_spoilt=is_spoilt)
        self._taken.pop(lease.slot, None)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """Run all `rows` in one forward pass; logits are computed for the wanted tokens only.

        Raises:
            StageError: if logits are not finite.
        """
        hidden = self.decoder.forward([piece for row in rows for piece in self._pieces(row)])
        wanted: list[int] = []
        start = 0
        for row in rows:
            wanted += range(start + row.pick_from, start + len(row.tokens))
            start += len(row.tokens)
        if not wanted:
            return [RowResult((), None) for _ in rows]
        logits = self.decoder.logits(hidden[wanted] if len(wanted) < start else hidden).float()
        picks = iter(_picks(logits.masked_fill_(self._not_pickable, -torch.inf)))
        return [RowResult(tuple(next(picks) for _ in row.tokens[row.pick_from :]), None) for row in rows]

    def words(self, lease: Lease, text: TimedText, num_audio_samples: int) -> tuple[Word, ...]:  # noqa: ARG002
        """Return nothing: the model does not tell when a word was said."""
        return ()

    def _project(
        self, sound: Embeddings | None, pictures: Pictures | None, projector: Projector
    ) -> dict[int, torch.Tensor]:
        positions = {}
        with torch.inference_mode():
            if sound is not None:
                # Copied: what arrives from another process may be read-only, which torch warns of.
                values = torch.tensor(sound.values, device=self.decoder.device, dtype=self.decoder.dtype)
                positions[self._config.audio.placeholder_token] = self._projections.audio(values, projector)
            if pictures is not None:
                project = self._projections.vision
                parts = [project(torch.tensor(item.values), item.layout) for item in pictures.pictures]
                positions[self._config.vision.placeholder_token] = torch.cat(parts)
        return positions

    def _pieces(self, row: Row) -> list[DecoderRow]:
        """Cut a row where its tokens change from text to positions of the context and back."""
        lease = row.lease
        if not isinstance(lease, Phi4Lease):
            raise TypeError(f"a lease of another runner: {type(lease).__name__}")
        taken = self._taken[lease.slot]
        pieces, place = [], row.position
        for kind, group in groupby(row.tokens, key=lambda token: token if token in taken.positions else None):
            tokens = tuple(group)
            if kind is None:
                pieces.append(DecoderRow(lease, place, tokens))
            else:
                first = place - taken.first_places.setdefault(kind, place)
                pieces.append(DecoderRow(lease, place, taken.positions[kind][first : first + len(tokens)]))
            place += len(tokens)
        return pieces


def _check_finite(what: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"the embeddings of the {what} have values that are not finite")


def _picks(logits: torch.Tensor) -> list[Pick]:
    """Return the best token of each row of `logits`, a row at a time on a CPU: no rounding depends on other rows."""
    rows = [logits] if logits.device.type != "cpu" else [logits[i : i + 1] for i in range(len(logits))]
    picks = []
    for row in rows:
        best, tokens = row.max(-1)
        logprobs = best - row.logsumexp(-1)
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise StageError("the decoder's logits are not finite; its input is unusable")
            picks.append(Pick(token, logprob))
    return picks


def load_parts(model: ModelParams, params: DecoderParams) -> DecoderParts:
    """Read the language model, its adapters, the projections and the tokenizer of `model`.

    Raises:
        ModelError: if the checkpoint is missing or unusable, or slots are larger than the model's context.
    """
    directory = phi4_directory(model)
    device = choose_device(model)
    dtype = phi4_dtype(model, device)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    if params.slot_tokens > config.decoder.rope.max_positions:
        raise ModelError(
            f"decoder.slot_tokens is {params.slot_tokens}, more than the {config.decoder.rope.max_positions} positions "
            "of the model: lower it"
        )
    tensors = load_decoder(directory)
    adapters: dict[Adapter, LoraWeights] = {Adapter(name): load_adapter(directory, name) for name in ADAPTERS}
    decoder = Phi4Decoder(
        config.decoder,
        tensors.language,
        adapters,
        num_slots=params.scheduler.num_slots,
        max_tokens=params.slot_tokens,
        device=device,
        dtype=dtype,
        # On a GPU blocks of a few rows would read all weights for each of them.
        pack=pack_linear if device.type == "cpu" else PlainLinear,
    )
    projections = Projections(
        audio=AudioProjection(config, tensors.audio_projection, device, dtype),
        vision=VisionProjection(config.vision, tensors.image_projection, device, dtype),
    )
    prompter = Phi4Prompter(tokenizer, config, chains_translations=params.chains_translations)
    runner = Phi4Runner(config, decoder, projections, num_text_tokens=prompter.num_text_tokens, ends=prompter.ends)
    return DecoderParts(runner, prompter, "phi4")
