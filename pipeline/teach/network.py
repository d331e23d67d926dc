"""What the model computes while it is taught: hearing, looking, and the loss of what it should say.

The modules are transformers' own; only how a batch goes through them is written here. Sounds of unequal length are
computed as each alone: the reference lets padding into them (docs/phi4.md, trap 2), and what is taught so would be
another model than the one that runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.phi4.conformer import Projector
from pipeline.models.phi4.crops import PictureCrops
from pipeline.models.phi4.keys import AdapterName
from pipeline.teach.learning import NUM_PARTS
from pipeline.teach.model import LowRank, Nano

_IGNORED = -100
_POOLED = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One request and its answer.

    Args:
        tokens: the prompt with its placeholders, and the answer with its end.
        num_prompt_tokens: how many of them are the prompt.
        sound: [n, decoder width], in place of the prompt's placeholders of sound.
        pictures: [m, decoder width], in place of those of pictures.
    """

    tokens: tuple[int, ...]
    num_prompt_tokens: int
    sound: Tensor | None = None
    pictures: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """What a batch of rows cost: mean over the tokens of the answers, and over those of the prompts."""

    answer: Tensor
    prompt: Tensor | None
    num_tokens: int


class Network:
    """The model in teaching as a function of sounds, pictures and texts; as many threads as parts may compute."""

    def __init__(self, nano: Nano) -> None:
        self.nano = nano
        extended = nano.model.model.embed_tokens_extend
        self.audio: Any = extended.audio_embed
        self.image: Any = extended.image_embed
        self._sound_token = nano.config.audio.placeholder_token
        self._picture_token = nano.config.vision.placeholder_token
        # Adapted weights take the place of a decoder's own while it computes, so each thread needs one for itself. They
        # share all weights with the model's, which is never touched.
        shared = {id(value): value for value in (*nano.model.parameters(), *nano.model.buffers())}
        self._decoders: SimpleQueue[nn.Module] = SimpleQueue()
        for _ in range(NUM_PARTS):
            self._decoders.put(copy.deepcopy(nano.model.model, dict(shared)))

    def hear(self, clips: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Return what the conformer makes of `clips` [steps, mels], [clips, longest, width], and their lengths.

        Equal to `ConformerEncoder`, but for clips of more than a window (40 s), which are not cut here.
        """
        encoder = self.audio.encoder
        lengths = torch.tensor([len(clip) for clip in clips])
        padded = nn.utils.rnn.pad_sequence([clip.float() for clip in clips], batch_first=True)
        h = encoder.encoder_embedding(padded)[:, None]
        for layer in encoder.embed.conv:
            if isinstance(layer, nn.Conv2d) and layer.stride[0] == _POOLED:
                # Alone, a clip has zeros behind it at every convolution over time.
                is_there = torch.arange(h.shape[2]) < lengths[:, None]
                h = h * is_there[:, None, :, None]
                lengths = (lengths - 1) // _POOLED + 1
            h = layer(h)
        h = encoder.embed.out(h.transpose(1, 2).flatten(2))
        longest = h.shape[1]
        is_past = torch.arange(longest) >= lengths[:, None]
        bias = (encoder.relative_attention_bias_layer(h) + 1).expand(len(clips), -1, -1, -1)
        bias = bias.masked_fill(is_past[:, None, None], float("-inf"))
        for block in encoder.encoders:
            h = block(h, bias)
        return h, lengths.tolist()

    def project_sound(self, heard: Tensor, projector: Projector) -> Tensor:
        """Return `heard` [..., width] in the decoder's width."""
        up = getattr(self.audio, f"up_proj_for_{projector.value}")
        down = getattr(self.audio, f"down_proj_for_{projector.value}")
        projected: Tensor = down(F.gelu(up(heard)))
        return projected

    def look(self, pictures: Sequence[PictureCrops]) -> list[Tensor]:
        """Return what SigLIP makes of each picture, [crops, side / 2, side / 2, width].

        Equal to `SiglipEncoder`; the layers that nothing computes with are left out.
        """
        encoder, config = self.image.img_processor, self.nano.config.vision
        mask = torch.cat([picture.mask for picture in pictures])
        h = encoder.embeddings(torch.cat([picture.pixels for picture in pictures]), mask)
        keys = None if bool(mask.all()) else mask.flatten(1)[:, None, None, :]
        for layer in encoder.encoder.layers[: config.num_used_layers]:
            h = layer(h, keys)
        side = config.crop_size // config.patch_size
        square = h.transpose(1, 2).reshape(len(h), -1, side, side)
        features = F.avg_pool2d(square, _POOLED).permute(0, 2, 3, 1)
        return list(torch.split(features, [len(picture.pixels) for picture in pictures]))

    def project_pictures(self, seen: Sequence[Tensor], pictures: Sequence[PictureCrops]) -> list[Tensor]:
        """Return the decoder's tokens of each picture, [layout.num_tokens, decoder width], as `VisionProjection`."""
        joined = [self._join(part, picture) for part, picture in zip(seen, pictures, strict=True)]
        projected = self._project_picture(torch.cat(joined))
        return list(torch.split(projected, [len(part) for part in joined]))

    def name_positions(self, features: Tensor, words: Tensor) -> Tensor:
        """Return how near each of `features` [..., width], projected, is to each of these tokens: [..., tokens]."""
        found: Tensor = self._project_picture(features) @ self.nano.model.model.embed_tokens.weight[words].T
        return found

    def _project_picture(self, features: Tensor) -> Tensor:
        projected: Tensor = self.image.img_projection_down(F.gelu(self.image.img_projection_up(features)))
        return projected

    def _join(self, features: Tensor, picture: PictureCrops) -> Tensor:
        """Return one picture's rows, each with its separator, the grid before the whole."""
        layout, (_, side, _, width) = picture.layout, features.shape
        grid = features[1:].view(layout.rows, layout.columns, side, side, width).transpose(1, 2)
        grid = grid.reshape(layout.rows * side, layout.columns * side, width)
        seen = grid[: layout.token_rows, : layout.token_columns]
        row_end = self.image.sub_img_feature_extensor[0]
        parts = [
            torch.cat([rows, row_end.expand(len(rows), 1, width)], 1).flatten(0, 1) for rows in (seen, features[0])
        ]
        return torch.cat([parts[0], self.image.global_img_feature_extensor[0], parts[1]])

    def loss(self, rows: Sequence[Row], adapter: AdapterName | None, *, has_prompt: bool = False) -> Loss:
        """Return the loss of the next token at every place of the answers, and with `has_prompt` of the prompts too.

        Logits are computed at the places that count, and nowhere else.
        """
        hidden = self._hidden(rows, self.nano.adapters[adapter] if adapter else None)
        longest = hidden.shape[1]
        answers, prompts = (torch.full((len(rows), longest), _IGNORED) for _ in range(2))
        for index, row in enumerate(rows):
            start, tokens = row.num_prompt_tokens, torch.tensor(row.tokens)
            answers[index, start - 1 : len(tokens) - 1] = tokens[start:]
            prompts[index, : start - 1] = tokens[1:start]
        answer = self._loss_at(hidden, answers)
        prompt = self._loss_at(hidden, prompts) if has_prompt else None
        return Loss(answer, prompt, sum(len(row.tokens) for row in rows))

    def _loss_at(self, hidden: Tensor, labels: Tensor) -> Tensor:
        is_wanted = labels != _IGNORED
        return F.cross_entropy(self.nano.model.lm_head(hidden[is_wanted]), labels[is_wanted])

    def _hidden(self, rows: Sequence[Row], adapter: LowRank | None) -> Tensor:
        """Return [rows, longest, width]: padding stands behind, where causal attention never sees it."""
        tokens = [torch.tensor(row.tokens) for row in rows]
        padding = self.nano.native["pad_token_id"]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding)
        embedded = self.nano.model.model.embed_tokens(ids)
        for token, found in (
            (self._sound_token, [row.sound for row in rows if row.sound is not None]),
            (self._picture_token, [row.pictures for row in rows if row.pictures is not None]),
        ):
            if found:
                embedded = embedded.index_put(
                    torch.nonzero(ids == token, as_tuple=True), torch.cat(found).to(embedded.dtype)
                )
        arguments = {"inputs_embeds": embedded, "use_cache": False}
        weights = adapter.merged(self.nano.model) if adapter else {}
        with self._decoder() as decoder:
            hidden: Tensor = torch.func.functional_call(decoder, weights, (), arguments).last_hidden_state
        return hidden

    @contextmanager
    def _decoder(self) -> Iterator[nn.Module]:
        """Yield a decoder that no other thread computes with; wait for one."""
        decoder = self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)
