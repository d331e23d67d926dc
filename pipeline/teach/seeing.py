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
from pipeline.models.phi4.crops import PictureCrops, cut_crops
from pipeline.teach.clips import Clip, Distortion
from pipeline.teach.grammar import COLOURS, SHAPES, SIDES
from pipeline.teach.language import ANSWER, description, draw_frames
from pipeline.teach.lessons import Lesson, Teacher
from pipeline.teach.network import Network, Row
from pipeline.teach.pictures import draw_picture
from pipeline.teach.world import MAX_ELEMENTS, Scene, draw_question, draw_scene
from pipeline.vision.crop_layout import plan_live_crops

MAX_CROPS = 6
"""Crops of a picture beside the one of the whole, as `VisionParams` has them."""

SIZES_PX = ((112, 112), (224, 112), (224, 224), (336, 224), (320, 240), (320, 180), (640, 360), (640, 480))
"""Widths and heights of pictures, from small to large."""
_MATCHING_SHARE, _READING_SHARE = 0.3, 0.4
"""Of the stage: until when only things are matched, and until when the vision encoder is left as it is."""
_MATCHING_WEIGHT = 0.03
_FIRST_BIAS = -8.0  # of one position: the loss sums over all of a picture, and most things are not in it
_NUM_SMALL = 3
_SMALL_SHARE = 0.15  # of the stage in which only small ones are shown
_BATCH_CROPS = 64
_MAX_PICTURES = 24
_FEW_SHARE = 0.15  # of the stage in which the elements of a picture grow from one to all
_SEVERAL_SHARE, _ASKED_SHARE, _SEVERAL_FROM = 0.2, 0.35, 0.5
_SPOKEN_SHARE = 0.6
_WEIGHT_OF_SMALL, _WEIGHT_OF_LARGE = 1, 2


def show(scene: Scene, size_px: tuple[int, int], network: Network, rng: random.Random) -> PictureCrops:
    """Return a picture of `scene`, made smaller and cut as a live frame is."""
    width_px, height_px = size_px
    vision = network.nano.config.vision
    pixels = torch.from_numpy(draw_picture(scene, width_px, height_px, rng))
    layout = plan_live_crops(width_px, height_px, vision.crop_size, vision.patch_size, MAX_CROPS)
    if (layout.width_px, layout.height_px) != size_px and layout.width_px < width_px:
        resized = F.interpolate(
            pixels.permute(2, 0, 1)[None], (layout.height_px, layout.width_px), mode="bilinear", antialias=True
        )
        pixels = resized[0].permute(1, 2, 0).contiguous()
    return cut_crops(pixels, vision, MAX_CROPS)


_THINGS: tuple[str, ...] = (
    *(*SHAPES, *COLOURS, *SIDES),
    *(f"{place} {digit}" for place in ("first", "second") for digit in range(10)),
    *("gauge high", "gauge low", "door open", "door closed", "person inside", "person outside"),
)
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
        width = network.nano.config.vision.width
        self.matcher = nn.Linear(width, len(_THINGS))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.matcher.weight.copy_(torch.randn(self.matcher.weight.shape, generator=generator) / width**0.5)
            self.matcher.bias.fill_(_FIRST_BIAS)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        found = {f"image.{name}": value for name, value in self._network.image.named_parameters()}
        found |= {f"matcher.{name}": value for name, value in self.matcher.named_parameters()}
        return found | {f"vision:{key}": value for key, value in self._network.nano.adapters["vision"].tensors.items()}

    def step(self, rng: random.Random, progress: float) -> tuple[Tensor, dict[str, float], int]:
        """Return the loss of one step, what to tell of it, and how many tokens it had."""
        looks = self._draw_looks(rng, progress)
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
        found = torch.stack([torch.logsumexp(self.matcher(part.flatten(0, 2)), 0) for part in seen])
        return F.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / len(scenes)

    def _draw_looks(self, rng: random.Random, progress: float) -> list[Look]:
        """Return descriptions and typed questions, each with its pictures; those of a step are of one size."""
        is_early = progress < _SMALL_SHARE
        weights = [_WEIGHT_OF_SMALL] * _NUM_SMALL + [_WEIGHT_OF_LARGE] * (len(SIZES_PX) - _NUM_SMALL)
        size_px = rng.choice(SIZES_PX[:_NUM_SMALL]) if is_early else rng.choices(SIZES_PX, weights)[0]
        has_several = not is_early and progress > _SEVERAL_FROM and rng.random() < _SEVERAL_SHARE
        looks: list[Look] = []
        num_crops = num_pictures = 0
        while num_crops < _BATCH_CROPS and num_pictures < _MAX_PICTURES:
            if has_several:
                scenes = draw_frames(rng)
                lesson = description(scenes)
            else:
                scenes = (_draw_scene(rng, progress),)
                lesson = description(scenes)
                if rng.random() < _ASKED_SHARE:
                    question = draw_question(rng, scenes[0])
                    lesson = Lesson(ANSWER, question.answer, text=question.text)
            pictures = [show(scene, size_px, self._network, rng) for scene in scenes]
            looks.append(Look(lesson, pictures, scenes))
            num_crops += sum(picture.layout.num_crops for picture in pictures)
            num_pictures += len(pictures)
        return looks

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


def _draw_scene(rng: random.Random, progress: float) -> Scene:
    """Return a scene with few elements at first: what is alone in a picture is found sooner."""
    most = 1 + int(MAX_ELEMENTS * progress / _FEW_SHARE)
    while True:
        scene = draw_scene(rng, held_out=False)
        if len(scene.elements) <= most:
            return scene


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

    def step(self, rng: random.Random, progress: float) -> tuple[Tensor, dict[str, float], int]:
        """Return the loss of one step, what to tell of it, and how many tokens it had."""
        del progress
        looks = self._draw_looks(rng, 1.0)
        clips: dict[int, Clip] = {}
        for index, look in enumerate(looks):
            if len(look.pictures) == 1 and rng.random() < _SPOKEN_SHARE:
                looks[index], clips[index] = self._draw_spoken(rng, look.pictures[0])
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

    def _draw_spoken(self, rng: random.Random, picture: PictureCrops) -> tuple[Look, Clip]:
        """Return a spoken question about a picture of the size of `picture`."""
        while True:
            scene = draw_scene(rng, held_out=False)
            question = draw_question(rng, scene)
            if question.text in self._clips:
                break
        size_px = (picture.layout.width_px, picture.layout.height_px)
        shown = show(scene, size_px, self._network, rng)
        return Look(Lesson(ANSWER, question.answer), [shown], (scene,)), rng.choice(self._clips[question.text])
