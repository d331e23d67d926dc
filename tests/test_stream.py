"""The stream core, with outcomes made by hand: its rules do not depend on what models answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.audio.chunks_to_utterances import ChunksToUtterances, VadParams
from pipeline.audio.samples_to_chunks import by_chunk_index
from pipeline.items import (
    TRANSCRIBE,
    Failure,
    FailureKind,
    Hypothesis,
    Outcome,
    Snapshot,
    SnapshotKey,
    Task,
    TaskKind,
    Word,
)
from pipeline.records import BaseRecord, ErrorRecord, FinalRecord, HealthRecord, PartialRecord, TranslationRecord
from pipeline.stream import StartPoint, Stream
from pipeline.stream_params import NUM_OPENING_SNAPSHOTS, CaptionParams, SnapshotParams, StreamParams
from pipeline.text.captions import to_cues
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ
from tests.media import read_pcm


def answer(
    snapshot: Snapshot, text: str = "one two", *, task: Task = TRANSCRIBE, guard: str | None = None
) -> Hypothesis:
    return Hypothesis(
        key=snapshot.key,
        task=task,
        text=text,
        tokens=(snapshot.key.utterance, snapshot.key.revision),
        words=(),
        language="en",
        average_logprob=-0.25,
        no_speech_probability=0.01,
        num_passes=1,
        guard=guard,
    )


def hear(stream: Stream, samples: NDArray[np.int16]) -> list[Snapshot]:
    """Push all of `samples` and return every snapshot that was due on the way, without answering any."""
    due: list[Snapshot] = []
    for group in by_chunk_index(stream.chunker.push(np.atleast_2d(samples))):
        for chunk in group:
            stream.push(chunk)
        due += stream.due_snapshots()
    return due


def caption(
    stream: Stream,
    samples: NDArray[np.int16],
    decode: Callable[[Snapshot], Iterable[Outcome]],
    cadence_ms: int | None = None,
) -> tuple[list[Snapshot], list[BaseRecord]]:
    """Play `samples` to the end, answering every snapshot at once."""
    served: list[Snapshot] = []

    def serve() -> None:
        for snapshot in stream.due_snapshots(cadence_ms):
            served.append(snapshot)
            for outcome in decode(snapshot):
                stream.accept(outcome)

    for group in by_chunk_index(stream.chunker.push(np.atleast_2d(samples))):
        for chunk in group:
            stream.push(chunk)
        serve()
    stream.finish()
    serve()
    return served, stream.take_records()


def of_kind(records: list[BaseRecord], kind: type[BaseRecord]) -> list[BaseRecord]:
    return [record for record in records if isinstance(record, kind)]


@pytest.fixture(scope="module")
def sound(speech) -> NDArray[np.int16]:
    return read_pcm(speech)


def test_a_stream_starts_and_ends_with_health_records_around_partials_and_finals(sound):
    served, records = caption(Stream("s", StreamParams()), sound, lambda snapshot: [answer(snapshot)])
    health = of_kind(records, HealthRecord)
    finals = of_kind(records, FinalRecord)
    assert [record.event for record in health] == ["started", "ended"]
    assert records[0] is health[0]
    assert records[-1] is health[-1]
    assert health[-1].end_ms == len(sound) // 16
    assert [final.sequence for final in finals] == list(range(1, len(finals) + 1))
    assert len(finals) >= 3
    assert sum(snapshot.is_final for snapshot in served) == len(finals)
    assert len(of_kind(records, PartialRecord)) > len(finals)


def test_a_partial_waits_for_640_ms_of_speech_and_of_new_sound(sound):
    served, _ = caption(Stream("s", StreamParams()), sound, lambda snapshot: [answer(snapshot)])
    partials = [snapshot for snapshot in served if not snapshot.is_final]
    for before, after in itertools.pairwise(partials):
        if before.key.utterance == after.key.utterance:
            assert after.end_sample - before.end_sample == 640 * 16
        assert len(after.samples) >= 640 * 16


def partials_by_utterance(served: list[Snapshot]) -> list[list[Snapshot]]:
    partials = [snapshot for snapshot in served if not snapshot.is_final]
    return [list(group) for _, group in itertools.groupby(partials, key=lambda snapshot: snapshot.key.utterance)]


def gaps_ms(partials: list[Snapshot]) -> list[int]:
    return [(after.end_sample - before.end_sample) // 16 for before, after in itertools.pairwise(partials)]


@pytest.mark.parametrize("cadence_ms", [0, 320, 700, 1_400, 2_000, 60_000])
def test_the_cadence_of_a_live_stream_is_the_one_asked_for_within_its_bounds_but_the_first_come_soon(sound, cadence_ms):
    params = StreamParams(vad=VadParams(soft_limit_ms=15_000))
    served, _ = caption(Stream("s", params), sound, lambda snapshot: [answer(snapshot)], cadence_ms)
    wanted_ms = min(max(320, cadence_ms), 2_000)
    stretched = []
    for partials in partials_by_utterance(served):
        first, *others = gaps_ms(partials)
        assert first == 320
        assert all(gap_ms >= 320 for gap_ms in others)
        stretched += others
    assert stretched.count(-(-wanted_ms // 80) * 80) >= 3


def test_an_utterance_of_which_nothing_is_shown_keeps_the_minimum_cadence_for_a_few_partials_only(sound):
    served, _ = caption(
        Stream("s", StreamParams()), sound, lambda s: [answer(s, guard=None if s.is_final else "silence")], 1_600
    )
    gaps = [gaps_ms(partials) for partials in partials_by_utterance(served)]
    assert any(len(each) >= NUM_OPENING_SNAPSHOTS for each in gaps)
    for each in gaps:
        assert set(each[: NUM_OPENING_SNAPSHOTS - 1]) <= {320, 400, 480}
        assert all(gap_ms > 480 for gap_ms in each[NUM_OPENING_SNAPSHOTS - 1 : -1])


def paused(sound: NDArray[np.int16], pause_ms: int) -> tuple[Stream, NDArray[np.int16], int]:
    """Two pieces of speech with a pause of `pause_ms` between them, in one utterance; where the pause begins."""
    params = StreamParams(
        vad=VadParams(hangover_ms=2_000, soft_limit_ms=15_000), snapshots=SnapshotParams(min_speech_ms=640)
    )
    stream = Stream("s", params)
    began = next(snapshot for snapshot in hear(Stream("s", StreamParams()), sound) if not snapshot.is_final)
    piece = sound[began.start_sample : began.start_sample + 2_400 * 16]
    pause = np.zeros(pause_ms * 16, np.int16)
    return stream, np.concatenate([np.zeros(8_000, np.int16), piece, pause, piece]), 8_000 + len(piece)


@pytest.mark.parametrize("cadence_ms", [320, 2_000])
def test_the_last_words_before_a_pause_get_a_partial_soon_and_the_pause_gets_none(sound, cadence_ms):
    stream, samples, pause_start = paused(sound, 1_500)
    served, _ = caption(stream, samples, lambda snapshot: [answer(snapshot)], cadence_ms)
    assert {snapshot.key.utterance for snapshot in served} == {1}
    *before_the_end, _ = served
    ends_ms = [(snapshot.end_sample - pause_start) // 16 for snapshot in before_the_end]
    in_pause_ms = [end_ms for end_ms in ends_ms if 80 < end_ms <= 1_500]
    # one of the last cadence, perhaps, and the early final: the detector's own hangover and the post-roll
    assert 1 <= len(in_pause_ms) <= 2
    assert max(in_pause_ms) <= 400
    back = min(end_ms for end_ms in ends_ms if end_ms > 1_500)
    assert back >= 1_500 + 80


def test_a_final_that_was_begun_in_the_pause_is_the_one_that_would_have_come_behind_it(sound):
    """The same records but for the numbers of revisions, and no second snapshot of the same sound."""
    late_params = StreamParams(snapshots=SnapshotParams(prefetches_finals=False))
    late, late_records = caption(Stream("s", late_params), sound, lambda snapshot: [said(snapshot)], 640)
    early, early_records = caption(Stream("s", StreamParams()), sound, lambda snapshot: [said(snapshot)], 640)
    first, second = of_kind(late_records, FinalRecord), of_kind(early_records, FinalRecord)
    assert [record.model_dump(exclude={"revision"}) for record in first] == [
        record.model_dump(exclude={"revision"}) for record in second
    ]
    spans = [(snapshot.start_sample, snapshot.end_sample) for snapshot in early if snapshot.is_final]
    assert len(set(spans)) == len(spans)
    assert {(snapshot.start_sample, snapshot.end_sample) for snapshot in late if snapshot.is_final} <= set(spans)


def test_an_early_final_is_begun_in_time_to_be_ready_when_the_utterance_closes(sound):
    stream = Stream("s", StreamParams())
    begun: dict[int, int] = {}  # by the end of a final: the sound heard when it was handed out
    closed_at: dict[int, int] = {}
    for [chunk] in by_chunk_index(stream.chunker.push(np.atleast_2d(sound))):
        stream.push(chunk)
        for snapshot in stream.due_snapshots(640):
            if snapshot.is_final:
                begun[snapshot.end_sample] = chunk.end_sample
            stream.accept(said(snapshot))
        for record in stream.take_records():
            if isinstance(record, FinalRecord):
                closed_at[record.end_ms * 16] = chunk.end_sample
    assert len(closed_at) >= 8
    for end_sample, heard in closed_at.items():
        assert heard - begun[end_sample] >= 160 * 16


def test_who_speaks_on_voids_an_early_final_and_it_was_shown_as_a_partial(sound):
    stream, samples, pause_start = paused(sound, 1_000)
    early: list[Snapshot] = []
    void: list[SnapshotKey] = []
    for [chunk] in by_chunk_index(stream.chunker.push(np.atleast_2d(samples))):
        stream.push(chunk)
        void += stream.take_void_keys()
        for snapshot in stream.due_snapshots(640):
            if snapshot.is_final:
                early.append(snapshot)
            else:
                stream.accept(said(snapshot))
    assert pause_start < early[0].end_sample <= pause_start + 500 * 16
    assert early[0].key in void, "nobody answered it"
    stream.take_records()
    stream.accept(said(early[0]))
    assert stream.take_records() == []

    stream, samples, _ = paused(sound, 1_000)
    _, records = caption(stream, samples, lambda snapshot: [said(snapshot)], 640)
    assert stream.take_void_keys() == [], "what is answered need not be withdrawn"
    shown = [record for record in of_kind(records, PartialRecord) if record.revision == early[0].key.revision]
    assert [record.end_ms for record in shown] == [early[0].end_sample // 16]
    assert len(of_kind(records, FinalRecord)) == 1


def test_an_early_final_that_failed_is_an_error_only_if_the_utterance_ends_with_it(sound):
    def decode(snapshot: Snapshot) -> list[Outcome]:
        is_lost = snapshot.is_final
        return [Failure(snapshot.key, None, FailureKind.FAILED, "lost") if is_lost else said(snapshot)]

    stream, samples, _ = paused(sound, 1_000)
    _, records = caption(stream, samples, decode, 640)
    assert len(of_kind(records, ErrorRecord)) == 1
    assert of_kind(records, FinalRecord) == []


@given(cadence_ms=st.one_of(st.none(), st.integers(100, 3_000)), lag=st.integers(0, 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_partial_adds_speech_however_late_the_answers_come(sound, cadence_ms, lag):
    """`lag` is how many chunks the stages need for an answer."""
    stream, detector = Stream("s", StreamParams()), ChunksToUtterances(VadParams(), 0)
    ends: dict[int, int] = {}  # by utterance: where its last partial ended
    speech_until: list[int] = []
    waiting: list[tuple[int, Snapshot]] = []
    for index, [chunk] in enumerate(by_chunk_index(stream.chunker.push(np.atleast_2d(sound[: 20 * SAMPLE_RATE_HZ])))):
        stream.push(chunk)
        detector.push(chunk)
        speech_until.append(detector.last_speech_sample)
        while waiting and waiting[0][0] <= index:
            stream.accept(answer(waiting.pop(0)[1]))
        for snapshot in stream.due_snapshots(cadence_ms):
            waiting.append((index + lag, snapshot))
            if snapshot.is_final:
                continue
            since = ends.get(snapshot.key.utterance, snapshot.start_sample)
            assert speech_until[-1] - since >= 80 * 16
            assert snapshot.end_sample - since >= 320 * 16
            ends[snapshot.key.utterance] = snapshot.end_sample
    assert len(ends) >= 3


def test_bounds_of_the_cadence_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match="cadence_ms=640 must lie between min_cadence_ms=800"):
        SnapshotParams(min_cadence_ms=800)
    with pytest.raises(ValidationError, match="max_cadence_ms=600"):
        SnapshotParams(max_cadence_ms=600)


def test_no_partial_is_asked_for_while_one_is_in_flight(sound):
    due = hear(Stream("s", StreamParams()), sound)
    for utterance in {snapshot.key.utterance for snapshot in due}:
        assert [snapshot.is_final for snapshot in due if snapshot.key.utterance == utterance].count(False) <= 1


def test_snapshots_hold_the_sound_of_their_utterance(sound):
    due = hear(Stream("s", StreamParams()), sound)
    padded = np.concatenate([sound, np.zeros(CHUNK_SAMPLES, np.int16)])
    for snapshot in due:
        assert np.array_equal(snapshot.samples, padded[snapshot.start_sample : snapshot.end_sample])


def test_finals_leave_in_order_though_their_outcomes_come_in_reverse(sound):
    stream = Stream("s", StreamParams())
    finals = [snapshot for snapshot in hear(stream, sound) if snapshot.is_final]
    assert len(finals) >= 3
    for snapshot in finals[:0:-1]:
        stream.accept(answer(snapshot))
        assert not of_kind(stream.take_records(), FinalRecord)
    stream.accept(answer(finals[0]))
    assert [record.sequence for record in of_kind(stream.take_records(), FinalRecord)] == [*range(1, len(finals) + 1)]


def test_each_language_has_its_own_order(sound):
    params = StreamParams(captions=CaptionParams(translate_to=("en",)))
    english = Task(TaskKind.TRANSLATE, "en")
    stream = Stream("s", params)
    first, second, *_ = [snapshot for snapshot in hear(stream, sound) if snapshot.is_final]
    assert first.tasks == (TRANSCRIBE, english)
    stream.accept(answer(first))
    stream.accept(answer(second))
    stream.accept(answer(second, task=english))
    records = stream.take_records()
    assert [record.sequence for record in of_kind(records, FinalRecord)] == [1, 2]
    assert not of_kind(records, TranslationRecord)
    stream.accept(answer(first, task=english))
    assert [record.sequence for record in of_kind(stream.take_records(), TranslationRecord)] == [1, 2]


def test_a_failed_final_is_an_error_record_in_its_place_and_blocks_nobody(sound):
    params = StreamParams(captions=CaptionParams(translate_to=("en",)))
    stream = Stream("s", params)
    first, second, *_ = [snapshot for snapshot in hear(stream, sound) if snapshot.is_final]
    stream.accept(answer(second))
    stream.accept(Failure(first.key, None, FailureKind.FAILED, "the encoder refused it"))
    records = stream.take_records()
    errors = of_kind(records, ErrorRecord)
    assert [(error.task, error.sequence) for error in errors] == [("transcribe", 1), ("translate:en", 1)]
    assert errors[0].message == "the encoder refused it"
    assert [final.sequence for final in of_kind(records, FinalRecord)] == [2]
    assert records.index(errors[0]) < records.index(of_kind(records, FinalRecord)[0])


@pytest.mark.parametrize("num_channels", [1, 2])
def test_nothing_comes_of_an_utterance_that_would_begin_behind_the_end_of_the_sound(long_sound, num_channels):
    """The sound ends just before an utterance has its hard limit, and the cut falls into the padding of its chunk."""
    params = StreamParams(vad=VadParams(hard_limit_ms=2_000, soft_limit_ms=2_000, cut_search_ms=1_000))

    def finals_of(num_samples: int) -> list[FinalRecord]:
        sound = np.stack([long_sound[at : at + num_samples] for at in (0, 8_000)[:num_channels]])
        stream = Stream("s", params, num_channels=num_channels)
        served, records = caption(stream, sound, lambda snapshot: [answer(snapshot)])
        assert all(len(snapshot.samples) and snapshot.end_sample <= num_samples for snapshot in served)
        assert isinstance(records[-1], HealthRecord)
        assert records[-1].event == "ended"
        return of_kind(records, FinalRecord)

    last_reasons = set()
    for cut in [final for final in finals_of(10 * SAMPLE_RATE_HZ) if final.close_reason == "limit"]:
        limit = cut.start_ms * 16 + 2_000 * 16
        for num_samples in range(limit - CHUNK_SAMPLES, limit, 160):
            finals = finals_of(num_samples)
            assert [final.sequence for final in finals] == list(range(1, len(finals) + 1))
            last_reasons.add([final.close_reason for final in finals if final.channel == cut.channel][-1])
    assert last_reasons == {"end", "limit"}, "with and without sound behind the cut"


def test_an_overtaken_partial_changes_nothing_when_it_answers_late(sound):
    stream = Stream("s", StreamParams())
    due = hear(stream, sound)
    late = next(snapshot for snapshot in due if not snapshot.is_final)
    stream.take_records()
    stream.accept(answer(late, "too late"))
    assert stream.take_records() == []


def test_what_a_guard_left_of_a_partial_is_shown_but_never_stable_nor_a_draft(sound):
    served, records = caption(
        Stream("s", StreamParams()), sound, lambda s: [answer(s, guard=None if s.is_final else "loop")]
    )
    partials = of_kind(records, PartialRecord)
    assert len(partials) == sum(not snapshot.is_final for snapshot in served)
    assert {(partial.text, partial.stable_chars, partial.guard) for partial in partials} == {("one two", 0, "loop")}
    assert all(snapshot.draft == () for snapshot in served)


def test_a_guarded_partial_without_text_or_with_less_of_it_than_before_is_not_published(sound):
    texts = {1: "one two three", 2: "one two", 3: ""}

    def guarded(snapshot: Snapshot) -> list[Outcome]:
        if snapshot.is_final or snapshot.key.revision == 1:
            return [answer(snapshot, texts[1])]
        return [answer(snapshot, texts[2 + snapshot.key.revision % 2], guard="loop")]

    _, records = caption(Stream("s", StreamParams()), sound, guarded)
    assert {partial.text for partial in of_kind(records, PartialRecord)} == {texts[1]}
    assert {partial.revision for partial in of_kind(records, PartialRecord)} == {1}


def test_words_behind_speech_without_words_and_late_ones_are_not_stable(sound):
    """Every partial but the first says four words, the third after a hole."""
    words = tuple(
        Word(text, start * 16, end * 16, 0.9)
        for text, start, end in (("one", 0, 200), ("two", 200, 500), ("three", 2_000, 2_200), ("four", 2_200, 2_400))
    )

    def stable_of(stream: Stream, with_times: bool) -> set[str]:
        _, records = caption(
            stream,
            sound,
            lambda s: [
                replace(answer(s, "one two three four"), words=words if with_times else ())
                if s.key.revision > 1
                else answer(s, "one two")
            ],
        )
        return {partial.text[: partial.stable_chars] for partial in of_kind(records, PartialRecord)} - {""}

    assert stable_of(Stream("s", StreamParams()), with_times=True) == {"one two"}
    assert stable_of(Stream("s", StreamParams()), with_times=False) == {"one two", "one two three four"}
    early = StreamParams(vad=VadParams(hard_limit_ms=2_000, soft_limit_ms=2_000, cut_search_ms=1_000))
    assert stable_of(Stream("s", early), with_times=False) == {"one two"}


def test_the_last_hypothesis_is_the_next_draft_and_the_finals(sound):
    served, _ = caption(Stream("s", StreamParams()), sound, lambda snapshot: [answer(snapshot)])
    for snapshot in served:
        revision = snapshot.key.revision
        assert snapshot.draft == (() if revision == 1 else (snapshot.key.utterance, revision - 1))


def test_a_language_once_detected_on_enough_sound_stays_for_partials_but_not_for_the_final(sound):
    served, _ = caption(Stream("s", StreamParams()), sound, lambda snapshot: [answer(snapshot)])
    for snapshot in served:
        heard_before_ms = (snapshot.key.revision - 1) * 640
        if snapshot.is_final or heard_before_ms < 3_000 - 1_000:
            assert snapshot.language is None
        elif heard_before_ms > 3_000 + 1_000:
            assert snapshot.language == "en"


def test_a_failing_source_still_gives_the_final_of_what_was_heard(sound):
    stream = Stream("s", StreamParams())
    hear(stream, sound[: 3 * SAMPLE_RATE_HZ])
    stream.fail("the connection was lost")
    (final,) = stream.due_snapshots()
    assert not stream.has_ended
    stream.accept(answer(final))
    assert stream.has_ended
    last = stream.take_records()[-1]
    assert isinstance(last, HealthRecord)
    assert (last.event, last.message) == ("failed", "the connection was lost")


def test_a_resumed_stream_goes_on_numbering_and_counting_time(sound):
    start = StartPoint(next_sequence=8, next_utterance=9, start_sample=30 * CHUNK_SAMPLES, is_resumed=True)
    served, records = caption(Stream("s", StreamParams(), start=start), sound, lambda snapshot: [answer(snapshot)])
    finals = of_kind(records, FinalRecord)
    assert isinstance(records[0], HealthRecord)
    assert records[0].event == "resumed"
    assert (finals[0].sequence, finals[0].utterance) == (8, 9)
    assert served[0].start_sample >= 30 * CHUNK_SAMPLES
    assert records[-1].end_ms == 30 * 80 + len(sound) // 16


def test_a_gap_is_told(sound):
    stream = Stream("s", StreamParams())
    for item in stream.chunker.push_gap(16_000, "packets lost"):
        stream.push(item)
    gap = stream.take_records()[-1]
    assert isinstance(gap, HealthRecord)
    assert (gap.event, gap.start_ms, gap.end_ms, gap.message) == ("gap", 0, 1_000, "packets lost")


def test_two_channels_have_utterances_of_their_own(media):
    both = read_pcm(media / "two_voices.wav")
    _, records = caption(Stream("s", StreamParams(), num_channels=2), both, lambda snapshot: [answer(snapshot)])
    finals = of_kind(records, FinalRecord)
    assert {final.channel for final in finals} == {0, 1}
    assert len({final.utterance for final in finals}) == len(finals)
    for channel in (0, 1):
        _, alone = caption(Stream("s", StreamParams()), both[channel], lambda snapshot: [answer(snapshot)])
        assert [(f.start_ms, f.end_ms) for f in finals if f.channel == channel] == [
            (f.start_ms, f.end_ms) for f in of_kind(alone, FinalRecord)
        ]


def test_memory_does_not_grow_with_silence():
    stream = Stream("s", StreamParams())
    silence = np.zeros(60 * SAMPLE_RATE_HZ, np.int16)
    held = []
    for _ in range(5):
        hear(stream, silence)
        held.append(sum(tail.end_sample - tail.start_sample for tail in stream._tails))
        stream.take_records()
    assert held[-1] == held[0]
    assert held[-1] < 10 * SAMPLE_RATE_HZ


# Models that tell neither the language nor when a word was said


def untold(snapshot: Snapshot) -> Hypothesis:
    """As of a model that writes no word times and does not say which language it heard."""
    number = snapshot.end_sample // WORD - snapshot.start_sample // WORD
    return replace(answer(snapshot, " ".join(f"w{n}" for n in range(number))), language="und")


@pytest.mark.parametrize("cadence_ms", [None, 640])
def test_a_language_that_nobody_told_is_neither_given_nor_called_detected(long_sound, cadence_ms):
    served, records = caption(Stream("s", long_params(language="auto")), long_sound, lambda s: [untold(s)], cadence_ms)
    assert {snapshot.language for snapshot in served} == {None}
    told = [record for record in records if isinstance(record, FinalRecord | PartialRecord)]
    assert {(record.language, record.language_source) for record in told} == {("und", "tier")}


def test_a_language_once_told_is_kept_though_a_later_partial_does_not_tell_it(long_sound):
    def heard(snapshot: Snapshot) -> list[Outcome]:
        has_told = snapshot.end_sample - snapshot.start_sample < 5 * SAMPLE_RATE_HZ
        return [replace(untold(snapshot), language="de" if has_told else "und")]

    served, _ = caption(Stream("s", long_params(language="auto")), long_sound, heard)
    late = [s for s in served if not s.is_final and s.end_sample - s.start_sample > 6 * SAMPLE_RATE_HZ]
    assert late
    assert {snapshot.language for snapshot in late} == {"de"}


@pytest.mark.parametrize("language", ["auto", "en"])
def test_text_without_word_times_is_looked_at_once_and_becomes_stable_by_agreement(long_sound, language):
    params = long_params(language=language)
    served, records = caption(Stream("s", params), long_sound, lambda s: [untold(s)], 640)
    finals = [snapshot for snapshot in served if snapshot.is_final]
    assert len({(s.key.utterance, s.start_sample, s.end_sample) for s in finals}) == len(finals), "no second looks"
    for number, partials in itertools.groupby(of_kind(records, PartialRecord), key=lambda record: record.utterance):
        shown = list(partials)
        [final] = [record for record in of_kind(records, FinalRecord) if record.utterance == number]
        assert [partial.stable_chars for partial in shown] == sorted(partial.stable_chars for partial in shown)
        assert all(final.text.startswith(partial.text[: partial.stable_chars]) for partial in shown)
        assert final.words == []
    assert any(partial.stable_chars for partial in of_kind(records, PartialRecord))


def test_captions_of_finals_without_word_times_are_spread_over_their_utterance(long_sound):
    _, records = caption(Stream("s", long_params()), long_sound, lambda s: [untold(s)])
    finals = of_kind(records, FinalRecord)
    for final in finals:
        cues = to_cues([final])
        assert len(cues) >= (final.end_ms - final.start_ms) / 7_000
        assert (cues[0].start_ms, cues[-1].end_ms) == (final.start_ms, final.end_ms)
        assert all(0 < cue.end_ms - cue.start_ms <= 7_000 for cue in cues)
        assert " ".join(" ".join(cue.lines) for cue in cues) == final.text
        for before, after in itertools.pairwise(cues):
            assert before.end_ms == after.start_ms


# Partials that look at the last seconds only

WORD = 400 * 16
"""Samples of a word of `said`: word number n is spoken from n of them on, whatever the sound."""


def said(snapshot: Snapshot, *, is_timed: bool = True) -> Hypothesis:
    """What was given, the words said since, and one that only its first half was heard of."""
    after_given = snapshot.prefix[-1] + 1 if snapshot.prefix else -(-snapshot.start_sample // WORD)
    tokens = (*snapshot.prefix, *range(after_given, snapshot.end_sample // WORD))
    half = () if snapshot.is_final else (100_000 + snapshot.key.revision,)
    numbers = (*tokens, *half)
    words = tuple(
        Word(f"w{number}", max(0, start - snapshot.start_sample), max(0, start + WORD - snapshot.start_sample), 0.9, 1)
        for number, start in zip(numbers, (*(token * WORD for token in tokens), snapshot.end_sample), strict=False)
    )
    text = " ".join(f"w{number}" for number in numbers)
    return replace(answer(snapshot, text), tokens=numbers, words=words if is_timed and snapshot.wants_words else ())


@pytest.fixture(scope="module")
def long_sound(media) -> NDArray[np.int16]:
    return read_pcm(media / "long.wav")


def long_params(window_ms: int = 2_500, **captions: str) -> StreamParams:
    return StreamParams(
        vad=VadParams(soft_limit_ms=20_000, hard_limit_ms=20_000, cut_search_ms=1_000),
        captions=CaptionParams(**{"language": "en", **captions}),
        snapshots=SnapshotParams(window_ms=window_ms),
    )


@pytest.mark.parametrize("window_ms", [1_000, 2_500, 5_000])
def test_partials_of_long_speech_look_at_the_last_seconds_and_the_final_at_all_of_it(long_sound, window_ms):
    served, records = caption(Stream("s", long_params(window_ms)), long_sound, lambda snapshot: [said(snapshot)])
    *partials, final = [snapshot for snapshot in served if snapshot.key.utterance == 1]
    assert final.is_final
    assert len(final.samples) >= 15 * SAMPLE_RATE_HZ
    assert partials[0].start_sample == final.start_sample
    # What is kept, what it takes until word times are wanted or a word is stable, one cadence, one word.
    longest_ms = max(window_ms + 500, 640 + 640 + 400) + 640 + 400
    assert max(len(snapshot.samples) for snapshot in partials) <= longest_ms * 16
    assert max(len(snapshot.samples) for snapshot in partials) >= window_ms * 16
    for before, after in itertools.pairwise(partials):
        assert after.start_sample >= before.start_sample
        assert after.end_sample - after.start_sample >= min(window_ms * 16, after.end_sample - final.start_sample)
        assert (after.prefix != ()) == (after.start_sample > final.start_sample)
    # the final's draft holds every word once, the first ones too
    first = -(-final.start_sample // WORD)
    assert final.draft[:-1] == tuple(range(first, first + len(final.draft) - 1))
    assert (final.draft[-2] + 1) * WORD > partials[-1].end_sample - WORD
    assert (final.prefix, final.wants_words) == ((), False)
    for record in [record for record in of_kind(records, PartialRecord) if record.utterance == 1]:
        *words, _ = record.text.split()
        assert words == [f"w{number}" for number in range(first, first + len(words))]
        assert record.start_ms * 16 == final.start_sample
        assert len(words) >= (record.end_ms * 16 // WORD) - first
    stable = [record.stable_chars for record in of_kind(records, PartialRecord) if record.utterance == 1]
    assert stable == sorted(stable)


def test_word_times_are_wanted_of_partials_only_when_the_window_may_move(long_sound):
    served, _ = caption(Stream("s", long_params()), long_sound, lambda snapshot: [said(snapshot)])
    partials = [snapshot for snapshot in served if not snapshot.is_final]
    assert all(snapshot.wants_words == (len(snapshot.samples) >= 3_000 * 16) for snapshot in partials)
    assert 0 < sum(snapshot.wants_words for snapshot in partials) < len(partials)


def test_without_word_times_partials_hear_the_whole_utterance(long_sound):
    served, _ = caption(Stream("s", long_params()), long_sound, lambda snapshot: [said(snapshot, is_timed=False)])
    *partials, final = [snapshot for snapshot in served if snapshot.key.utterance == 1]
    assert {(snapshot.start_sample, snapshot.prefix) for snapshot in partials} == {(final.start_sample, ())}


@pytest.mark.parametrize("keep_language_after_ms", [3_000, 30_000])
def test_the_window_does_not_move_while_the_language_may_still_change(long_sound, keep_language_after_ms):
    """Every partial tells its words with their times, as those with few words for their length do."""
    params = long_params(1_000, language="auto")
    snapshots = params.snapshots.model_copy(update={"keep_language_after_ms": keep_language_after_ms})
    stream = Stream("s", params.model_copy(update={"snapshots": snapshots}))
    served, _ = caption(stream, long_sound, lambda snapshot: [said(replace(snapshot, wants_words=True))])
    *partials, final = [snapshot for snapshot in served if snapshot.key.utterance == 1]
    assert all(snapshot.start_sample == final.start_sample for snapshot in partials if snapshot.language is None)
    assert any(snapshot.language is not None for snapshot in partials) == (keep_language_after_ms == 3_000)
    assert any(snapshot.prefix for snapshot in partials) == (keep_language_after_ms == 3_000)


def test_a_guarded_partial_leaves_the_window_as_it_is(long_sound):
    def heard(snapshot: Snapshot) -> list[Outcome]:
        is_looping = not snapshot.is_final and snapshot.key.revision % 3 == 0
        return [replace(said(snapshot), guard="loop", tokens=()) if is_looping else said(snapshot)]

    served, records = caption(Stream("s", long_params()), long_sound, heard)
    partials = [snapshot for snapshot in served if snapshot.key.utterance == 1 and not snapshot.is_final]
    for before, after in itertools.pairwise(partials):
        if before.key.revision % 3 == 0:
            assert (after.start_sample, after.prefix, after.draft) == (
                before.start_sample,
                before.prefix,
                before.draft,
            )
    assert max(len(snapshot.samples) for snapshot in partials) <= (3_000 + 2 * 640 + 400) * 16
    for record in of_kind(records, PartialRecord):
        *words, _ = record.text.split()
        assert words == [f"w{int(words[0][1:]) + place}" for place in range(len(words))]
        assert len(words) >= (record.end_ms - record.start_ms) // 400 - 1
    assert any(record.guard for record in of_kind(records, PartialRecord))
