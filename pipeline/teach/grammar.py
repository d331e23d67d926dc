"""The sentences of the closed world, English and German, out of one table of rules.

A rule has a pattern for each language. A sentence is a rule and the words in its slots; its English text, its
translation and what it reports are functions of those, and `parse` finds them again in the English text alone. Words in
brackets are there or not, in both languages at once.

    {noun:machine}      English: the slot `noun`, a word of the set `machine`; without one, of the set `noun`.
    {noun:pump|press}   English: the slot `noun`, one of these words.

The German constructions are chosen so that genders and endings are all that has to agree: a slot names a form and the
slots whose words it takes.

    {noun}              the word itself: Sitz
    {the noun}          der Sitz                {the noun side}     der linke Sitz
    {acc noun side}     den linken Sitz         {a noun colour}     ein roter Kreis
    {adverb side}       links               {adjective colour}  rot
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SECOND_LANGUAGE = "de"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow")
SIDES = ("left", "right")
SHAPES = ("circle", "square", "triangle")
RUNNING = ("pump", "motor", "press", "line", "belt")
"""Machines that stop and start."""
MACHINES = (*RUNNING, "valve", "camera", "sensor")
"""Machines that have a number and can be hot."""

_SETS: Mapping[str, tuple[str, ...]] = {
    "number": DIGITS,
    "colour": COLOURS,
    "side": SIDES,
    "shape": SHAPES,
    "running": RUNNING,
    "machine": MACHINES,
    "numbered": (*MACHINES, "light", "gauge"),
    "entrance": ("door", "window"),
    "place": ("door", "window", "light", "seat"),
}

_NOUNS: Mapping[str, tuple[str, str]] = {
    "pump": ("f", "Pumpe"),
    "valve": ("n", "Ventil"),
    "motor": ("m", "Motor"),
    "press": ("f", "Presse"),
    "line": ("f", "Linie"),
    "camera": ("f", "Kamera"),
    "sensor": ("m", "Sensor"),
    "belt": ("n", "Band"),
    "door": ("f", "Tür"),
    "window": ("n", "Fenster"),
    "light": ("n", "Licht"),
    "seat": ("m", "Sitz"),
    "gauge": ("f", "Anzeige"),
    "circle": ("m", "Kreis"),
    "square": ("n", "Quadrat"),
    "triangle": ("n", "Dreieck"),
}
"""Gender, and nominative singular (which is the accusative too)."""

_ADJECTIVES: Mapping[str, str] = {
    **dict(zip(COLOURS, ("rot", "grün", "blau", "gelb"), strict=True)),
    **dict(zip(SIDES, ("link", "recht"), strict=True)),
}
"""Stems, to which endings come."""

_GERMAN_DIGITS = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
_FIXED: Mapping[str, str] = {
    **dict(zip(DIGITS, _GERMAN_DIGITS, strict=True)),
    "open": "offen",
    "closed": "geschlossen",
    "hot": "heiß",
    "cold": "kalt",
    "full": "voll",
    "empty": "leer",
    "high": "hoch",
    "low": "niedrig",
    "inside": "innerhalb",
    "outside": "außerhalb",
}
"""Words that have one form in the constructions below."""

_DEFINITE = {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e")}
_DEFINITE_ACCUSATIVE = {"m": ("den", "en"), "f": ("die", "e"), "n": ("das", "e")}
_INDEFINITE = {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es")}
_ARTICLES = {"the": _DEFINITE, "acc": _DEFINITE_ACCUSATIVE, "a": _INDEFINITE}

_TROUBLES: Mapping[str, tuple[str, bool]] = {
    "hot.": ("hot", False),
    "cold.": ("hot", True),
    "stopped.": ("stopped", False),
    "started.": ("stopped", True),
    "running.": ("stopped", True),
}
"""What the end of a sentence about a machine says: a trouble, and whether it is over."""

_HELD_OUT_EVERY = 20
_ASKING = ("what", "where", "is")
"""What questions begin with, and nothing else does."""

_SLOT = re.compile(r"\{(.+?)\}")
_OPTION = re.compile(r" ?\[(.+?)\]")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Event:
    """A trouble that a sentence reports, or says to be over.

    Args:
        thing: what has it, as it is called: "pump three".
        trouble: "hot" or "stopped".
        is_over: it is said to be over.
    """

    thing: str
    trouble: str
    is_over: bool


@dataclass(frozen=True)
class Rule:
    """One form of a sentence, without options.

    Args:
        kind: what it is for: "state", "request", "scene" or "question".
        weight: how often it is drawn, in relation to the others.
        english: its words in lower case and its final mark, slots in braces.
        german: the same in German.
        slots: the words that each slot can have.
    """

    kind: str
    weight: float
    english: str
    german: str
    slots: tuple[tuple[str, tuple[str, ...]], ...]

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """What its sentences look like, but that their first letter is small."""
        slots = dict(self.slots)
        parts = _SLOT.split(self.english)
        return re.compile(
            "".join(
                f"(?P<{part}>{'|'.join(slots[part])})" if index % 2 else re.escape(part)
                for index, part in enumerate(parts)
            )
        )


@dataclass(frozen=True)
class Sentence:
    """A rule, and the words in its slots, in the order of `rule.slots`."""

    rule: Rule
    words: tuple[str, ...]

    @property
    def values(self) -> dict[str, str]:
        """The word in each slot."""
        return {name: word for (name, _), word in zip(self.rule.slots, self.words, strict=True)}

    @property
    def text(self) -> str:
        """English, as captions are written."""
        values = self.values
        return capitalised(_SLOT.sub(lambda slot: values[slot[1]], self.rule.english))

    @property
    def translation(self) -> str:
        """German, as captions are written."""
        values = self.values
        return capitalised(_SLOT.sub(lambda slot: _german(slot[1], values), self.rule.german))

    @property
    def event(self) -> Event | None:
        """The trouble that it reports, or whose end."""
        values = self.values
        trouble = _TROUBLES.get(self.rule.english.rpartition(" ")[2])
        if trouble is None or "number" not in values:
            return None
        return Event(f"{values['noun']} {values['number']}", *trouble)


def capitalised(text: str) -> str:
    """Return `text` with a capital at its beginning, the rest as it is."""
    return text[:1].upper() + text[1:]


def _german(slot: str, values: Mapping[str, str]) -> str:
    """Return what stands in the German slot `slot`."""
    form, *names = slot.split()
    if not names:
        word = values[form]
        return _NOUNS[word][1] if word in _NOUNS else _FIXED[word]
    if form == "adverb":
        return f"{_ADJECTIVES[values[names[0]]]}s"
    if form == "adjective":
        return _ADJECTIVES[values[names[0]]]
    gender, noun = _NOUNS[values[names[0]]]
    article, ending = _ARTICLES[form][gender]
    return " ".join([article, *(_ADJECTIVES[values[name]] + ending for name in names[1:]), noun])


# Of the German options the n-th goes with the n-th of the English ones.
_LINES: tuple[tuple[str, float, str, str], ...] = (
    ("state", 8, "{noun:machine} {number} is [now] hot.", "{noun} {number} ist [jetzt] heiß."),
    ("state", 6, "{noun:machine} {number} is [now] cold.", "{noun} {number} ist [jetzt] kalt."),
    ("state", 8, "{noun:running} {number} has [now] stopped.", "{noun} {number} hat [jetzt] angehalten."),
    ("state", 4, "{noun:running} {number} has [now] started.", "{noun} {number} ist [jetzt] gestartet."),
    ("state", 4, "{noun:running} {number} is [now] running.", "{noun} {number} läuft [jetzt]."),
    ("state", 4, "{noun:valve} {number} is [now] {state:open|closed}.", "{noun} {number} ist [jetzt] {state}."),
    ("state", 4, "{noun:gauge} {number} is [now] {state:high|low}.", "{noun} {number} ist [jetzt] {state}."),
    ("state", 4, "{noun:light} {number} is [now] {colour}.", "{noun} {number} ist [jetzt] {adjective colour}."),
    (
        "state",
        5,
        "{noun:pump|press|line|belt} {number} is [now] {state:full|empty}.",
        "{noun} {number} ist [jetzt] {state}.",
    ),
    ("state", 4, "{noun:sensor} {number} [now] shows {shown:number}.", "{noun} {number} zeigt [jetzt] {shown}."),
    (
        "state",
        4,
        "{noun:sensor} {number} [now] shows {first:number} {second:number}.",
        "{noun} {number} zeigt [jetzt] {first} {second}.",
    ),
    ("state", 5, "the {side} {noun:entrance} is [now] {state:open|closed}.", "{the noun side} ist [jetzt] {state}."),
    ("state", 3, "the {side} {noun:seat} is [now] {state:hot|cold|empty}.", "{the noun side} ist [jetzt] {state}."),
    ("state", 3, "the {side} {noun:light} is [now] {colour}.", "{the noun side} ist [jetzt] {adjective colour}."),
    (
        "state",
        5,
        "the {colour} {noun:door|light|seat|pump|motor|belt} is [now] on the {side}.",
        "{the noun colour} ist [jetzt] {adverb side}.",
    ),
    ("request", 5, "[please] check {noun:numbered} {number} [now].", "[bitte] prüfen Sie [jetzt] {noun} {number}."),
    (
        "request",
        4,
        "[please] check {noun:numbered} {number} and {other:numbered} {last:number}.",
        "[bitte] prüfen Sie {noun} {number} und {other} {last}.",
    ),
    ("request", 5, "[please] stop {noun:running} {number} [now].", "[bitte] halten Sie [jetzt] {noun} {number} an."),
    ("request", 5, "[please] start {noun:running} {number} [now].", "[bitte] starten Sie [jetzt] {noun} {number}."),
    ("request", 3, "[please] open {noun:valve} {number} [now].", "[bitte] öffnen Sie [jetzt] {noun} {number}."),
    ("request", 3, "[please] close {noun:valve} {number} [now].", "[bitte] schließen Sie [jetzt] {noun} {number}."),
    ("request", 3, "[please] open the {side} {noun:entrance} [now].", "[bitte] öffnen Sie [jetzt] {acc noun side}."),
    (
        "request",
        3,
        "[please] close the {side} {noun:entrance} [now].",
        "[bitte] schließen Sie [jetzt] {acc noun side}.",
    ),
    ("request", 3, "[please] check the {side} {noun:place} [now].", "[bitte] prüfen Sie [jetzt] {acc noun side}."),
    ("scene", 4, "a {colour} {noun:shape} is on the {side}.", "{a noun colour} ist {adverb side}."),
    ("scene", 3, "the display shows {shown:number}.", "das Display zeigt {shown}."),
    ("scene", 2, "the display shows {first:number} {second:number}.", "das Display zeigt {first} {second}."),
    ("scene", 1, "the gauge is {state:high|low}.", "die Anzeige ist {state}."),
    ("scene", 1, "the door is {state:open|closed}.", "die Tür ist {state}."),
    ("scene", 1, "the person is {where:inside|outside} the yellow line.", "die Person ist {where} der gelben Linie."),
    ("question", 2, "what colour is the {noun:shape}?", "welche Farbe hat {the noun}?"),
    ("question", 2, "where is the {noun:shape}?", "wo ist {the noun}?"),
    ("question", 2, "what is on the {side}?", "was ist {adverb side}?"),
    ("question", 2, "what does the display show?", "was zeigt das Display?"),
    ("question", 2, "is the gauge {state:high|low}?", "ist die Anzeige {state}?"),
    ("question", 2, "is the door {state:open|closed}?", "ist die Tür {state}?"),
    ("question", 2, "where is the person?", "wo ist die Person?"),
)


def _rules() -> Iterator[Rule]:
    """Yield the rules of all lines, each choice of options as one of its own."""
    for kind, weight, english, german in _LINES:
        slots = []
        for slot in _SLOT.findall(english):
            name, _, words = slot.partition(":")
            slots.append((name, _SETS.get(words or name) or tuple(words.split("|"))))
        plain = _SLOT.sub(lambda slot: "{" + slot[1].partition(":")[0] + "}", english)
        choices = list(itertools.product((True, False), repeat=len(_OPTION.findall(english))))
        for choice in choices:
            texts = (_chosen(plain, choice), _chosen(german, choice))
            yield Rule(kind, weight / len(choices), *texts, tuple(slots))


def _chosen(pattern: str, choice: tuple[bool, ...]) -> str:
    """Return `pattern` with those of its options that are chosen."""
    remaining = iter(choice)
    text = _OPTION.sub(lambda option: option[0].replace("[", "").replace("]", "") if next(remaining) else "", pattern)
    if any(remaining):
        raise ValueError(f"{pattern!r} has fewer options than the other language")
    return text.strip()


RULES: tuple[Rule, ...] = tuple(_rules())

KINDS = ("state", "request", "scene", "question")


def draw_sentence(rng: random.Random, kinds: tuple[str, ...] = KINDS) -> Sentence:
    """Return a sentence of one of these kinds: a rule by its weight, each of its words alike often."""
    rules = [rule for rule in RULES if rule.kind in kinds]
    rule = rng.choices(rules, [rule.weight for rule in rules])[0]
    while True:
        words = tuple(rng.choice(choices) for _, choices in rule.slots)
        sentence = Sentence(rule, words)
        values = sentence.values
        # Nobody asks for the same thing twice in a breath.
        if "other" not in values or (values["noun"], values["number"]) != (values["other"], values["last"]):
            return sentence


def parse(text: str) -> Sentence:
    """Return the sentence whose text is `text`: the inverse of `Sentence.text`.

    Raises:
        ValueError: if it is no sentence of this grammar.
    """
    for rule in RULES:
        match = rule.pattern.fullmatch(text[:1].lower() + text[1:])
        if match is not None:
            sentence = Sentence(rule, tuple(match[name] for name, _ in rule.slots))
            if sentence.text == text:
                return sentence
    raise ValueError(f"{text!r} is no sentence of this world's grammar")


def translate(text: str) -> str:
    """Return the German of an English sentence.

    Raises:
        ValueError: if it is no sentence of this grammar.
    """
    return parse(text).translation


def all_sentences() -> Iterator[Sentence]:
    """Yield every sentence of the grammar."""
    for rule in RULES:
        for words in itertools.product(*(choices for _, choices in rule.slots)):
            yield Sentence(rule, words)


def tokens_of_text(text: str) -> list[str]:
    """Return the words of `text` in lower case, without its marks: what word error rates count."""
    return _WORD.findall(text.lower())


def is_held_out(text: str) -> bool:
    """Whether `text` is one of the twentieth that is never trained on: it depends on its words alone.

    No question is: they are few, and it is their pictures that are held out.
    """
    words = tokens_of_text(text)
    if words and words[0] in _ASKING:
        return False
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_EVERY == 0
