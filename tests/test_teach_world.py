"""The closed world: one grammar, whose German, summaries, descriptions and answers follow from what was drawn."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.teach.grammar import RULES, Sentence, all_sentences, parse
from pipeline.teach.world import (
    MAX_ELEMENTS,
    SECOND_WORDS,
    WORDS,
    Report,
    Scene,
    Shape,
    describe_scenes,
    draw_question,
    draw_report,
    draw_saying,
    draw_scene,
    draw_scene_change,
    is_held_out,
    questions_of,
    saying_of,
    summary_of,
    tokens_of_text,
    translate,
)

seeds = st.integers(0, 2**32)


def summarised(*texts: str) -> str:
    return summary_of([saying_of(text) for text in texts])


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    return list(all_sentences())


def test_every_sentence_is_found_again_in_its_text_and_no_two_have_one_text(sentences: list[Sentence]) -> None:
    assert len({sentence.text for sentence in sentences}) == len(sentences) > 20_000
    sample = random.Random(1).sample(sentences, 2_000)
    assert [parse(sentence.text) for sentence in sample] == sample
    for rule in RULES:
        sentence = Sentence(rule, tuple(words[0] for _, words in rule.slots))
        assert parse(sentence.text) == sentence
        assert [other for other in RULES if other.pattern.fullmatch(sentence.text[0].lower() + sentence.text[1:])] == [
            rule
        ]


def test_every_sentence_is_short_and_its_words_are_known(sentences: list[Sentence]) -> None:
    for sentence in sentences:
        words = tokens_of_text(sentence.text)
        assert 3 <= len(words) <= 8
        assert set(words) <= set(WORDS)
        assert sentence.text[0].isupper()
        assert sentence.text[-1] in ".?"
        assert "  " not in sentence.text + sentence.translation
    assert 60 <= len(WORDS) <= 75


def test_every_sentence_has_a_translation_of_its_own(sentences: list[Sentence]) -> None:
    translations = {sentence.translation for sentence in sentences}
    assert len(translations) == len(sentences)
    assert not any(mark in translation for translation in translations for mark in "{}[]")
    assert {word for translation in translations for word in tokens_of_text(translation)} == set(SECOND_WORDS)


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("Pump three is hot.", "Pumpe drei ist heiß."),
        ("Line two has stopped.", "Linie zwei hat angehalten."),
        ("Line two is now running.", "Linie zwei läuft jetzt."),
        ("Sensor one now shows four seven.", "Sensor eins zeigt jetzt vier sieben."),
        ("Please close the left door.", "Bitte schließen Sie die linke Tür."),
        ("Check the right seat now.", "Prüfen Sie jetzt den rechten Sitz."),
        ("Open the left window.", "Öffnen Sie das linke Fenster."),
        ("Please stop belt nine now.", "Bitte halten Sie jetzt Band neun an."),
        ("Check valve zero and press five.", "Prüfen Sie Ventil null und Presse fünf."),
        ("The red light is on the right.", "Das rote Licht ist rechts."),
        ("The right light is green.", "Das rechte Licht ist grün."),
        ("The blue seat is now on the left.", "Der blaue Sitz ist jetzt links."),
        ("A yellow circle is on the left.", "Ein gelber Kreis ist links."),
        ("A red triangle is on the right.", "Ein rotes Dreieck ist rechts."),
        ("The person is outside the yellow line.", "Die Person ist außerhalb der gelben Linie."),
        ("What colour is the circle?", "Welche Farbe hat der Kreis?"),
        ("Is the door open?", "Ist die Tür offen?"),
    ],
)
def test_german_has_its_own_word_order_and_endings(english: str, german: str) -> None:
    assert translate(english) == german


@given(text=st.text(max_size=40) | st.sampled_from(["", "Pump three is hot", "pump three is hot.", "Seat one is hot."]))
def test_what_is_no_sentence_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no sentence"):
        parse(text)


def test_a_twentieth_of_the_sentences_is_held_out_by_its_words_alone(sentences: list[Sentence]) -> None:
    share = sum(is_held_out(sentence.text) for sentence in sentences) / len(sentences)
    assert 0.045 < share < 0.055
    for sentence in sentences[::100]:
        assert is_held_out(sentence.text) == is_held_out(sentence.text.lower().rstrip(".?"))


def test_no_question_is_held_out(sentences: list[Sentence]) -> None:
    questions = [sentence for sentence in sentences if sentence.rule.kind == "question"]
    assert questions
    assert not any(is_held_out(sentence.text) for sentence in questions)


def test_what_is_trained_on_has_all_words(sentences: list[Sentence]) -> None:
    trained = [sentence for sentence in sentences if not is_held_out(sentence.text)]
    assert {word for sentence in trained for word in tokens_of_text(sentence.text)} == {
        word for sentence in sentences for word in tokens_of_text(sentence.text)
    }


@given(seed=seeds, held_out=st.booleans())
def test_a_saying_depends_on_the_seed_alone_and_is_held_out_where_asked(seed: int, held_out: bool) -> None:
    first, again = (draw_saying(random.Random(seed), held_out=held_out) for _ in range(2))
    assert first == again == saying_of(first.text)
    assert first.translation == translate(first.text)
    assert is_held_out(first.text) == held_out


@pytest.mark.parametrize(
    ("texts", "summary"),
    [
        (["Please check pump three.", "Valve two is open."], "No trouble."),
        (
            ["Pump three is now hot.", "The left door is open.", "Line two has stopped."],
            "Pump three is hot. Line two is stopped.",
        ),
        (
            ["Line two has stopped.", "Pump three is hot.", "Line two is running."],
            "Line two was stopped. Pump three is hot.",
        ),
        (["Pump three is hot.", "Pump three is now cold."], "Pump three was hot."),
        (["Pump three is hot.", "Pump four is cold."], "Pump three is hot. Pump four was hot."),
        (["Pump three is hot.", "Pump three is cold.", "Pump three is hot."], "Pump three is hot."),
        (["Pump three is cold.", "The left seat is hot."], "Pump three was hot."),
        (["Belt one has stopped.", "Belt one has now started."], "Belt one was stopped."),
    ],
)
def test_a_summary_says_which_troubles_are_and_which_were(texts: list[str], summary: str) -> None:
    assert summarised(*texts) == summary


@given(seed=seeds, num_sayings=st.integers(1, 8))
def test_a_reports_summary_is_short_and_follows_from_its_sayings(seed: int, num_sayings: int) -> None:
    report = draw_report(random.Random(seed), num_sayings)
    assert report == draw_report(random.Random(seed), num_sayings)
    assert len(report.sayings) == num_sayings
    assert report.summary == summary_of(report.sayings)
    assert len(tokens_of_text(report.summary)) <= 12
    assert set(tokens_of_text(report.text + report.summary)) <= set(WORDS)


@given(seed=seeds, num_sayings=st.integers(2, 10), data=st.data())
def test_the_summary_of_a_whole_follows_from_those_of_its_parts(
    seed: int, num_sayings: int, data: st.DataObject
) -> None:
    report = draw_report(random.Random(seed), num_sayings)
    cut = data.draw(st.integers(1, num_sayings - 1))
    told: dict[tuple[str, str], str] = {}
    for part in (report.sayings[:cut], report.sayings[cut:]):
        for line in re.findall(r"\w[^.]*", summary_of(part)):
            if line != "No trouble":
                thing, verb, trouble = re.fullmatch(r"(.+) (is|was) (\w+)", line).groups()  # type: ignore[union-attr]
                told[thing, trouble] = verb
    lines = [f"{thing} {verb} {trouble}." for (thing, trouble), verb in told.items()]
    assert (" ".join(lines) or "No trouble.") == report.summary


def test_reports_have_none_one_and_two_troubles_over_and_not() -> None:
    rng = random.Random(0)
    summaries = [draw_report(rng, rng.randint(3, 8)).summary for _ in range(400)]
    kinds = [" ".join(word for word in tokens_of_text(text) if word in {"is", "was", "no"}) for text in summaries]
    assert set(kinds) == {"no", "is", "was", "is is", "is was", "was is", "was was"}
    assert all(kinds.count(kind) > 10 for kind in kinds)


@settings(max_examples=20)
@given(seed=seeds)
def test_a_report_to_train_on_has_nothing_that_is_held_out(seed: int) -> None:
    report = draw_report(random.Random(seed), 5, held_out=False)
    assert not any(is_held_out(text) for text in [report.text, *(saying.text for saying in report.sayings)])
    other: Report = draw_report(random.Random(seed), 5, held_out=True)
    assert is_held_out(other.text)


def test_a_scene_is_described_in_sentences_of_the_grammar() -> None:
    scene = Scene(Shape("circle", "red", "left"), 7, "low", "open", "inside")
    assert scene.description == (
        "A red circle is on the left. The display shows seven. The gauge is low. The door is open. "
        "The person is inside the yellow line."
    )
    assert [parse(sentence).text for sentence in scene.sentences] == list(scene.sentences)


@given(seed=seeds)
def test_scenes_are_described_alike_only_if_they_are_equal(seed: int) -> None:
    rng = random.Random(seed)
    scene, other = draw_scene(rng), draw_scene(rng)
    assert scene == draw_scene(random.Random(seed))
    assert 1 <= len(scene.elements) <= MAX_ELEMENTS
    assert len(tokens_of_text(scene.description)) <= 25
    assert set(tokens_of_text(scene.description)) <= set(WORDS)
    assert (scene.description == other.description) == (scene == other)


@given(seed=seeds)
def test_a_change_is_of_one_element_and_is_described_by_one_sentence_more(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    changed = draw_scene_change(rng, scene)
    assert changed.elements == scene.elements
    assert sum(getattr(scene, name) != getattr(changed, name) for name in scene.elements) == 1
    text = describe_scenes([scene, scene, changed, changed])
    assert text.startswith(scene.description + " Now ")
    assert len(text.split(" Now ")) == 2
    assert set(tokens_of_text(text)) <= set(WORDS)


def test_several_scenes_are_the_first_and_what_is_new() -> None:
    scene = Scene(gauge="low", door="open")
    assert describe_scenes([scene]) == "The gauge is low. The door is open."
    assert (
        describe_scenes([scene, replace(scene, door="closed")])
        == "The gauge is low. The door is open. Now the door is closed."
    )


def test_what_has_nothing_in_it_is_refused() -> None:
    for refused in (lambda: describe_scenes([]), lambda: draw_report(random.Random(0), 0)):
        with pytest.raises(ValueError, match="give 1 or more"):
            refused()
    with pytest.raises(ValueError, match="empty scene"):
        draw_scene_change(random.Random(0), Scene())
    with pytest.raises(ValueError, match="empty scene"):
        draw_question(random.Random(0), Scene())


def test_questions_have_the_answers_that_the_scene_gives() -> None:
    scene = Scene(Shape("circle", "red", "left"), 7, "low", "closed", "inside")
    assert {question.text: question.answer for question in questions_of(scene)} == {
        "What colour is the circle?": "Red.",
        "Where is the circle?": "On the left.",
        "What is on the left?": "A red circle.",
        "What does the display show?": "Seven.",
        "Is the gauge high?": "No, it is low.",
        "Is the gauge low?": "Yes, it is low.",
        "Is the door open?": "No, it is closed.",
        "Is the door closed?": "Yes, it is closed.",
        "Where is the person?": "Inside the yellow line.",
    }


@given(seed=seeds)
def test_a_question_is_about_the_scene_and_can_be_spoken(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    question = draw_question(random.Random(seed), scene)
    assert question in questions_of(scene)
    assert question == draw_question(random.Random(seed), scene)
    assert parse(question.text).rule.kind == "question"
    assert set(tokens_of_text(question.answer)) <= set(WORDS)
