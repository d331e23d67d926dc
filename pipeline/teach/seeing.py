"""Stages 3 and 4: seeing, and being asked aloud about what is seen.

Pictures are drawn anew for every step. In stage 3 the vision encoder, its projection, the separators and the vision
adapter learn to describe one and several frames and to answer typed questions. As in hearing there is a layer that is
thrown away afterwards, and at first nothing else: it tells from each position what is in the picture, with a sigmoid
for each thing, which is how SigLIP was taught before it came into the real model.

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
from pipeline.models.phi4.crops import PictureCrops
from pipeline.teach.clips import Clip, Distortion
from pipeline.teach.gallery import NUM_SMALL, SIZES_PX, Gallery, show
from pipeline.teach.grammar import COLOURS, SHAPES, SIDES
from pipeline.teach.language import ANSWER, description, draw_frames
from pipeline.teach.lessons import Lesson, Teacher
from pipeline.teach.network import Network, Row
from pipeline.teach.world import Scene, draw_question

_SMALLEST_SHARE, _MATCHING_SHARE, _READING_SHARE = 0.25, 0.33, 0.4
"""Of the stage: until when things are matched in the smallest pictures and in all, and until when the encoder rests.

At one size things are found in a minute; at all of them, to begin with, not in four."""
_BATCH_SMALLEST = 32
_MATCHING_WEIGHT = 0.03
_FIRST_BIAS = -6.0  # of one position: the loss sums over all of a picture, and most things are not in it
_BATCH_CROPS = 64
_MAX_PICTURES = 24
_SEVERAL_SHARE, _ASKED_SHARE, _SEVERAL_FROM = 0.2, 0.35, 0.5
_SPOKEN_SHARE = 0.6
_WEIGHT_OF_SMALL, _WEIGHT_OF_LARGE = 1, 2


_THINGS: tuple[str, ...] = (
    *(*SHAPES, *COLOURS, *SIDES),
    *(f"{place} {digit}" for place in ("first", "second") for digit in range(10)),
    *("gauge high", "gauge low", "door open", "door closed", "person inside", "person outside"),
)
_IS_SIDE = [thing in SIDES for thing in _THINGS]
_THING = {thing: index for index, thing in enumerate(_THINGS)}


def things_in(scene: Scene) -> list[int]:
    """Return the numbers of what is in `scene`, each by itself: a shape, a colour, a digit and its place."""
    found: list[str] = []
    if scene.shape is not None:
        found += (scene.shape.kind, scene.shape.colour, scene.shape.side)
    if scene.display is not None:
        found += [f"{place} {digit}" for place, digit in zip(("first", "second"), scene.display, strict=False)]
    for name in ("gauge", "door", "person"):
        state = getattr(scene, name)
        if state is not None:
            found.append(f"{name} {state}")
    return [_THING[thing] for thing in found]


@dataclass(frozen=True, slots=True)
class Look:
    """One request about pictures, and what they show."""

    lesson: Lesson
    pictures: list[PictureCrops]
    scenes: tuple[Scene, ...]


class Seeing:
    """The steps of stage 3."""

    def __init__(self, network: Network, teacher: Teacher, seed: int) -> None:
        self._network, self._teacher = network, teacher
        config = network.nano.config.vision
        self._gallery = Gallery(config, seed)
        layer = nn.Linear(config.width, len(_THINGS))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / config.width**0.5)
            layer.bias.fill_(_FIRST_BIAS)
        self.matcher = nn.Sequential(nn.LayerNorm(config.width), layer)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        found = {f"image.{name}": value for name, value in self._network.image.named_parameters()}
        found |= {f"matcher.{name}": value for name, value in self.matcher.named_parameters()}
        return found | {f"vision:{key}": value for key, value in self._network.nano.adapters["vision"].tensors.items()}

    def step(self, number: int, rng: random.Random, progress: float) -> tuple[Tensor, dict[str, float], int]:
        """Return the loss of one step, what to tell of it, and how many tokens it had."""
        if progress < _SMALLEST_SHARE:
            shown = [self._gallery.draw_smallest(number, rng) for _ in range(_BATCH_SMALLEST)]
            seen = self._network.look([picture for _, picture in shown])
            things = self._match(seen, [scene for scene, _ in shown])
            return things, {"things": things.item()}, sum(part.shape[:-1].numel() for part in seen)
        looks = self._draw_looks(number, rng, progress)
        is_reading = _MATCHING_SHARE <= progress < _READING_SHARE
        with torch.set_grad_enabled(not is_reading):
            seen = self._network.look([picture for look in looks for picture in look.pictures])
        things = self._match(seen, [scene for look in looks for scene in look.scenes])
        if progress < _MATCHING_SHARE:
            num_positions = sum(part.shape[:-1].numel() for part in seen)
            return things, {"things": things.item()}, num_positions
        answered = self._network.loss(self._rows(looks, seen, [None] * len(looks)), "vision")
        told = {"things": things.item(), "answers": answered.answer.item()}
        return answered.answer + _MATCHING_WEIGHT * things, told, answered.num_tokens

    def _match(self, seen: Sequence[Tensor], scenes: Sequence[Scene]) -> Tensor:
        """Return the loss of telling what is in each picture, from whichever of its positions shows it."""
        wanted = torch.zeros(len(scenes), len(_THINGS))
        for index, scene in enumerate(scenes):
            wanted[index, things_in(scene)] = 1.0
        logits = [self.matcher(part) for part in seen]
        found = torch.stack([torch.logsumexp(part.flatten(0, 2), 0) for part in logits])
        # A crop of the grid does not know on which side of the whole it is.
        whole = torch.stack([torch.logsumexp(part[0].flatten(0, 1), 0) for part in logits])
        found = torch.where(torch.tensor(_IS_SIDE), whole, found)
        return F.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / len(scenes)

    def _draw_looks(self, number: int, rng: random.Random, progress: float) -> list[Look]:
        """Return descriptions and typed questions, each with its pictures; those of a step are of one size."""
        weights = [_WEIGHT_OF_SMALL] * NUM_SMALL + [_WEIGHT_OF_LARGE] * (len(SIZES_PX) - NUM_SMALL)
        size_px = rng.choices(SIZES_PX, weights)[0]
        has_several = progress > _SEVERAL_FROM and rng.random() < _SEVERAL_SHARE
        looks: list[Look] = []
        num_crops = num_pictures = 0
        while num_crops < _BATCH_CROPS and num_pictures < _MAX_PICTURES:
            look = self._draw_several(size_px, rng) if has_several else self._draw_one(number, size_px, rng)
            looks.append(look)
            num_crops += sum(picture.layout.num_crops for picture in look.pictures)
            num_pictures += len(look.pictures)
        return looks

    def _draw_one(self, number: int, size_px: tuple[int, int], rng: random.Random) -> Look:
        scene, picture = self._gallery.draw(number, size_px, rng)
        lesson = description([scene])
        if rng.random() < _ASKED_SHARE:
            question = draw_question(rng, scene)
            lesson = Lesson(ANSWER, question.answer, text=question.text)
        return Look(lesson, [picture], (scene,))

    def _draw_several(self, size_px: tuple[int, int], rng: random.Random) -> Look:
        scenes, config = draw_frames(rng), self._network.nano.config.vision
        return Look(description(scenes), [show(scene, size_px, config, rng) for scene in scenes], scenes)

    def _rows(self, looks: Sequence[Look], seen: Sequence[Tensor], sounds: Sequence[Tensor | None]) -> list[Row]:
        pictures = [picture for look in looks for picture in look.pictures]
        projected = iter(self._network.project_pictures(seen, pictures))
        rows = []
        for look, sound in zip(looks, sounds, strict=True):
            layouts = [picture.layout for picture in look.pictures]
            num_sound_tokens = 0 if sound is None else len(sound)
            tokens, num_prompt_tokens = self._teacher.tokens(look.lesson, num_sound_tokens, layouts)
            positions = torch.cat([next(projected) for _ in layouts])
            rows.append(Row(tokens, num_prompt_tokens, sound=sound, pictures=positions))
        return rows


class SpokenQuestions(Seeing):
    """The steps of stage 4. `clips` are questions, spoken."""

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

    def step(self, number: int, rng: random.Random, progress: float) -> tuple[Tensor, dict[str, float], int]:
        """Return the loss of one step, what to tell of it, and how many tokens it had."""
        del progress
        looks = self._draw_looks(number, rng, 1.0)
        clips: dict[int, Clip] = {}
        for index, look in enumerate(looks):
            if len(look.pictures) == 1 and rng.random() < _SPOKEN_SHARE:
                question = draw_question(rng, look.scenes[0])
                if question.text in self._clips:
                    looks[index] = Look(Lesson(ANSWER, question.answer), look.pictures, look.scenes)
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
        seen = self._network.look([picture for look in looks for picture in look.pictures])
        answered = self._network.loss(self._rows(looks, seen, sounds), "vision")
        return answered.answer, {"answers": answered.answer.item()}, answered.num_tokens
