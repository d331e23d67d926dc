"""What a terminal shows: text in reading order, and the live view."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from actors.cli.live_view import LiveView, ViewState
from actors.cli.options import OutputFormat
from actors.cli.printers import CaptionFilePrinter, JsonPrinter, TextPrinter
from pipeline.records import (
    RECORD_ADAPTER,
    ErrorRecord,
    HealthRecord,
    PartialRecord,
    SummaryRecord,
    TranslationRecord,
)
from tests.stores import scene
from tests.test_captions import final


def translation(sequence: int, text: str, language: str = "en") -> TranslationRecord:
    common = final(sequence, 1_000 * sequence, 1_000 * sequence + 900, text).model_dump(
        exclude={"kind", "close_reason", "average_logprob"}
    )
    return TranslationRecord.model_validate(common | {"target_language": language})


def partial(utterance: int, text: str, stable_chars: int) -> PartialRecord:
    common = final(utterance, 1_000 * utterance, 1_000 * utterance + 900, text).model_dump(
        exclude={"kind", "close_reason", "average_logprob", "sequence"}
    )
    return PartialRecord.model_validate(common | {"stable_chars": stable_chars})


def summary(text: str) -> SummaryRecord:
    return SummaryRecord(
        stream="s",
        start_ms=0,
        end_ms=60_000,
        text=text,
        scope="rolling",
        covers_from=1,
        covers_to=1,
        language="en",
        tier="edge",
    )


def test_a_translation_that_comes_late_still_stands_below_its_final() -> None:
    file = io.StringIO()
    printer = TextPrinter(file, ["en"])
    printer.show(final(1, 1_000, 1_900, "eins"))
    assert file.getvalue() == "[00:01.000] eins\n"  # nobody waits for a translation to read what was said
    printer.show(final(2, 2_000, 2_900, "zwei"))
    printer.show(translation(2, "two"))
    assert "zwei" not in file.getvalue()
    printer.show(translation(1, "one"))
    assert file.getvalue() == "[00:01.000] eins\n    en: one\n[00:02.000] zwei\n    en: two\n"


def test_a_translation_that_fails_holds_nothing_up(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    printer = TextPrinter(file, ["en"])
    printer.show(final(1, 1_000, 1_900, "eins"))
    printer.show(final(2, 2_000, 2_900, "zwei"))
    printer.show(
        ErrorRecord(
            stream="s", start_ms=1_000, end_ms=1_900, utterance=1, sequence=1, task="translate:en", message="gone"
        )
    )
    assert file.getvalue() == "[00:01.000] eins\n[00:02.000] zwei\n"
    assert "no translate:en at 00:01.000: gone" in capsys.readouterr().err


def test_finals_do_not_wait_for_ever() -> None:
    file = io.StringIO()
    printer = TextPrinter(file, ["en"])
    for number in range(1, 41):
        printer.show(final(number, 1_000 * number, 1_000 * number + 900, f"Satz {number}"))
    assert "Satz 24\n" in file.getvalue()
    printer.close()
    assert len(file.getvalue().splitlines()) == 40


def test_gaps_are_told_beside_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    printer = TextPrinter(file, [])
    printer.show(HealthRecord(stream="s", start_ms=1_000, end_ms=2_000, event="gap", message="jump"))
    printer.show(summary("All is well."))
    assert file.getvalue() == "summary 00:00.000 to 01:00.000: All is well.\n"
    assert capsys.readouterr().err == "surtitle: sound was lost from 00:01.000 to 00:02.000: jump\n"


def shown(state: ViewState) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=90, color_system="standard", no_color=False)
    console.print(state.render())
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_partials_are_white_as_far_as_they_are_stable_and_grey_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    state = ViewState()
    state.apply(partial(1, "good morning every", stable_chars=12))
    assert "\x1b[37mgood morning\x1b[0m\x1b[90m every\x1b[0m" in shown(state)


def test_a_final_takes_the_place_of_its_partial_in_bold_with_translation_and_summary_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    state = ViewState()
    for record in (
        partial(1, "gut", 0),
        final(1, 1_000, 1_900, "guten Tag"),
        translation(1, "good day"),
        summary("In short."),
    ):
        state.apply(record)
    text = shown(state)
    first_line = text.splitlines()[0]
    assert "\x1b[1mguten Tag " in first_line
    assert "\x1b[36mgood day " in first_line
    assert "summary to 01:00.000" in first_line
    assert "\x1b[90m" not in text.replace("\x1b[90m00:01\x1b[0m", "")


def test_rows_that_no_longer_fit_stay_behind_in_the_terminal_each_once() -> None:
    file = io.StringIO()
    view = LiveView(Console(file=file, force_terminal=False, width=60, height=10))
    for number in range(1, 31):
        view.show(final(number, 1_000 * number, 1_000 * number + 900, f"sentence number {number}."))
    view.close()
    assert [file.getvalue().count(f"sentence number {number}.") for number in range(1, 31)] == [1] * 30


def test_nothing_of_a_text_is_taken_for_markup() -> None:
    state = ViewState()
    state.apply(final(1, 0, 900, "press [bold]enter[/bold] \\[x]"))
    state.apply(HealthRecord(stream="s", start_ms=0, end_ms=900, event="gap", message="[/]"))
    assert "press [bold]enter[/bold] \\[x]" in shown(state)


def test_a_scene_stands_in_the_text_where_it_was_seen_and_never_between_a_final_and_its_translation() -> None:
    file = io.StringIO()
    printer = TextPrinter(file, ["en"])
    printer.show(scene("s", 500, "A desk\nand a \x1b[31mlamp"))
    assert file.getvalue() == "scene 00:00.500: A desk and a \ufffd[31mlamp\n"
    printer.show(final(1, 1_000, 1_900, "eins"))
    printer.show(scene("s", 1_500, "A chair"))
    assert "chair" not in file.getvalue()
    printer.show(translation(1, "one"))
    assert file.getvalue().splitlines()[1:] == ["[00:01.000] eins", "    en: one", "scene 00:01.500: A chair"]


def test_scenes_that_wait_for_a_translation_that_never_comes_are_written_in_the_end() -> None:
    file = io.StringIO()
    printer = TextPrinter(file, ["en"])
    printer.show(final(1, 1_000, 1_900, "eins"))
    for number in range(1, 41):
        printer.show(scene("s", 1_000 * number, f"scene number {number}"))
    assert "scene number 24\n" in file.getvalue()
    printer.close()
    assert len(file.getvalue().splitlines()) == 41


@pytest.mark.parametrize("output_format", [OutputFormat.VTT, OutputFormat.SRT])
def test_caption_files_say_what_was_said_and_not_what_was_seen(output_format: OutputFormat) -> None:
    with_scene, without = io.StringIO(), io.StringIO()
    for file, records in (
        (with_scene, [final(1, 0, 900, "eins"), scene("s", 500)]),
        (without, [final(1, 0, 900, "eins")]),
    ):
        printer = CaptionFilePrinter(file, output_format)
        for record in records:
            printer.show(record)
        printer.close()
    assert with_scene.getvalue() == without.getvalue()
    assert "eins" in with_scene.getvalue()


def test_a_scene_is_a_line_of_json() -> None:
    file = io.StringIO()
    JsonPrinter(file).show(scene("s", 500, "a desk"))
    assert RECORD_ADAPTER.validate_json(file.getvalue()) == scene("s", 500, "a desk")


def test_the_last_scene_stands_beside_the_captions_with_the_summary() -> None:
    state = ViewState()
    for record in (
        final(1, 1_000, 1_900, "eins"),
        summary("In short."),
        scene("s", 500, "old"),
        scene("s", 900, "[b]new"),
    ):
        state.apply(record)
    text = shown(state)
    assert "scene at 00:00.900" in text
    assert "[b]new" in text
    assert "old" not in text
    assert "In short." in text


def test_scenes_that_fail_push_no_captions_out_of_view() -> None:
    state = ViewState()
    state.apply(final(1, 1_000, 1_900, "eins"))
    for ms in range(0, 60_000, 2_000):
        state.apply(
            ErrorRecord(
                stream="s", start_ms=ms, end_ms=ms, utterance=0, sequence=0, task="describe", message="[/] gone"
            )
        )
    assert len(state.rows) == 1
    assert "no describe at 00:58.000: [/] gone" in shown(state)
