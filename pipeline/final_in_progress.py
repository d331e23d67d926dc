"""A final on its way: the whole utterance's snapshot, its tasks without an outcome, and second looks at its sound.

It begins when the utterance closes, or before: in a pause, when the sound that the final would have is all there but
the pause is not yet long enough to be the end. This is the prefetching of Chang et al. 2020 ("Low Latency Speech
Recognition using End-to-End Prefetching", Interspeech), with the whole final prefetched instead of an answer to it.
If somebody speaks on, all of it is void. A final is the same text whenever it was begun, as it depends on its sound
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.items import (
    TRANSCRIBE,
    UNDETERMINED,
    CloseReason,
    Failure,
    Hypothesis,
    Outcome,
    RequestKey,
    Snapshot,
    SnapshotKey,
    Task,
    TaskKind,
)
from pipeline.records import BaseRecord
from pipeline.text.hypotheses_to_records import Utterance, to_error, to_final, to_translation
from pipeline.text.skipped_speech import SkippedSpeechParams, Stretch, find_skipped, put_in, shortened
from pipeline.timebase import ms_to_samples


@dataclass(frozen=True, slots=True)
class _Look:
    """A second look that is due or in flight."""

    stretch: Stretch
    snapshot: Snapshot


class FinalInProgress:
    """Takes the outcomes of a final snapshot and gives the records that come of them, each task's once.

    Records come when the utterance has closed.

    Args:
        utterance: what records tell of it.
        snapshot: the final snapshot, whose outcomes will come.
        speech_end_sample: end of the last speech, from the stream's start.
        params: when to look again.
    """

    def __init__(
        self, utterance: Utterance, snapshot: Snapshot, *, speech_end_sample: int, params: SkippedSpeechParams
    ) -> None:
        self._num_looks = 0
        self._utterance = utterance
        self._snapshot = snapshot
        self._params = params
        self._speech_end_sample = speech_end_sample - snapshot.start_sample
        self._open_tasks = set(snapshot.tasks)
        self._results: list[tuple[Task, Hypothesis | str]] = []
        self._closed: tuple[int, CloseReason] | None = None
        self._transcription: Hypothesis | None = None
        self._looked_at: set[tuple[int, int]] = set()
        self._look: _Look | None = None
        self._is_look_due = False

    @property
    def end_sample(self) -> int:
        """Media time behind its last sample."""
        return self._snapshot.end_sample

    @property
    def keys(self) -> tuple[RequestKey, ...]:
        """What it waits for: the snapshot, and the second look that was handed out."""
        look = () if self._look is None or self._is_look_due else (self._look.snapshot.key,)
        return (self._snapshot.key, *look) if self._open_tasks else ()

    @property
    def transcription(self) -> Hypothesis | None:
        """The text as it is known now."""
        return self._transcription

    @property
    def sequence(self) -> int:
        """The number of the final.

        Raises:
            RuntimeError: before `close`.
        """
        if self._closed is None:
            raise RuntimeError("the utterance has not closed")
        return self._closed[0]

    @property
    def is_done(self) -> bool:
        """Whether every task has its record."""
        return not self._open_tasks and not self._results

    def close(self, sequence: int, reason: CloseReason) -> None:
        """The utterance has closed for `reason`, and this is its final, number `sequence`."""
        self._closed = sequence, reason

    def take_records(self) -> list[tuple[Task, BaseRecord]]:
        """Return the tasks that are done, each once, with their records; none before `close`."""
        if self._closed is None:
            return []
        results, self._results = self._results, []
        return [(task, self._record(task, result, *self._closed)) for task, result in results]

    def take_snapshot(self) -> Snapshot | None:
        """Return the snapshot of a second look that is due, once."""
        if self._look is None or not self._is_look_due:
            return None
        self._is_look_due = False
        return self._look.snapshot

    def accept(self, outcome: Outcome) -> bool:
        """Take an outcome; return whether it is one of this final's."""
        if self._look is not None and outcome.key == self._look.snapshot.key:
            self._accept_look(self._look, outcome)
            return True
        if outcome.key != self._snapshot.key:
            return False
        for task in self._unanswered() if outcome.task is None else [outcome.task]:
            if task in self._open_tasks:
                self._accept_task(task, outcome)
        return True

    def _unanswered(self) -> list[Task]:
        """Return the tasks that a failure of the snapshot ends: not a transcription that is only looked at again."""
        has_answer = {TRANSCRIBE} if self._transcription is not None else set()
        return sorted(self._open_tasks - has_answer, key=_task_order)

    def _accept_task(self, task: Task, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self._done(task, outcome.message)
        elif task.kind is TaskKind.TRANSLATE:
            self._done(task, outcome)
        else:
            self._transcription = outcome
            self._look_again_or_finish(outcome)

    def _accept_look(self, look: _Look, outcome: Outcome) -> None:
        """Put in what a second look found; finish when it failed."""
        self._look = None
        transcription = self._transcription
        if transcription is None:
            raise RuntimeError("a second look came before the first")
        if isinstance(outcome, Failure):
            # The text is known. Stages that fail may take minutes to say so, each time, and all later finals wait.
            self._done(TRANSCRIBE, transcription)
            return
        found: Hypothesis | None = None
        if outcome.average_logprob >= self._params.min_logprob:
            offset_samples = look.snapshot.start_sample - self._snapshot.start_sample
            found = put_in(transcription, outcome, look.stretch, offset_samples)
        self._transcription = found or transcription
        again = None if found else shortened(look.stretch, self._params)
        self._look_again_or_finish(self._transcription, again)

    def _look_again_or_finish(self, transcription: Hypothesis, again: Stretch | None = None) -> None:
        """Look at `again`, or at the next stretch that seems to lack words; finish when there is none."""
        skipped = find_skipped(transcription.words, self._speech_end_sample, self._params)
        for stretch in ([again] if again else []) + skipped:
            span = (stretch.start_sample, stretch.end_sample)
            if span not in self._looked_at and self._num_looks < self._params.max_looks:
                self._looked_at.add(span)
                self._look = self._make_look(stretch, transcription.language)
                self._is_look_due = True
                return
        self._done(TRANSCRIBE, transcription)

    def _make_look(self, stretch: Stretch, language: str) -> _Look:
        self._num_looks += 1
        key = self._snapshot.key
        margin = ms_to_samples(self._params.margin_ms)
        start = max(0, stretch.start_sample - margin)
        end = stretch.end_sample + (0 if stretch.is_shortened else margin)
        is_unknown = language == UNDETERMINED
        snapshot = replace(
            self._snapshot,
            key=SnapshotKey(key.stream_id, key.utterance, key.revision + self._num_looks),
            start_sample=self._snapshot.start_sample + start,
            samples=self._snapshot.samples[start:end],
            language=None if is_unknown else language,
            languages=self._snapshot.languages if is_unknown else (),
            draft=(),
            tasks=(TRANSCRIBE,),
        )
        return _Look(stretch, snapshot)

    def _done(self, task: Task, result: Hypothesis | str) -> None:
        """Take note of what `task` came to: a hypothesis, or the message of a failure."""
        self._open_tasks.discard(task)
        self._results.append((task, result))

    def _record(self, task: Task, result: Hypothesis | str, sequence: int, reason: CloseReason) -> BaseRecord:
        if isinstance(result, str):
            return to_error(self._utterance, task, sequence, result)
        if task.kind is TaskKind.TRANSLATE:
            return to_translation(self._utterance, result, sequence)
        return to_final(self._utterance, result, sequence, reason)


def _task_order(task: Task) -> tuple[str, str]:
    return (task.kind.value, task.target_language or "")
