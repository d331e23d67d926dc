"""A final on its way: an utterance that has closed, its tasks without an outcome, and second looks at its sound."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.items import TRANSCRIBE, CloseReason, Failure, Hypothesis, Outcome, Snapshot, SnapshotKey, Task, TaskKind
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

    Args:
        utterance: what records tell of it.
        snapshot: the final snapshot, whose outcomes will come.
        sequence: the number of the final.
        reason: why the utterance closed.
        speech_end_sample: end of the last speech, from the stream's start.
        params: when to look again.
    """

    def __init__(
        self,
        utterance: Utterance,
        snapshot: Snapshot,
        *,
        sequence: int,
        reason: CloseReason,
        speech_end_sample: int,
        params: SkippedSpeechParams,
    ) -> None:
        self.sequence = sequence
        self._num_looks = 0
        self._utterance = utterance
        self._snapshot = snapshot
        self._reason = reason
        self._params = params
        self._speech_end_sample = speech_end_sample - snapshot.start_sample
        self._open_tasks = set(snapshot.tasks)
        self._transcription: Hypothesis | None = None
        self._looked_at: set[tuple[int, int]] = set()
        self._look: _Look | None = None
        self._is_look_due = False

    @property
    def is_done(self) -> bool:
        """Whether every task has its record."""
        return not self._open_tasks

    def take_snapshot(self) -> Snapshot | None:
        """Return the snapshot of a second look that is due, once."""
        if self._look is None or not self._is_look_due:
            return None
        self._is_look_due = False
        return self._look.snapshot

    def accept(self, outcome: Outcome) -> list[tuple[Task, BaseRecord]]:
        """Take an outcome; return the tasks that are done by it, with their records. Strangers are ignored."""
        if self._look is not None and outcome.key == self._look.snapshot.key:
            return self._accept_look(self._look, outcome)
        if outcome.key != self._snapshot.key:
            return []
        tasks = self._unanswered() if outcome.task is None else [outcome.task]
        return [done for task in tasks if task in self._open_tasks for done in self._accept_task(task, outcome)]

    def _unanswered(self) -> list[Task]:
        """Return the tasks that a failure of the snapshot ends: not a transcription that is only looked at again."""
        has_answer = {TRANSCRIBE} if self._transcription is not None else set()
        return sorted(self._open_tasks - has_answer, key=_task_order)

    def _accept_task(self, task: Task, outcome: Outcome) -> list[tuple[Task, BaseRecord]]:
        if isinstance(outcome, Failure):
            return [self._done(task, to_error(self._utterance, task, self.sequence, outcome.message))]
        if task.kind is TaskKind.TRANSLATE:
            return [self._done(task, to_translation(self._utterance, outcome, self.sequence))]
        self._transcription = outcome
        return self._look_again_or_finish(outcome)

    def _accept_look(self, look: _Look, outcome: Outcome) -> list[tuple[Task, BaseRecord]]:
        """Put in what a second look found; finish when it failed."""
        self._look = None
        transcription = self._transcription
        if transcription is None:
            raise RuntimeError("a second look came before the first")
        if isinstance(outcome, Failure):
            # The text is known. Stages that fail may take minutes to say so, each time, and all later finals wait.
            return [self._finished(transcription)]
        found: Hypothesis | None = None
        if outcome.average_logprob >= self._params.min_logprob:
            offset_samples = look.snapshot.start_sample - self._snapshot.start_sample
            found = put_in(transcription, outcome, look.stretch, offset_samples)
        self._transcription = found or transcription
        again = None if found else shortened(look.stretch, self._params)
        return self._look_again_or_finish(self._transcription, again)

    def _look_again_or_finish(
        self, transcription: Hypothesis, again: Stretch | None = None
    ) -> list[tuple[Task, BaseRecord]]:
        """Look at `again`, or at the next stretch that seems to lack words; finish when there is none."""
        skipped = find_skipped(transcription.words, self._speech_end_sample, self._params)
        for stretch in ([again] if again else []) + skipped:
            span = (stretch.start_sample, stretch.end_sample)
            if span not in self._looked_at and self._num_looks < self._params.max_looks:
                self._looked_at.add(span)
                self._look = self._make_look(stretch, transcription.language)
                self._is_look_due = True
                return []
        return [self._finished(transcription)]

    def _make_look(self, stretch: Stretch, language: str) -> _Look:
        self._num_looks += 1
        key = self._snapshot.key
        margin = ms_to_samples(self._params.margin_ms)
        start = max(0, stretch.start_sample - margin)
        end = stretch.end_sample + (0 if stretch.is_shortened else margin)
        snapshot = replace(
            self._snapshot,
            key=SnapshotKey(key.stream_id, key.utterance, key.revision + self._num_looks),
            start_sample=self._snapshot.start_sample + start,
            samples=self._snapshot.samples[start:end],
            language=language,
            languages=(),
            draft=(),
            tasks=(TRANSCRIBE,),
        )
        return _Look(stretch, snapshot)

    def _finished(self, transcription: Hypothesis) -> tuple[Task, BaseRecord]:
        return self._done(TRANSCRIBE, to_final(self._utterance, transcription, self.sequence, self._reason))

    def _done(self, task: Task, record: BaseRecord) -> tuple[Task, BaseRecord]:
        self._open_tasks.discard(task)
        return task, record


def _task_order(task: Task) -> tuple[str, str]:
    return (task.kind.value, task.target_language or "")
