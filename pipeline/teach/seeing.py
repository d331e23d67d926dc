"""Stages 3 and 4: seeing, and being asked aloud about what is seen.

Pictures are drawn anew for every step. In stage 3 the vision encoder, its projection, the separators and the vision
adapter learn to describe one and several frames and to answer typed questions. In stage 4 the projection of sound
beside pictures learns, and the vision adapter goes on learning, old tasks among new ones; the ears stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.models.phi4.conformer import Projector
from pipeline.models.phi4.crops import PictureCrops, cut_crops
from pipeline.teach.clips import Clip, Distortion
from pipeline.teach.language import ANSWER, description, draw_frames
from pipeline.teach.lessons import Lesson, Teacher
from pipeline.teach.network import Network, Row
from pipeline.teach.pictures import draw_picture
from pipeline.teach.world import Scene, draw_question, draw_scene
from pipeline.vision.crop_layout import plan_live_crops

MAX_CROPS = 6
"""Crops of a picture beside the one of the whole, as `VisionParams` has them."""

SIZES_PX = ((112, 112), (224, 112), (224, 224), (336, 224), (320, 240), (320, 180), (640, 360), (640, 480))
"""Widths and heights of pictures, from small to large."""
_NUM_SMALL = 3
_SMALL_SHARE = 0.35  # of the stage in which only small ones are shown
_BATCH_CROPS = 64
_MAX_PICTURES = 24
_SEVERAL_SHARE, _ASKED_SHARE, _SEVERAL_FROM = 0.2, 0.35, 0.4
_SPOKEN_SHARE = 0.6
_WEIGHT_OF_SMALL, _WEIGHT_OF_LARGE = 1, 2


def show(scene: Scene, size_px: tuple[int, int], network: Network, rng: random.Random) -> PictureCrops:
    """Return a picture of `scene`, made smaller and cut as a live frame is."""
    width_px, height_px = size_px
    vision = network.nano.config.vision
    pixels = torch.from_numpy(draw_picture(scene, width_px, height_px, rng))
    layout = plan_live_crops(width_px, height_px, vision.crop_size, vision.patch_size, MAX_CROPS)
    if (layout.width_px, layout.height_px) != size_px and layout.width_px < width_px:
        resized = nn.functional.interpolate(
            pixels.permute(2, 0, 1)[None], (layout.height_px, layout.width_px), mode="bilinear", antialias=True
        )
        pixels = resized[0].permute(1, 2, 0).contiguous()
    return cut_crops(pixels, vision, MAX_CROPS)


class Seeing:
    """The steps of stage 3."""

    def __init__(self, network: Network, teacher: Teacher) -> None:
        self._network, self._teacher = network, teacher

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        found = {f"image.{name}": value for name, value in self._network.image.named_parameters()}
        return found | {f"vision:{key}": value for key, value in self._network.nano.adapters["vision"].tensors.items()}

    def step(self, rng: random.Random, progress: float) -> tuple[Tensor, dict[str, float], int]:
        """Return the loss of one step, what to tell of it, and how many tokens it had."""
        requests = self._draw_requests(rng, progress)
        rows = self._rows(requests, [None] * len(requests))
        answered = self._network.loss(rows, "vision")
        return answered.answer, {"answers": answered.answer.item()}, answered.num_tokens

    def _draw_requests(self, rng: random.Random, progress: float) -> list[tuple[Lesson, list[PictureCrops]]]:
        """Return descriptions and typed questions, each with its pictures; those of a step are of one size."""
        is_early = progress < _SMALL_SHARE
        weights = [_WEIGHT_OF_SMALL] * _NUM_SMALL + [_WEIGHT_OF_LARGE] * (len(SIZES_PX) - _NUM_SMALL)
        size_px = rng.choice(SIZES_PX[:_NUM_SMALL]) if is_early else rng.choices(SIZES_PX, weights)[0]
        has_several = not is_early and progress > _SEVERAL_FROM and rng.random() < _SEVERAL_SHARE
        requests: list[tuple[Lesson, list[PictureCrops]]] = []
        num_crops = num_pictures = 0
        while num_crops < _BATCH_CROPS and num_pictures < _MAX_PICTURES:
            if has_several:
                scenes = draw_frames(rng)
                lesson = description(scenes)
            else:
                scenes = (draw_scene(rng, held_out=False),)
                lesson = description(scenes)
                if rng.random() < _ASKED_SHARE:
                    question = draw_question(rng, scenes[0])
                    lesson = Lesson(ANSWER, question.answer, text=question.text)
            pictures = [show(scene, size_px, self._network, rng) for scene in scenes]
            requests.append((lesson, pictures))
            num_crops += sum(picture.layout.num_crops for picture in pictures)
            num_pictures += len(pictures)
        return requests

    def _rows(
        self, requests: Sequence[tuple[Lesson, list[PictureCrops]]], sounds: Sequence[Tensor | None]
    ) -> list[Row]:
        seen = iter(self._network.look([picture for _, pictures in requests for picture in pictures]))
        rows = []
        for (lesson, pictures), sound in zip(requests, sounds, strict=True):
            layouts = [picture.layout for picture in pictures]
            tokens, num_prompt_tokens = self._teacher.tokens(lesson, 0 if sound is None else len(sound), layouts)
            positions = torch.cat([next(seen) for _ in pictures])
            rows.append(Row(tokens, num_prompt_tokens, sound=sound, pictures=positions))
        return rows


class SpokenQuestions(Seeing):
    """The steps of stage 4. `clips` are questions, spoken."""

    def __init__(self, network: Network, teacher: Teacher, clips: Sequence[Clip], seed: int) -> None:
        super().__init__(network, teacher)
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
        requests = self._draw_requests(rng, 1.0)
        clips: list[Clip | None] = [None] * len(requests)
        for index, (_, pictures) in enumerate(requests):
            if len(pictures) == 1 and rng.random() < _SPOKEN_SHARE:
                requests[index], clips[index] = self._draw_spoken(rng, pictures[0])
        spoken = [index for index, clip in enumerate(clips) if clip is not None]
        sounds: list[Tensor | None] = [None] * len(requests)
        if spoken:
            found = [clip for clip in clips if clip is not None]
            with torch.no_grad():
                heard, lengths = self._network.hear([self._distortion(clip.features, rng)[0] for clip in found])
            projected = self._network.project_sound(heard, Projector.VISION_SPEECH)
            for place, index in enumerate(spoken):
                sounds[index] = projected[place, : lengths[place]]
        answered = self._network.loss(self._rows(requests, sounds), "vision")
        return answered.answer, {"answers": answered.answer.item()}, answered.num_tokens

    def _draw_spoken(
        self, rng: random.Random, picture: PictureCrops
    ) -> tuple[tuple[Lesson, list[PictureCrops]], Clip]:
        """Return a spoken question about a picture of the size of `picture`."""
        while True:
            scene = draw_scene(rng, held_out=False)
            question = draw_question(rng, scene)
            if question.text in self._clips:
                break
        size_px = (picture.layout.width_px, picture.layout.height_px)
        shown = show(scene, size_px, self._network, rng)
        return (Lesson(ANSWER, question.answer), [shown]), rng.choice(self._clips[question.text])
