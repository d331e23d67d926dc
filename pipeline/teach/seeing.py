"""Stages 2 and 4: seeing, and being asked aloud about what is seen.

Pictures are drawn anew for every step. In stage 2 the vision encoder, its projection, the separators and the vision
adapter learn to describe one and several frames and to answer typed questions. At first they learn which words belong
to each position, a sigmoid for each: that is SigLIP's loss, here with the words as the language model knows them, so
that the projection leads to where it can read. As long as it does not, what the model asks of the encoder is noise.

In stage 4 the projection of sound beside pictures learns, and the vision adapter goes on learning, old tasks among new
ones; the ears stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.models.phi4.conformer import Projector
from pipeline.teach.clips import Clip, Distortion
from pipeline.teach.gallery import NUM_SMALL, SIZES_PX, Gallery, Shown, show
from pipeline.teach.language import ANSWER, description, draw_frames
from pipeline.teach.learning import Part
from pipeline.teach.lessons import Lesson, Teacher
from pipeline.teach.network import Network, Row
from pipeline.teach.things import KINDS, THINGS
from pipeline.teach.world import draw_question

_SHEETS_SHARE, _MATCHING_SHARE, _READING_SHARE, _SMALL_SHARE = 0.2, 0.55, 0.58, 0.62
"""Of the stage: until when things are matched in sheets of them, and in scenes too; until when the encoder rests while
what it gives is read; until when only small pictures are read."""
_SCENES_AMONG_SHEETS = 0.5
_MATCHING_WEIGHT = 0.4
_FIRST_SCALE, _FIRST_BIAS = 8.0, -4.0  # a word is as near to itself as 1, about
_BATCH_CROPS = 18
_MAX_PICTURES = 14
_SEVERAL_SHARE, _ASKED_SHARE, _SEVERAL_FROM = 0.2, 0.35, 0.65
_SPOKEN_SHARE, _SEVERAL_SHARE_AT_LAST = 0.6, 0.4  # in stage 4
_WEIGHT_OF_SMALL, _WEIGHT_OF_LARGE = 1, 2
_KINDS = [[THINGS.index(thing) for thing in kind] for kind in KINDS]


@dataclass(frozen=True, slots=True)
class Look:
    """One request about pictures, and those."""

    lesson: Lesson
    pictures: tuple[Shown, ...]


class _Matcher(nn.Module):
    """The scale and bias of SigLIP's loss (Zhai et al. 2023, https://arxiv.org/abs/2303.15343)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(_FIRST_SCALE)), nn.Parameter(torch.tensor(_FIRST_BIAS))

    def forward(self, nearness: Tensor) -> Tensor:
        found: Tensor = self.scale * nearness + self.bias
        return found


class Seeing:
    """The steps of stage 2."""

    several_share = _SEVERAL_SHARE
    """Parts that are of several frames each, once there are any."""

    def __init__(self, network: Network, teacher: Teacher, seed: int) -> None:
        self._network, self._teacher = network, teacher
        config = network.nano.config.vision
        self._gallery = Gallery(config, seed)
        tokens = [teacher.tokenizer.encode(f" {thing}")[0] for thing in THINGS]
        self._things = torch.tensor(tokens)
        self.matcher = _Matcher()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        found = {f"image.{name}": value for name, value in self._network.image.named_parameters()}
        found |= {f"matcher.{name}": value for name, value in self.matcher.named_parameters()}
        return found | {f"vision:{key}": value for key, value in self._network.nano.adapters["vision"].tensors.items()}

    def part(self, number: int, rng: random.Random, progress: float) -> Part:
        """Return one part of step `number`."""
        if progress < _MATCHING_SHARE:
            return self._matching_part(number, rng, has_scenes=progress >= _SHEETS_SHARE)
        looks = self._draw_looks(number, rng, progress)
        pictures = [picture for look in looks for picture in look.pictures]
        with torch.set_grad_enabled(progress >= _READING_SHARE):
            seen = self._network.look([picture.crops for picture in pictures])
        things = self._match(seen, pictures)
        answered = self._network.loss(self._rows(looks, seen, [None] * len(looks)), "vision")
        told = {"things": things.item(), "answers": answered.answer.item()}
        return Part(answered.answer + _MATCHING_WEIGHT * things, told, answered.num_tokens)

    def _matching_part(self, number: int, rng: random.Random, *, has_scenes: bool) -> Part:
        pictures: list[Shown] = []
        num_crops = 0
        while num_crops < _BATCH_CROPS:
            if has_scenes and rng.random() < _SCENES_AMONG_SHEETS:
                pictures.append(self._gallery.draw(number, rng.choice(SIZES_PX), rng))
            else:
                pictures.append(self._gallery.draw_sheet(number, rng))
            num_crops += len(pictures[-1].crops.pixels)
        seen = self._network.look([picture.crops for picture in pictures])
        loss = self._match(seen, pictures)
        return Part(loss, {"things": loss.item()}, sum(each.shape[:-1].numel() for each in seen))

    def _match(self, seen: Sequence[Tensor], pictures: Sequence[Shown]) -> Tensor:
        """Return the loss of telling what is at each position, and which of its kind it is.

        A kind is at few positions, and its words share those: without a loss of their own, ten digits and three shapes
        are learned last, or not at all.
        """
        found = self.matcher(self._network.name_positions(torch.cat(list(seen)), self._things))
        wanted = torch.cat([picture.things for picture in pictures]).float()
        things = F.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / wanted.sum().clamp_min(1.0)
        for kind in _KINDS:
            which = wanted[..., kind]
            is_there = which.sum(-1) == 1
            if is_there.any():
                things = things + F.cross_entropy(found[..., kind][is_there], which[is_there])
        return things

    def _draw_looks(self, number: int, rng: random.Random, progress: float) -> list[Look]:
        """Return descriptions and typed questions, each with its pictures; those of a part are of one size."""
        num_sizes = 1 if progress < _READING_SHARE else NUM_SMALL if progress < _SMALL_SHARE else len(SIZES_PX)
        weights = [_WEIGHT_OF_SMALL] * NUM_SMALL + [_WEIGHT_OF_LARGE] * (len(SIZES_PX) - NUM_SMALL)
        size_px = rng.choices(SIZES_PX[:num_sizes], weights[:num_sizes])[0]
        has_several = progress > _SEVERAL_FROM and rng.random() < self.several_share
        looks: list[Look] = []
        num_crops = num_pictures = 0
        while num_crops < _BATCH_CROPS and num_pictures < _MAX_PICTURES:
            look = self._draw_several(size_px, rng) if has_several else self._draw_one(number, size_px, rng)
            looks.append(look)
            num_crops += sum(picture.crops.layout.num_crops for picture in look.pictures)
            num_pictures += len(look.pictures)
        return looks

    def _draw_one(self, number: int, size_px: tuple[int, int], rng: random.Random) -> Look:
        picture = self._gallery.draw(number, size_px, rng)
        lesson = description([picture.scene])
        if rng.random() < _ASKED_SHARE:
            question = draw_question(rng, picture.scene)
            lesson = Lesson(ANSWER, question.answer, text=question.text)
        return Look(lesson, (picture,))

    def _draw_several(self, size_px: tuple[int, int], rng: random.Random) -> Look:
        scenes, config = draw_frames(rng), self._network.nano.config.vision
        return Look(description(scenes), tuple(show(scene, size_px, config, rng) for scene in scenes))

    def _rows(self, looks: Sequence[Look], seen: Sequence[Tensor], sounds: Sequence[Tensor | None]) -> list[Row]:
        pictures = [picture.crops for look in looks for picture in look.pictures]
        projected = iter(self._network.project_pictures(seen, pictures))
        rows = []
        for look, sound in zip(looks, sounds, strict=True):
            layouts = [picture.crops.layout for picture in look.pictures]
            num_sound_tokens = 0 if sound is None else len(sound)
            tokens, num_prompt_tokens = self._teacher.tokens(look.lesson, num_sound_tokens, layouts)
            positions = torch.cat([next(projected) for _ in layouts])
            rows.append(Row(tokens, num_prompt_tokens, sound=sound, pictures=positions))
        return rows


class SpokenQuestions(Seeing):
    """The steps of stage 4. `clips` are questions, spoken."""

    several_share = _SEVERAL_SHARE_AT_LAST

    def __init__(self, network: Network, teacher: Teacher, clips: Sequence[Clip], seed: int) -> None:
        super().__init__(network, teacher, seed)
        self._clips: dict[str, list[Clip]] = {}
        for clip in clips:
            self._clips.setdefault(clip.text, []).append(clip)
        self._distortion = Distortion(AudioFeatures(network.nano.config.audio.num_mels), seed)

    def begin(self) -> None:
        """Begin with the projection of speech, which leads to where the language model understands it."""
        audio = self._network.audio
        for part in ("up", "down"):
            source, target = (getattr(audio, f"{part}_proj_for_{mode}") for mode in ("speech", "vision_speech"))
            target.load_state_dict(source.state_dict())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        audio = self._network.audio
        found = {f"audio.{name}": value for name, value in audio.named_parameters() if "for_vision_speech" in name}
        return found | super().parameters()

    def part(self, number: int, rng: random.Random, progress: float) -> Part:
        """Return one part of step `number`."""
        del progress
        looks = self._draw_looks(number, rng, 1.0)
        clips: dict[int, Clip] = {}
        for index, look in enumerate(looks):
            if len(look.pictures) == 1 and rng.random() < _SPOKEN_SHARE:
                question = draw_question(rng, look.pictures[0].scene)
                if question.text in self._clips:
                    looks[index] = Look(Lesson(ANSWER, question.answer), look.pictures)
                    clips[index] = rng.choice(self._clips[question.text])
        sounds: list[Tensor | None] = [None] * len(looks)
        if clips:
            with torch.no_grad():
                heard, lengths = self._network.hear(
                    [self._distortion(clip.features, rng)[0] for clip in clips.values()]
                )
            projected = self._network.project_sound(heard, Projector.VISION_SPEECH)
            for place, index in enumerate(clips):
                sounds[index] = projected[place, : lengths[place]]
        seen = self._network.look([picture.crops for look in looks for picture in look.pictures])
        answered = self._network.loss(self._rows(looks, seen, sounds), "vision")
        return Part(answered.answer, {"answers": answered.answer.item()}, answered.num_tokens)
