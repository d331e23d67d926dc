"""`surtitle demo phi4`: its media, its verdict, and the whole of it with a model that says nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from actors.demo.media import DemoMedia, Said, Shown, Story, make_demo_media
from actors.demo.verdict import Row, judge
from actors.speech_tools import run_speech_tool
from pipeline.errors import MediaError
from pipeline.models.known import PHI4_NANO
from pipeline.models.phi4.tiny import make_tiny
from pipeline.records import BaseRecord, FinalRecord, SceneRecord, SummaryRecord, TranslationRecord
from pipeline.teach.world import Question, Scene, saying_of

SURTITLE = Path(sys.executable).parent / "surtitle"
DEMO = ("demo", "phi4", "--runtime", "local", "--fast")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> DemoMedia:
    return make_demo_media(tmp_path_factory.mktemp("demo"), 5)


def demo(home: Path, *args: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SURTITLE_")}
    values = {**kept, "XDG_DATA_HOME": str(home), "TMPDIR": str(home), "NO_COLOR": "1", **environ}
    command = [str(SURTITLE), *DEMO, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=values, timeout=150)


def test_the_video_holds_what_the_story_says(media: DemoMedia) -> None:
    story = media.story
    with av.open(str(media.video)) as container:
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
    sound = np.concatenate([block.reshape(-1) for block in blocks]).astype(np.int32)
    assert 35 <= len(sound) / 16_000 <= 45
    is_said = np.zeros(len(sound), bool)
    for said in story.said:
        is_said[said.start_ms * 16 : said.end_ms * 16 + 16] = True
        assert np.abs(sound[said.start_ms * 16 : said.end_ms * 16]).max() > 1_000
    assert not sound[~is_said].any()
    with av.open(str(media.video)) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(pictures) * 250 == len(sound) // 16
    for before, shown in zip(story.shown, story.shown[1:], strict=False):
        assert before.scene != shown.scene
        index = shown.start_ms // 250
        assert np.abs(pictures[index] - pictures[index - 1]).max() > 60
        assert np.abs(pictures[index - 1] - pictures[index - 2]).max() < 60
    with av.open(str(media.picture)) as container:
        (last,) = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert np.abs(last - pictures[-1]).mean() < 8
    assert story.question.answer


def test_a_seed_gives_the_same_story_and_another_one_another(media: DemoMedia, tmp_path: Path) -> None:
    again = make_demo_media(tmp_path / "again", 5)
    assert again.story == media.story
    assert again.question.read_bytes() == media.question.read_bytes()
    assert again.picture.read_bytes() == media.picture.read_bytes()
    assert make_demo_media(tmp_path / "other", 6).story != media.story


def test_a_missing_voice_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MediaError, match="apt-get install flite"):
        make_demo_media(tmp_path, 5, run_speech_tool)


PUMP, END, DOOR = (
    saying_of(text) for text in ("Pump three is hot.", "Pump three is cold.", "The left door is now open.")
)
STORY = Story(
    (Said(PUMP, 500, 2_000), Said(END, 3_000, 4_500), Said(DOOR, 6_000, 8_000)),
    (Shown(Scene(gauge="low"), 0), Shown(Scene(gauge="high"), 5_000), Shown(Scene(door="open"), 10_000)),
    Question("Is the door open?", "Yes, it is open."),
)


def final(sequence: int, start_ms: int, end_ms: int, text: str) -> FinalRecord:
    return FinalRecord(
        stream="s",
        start_ms=start_ms,
        end_ms=end_ms,
        utterance=sequence,
        revision=1,
        channel=0,
        text=text,
        language="en",
        language_source="given",
        tier="phi4",
        sequence=sequence,
        close_reason="pause",
        average_logprob=0.0,
    )


def translation(of: FinalRecord, text: str) -> TranslationRecord:
    shared = of.model_dump(exclude={"kind", "close_reason", "average_logprob"})
    return TranslationRecord(**{**shared, "text": text}, target_language="de")


def summary(first: int, last: int, text: str, scope: str = "rolling") -> SummaryRecord:
    return SummaryRecord.model_validate(
        {"stream": "s", "start_ms": HEARD[first - 1].start_ms, "end_ms": HEARD[last - 1].end_ms, "text": text}
        | {"scope": scope, "language": "en", "tier": "phi4", "covers_from": first, "covers_to": last}
    )


def scene(start_ms: int, text: str) -> SceneRecord:
    return SceneRecord(
        stream="s", start_ms=start_ms, end_ms=start_ms, text=text, tier="phi4", reason="changed", changed_share=0.5
    )


HEARD = [final(1, 300, 2_200, PUMP.text), final(2, 2_800, 4_700, END.text), final(3, 5_900, 8_100, DOOR.text)]
RIGHT: list[BaseRecord] = [
    *HEARD,
    *(translation(one, saying.translation) for one, saying in zip(HEARD, (PUMP, END, DOOR), strict=True)),
    summary(1, 1, "Pump three is hot."),
    summary(2, 3, "Pump three was hot."),
    summary(1, 3, "Pump three was hot.", "closing"),
    scene(0, "The gauge is low."),
    scene(4_990, "The gauge is high."),
    scene(10_500, "The door is open."),
]


def wrong(rows: list[Row]) -> list[tuple[str, str, str]]:
    return [(row.kind, row.expected, row.found) for row in rows if not row.is_right]


def test_what_is_right_is_found_right() -> None:
    rows = judge(STORY, RIGHT, " Yes, it is open. ")
    assert [row.kind for row in rows] == ["speech"] * 3 + ["summary"] * 2 + ["closing"] + ["scene"] * 3 + ["question"]
    assert wrong(rows) == []
    assert all(row.is_translation_right for row in rows)


@pytest.mark.parametrize("index", range(len(RIGHT)))
def test_every_wrong_or_missing_text_is_found(index: int) -> None:
    changed = RIGHT[index].model_copy(update={"text": "The gauge is open."})
    rows = judge(STORY, [*RIGHT[:index], changed, *RIGHT[index + 1 :]], "Yes, it is open.")
    assert len(wrong(rows)) + sum(not row.is_translation_right for row in rows) == 1
    without = judge(STORY, [*RIGHT[:index], *RIGHT[index + 1 :]], "Yes, it is open.")
    is_summary = isinstance(RIGHT[index], SummaryRecord)
    assert bool(wrong(without) or not all(row.is_translation_right for row in without)) != is_summary
    assert wrong(judge(STORY, RIGHT, "")) == [("question", "Yes, it is open.", "")]


def test_sentences_in_one_final_and_a_sentence_in_two_are_put_together() -> None:
    joined = final(1, 300, 4_700, f"{PUMP.text} {END.text}")
    parts = [final(2, 5_900, 6_900, "The left door"), final(3, 6_900, 8_100, "is now open.")]
    texts = {1: f"{PUMP.translation} {END.translation}", 2: "Die linke Tür", 3: "ist jetzt offen."}
    records = [joined, *parts, *(translation(one, texts[one.sequence]) for one in (joined, *parts))]
    rows = judge(STORY, [*records, summary(1, 2, "Pump three was hot.")], "")
    assert [row.expected for row in rows[:2]] == [f"{PUMP.text} {END.text}", DOOR.text]
    assert all(row.is_right and row.is_translation_right for row in rows[:3])


def test_a_sentence_that_was_not_heard_is_still_to_be_summarised() -> None:
    rows = judge(STORY, [HEARD[0].model_copy(update={"text": ""}), summary(1, 1, "No trouble.")], "")
    assert ("speech", PUMP.text, "") in wrong(rows)
    assert ("summary", "Pump three is hot.", "No trouble.") in wrong(rows)


def test_what_nobody_said_is_wrong() -> None:
    ghost = final(4, 9_000, 9_500, "Stop line two.")
    rows = judge(STORY, [*RIGHT, ghost, translation(ghost, "Halten Sie Linie zwei an.")], "Yes, it is open.")
    assert wrong(rows) == [("speech", "", "Stop line two.")]
    silent = replace(STORY, said=())
    assert len(wrong(judge(silent, RIGHT[:1], ""))) == 2 + len(STORY.shown)


def test_a_model_that_was_not_taught_is_told_to_be_wrong_to_the_end(tmp_path: Path) -> None:
    """All of it in one process: speech, pictures, captions, summaries, scenes, a spoken question, and the table."""
    model = make_tiny(tmp_path / "tiny")
    kept = tmp_path / "kept"
    done = demo(tmp_path, "--model", model, "--keep", kept)
    assert done.returncode == 0, done.stderr
    assert "A demonstration, not a recogniser" in done.stderr
    assert re.search(r"surtitle watch demo-\S+", done.stderr)
    assert {path.name for path in kept.iterdir()} == {"demo.mkv", "last-picture.png", "question.wav"}
    story = make_demo_media(tmp_path / "again", 5).story
    for said in story.said:
        assert f"said: {said.saying.text}\n       heard WRONG: " in done.stdout
    assert f'asked aloud "{story.question.text}": {story.question.answer}\n       model WRONG: ' in done.stdout
    totals = dict(line.split(": ") for line in done.stdout.splitlines() if line.endswith(" right"))
    assert totals["speech"] == totals["translations"] == f"0 of {len(story.said)} right"
    assert totals["question"] == "0 of 1 right"
    assert totals["scenes"].startswith("0 of ")
    assert {"rolling summaries", "closing summary"} <= totals.keys()


@pytest.mark.skipif(bool(PHI4_NANO.pins), reason="a taught checkpoint is in the package")
def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "surtitle models teach OUT" in done.stderr
    assert "pin_nano.py OUT" in done.stderr


def test_a_model_of_another_tier_and_a_missing_tool_are_refused(tmp_path: Path) -> None:
    done = demo(tmp_path, "--model", "whisper-base")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'whisper-base' is not of the phi4 tier" in done.stderr
    done = demo(tmp_path, "--model", make_tiny(tmp_path / "tiny"), PATH="/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get install flite" in done.stderr
