"""Caption files: what players can read, in order, with nothing lost."""

from __future__ import annotations

import html
import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import FinalRecord, HealthRecord, TranslationRecord, WordRecord
from pipeline.text.captions import MAX_COLUMNS, MAX_LINES, columns_of, to_cues, to_srt, to_text, to_webvtt

CUE_VTT = re.compile(r"(\d+)\n(\d\d+):(\d\d):(\d\d)\.(\d{3}) --> (\d\d+):(\d\d):(\d\d)\.(\d{3})\n(.+)", re.DOTALL)
CUE_SRT = re.compile(r"(\d+)\n(\d\d+):(\d\d):(\d\d),(\d{3}) --> (\d\d+):(\d\d):(\d\d),(\d{3})\n(.+)", re.DOTALL)


def final(sequence: int, start_ms: int, end_ms: int, text: str, **more: object) -> FinalRecord:
    values = {
        "stream": "s",
        "utterance": sequence,
        "revision": 1,
        "channel": 0,
        "language": "en",
        "language_source": "given",
        "tier": "edge",
        "close_reason": "pause",
        "average_logprob": -0.2,
        "sequence": sequence,
        "start_ms": start_ms,
        "end_ms": end_ms,
        "text": text,
    }
    return FinalRecord.model_validate(values | more)


def word_records(text: str, start_ms: int, word_ms: int) -> list[WordRecord]:
    words = text.split()
    return [
        WordRecord(
            text=f" {word}", start_ms=start_ms + i * word_ms, end_ms=start_ms + (i + 1) * word_ms, probability=0.9
        )
        for i, word in enumerate(words)
    ]


def squeezed(text: str) -> str:
    return "".join(text.split())


def to_ms(hours: str, minutes: str, seconds: str, millis: str) -> int:
    return ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1_000 + int(millis)


# Any text that a decoder may write, with what is special in the two formats more likely than by chance.
TEXTS = st.one_of(
    st.lists(
        st.sampled_from(["a", "word", "-->", "<b>", "&amp;", "end.", "超長い字幕です。", "x" * 100, "\n\n"]),
        max_size=60,
    ).map(" ".join),
    st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs")), max_size=300),
)


@st.composite
def final_lists(draw: st.DrawFn) -> list[FinalRecord]:
    finals, free_from_ms = [], [0, 0]
    for sequence, text in enumerate(draw(st.lists(TEXTS, max_size=6)), start=1):
        channel = draw(st.integers(0, 1))
        start_ms = free_from_ms[channel] + draw(st.integers(0, 3_000))
        length_ms = draw(st.integers(0, 20_000))
        free_from_ms[channel] = start_ms + length_ms
        words = word_records(text, start_ms, length_ms // (len(text.split()) or 1)) if draw(st.booleans()) else []
        finals.append(final(sequence, start_ms, start_ms + length_ms, text, words=words, channel=channel))
    return finals


@settings(max_examples=80, deadline=None)
@given(final_lists())
def test_cues_are_ordered_fit_the_screen_and_lose_no_text(finals: list[FinalRecord]) -> None:
    cues = to_cues(finals)
    assert [cue.start_ms for cue in cues] == sorted(cue.start_ms for cue in cues)
    for channel in (0, 1):
        own = [cue for cue in cues if cue.channel == channel]
        assert all(earlier.end_ms <= later.start_ms for earlier, later in itertools.pairwise(own))
        shown = squeezed("".join(line for cue in own for line in cue.lines))
        assert shown == squeezed("".join(record.text for record in finals if record.channel == channel))
    for cue in cues:
        assert cue.start_ms < cue.end_ms
        assert 1 <= len(cue.lines) <= MAX_LINES
        assert all(line == line.strip() and line and columns_of(line) <= MAX_COLUMNS for line in cue.lines)


@settings(max_examples=80, deadline=None)
@given(final_lists())
def test_a_webvtt_file_parses_back_to_its_cues(finals: list[FinalRecord]) -> None:
    header, *blocks = to_webvtt(finals).rstrip("\n").split("\n\n")
    assert header == "WEBVTT"
    cues = to_cues(finals)
    assert len(blocks) == len(cues)
    for number, (block, cue) in enumerate(zip(blocks, cues, strict=True), start=1):
        match = CUE_VTT.fullmatch(block)
        assert match is not None
        assert int(match[1]) == number
        assert (to_ms(*match.group(2, 3, 4, 5)), to_ms(*match.group(6, 7, 8, 9))) == (cue.start_ms, cue.end_ms)
        payload = re.sub(r"^<v Channel \d>", "", match[10])
        assert "-->" not in payload
        assert "<" not in payload
        assert html.unescape(payload) == "\n".join(cue.lines)


@settings(max_examples=80, deadline=None)
@given(final_lists())
def test_an_srt_file_parses_back_to_its_cues(finals: list[FinalRecord]) -> None:
    text = to_srt(finals)
    cues = to_cues(finals)
    blocks = text.rstrip("\n").split("\n\n") if text else []
    assert len(blocks) == len(cues)
    for number, (block, cue) in enumerate(zip(blocks, cues, strict=True), start=1):
        match = CUE_SRT.fullmatch(block)
        assert match is not None
        assert int(match[1]) == number
        assert (to_ms(*match.group(2, 3, 4, 5)), to_ms(*match.group(6, 7, 8, 9))) == (cue.start_ms, cue.end_ms)
        assert squeezed(re.sub(r"^\[\d\] ", "", match[10])) == squeezed("".join(cue.lines))


def test_a_long_utterance_becomes_cues_with_the_times_of_their_words() -> None:
    text = "When that happens, a voice tells the whole team what went wrong. Then everyone stops and listens to it."
    record = final(1, 1_000, 11_000, text, words=word_records(text, 1_000, 400))
    first, second = to_cues([record])
    assert first.lines == ("When that happens, a voice tells the whole", "team what went wrong.")
    assert (first.start_ms, first.end_ms) == (1_000, 1_000 + 12 * 400)
    assert second.lines == ("Then everyone stops and listens to it.",)
    assert (second.start_ms, second.end_ms) == (1_000 + 12 * 400, 1_000 + 19 * 400)


def test_slow_speech_is_cut_before_it_stays_for_too_long() -> None:
    cues = to_cues([final(1, 0, 15_000, "one two three", words=word_records("one two three", 0, 5_000))])
    assert [cue.lines for cue in cues] == [("one",), ("two",), ("three",)]


def test_words_that_are_not_the_text_do_not_time_it() -> None:
    record = final(1, 500, 2_500, "cut by a guard", words=word_records("something else", 9_000, 100))
    assert [(cue.start_ms, cue.end_ms) for cue in to_cues([record])] == [(500, 2_500)]


def test_lost_sound_is_noted_where_it_was() -> None:
    gap = HealthRecord(stream="s", start_ms=2_000, end_ms=3_500, event="gap", message="packets lost --> resync")
    vtt = to_webvtt([final(1, 0, 1_000, "before"), final(2, 4_000, 5_000, "after")], [gap])
    assert vtt.split("\n\n")[2] == "NOTE gap 00:00:02.000 to 00:00:03.500 packets lost -- > resync"


def test_two_channels_are_told_apart() -> None:
    finals = [final(1, 0, 1_000, "left"), final(2, 500, 1_500, "right", channel=1)]
    assert "<v Channel 1>left" in to_webvtt(finals)
    assert "[2] right" in to_srt(finals)


def test_plain_text_has_a_line_a_final_and_translations_below() -> None:
    finals = [final(1, 3_723_004, 3_724_000, "Guten  Morgen"), final(2, 0, 10, "")]
    common = finals[0].model_dump(exclude={"kind", "close_reason", "average_logprob"})
    translation = TranslationRecord.model_validate(common | {"text": "Good morning", "target_language": "en"})
    assert to_text(finals, [translation]) == "[62:03.004] Guten Morgen\n    en: Good morning\n"


def test_an_hour_is_counted_in_caption_times() -> None:
    assert "01:02:03.004 --> 01:02:04.000" in to_webvtt([final(1, 3_723_004, 3_724_000, "x")])
    assert "01:02:03,004 --> 01:02:04,000" in to_srt([final(1, 3_723_004, 3_724_000, "x")])


def test_nothing_said_is_a_valid_file() -> None:
    assert to_webvtt([]) == "WEBVTT\n"
    assert to_srt([]) == ""
