"""Summaries by jobs: when they are due, what they are handed, what they cover; the model is whoever answers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.items import Failure, FailureKind, Hypothesis, Job, JobKey, Outcome, SnapshotKey, TaskKind
from pipeline.records import BaseRecord, ErrorRecord, FinalRecord, SummaryRecord
from pipeline.text.generated_summaries import GeneratedSummaries
from pipeline.text.sentences import joint
from pipeline.text.transcripts_to_summaries import SummaryParams, TranscriptsToSummaries, summary_method

EVERY_6_S = SummaryParams(every_minutes=0.1)


def final(sequence: int, text: str, *, start_ms: int, length_ms: int = 1_500, channel: int = 0) -> FinalRecord:
    return FinalRecord(
        stream="s",
        start_ms=start_ms,
        end_ms=start_ms + length_ms,
        utterance=sequence,
        revision=1,
        channel=channel,
        text=text,
        language="und",
        language_source="tier",
        tier="phi4",
        sequence=sequence,
        close_reason="pause",
        average_logprob=-0.2,
    )


def wrote(job: Job, text: str = "They talked.", *, guard: str | None = None) -> Hypothesis:
    return Hypothesis(job.key, job.task, text, (1,), (), "en", -0.1, 0.0, 1, guard)


def lost(job: Job) -> Failure:
    return Failure(job.key, job.task, FailureKind.FAILED, "the decoder refused it")


class Listener:
    """Hands jobs to `model`, each `lag` finals after it was begun, and keeps them and the records."""

    def __init__(
        self,
        params: SummaryParams,
        model: Callable[[Job], Outcome] = wrote,
        *,
        lag: int = 0,
        num_channels: int = 1,
    ) -> None:
        self.summaries = GeneratedSummaries(params, "s", "phi4", num_channels=num_channels)
        self.jobs: list[Job] = []
        self.records: list[BaseRecord] = []
        self._model = model
        self._lag = lag
        self._num_heard = 0
        self._ready: tuple[int, Job] | None = None

    def hear(self, *finals: FinalRecord) -> None:
        for each in finals:
            self.summaries.push(each)
            self._num_heard += 1
            self._serve()

    def end(self) -> list[BaseRecord]:
        self.summaries.finish()
        self._lag = 0
        if self._ready is not None:
            self._ready = (0, self._ready[1])
        self._serve()
        assert self.summaries.is_done
        return self.records

    def _serve(self) -> None:
        while True:
            if self._ready is not None and self._ready[0] <= self._num_heard:
                job, self._ready = self._ready[1], None
                self.records += self.summaries.accept(self._model(job))
            job_now = self.summaries.take_job()
            if job_now is None:
                return
            assert self._ready is None, "two jobs in flight"
            self.jobs.append(job_now)
            self._ready = (self._num_heard + self._lag, job_now)
            if self._lag:
                return


def covers(records: Sequence[BaseRecord], scope: str = "rolling") -> list[tuple[int, int]]:
    return [
        (record.covers_from, record.covers_to)
        for record in records
        if isinstance(record, SummaryRecord) and record.scope == scope
    ]


def talk(count: int, *, step_ms: int = 3_000, text: str = "Sentence w{} is here.") -> list[FinalRecord]:
    return [final(n, text.format(n), start_ms=(n - 1) * step_ms) for n in range(1, count + 1)]


def words_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\bw(\d+)\b", text)]


# -- who writes them ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "tier", "expected"),
    [
        ("auto", "edge", "extractive"),
        ("auto", "phi4", "generated"),
        ("extractive", "edge", "extractive"),
        ("extractive", "phi4", "extractive"),
        ("generated", "phi4", "generated"),
    ],
)
def test_summaries_are_generated_where_the_tier_can_unless_asked_otherwise(method, tier, expected) -> None:
    assert summary_method(SummaryParams(method=method), tier) == expected


def test_generated_summaries_are_refused_where_nobody_can_write_them() -> None:
    with pytest.raises(ConfigError, match="'edge' has none: use extractive or auto"):
        summary_method(SummaryParams(method="generated"), "edge")


# -- what is handed over --------------------------------------------------------------------------


def test_a_rolling_summary_is_asked_for_what_was_said_since_the_last() -> None:
    listener = Listener(EVERY_6_S)
    listener.hear(*talk(5))
    assert [job.key for job in listener.jobs] == [
        JobKey("s", TaskKind.SUMMARISE, 1),
        JobKey("s", TaskKind.SUMMARISE, 2),
    ]
    assert [words_in(job.text) for job in listener.jobs] == [[1, 2, 3], [4, 5]]
    assert listener.jobs[0].text == "Sentence w1 is here. Sentence w2 is here. Sentence w3 is here."
    rolling, second = listener.records
    assert isinstance(rolling, SummaryRecord)
    assert (rolling.text, rolling.scope, rolling.language, rolling.tier) == ("They talked.", "rolling", "en", "phi4")
    assert (rolling.start_ms, rolling.end_ms, second.start_ms) == (0, 7_500, 9_000)


def test_several_speakers_are_told_apart() -> None:
    listener = Listener(EVERY_6_S, num_channels=2)
    listener.hear(
        final(1, "Is it open?", start_ms=0, channel=1),
        final(2, "No.", start_ms=2_000),
        final(3, "", start_ms=3_000, channel=1),
        final(4, "Why?", start_ms=5_000, channel=1),
    )
    assert [job.text for job in listener.jobs] == ["Speaker 2: Is it open?\nSpeaker 1: No.\nSpeaker 2: Why?"]


@pytest.mark.parametrize(
    ("before", "behind", "expected"),
    [
        ("Stop.", "Go on.", " "),
        ("ポンプです。", "圧力は低い", ""),
        ("圧力は低い", "ポンプ", ""),
        ("圧力は", "OK", " "),
        ("예", "아니오", " "),
        ("", "x", " "),
    ],
)
def test_texts_are_joined_as_their_script_is_written(before: str, behind: str, expected: str) -> None:
    assert joint(before, behind) == expected


def test_the_closing_summary_is_made_of_the_rolling_ones_and_the_tail() -> None:
    listener = Listener(EVERY_6_S, lambda job: wrote(job, f"Summary {job.key.number}."))
    listener.hear(*talk(6))
    records = listener.end()
    assert covers(records) == [(1, 3), (4, 5)]
    assert covers(records, "closing") == [(1, 6)]
    assert listener.jobs[-1].text == "Summary 1.\nSummary 2.\nSentence w6 is here."
    closing = records[-1]
    assert isinstance(closing, SummaryRecord)
    assert (closing.text, closing.start_ms, closing.end_ms) == ("Summary 3.", 0, 16_500)


def test_a_stream_in_which_nothing_was_said_asks_for_nothing() -> None:
    listener = Listener(EVERY_6_S)
    listener.hear(*talk(8, text="..."))
    assert listener.end() == []
    assert listener.jobs == []


def test_a_silent_stretch_gives_none_and_counts_to_the_next() -> None:
    listener = Listener(EVERY_6_S)
    texts = ("", "", "The gate is open.", "The gate is shut.")
    listener.hear(*(final(n, text, start_ms=n * 6_000) for n, text in enumerate(texts, start=1)))
    assert covers(listener.end()) == [(1, 3), (4, 4)]


def test_more_than_can_be_handed_over_loses_its_oldest_and_the_record_says_so() -> None:
    """The last rolling summary stands in for what fell out."""
    params = SummaryParams(every_minutes=1.0, max_text_chars=1_000)
    listener = Listener(params, lambda job: wrote(job, f"Summary {job.key.number}."))
    listener.hear(*talk(2, step_ms=60_000))  # the second makes a summary due
    later = [final(n, f"One w{n}. Two w{n}. {'x ' * 100}y.", start_ms=62_000 + n * 1_000) for n in range(3, 90)]
    listener.hear(*later)
    second = listener.jobs[1]
    assert second.text.startswith("Summary 1.\n")
    assert 700 < len(second.text) <= 1_000
    (_, (first, last)) = covers(listener.records)[:2]
    told = words_in(second.text)
    assert first == min(told) > 3
    assert last == max(told)
    record = listener.records[1]
    assert record.start_ms == later[first - 3].start_ms


def test_without_an_earlier_summary_a_long_text_is_cut_at_a_sentence() -> None:
    listener = Listener(SummaryParams(every_minutes=0.1, max_text_chars=1_000))
    sentences = " ".join(f"Sentence number {n} of a long speech." for n in range(60))
    listener.hear(final(1, sentences, start_ms=0, length_ms=9_000))
    (job,) = listener.jobs
    assert job.text.startswith("Sentence number ")
    assert sentences.endswith(job.text)
    assert 900 < len(job.text) <= 1_000


# -- one at a time, and failures ------------------------------------------------------------------


def test_while_a_job_is_in_flight_the_next_ones_wait_and_become_one() -> None:
    summaries = GeneratedSummaries(EVERY_6_S, "s", "phi4")
    for each in talk(3):
        summaries.push(each)
    first = summaries.take_job()
    assert first is not None
    for each in talk(9)[3:]:
        summaries.push(each)
        assert summaries.take_job() is None
    (record,) = summaries.accept(wrote(first))
    second = summaries.take_job()
    assert second is not None
    # Due at 12, 18 and 24 s: finals 5, 7 and 9.
    assert words_in(second.text) == [4, 5, 6, 7, 8, 9]
    assert covers([record, *summaries.accept(wrote(second))]) == [(1, 3), (4, 9)]


@pytest.mark.parametrize("answer", [lost, lambda job: wrote(job, " "), lambda job: wrote(job, "", guard="loop")])
def test_a_failed_summary_is_an_error_and_its_stretch_counts_to_the_next(answer) -> None:
    listener = Listener(EVERY_6_S, lambda job: answer(job) if job.key.number == 1 else wrote(job))
    listener.hear(*talk(5))
    error, rolling = listener.records
    assert isinstance(error, ErrorRecord)
    assert (error.utterance, error.sequence, error.task, error.start_ms, error.end_ms) == (0, 0, "summarise", 0, 7_500)
    assert error.message
    assert covers([rolling]) == [(1, 5)]
    assert words_in(listener.jobs[1].text) == [1, 2, 3, 4, 5]


def test_a_failed_summary_goes_in_front_of_the_one_that_waits() -> None:
    listener = Listener(EVERY_6_S, lambda job: lost(job) if job.key.number == 1 else wrote(job), lag=3)
    listener.hear(*talk(9))
    listener.end()
    assert words_in(listener.jobs[1].text) == [1, 2, 3, 4, 5]
    assert covers(listener.records)[0] == (1, 5)


def test_a_failed_closing_summary_ends_all_the_same() -> None:
    listener = Listener(SummaryParams(), lost)
    listener.hear(*talk(2))
    (error,) = listener.end()
    assert isinstance(error, ErrorRecord)
    assert len(listener.jobs) == 1


def test_outcomes_of_other_requests_and_of_jobs_already_answered_are_ignored() -> None:
    summaries = GeneratedSummaries(EVERY_6_S, "s", "phi4")
    for each in talk(3):
        summaries.push(each)
    job = summaries.take_job()
    assert job is not None
    assert summaries.accept(Failure(SnapshotKey("s", 1, 1), None, FailureKind.FAILED, "")) == []
    assert len(summaries.accept(wrote(job))) == 1
    assert summaries.accept(wrote(job)) == []


def test_finals_behind_the_end_are_refused() -> None:
    summaries = GeneratedSummaries(EVERY_6_S, "s", "phi4")
    summaries.finish()
    with pytest.raises(RuntimeError, match="finished"):
        summaries.push(talk(1)[0])


# -- however long the stream ----------------------------------------------------------------------


def held_chars(summaries: GeneratedSummaries) -> int:
    in_flight = None if summaries._in_flight is None else summaries._in_flight.stretch
    stretches = [stretch for stretch in (summaries._open, summaries._due, in_flight) if stretch is not None]
    return sum(len(turn.text) for stretch in stretches for turn in stretch.turns) + sum(
        len(kept.text) for kept in summaries._kept
    )


def test_many_rolling_summaries_are_made_one_text_so_that_the_closing_one_is_of_all() -> None:
    params = SummaryParams(every_minutes=0.1, max_text_chars=1_000)
    listener = Listener(params, lambda job: wrote(job, f"Job {job.key.number} was asked for. {'It is long. ' * 10}"))
    for each in talk(100):
        listener.hear(each)
        assert held_chars(listener.summaries) <= 2_000
    records = listener.end()
    assert covers(records, "closing") == [(1, 100)]
    assert len(listener.jobs) > len(records), "some jobs made one text of many summaries"
    assert max(len(job.text) for job in listener.jobs) <= 1_000
    rolling = covers(records)
    assert [first for first, _ in rolling] == [1, *(last + 1 for _, last in rolling[:-1])]


@pytest.mark.parametrize("turn_chars", [90, 333, 700, 2_500])
def test_what_nobody_ever_summarises_is_held_and_handed_over_in_part_only(turn_chars: int) -> None:
    listener = Listener(SummaryParams(every_minutes=0.1, max_text_chars=1_000), lost, num_channels=2)
    for each in talk(60, text="w{} " + "x" * turn_chars + "."):
        listener.hear(each)
        assert held_chars(listener.summaries) <= 1_000 + 1_000
    listener.end()
    assert max(len(job.text) for job in listener.jobs) <= 1_000
    told = words_in(listener.jobs[-1].text)
    assert told == list(range(61 - len(told), 61)), "the newest"
    error = listener.records[-1]
    assert error.start_ms == (60 - max(1, len(told))) * 3_000


def test_a_model_that_writes_too_much_is_cut_where_its_summaries_are_read_again() -> None:
    params = SummaryParams(every_minutes=0.1, max_text_chars=1_000)
    listener = Listener(params, lambda job: wrote(job, "It goes on. " * 500))
    for each in talk(20, text="w{} " + "x" * 580 + "."):
        listener.hear(each)
        assert sum(len(kept.text) for kept in listener.summaries._kept) <= 750
    listener.end()
    assert max(len(job.text) for job in listener.jobs) <= 1_000
    assert any("It goes on." in job.text and "x" in job.text for job in listener.jobs[:-1])
    assert isinstance(listener.records[0], SummaryRecord)
    assert len(listener.records[0].text) == 12 * 500 - 1, "what is published is whole"


def test_if_that_fails_the_oldest_are_left_out_and_the_closing_record_says_so() -> None:
    params = SummaryParams(every_minutes=0.1, max_text_chars=1_000)

    def model(job: Job) -> Outcome:
        return lost(job) if job.text.startswith("Rolled up.") else wrote(job, "Rolled up. " + "It is long. " * 15)

    listener = Listener(params, model)
    listener.hear(*talk(40))
    # The closing summary begins with a rolling one as well.
    assert any(isinstance(record, ErrorRecord) for record in listener.records)
    assert held_chars(listener.summaries) <= 2_000
    assert listener.summaries._kept[0].coverage.covers_from > 1
    assert isinstance(listener.end()[-1], ErrorRecord)


TEXTS = st.lists(
    st.tuples(
        st.one_of(st.just(""), st.integers(1, 30).map(lambda n: " ".join(["word"] * n) + ".")),
        st.integers(0, 20_000),  # pause before it
        st.integers(0, 1),  # channel
    ),
    min_size=1,
    max_size=40,
)


def finals_of(spoken: list[tuple[str, int, int]]) -> list[FinalRecord]:
    finals, now_ms = [], 0
    for sequence, (text, pause_ms, channel) in enumerate(spoken, start=1):
        now_ms += pause_ms
        told = f"w{sequence} {text}" if text else ""
        finals.append(final(sequence, told, start_ms=now_ms, channel=channel))
        now_ms += 1_500
    return finals


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.integers(1, 2))
def test_summaries_answered_at_once_are_due_and_cover_what_the_extractive_ones_do(spoken, num_channels) -> None:
    params = SummaryParams(every_minutes=0.2)
    listener = Listener(params, num_channels=num_channels)
    extractive = TranscriptsToSummaries(params, "s", "edge")
    expected: list[BaseRecord] = []
    for each in finals_of(spoken):
        listener.hear(each)
        expected += extractive.push(each)
        assert covers(listener.records) == covers(expected)
    expected += extractive.finish()
    told = [(r.start_ms, r.end_ms, r.covers_from, r.covers_to) for r in expected if isinstance(r, SummaryRecord)]
    records = listener.end()
    assert [(r.start_ms, r.end_ms, r.covers_from, r.covers_to) for r in records if isinstance(r, SummaryRecord)] == told


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(0, 6), st.sets(st.integers(1, 8)), st.integers(1, 2))
def test_every_final_is_covered_once_and_in_order_however_late_the_answers_and_whichever_fail(
    spoken, lag, failing, num_channels
) -> None:
    listener = Listener(
        SummaryParams(every_minutes=0.2, max_text_chars=100_000),
        lambda job: lost(job) if job.key.number in failing else wrote(job),
        lag=lag,
        num_channels=num_channels,
    )
    finals = finals_of(spoken)
    listener.hear(*finals)
    records = listener.end()
    rolling = covers(records)
    assert [first for first, _ in rolling] == [1, *(last + 1 for _, last in rolling)][: len(rolling)]
    # What a rolling summary covers is what it was told, each once.
    answered = [job for job in listener.jobs if job.key.number not in failing]
    told = [words_in(job.text) for job in answered]
    spoken_numbers = [each.sequence for each in finals if each.text]
    for (first, last), numbers in zip(rolling, told, strict=False):
        assert numbers == [number for number in spoken_numbers if first <= number <= last]
    is_closed = covers(records, "closing")
    if spoken_numbers and listener.jobs[-1].key.number not in failing:
        assert is_closed == [(1, len(finals))]
        behind = rolling[-1][1] if rolling else 0
        assert words_in(listener.jobs[-1].text) == [number for number in spoken_numbers if number > behind]
    else:
        assert is_closed == []
    assert sum(isinstance(record, ErrorRecord) for record in records) == len(listener.jobs) - len(answered)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(alphabet=st.sampled_from("ab .。漢\n"), max_size=3_000),
            st.integers(0, 9_000),
            st.integers(0, 11),
        ),
        max_size=25,
    ),
    st.integers(0, 4),
    st.sets(st.integers(1, 12)),
    st.text(alphabet=st.sampled_from("xy. "), max_size=1_500),
    st.integers(1, 12),
)
def test_what_is_handed_over_and_held_is_bounded_and_covers_never_overlap(
    spoken, lag, failing, summary, num_channels
) -> None:
    listener = Listener(
        SummaryParams(every_minutes=0.1, max_text_chars=1_000),
        lambda job: lost(job) if job.key.number in failing else wrote(job, summary),
        lag=lag,
        num_channels=num_channels,
    )
    for each in finals_of(spoken):
        listener.hear(each)
        # Three stretches, each one turn over at most, and the kept ones.
        assert held_chars(listener.summaries) <= 3 * 2_000 + 760
    records = listener.end()
    assert all(0 < len(job.text) <= 1_000 for job in listener.jobs)
    rolling = covers(records)
    assert all(first <= last for first, last in rolling)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(rolling))
