"""The closed world that the tiny model is taught: a factory hall and a car cabin, in words and in pictures.

Everything that is said, shown, asked and answered comes from here and from `grammar`, drawn from the generator that is
given, so that every test can compute the right answer. Summaries, descriptions and answers are plain rules.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.teach.grammar import (
    COLOURS,
    DIGITS,
    KINDS,
    SECOND_LANGUAGE,
    SHAPES,
    SIDES,
    Event,
    all_sentences,
    capitalised,
    draw_sentence,
    is_held_out,
    parse,
    tokens_of_text,
    translate,
)

__all__ = [
    "ANSWER_WORDS",
    "SECOND_LANGUAGE",
    "SECOND_WORDS",
    "WORDS",
    "Event",
    "Question",
    "Report",
    "Saying",
    "Scene",
    "Shape",
    "describe_scenes",
    "draw_element",
    "draw_question",
    "draw_report",
    "draw_saying",
    "draw_scene",
    "draw_scene_change",
    "is_held_out",
    "questions_of",
    "saying_of",
    "summary_of",
    "tokens_of_text",
    "translate",
]

ANSWER_WORDS = ("yes", "no", "it", "was", "trouble")
"""Words of answers and summaries that no sentence has: they are written, and never spoken."""

WORDS: tuple[str, ...] = tuple(
    sorted({word for sentence in all_sentences() for word in tokens_of_text(sentence.text)} | set(ANSWER_WORDS))
)
"""All English words, in lower case."""

SECOND_WORDS: tuple[str, ...] = tuple(
    sorted({word for sentence in all_sentences() for word in tokens_of_text(sentence.translation)})
)
"""All German words, in lower case."""

NO_TROUBLE = "No trouble."
MAX_TROUBLES = 2
"""Troubles of one report, so that a summary has at most 8 words."""

_ENDS = {
    "hot": ("is cold", "is now cold"),
    "stopped": ("has started", "has now started", "is running", "is now running"),
}

ELEMENTS = ("shape", "display", "gauge", "door", "person")
_HARD_ELEMENTS = ("shape", "display", "person")
MAX_ELEMENTS = 4


@dataclass(frozen=True, slots=True)
class Saying:
    """One sentence of somebody: English, German, and the trouble it is about."""

    text: str
    translation: str
    event: Event | None


@dataclass(frozen=True, slots=True)
class Report:
    """What was said in one stretch of a stream, and its summary in one line."""

    sayings: tuple[Saying, ...]
    summary: str

    @property
    def text(self) -> str:
        """All that was said."""
        return " ".join(saying.text for saying in self.sayings)


def saying_of(text: str) -> Saying:
    """Return the saying with that English text.

    Raises:
        ValueError: if it is no sentence of the grammar.
    """
    sentence = parse(text)
    return Saying(sentence.text, sentence.translation, sentence.event)


def draw_saying(
    rng: random.Random,
    *,
    held_out: bool | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> Saying:
    """Return one sentence; with `held_out` only one that is held out (True), or one that is not (False)."""
    while True:
        sentence = draw_sentence(rng, kinds)
        if held_out is None or is_held_out(sentence.text) == held_out:
            return Saying(sentence.text, sentence.translation, sentence.event)


def summary_of(sayings: Sequence[Saying]) -> str:
    """Return the troubles of `sayings` in the order of their first reports: what is, and what was and is over.

    "Pump three was hot. Line two is stopped." or "No trouble.". What is over was, whether or not anybody reported it
    before, and a trouble that comes again is again: so the summary of a whole follows from those of its parts, of which
    the later one is right about what both tell.
    """
    is_over: dict[tuple[str, str], bool] = {}
    for saying in sayings:
        event = saying.event
        if event is not None:
            is_over[event.thing, event.trouble] = event.is_over
    lines = [f"{capitalised(thing)} {'was' if over else 'is'} {trouble}." for (thing, trouble), over in is_over.items()]
    return " ".join(lines) or NO_TROUBLE


def draw_report(rng: random.Random, num_sayings: int, *, held_out: bool | None = None) -> Report:
    """Return a report of `num_sayings` statements and requests, with none to two troubles; some end within it.

    With `held_out` False none of its sayings is held out, nor is its text as a whole; with True its text is.

    Raises:
        ValueError: if `num_sayings` is below 1.
    """
    if num_sayings < 1:
        raise ValueError(f"a report of {num_sayings} sayings: give 1 or more")
    while True:
        sayings = _draw_sayings(rng, num_sayings)
        report = Report(sayings, summary_of(sayings))
        if held_out is None:
            return report
        has_held_out = any(is_held_out(saying.text) for saying in sayings)
        if is_held_out(report.text) == held_out and not (has_held_out and not held_out):
            return report


def _draw_sayings(rng: random.Random, num_sayings: int) -> tuple[Saying, ...]:
    """Return sayings about at most `MAX_TROUBLES` troubles, in an order that a trouble and its end keep."""
    num_troubles = min(rng.choice((0, 1, 1, 2, 2)), num_sayings)
    stories: list[list[Saying]] = []
    ends: list[Saying] = []
    things: set[str] = set()
    while len(stories) < num_troubles:
        saying, event = _draw_trouble(rng)
        if event.thing not in things:
            things.add(event.thing)
            stories.append([saying])
            ends.append(_draw_end(rng, event))
    for story, end in zip(stories, ends, strict=True):
        if sum(len(other) for other in stories) < num_sayings and rng.random() < 0.5:
            story.append(end)
    while sum(len(story) for story in stories) < num_sayings:
        saying = draw_saying(rng, kinds=("state", "request"))
        if saying.event is None:
            stories.append([saying])
    # Which story goes on at each place: drawn as the order of the stories' names, each as often as it has sayings.
    turns = [index for index, story in enumerate(stories) for _ in story]
    rng.shuffle(turns)
    heads = [iter(story) for story in stories]
    return tuple(next(heads[turn]) for turn in turns)


def _draw_trouble(rng: random.Random) -> tuple[Saying, Event]:
    while True:
        saying = draw_saying(rng, kinds=("state",))
        if saying.event is not None and not saying.event.is_over:
            return saying, saying.event


def _draw_end(rng: random.Random, event: Event) -> Saying:
    """Return a saying that the trouble of `event` is over."""
    end = rng.choice(_ENDS[event.trouble])
    return saying_of(f"{capitalised(event.thing)} {end}.")


@dataclass(frozen=True, slots=True)
class Shape:
    """A coloured shape, in the left or in the right half of the picture."""

    kind: str
    colour: str
    side: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. What is None is not there.

    Args:
        shape: a coloured shape.
        display: its digit.
        gauge: "high" or "low".
        door: "open" or "closed".
        person: "inside" or "outside" the yellow line.
    """

    shape: Shape | None = None
    display: int | None = None
    gauge: str | None = None
    door: str | None = None
    person: str | None = None

    @property
    def elements(self) -> tuple[str, ...]:
        """The names of what is there, in the order of the description."""
        return tuple(name for name in ELEMENTS if getattr(self, name) is not None)

    @property
    def sentences(self) -> tuple[str, ...]:
        """A sentence of the grammar for each element, in the order of `elements`."""
        lines = []
        if self.shape is not None:
            lines.append(f"A {self.shape.colour} {self.shape.kind} is on the {self.shape.side}.")
        if self.display is not None:
            lines.append(f"The display shows {DIGITS[self.display]}.")
        if self.gauge is not None:
            lines.append(f"The gauge is {self.gauge}.")
        if self.door is not None:
            lines.append(f"The door is {self.door}.")
        if self.person is not None:
            lines.append(f"The person is {self.person} the yellow line.")
        return tuple(lines)

    @property
    def description(self) -> str:
        """All of it, at most 25 words."""
        return " ".join(self.sentences)


def _draw_element(rng: random.Random, name: str) -> Any:
    if name == "shape":
        return Shape(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIDES))
    if name == "display":
        return rng.randrange(len(DIGITS))
    choices = {"gauge": ("high", "low"), "door": ("open", "closed"), "person": ("inside", "outside")}
    return rng.choice(choices[name])


def draw_scene(rng: random.Random, *, held_out: bool | None = None) -> Scene:
    """Return a scene of 1 to 4 elements; with `held_out` one whose description is held out (True) or not (False)."""
    while True:
        names = rng.sample(ELEMENTS, rng.randint(1, MAX_ELEMENTS))
        scene = replace(Scene(), **{name: _draw_element(rng, name) for name in names})
        if held_out is None or is_held_out(scene.description) == held_out:
            return scene


def draw_element(rng: random.Random, side: str) -> Scene:
    """Return a scene of one element, mostly of those that are hard to tell; a shape is on `side`."""
    name = rng.choices(ELEMENTS, [2 if name in _HARD_ELEMENTS else 1 for name in ELEMENTS])[0]
    value = _draw_element(rng, name)
    return replace(Scene(), **{name: replace(value, side=side) if name == "shape" else value})


def draw_scene_change(rng: random.Random, scene: Scene) -> Scene:
    """Return `scene` with one of its elements otherwise, such as a door that is now open.

    Raises:
        ValueError: if nothing is in it.
    """
    if not scene.elements:
        raise ValueError("an empty scene cannot change: draw one with elements")
    name = rng.choice(scene.elements)
    while True:
        changed = replace(scene, **{name: _draw_element(rng, name)})
        if changed != scene:
            return changed


def describe_scenes(scenes: Sequence[Scene]) -> str:
    """Return what several frames in a row show: all of the first, and of the others what is new in them.

    "The door is open. The gauge is low. Now the door is closed."

    Raises:
        ValueError: if there is none.
    """
    if not scenes:
        raise ValueError("a description of no scene: give 1 or more")
    lines = [scenes[0].description]
    for before, after in itertools.pairwise(scenes):
        lines += [f"Now {line[0].lower()}{line[1:]}" for line in after.sentences if line not in before.sentences]
    return " ".join(lines)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture, as it is spoken or typed, and its answer."""

    text: str
    answer: str


def questions_of(scene: Scene) -> tuple[Question, ...]:
    """Return all questions about what is in `scene`; each is a sentence of the grammar."""
    questions = []
    if scene.shape is not None:
        kind, colour, side = scene.shape.kind, scene.shape.colour, scene.shape.side
        questions.append(Question(f"What colour is the {kind}?", f"{capitalised(colour)}."))
        questions.append(Question(f"Where is the {kind}?", f"On the {side}."))
        questions.append(Question(f"What is on the {side}?", f"A {colour} {kind}."))
    if scene.display is not None:
        questions.append(Question("What does the display show?", f"{capitalised(DIGITS[scene.display])}."))
    for name, state, choices in (("gauge", scene.gauge, ("high", "low")), ("door", scene.door, ("open", "closed"))):
        if state is not None:
            for asked in choices:
                answer = f"{'Yes' if asked == state else 'No'}, it is {state}."
                questions.append(Question(f"Is the {name} {asked}?", answer))
    if scene.person is not None:
        questions.append(Question("Where is the person?", f"{capitalised(scene.person)} the yellow line."))
    return tuple(questions)


def draw_question(rng: random.Random, scene: Scene) -> Question:
    """Return a question about what is in `scene`: its elements are asked about alike often.

    Raises:
        ValueError: if nothing is in it.
    """
    if not scene.elements:
        raise ValueError("an empty scene has no questions: draw one with elements")
    name = rng.choice(scene.elements)
    return rng.choice(questions_of(replace(Scene(), **{name: getattr(scene, name)})))
