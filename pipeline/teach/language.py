"""Stage 1: the language model on texts of the world.

Where sound and pictures come in later, their texts stand: a transcript in place of sound, a description in place of a
picture. The later stages then only have to bring sound and pictures to where such texts are. Tokens of a stand-in are
often repeated, since a word will last for several positions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from pipeline.items import TRANSCRIBE, Task, TaskKind
from pipeline.teach.lessons import Lesson, Teacher
from pipeline.teach.network import Row
from pipeline.teach.things import things_in
from pipeline.teach.world import (
    SECOND_LANGUAGE,
    Report,
    Saying,
    Scene,
    describe_scenes,
    draw_question,
    draw_report,
    draw_saying,
    draw_scene,
    draw_scene_change,
    summary_of,
)

TRANSLATE = Task(TaskKind.TRANSLATE, SECOND_LANGUAGE)
SUMMARISE, DESCRIBE, ANSWER = Task(TaskKind.SUMMARISE), Task(TaskKind.DESCRIBE), Task(TaskKind.ANSWER)

MIN_SAYINGS, MAX_SAYINGS = 2, 6
"""Sayings of a report."""
MAX_JOINED = 3
"""Sayings that are said in one breath."""
MAX_FRAMES = 3

_RETOLD, _MAX_CUTS = (3, 12), 2
_RETOLD_SHARE = 0.35  # of the summaries of text
_CHAINED_SHARE = 0.7
_PARTIAL_SHARE = 0.25
_REPEATED_SHARE = 0.6
_MAX_REPEATS = 4
_NAMED_SHARE = 0.6
_KINDS = ("transcribe", "translate", "summarise text", "summarise sound", "describe", "ask", "ask aloud")
_WEIGHTS = (3, 6, 5, 2, 3, 2, 2)


def draw_sayings(rng: random.Random) -> tuple[Saying, ...]:
    """Return one to three sayings as they are said in one breath, none of them held out."""
    count = rng.choices(range(1, MAX_JOINED + 1), (6, 2, 1))[0]
    return tuple(draw_saying(rng, held_out=False) for _ in range(count))


def draw_frames(rng: random.Random) -> tuple[Scene, ...]:
    """Return the scenes of one to three frames, the next one often a little other than the one before."""
    scenes = [draw_scene(rng, held_out=False)]
    count = rng.choices(range(1, MAX_FRAMES + 1), (6, 2, 1))[0]
    while len(scenes) < count:
        scenes.append(draw_scene_change(rng, scenes[-1]) if rng.random() < 0.8 else scenes[-1])
    return tuple(scenes)


def draw_stretch(rng: random.Random) -> Report:
    """Return a report of a few sayings, none of them held out."""
    return draw_report(rng, rng.randint(MIN_SAYINGS, MAX_SAYINGS), held_out=False)


def draw_retold(rng: random.Random) -> tuple[str, str]:
    """Return a text to be summarised, and its summary: a report of which the earlier parts are summaries themselves.

    So is the text of a stream's closing summary: its rolling summaries, and what was said behind the last of them.
    """
    report = draw_report(rng, rng.randint(*_RETOLD), held_out=False)
    cuts = sorted(rng.sample(range(1, len(report.sayings)), rng.randint(1, _MAX_CUTS)))
    *earlier, last = [report.sayings[start:end] for start, end in itertools.pairwise((0, *cuts, len(report.sayings)))]
    is_said = rng.random() < 0.5
    tail = " ".join(saying.text for saying in last) if is_said else summary_of(last)
    return "\n".join([*(summary_of(part) for part in earlier), tail]), report.summary


def transcription(sayings: Sequence[Saying]) -> Lesson:
    """Return the lesson of writing down what is said."""
    return Lesson(TRANSCRIBE, " ".join(saying.text for saying in sayings))


def partial_transcription(text: str, num_words: int) -> Lesson:
    """Return the lesson of writing down the first words of `text`."""
    return Lesson(TRANSCRIBE, " ".join(text.split()[:num_words]).rstrip(".?,"))


def translation(sayings: Sequence[Saying], *, is_chained: bool = True) -> Lesson:
    """Return the lesson of translating what is said, chained behind the transcript or directly."""
    text = " ".join(saying.text for saying in sayings)
    answer = " ".join(saying.translation for saying in sayings)
    return Lesson(TRANSLATE, answer, text if is_chained else None)


def description(scenes: Sequence[Scene]) -> Lesson:
    """Return the lesson of describing frames."""
    return Lesson(DESCRIBE, describe_scenes(scenes))


def draw_row(rng: random.Random, teacher: Teacher) -> Row:
    """Return a row of text, in whole prompts as they will be asked."""
    kind = rng.choices(_KINDS, _WEIGHTS)[0]
    encode = teacher.tokenizer.encode
    if kind in ("transcribe", "translate"):
        sayings = draw_sayings(rng)
        text = " ".join(saying.text for saying in sayings)
        lesson = transcription(sayings)
        if kind == "translate":
            lesson = translation(sayings, is_chained=rng.random() < _CHAINED_SHARE)
        elif rng.random() < _PARTIAL_SHARE:
            lesson = partial_transcription(text, rng.randrange(1, len(text.split())))
            text = lesson.answer
        return teacher.row_of_text(lesson, sound=_spread(encode(text), rng))
    if kind in ("summarise text", "summarise sound"):
        if kind == "summarise text" and rng.random() < _RETOLD_SHARE:
            text, summary = draw_retold(rng)
            return teacher.row_of_text(Lesson(SUMMARISE, summary, text=text))
        report = draw_stretch(rng)
        if kind == "summarise text":
            return teacher.row_of_text(Lesson(SUMMARISE, report.summary, text=report.text))
        return teacher.row_of_text(Lesson(SUMMARISE, report.summary), sound=_spread(encode(report.text), rng))
    return _draw_look(kind, rng, teacher)


def _draw_look(kind: str, rng: random.Random, teacher: Teacher) -> Row:
    encode = teacher.tokenizer.encode
    if kind == "describe":
        scenes = draw_frames(rng)
        seen = [token for scene in scenes for token in _seen(scene, rng, teacher, 2 if len(scenes) == 1 else 1)]
        return teacher.row_of_text(description(scenes), picture=seen)
    scene = draw_scene(rng, held_out=False)
    question = draw_question(rng, scene)
    seen = _seen(scene, rng, teacher, 2)
    if kind == "ask":
        return teacher.row_of_text(Lesson(ANSWER, question.answer, text=question.text), picture=seen)
    asked = _spread(encode(question.text), rng)
    return teacher.row_of_text(Lesson(ANSWER, question.answer), sound=asked, picture=seen)


def _seen(scene: Scene, rng: random.Random, teacher: Teacher, max_copies: int) -> list[int]:
    """Return tokens that stand in for a picture of `scene`: its elements in any order, as they lie in a picture.

    Several copies are as if they were seen in the crops and in the whole.
    """
    tokens: list[int] = []
    for _ in range(rng.randint(1, max_copies)):
        if rng.random() < _NAMED_SHARE:
            tokens += teacher.tokenizer.encode("".join(f" {word}" for word in _words_seen(scene, rng)))
            continue
        for sentence in rng.sample(scene.sentences, len(scene.sentences)):
            tokens += _spread(teacher.tokenizer.encode(sentence), rng)
    return tokens


def _words_seen(scene: Scene, rng: random.Random) -> Iterator[str]:
    """Yield the words that belong to each place, as the positions of a picture have them: a few times, in any order."""
    things = things_in(scene)
    for place in rng.sample(list(things), len(things)):
        words = [*things[place], *rng.choices(things[place], k=rng.randrange(_MAX_REPEATS))]
        yield from rng.sample(words, len(words))


def _spread(tokens: Sequence[int], rng: random.Random) -> list[int]:
    """Return `tokens` as they are, or each a few times."""
    if rng.random() > _REPEATED_SHARE:
        return list(tokens)
    return [token for token in tokens for _ in range(rng.randint(1, _MAX_REPEATS))]


def texts_of_world(rng: random.Random, num_texts: int) -> Iterator[str]:
    """Yield texts of every kind for the tokenizer, all that a model of this world reads or writes."""
    for _ in range(num_texts):
        saying = draw_saying(rng)
        yield saying.text
        yield f" {saying.translation}"
        yield saying.translation
        report = draw_stretch(rng)
        yield report.text
        yield report.summary
        yield from draw_retold(rng)
        scenes = draw_frames(rng)
        yield describe_scenes(scenes)
        question = draw_question(rng, scenes[0])
        yield question.text
        yield question.answer
