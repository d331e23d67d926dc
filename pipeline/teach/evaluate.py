"""What a taught checkpoint is worth: scores on unseen items, through the code that runs it.

Sentences are held out (`is_held_out`), and so are the descriptions of the pictures. Everything goes through the audio
and the vision encoder stage and the decode engine, with the parameters that the service has by default.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.encoders import load_encoder
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.params import DecoderParams
from pipeline.decode.runner import Context
from pipeline.errors import StageError
from pipeline.items import (
    TRANSCRIBE,
    DecodeRequest,
    Embeddings,
    Failure,
    Frame,
    FrameSet,
    Hypothesis,
    Job,
    JobKey,
    Outcome,
    Pictures,
    Snapshot,
    SnapshotKey,
    Task,
)
from pipeline.models.weights import ModelParams
from pipeline.teach.gallery import live_frame
from pipeline.teach.language import ANSWER, DESCRIBE, SUMMARISE, TRANSLATE
from pipeline.teach.pictures import draw_picture
from pipeline.teach.speech import Samples, Tool, Voice, held_out_voices, speak, training_voices, with_noise
from pipeline.teach.world import (
    Scene,
    describe_scenes,
    draw_question,
    draw_report,
    draw_saying,
    draw_scene,
    draw_scene_change,
    tokens_of_text,
)
from pipeline.vision.frames_to_embeddings import FramesToEmbeddings
from pipeline.vision.params import VisionParams

NOISE_SNR_DB = 10.0
_STREAM = "evaluation"
_SIZES_PX = ((336, 168), (336, 189), (336, 336))


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares from 0 to 1; None for what was not asked.

    Word error rates are of unseen sentences: in voices that were trained on, in voices that were not, and in the first
    with noise 10 dB below. All others are the share of items whose text is right to the letter.
    """

    num_items: int
    wer_seen: float | None = None
    wer_held_out_voice: float | None = None
    wer_noise_10db: float | None = None
    translation_exact: float | None = None
    summary_right: float | None = None
    sound_summary_right: float | None = None
    description_right: float | None = None
    typed_question_right: float | None = None
    spoken_question_right: float | None = None
    two_frames_right: float | None = None

    def as_json(self) -> dict[str, float | int | None]:
        """Return the scores by name."""
        return asdict(self)


class Examiner:
    """A checkpoint with its stages loaded, and the items that it is asked.

    Args:
        directory: the checkpoint.
        tool: runs the programs that speak.
        seed: what items are drawn from.

    Raises:
        ModelError: if the checkpoint cannot be used.
    """

    def __init__(self, directory: Path, tool: Tool, seed: int = 0) -> None:
        model = ModelParams(name=str(directory), device="cpu")
        self._ears = load_encoder(model, EncoderParams(), None)
        self._eyes = FramesToEmbeddings(model, VisionParams())
        self._engine = DecodeEngine(model, DecoderParams())
        self._tool, self._seed = tool, seed
        self._num_asked = 0

    def hear(self, num_items: int) -> dict[str, float]:
        """Return the scores of listening: word error rates, translations, and summaries of text and of sound."""
        return {
            "wer_seen": self._word_error_rate(num_items, training_voices()),
            "wer_held_out_voice": self._word_error_rate(num_items, held_out_voices()),
            "wer_noise_10db": self._word_error_rate(num_items, training_voices(), NOISE_SNR_DB),
            "translation_exact": self._share(num_items, self._is_translated),
            "sound_summary_right": self._share(num_items, self._is_sound_summarised),
            **self.read(num_items),
        }

    def read(self, num_items: int) -> dict[str, float]:
        """Return the score of reading: summaries of transcripts."""
        return {"summary_right": self._share(num_items, self._is_summarised)}

    def see(self, num_items: int) -> dict[str, float]:
        """Return the scores of seeing: descriptions, of one picture and of two in a row, and typed questions."""
        return {
            "description_right": self._share(num_items, lambda index: self._is_described(index, num_frames=1)),
            "two_frames_right": self._share(num_items, lambda index: self._is_described(index, num_frames=2)),
            "typed_question_right": self._share(num_items, lambda index: self._is_answered(index, is_spoken=False)),
        }

    def see_and_hear(self, num_items: int) -> dict[str, float]:
        """Return the score of spoken questions about pictures."""
        return {"spoken_question_right": self._share(num_items, lambda index: self._is_answered(index, is_spoken=True))}

    def examine(self, num_items: int) -> Scores:
        """Return all scores, of `num_items` items each."""
        return Scores(num_items, **self.hear(num_items), **self.see(num_items), **self.see_and_hear(num_items))

    def transcribe(self, samples: Samples) -> str:
        """Return what is said in `samples`, as a final."""
        return self._listen(samples, (TRANSCRIBE,))[0]

    # Items

    def _random(self, what: str, index: int) -> tuple[random.Random, np.random.Generator]:
        drawn = random.Random(f"{self._seed}/{what}/{index}")  # noqa: S311 - repeatable on purpose
        return drawn, np.random.default_rng(drawn.getrandbits(63))

    def _word_error_rate(self, num_items: int, voices: Sequence[Voice], snr_db: float | None = None) -> float:
        num_errors = num_words = 0
        for index in range(num_items):
            rng, sound_rng = self._random(f"voices of {voices[0].name}", index)
            text = draw_saying(rng, held_out=True).text
            samples = speak(text, voices[index % len(voices)], sound_rng, self._tool)
            if snr_db is not None:
                samples = with_noise(samples, sound_rng, snr_db)
            words = tokens_of_text(text)
            num_errors += _distance(words, tokens_of_text(self.transcribe(samples)))
            num_words += len(words)
        return num_errors / num_words

    def _share(self, num_items: int, is_right: Callable[[int], bool]) -> float:
        return sum(is_right(index) for index in range(num_items)) / num_items

    def _is_translated(self, index: int) -> bool:
        rng, sound_rng = self._random("translation", index)
        saying = draw_saying(rng, held_out=True)
        samples = speak(saying.text, rng.choice(training_voices()), sound_rng, self._tool)
        return self._listen(samples, (TRANSCRIBE, TRANSLATE))[1] == saying.translation

    def _is_summarised(self, index: int) -> bool:
        rng, _ = self._random("summary", index)
        report = draw_report(rng, rng.randint(2, 6), held_out=True)
        return self._ask(SUMMARISE, report.text) == report.summary

    def _is_sound_summarised(self, index: int) -> bool:
        rng, sound_rng = self._random("sound summary", index)
        report = draw_report(rng, rng.randint(2, 5), held_out=True)
        samples = speak(report.text, rng.choice(training_voices()), sound_rng, self._tool)
        return self._ask(SUMMARISE, samples=samples) == report.summary

    def _is_described(self, index: int, *, num_frames: int) -> bool:
        rng, _ = self._random(f"description of {num_frames}", index)
        scenes = [draw_scene(rng, held_out=True)]
        while len(scenes) < num_frames:
            scenes.append(draw_scene_change(rng, scenes[-1]))
        size_px = rng.choice(_SIZES_PX)
        frames = tuple(self._frame(scene, size_px, rng) for scene in scenes)
        return self._ask(DESCRIBE, frames=frames) == describe_scenes(scenes)

    def _is_answered(self, index: int, *, is_spoken: bool) -> bool:
        rng, sound_rng = self._random("question", index)
        scene = draw_scene(rng, held_out=True)
        question = draw_question(rng, scene)
        frames = (self._frame(scene, rng.choice(_SIZES_PX), rng),)
        if not is_spoken:
            return self._ask(ANSWER, question.text, frames=frames) == question.answer
        samples = speak(question.text, rng.choice(training_voices()), sound_rng, self._tool)
        return self._ask(ANSWER, frames=frames, samples=samples) == question.answer

    def _frame(self, scene: Scene, size_px: tuple[int, int], rng: random.Random) -> Frame:
        return Frame(0, live_frame(draw_picture(scene, *size_px, rng), self._eyes.config))

    # Asking

    def _listen(self, samples: Samples, tasks: tuple[Task, ...]) -> list[str]:
        self._num_asked += 1
        snapshot = Snapshot(SnapshotKey(_STREAM, self._num_asked, 1), 0, True, 0, samples, "en", (), (), tasks)
        [sound] = self._ears.encode([snapshot])
        texts = self._decode(DecodeRequest.of(snapshot), Context(_checked(sound)))
        return [texts[task] for task in tasks]

    def _ask(
        self, task: Task, text: str = "", *, frames: tuple[Frame, ...] = (), samples: Samples | None = None
    ) -> str:
        self._num_asked += 1
        job = Job(JobKey(_STREAM, task.kind, self._num_asked), task, text, frames, samples)
        sound, pictures = None, None
        if job.snapshot is not None:
            sound = _checked(self._ears.encode([job.snapshot])[0])
        if frames:
            [found] = self._eyes.encode([FrameSet(job.key, frames)])
            if not isinstance(found, Pictures):
                raise StageError(found.message)
            pictures = found
        return self._decode(DecodeRequest.of_job(job), Context(sound, pictures))[task]

    def _decode(self, request: DecodeRequest, context: Context) -> dict[Task, str]:
        self._engine.submit(request, context)
        outcomes: list[Outcome] = []
        while self._engine.has_work:
            outcomes += self._engine.step()
        texts = {outcome.task: outcome.text for outcome in outcomes if isinstance(outcome, Hypothesis)}
        # What fails (a guard that fires, a text that never ends) is an item that is not right.
        return {task: texts.get(task, "") for task in request.tasks}


def _checked(sound: Embeddings | Failure) -> Embeddings:
    if isinstance(sound, Failure):
        raise StageError(sound.message)
    return sound


def _distance(expected: Sequence[str], found: Sequence[str]) -> int:
    """Return how many words have to be put in, left out or replaced."""
    row = list(range(len(found) + 1))
    for index, word in enumerate(expected, start=1):
        before, row[0] = row[0], index
        for place, other in enumerate(found, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]
