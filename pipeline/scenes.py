"""The scenes of one stream: frames in, jobs that describe keyframes out, records of what came of them. No clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from pipeline.items import Failure, FailureKind, Frame, Hypothesis, Job, JobKey, Outcome, Task, TaskKind
from pipeline.records import BaseRecord, ErrorRecord, SceneRecord
from pipeline.text.hypotheses_to_records import Tier, task_name
from pipeline.timebase import samples_to_ms
from pipeline.vision.frames_to_keyframes import FramesToKeyframes, Keyframe
from pipeline.vision.params import SceneParams

DESCRIBE: Final = Task(TaskKind.DESCRIBE)

_TOO_LATE = frozenset({FailureKind.SUPERSEDED, FailureKind.EXPIRED})


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A job without an outcome yet."""

    job: Job
    keyframe: Keyframe


class SceneTrack:
    """What is looked at and said of one stream's video. Deterministic; holds three frames at most, however long it is.

    One job is in flight at a time. While it is, the newest keyframe waits, and a newer one replaces it: `num_dropped`
    counts these, and those that the stages gave up because they came too late. Nothing else is lost without an `error`
    record.

    Args:
        params: when a frame is looked at.
        stream_id: the stream.
        tier: which models answer.
        crop_size: pixels of a side of the vision encoder's crops, for tiles that it need not encode again
            (`FramesToKeyframes`); None: the frame is one tile.
    """

    def __init__(self, params: SceneParams, stream_id: str, tier: Tier, crop_size: int | None = None) -> None:
        self._stream_id = stream_id
        self._tier: Tier = tier
        self._keyframes = FramesToKeyframes(params, crop_size)
        self._waiting: Keyframe | None = None
        self._in_flight: _InFlight | None = None
        self._num_jobs = 0
        self._num_dropped = 0
        self._last_text: str | None = None
        self._is_finished = False

    @property
    def num_dropped(self) -> int:
        """Keyframes that nobody looked at because a newer one came or it was too late."""
        return self._num_dropped

    @property
    def is_done(self) -> bool:
        """Whether it is finished and every keyframe has its outcome."""
        return self._is_finished and self._waiting is None and self._in_flight is None

    def push(self, frame: Frame) -> None:
        """Take the next frame, in order of time; nobody may write to its pixels any more. Ignored after `finish`."""
        if self._is_finished:
            return
        keyframe = self._keyframes.push(frame)
        if keyframe is None:
            return
        if self._waiting is not None:
            self._num_dropped += 1
            keyframe = _with_cause_of(self._waiting, keyframe)
        self._waiting = keyframe

    def take_job(self) -> Job | None:
        """Return the job for the keyframe that waits; None if there is none, or while another one is in flight."""
        keyframe = self._waiting
        if keyframe is None or self._in_flight is not None:
            return None
        self._waiting = None
        self._num_jobs += 1
        key = JobKey(self._stream_id, TaskKind.DESCRIBE, self._num_jobs)
        job = Job(key, DESCRIBE, frames=(keyframe.frame,))
        self._in_flight = _InFlight(job, keyframe)
        return job

    def accept(self, outcome: Outcome) -> list[BaseRecord]:
        """Take the outcome of the job in flight and return what is to be published; any other outcome is ignored.

        A description without text gives no record, nor does one that says what the last one said, of a frame that was
        only looked at because the last look was long ago.
        """
        if self._in_flight is None or outcome.key != self._in_flight.job.key:
            return []
        keyframe, self._in_flight = self._in_flight.keyframe, None
        if isinstance(outcome, Failure):
            return self._fail(outcome, keyframe)
        text = outcome.text.strip()
        if not text or (keyframe.reason == "interval" and text == self._last_text):
            return []
        self._last_text = text
        return [self._scene(outcome, keyframe, text)]

    def finish(self) -> None:
        """The video has ended: a keyframe that waits is still looked at, nothing new is. Idempotent."""
        self._is_finished = True

    def _scene(self, hypothesis: Hypothesis, keyframe: Keyframe, text: str) -> SceneRecord:
        seen_ms = samples_to_ms(keyframe.frame.start_sample)
        return SceneRecord(
            stream=self._stream_id,
            start_ms=seen_ms,
            end_ms=seen_ms,
            text=text,
            tier=self._tier,
            reason=keyframe.reason,
            changed_share=round(keyframe.changed_share, 4),
            guard=hypothesis.guard,
        )

    def _fail(self, failure: Failure, keyframe: Keyframe) -> list[BaseRecord]:
        if failure.kind in _TOO_LATE:
            self._num_dropped += 1
            return []
        seen_ms = samples_to_ms(keyframe.frame.start_sample)
        error = ErrorRecord(
            stream=self._stream_id,
            start_ms=seen_ms,
            end_ms=seen_ms,
            utterance=0,
            sequence=0,
            task=task_name(DESCRIBE),
            message=failure.message,
        )
        return [error]


def _with_cause_of(dropped: Keyframe, newer: Keyframe) -> Keyframe:
    """Return `newer` as what is looked at in the place of `dropped`: of what made that one, nothing was said yet."""
    return replace(
        newer,
        reason=newer.reason if dropped.reason == "interval" else dropped.reason,
        changed_share=max(dropped.changed_share, newer.changed_share),
    )
