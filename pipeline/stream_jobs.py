"""What a stream asks for besides captions: summaries of its finals and notes of what its camera shows.

Some of it is done here and at once (extractive summaries), the rest by jobs: they are handed out like snapshots, each
once, one of a kind at a time, and their outcomes become records whenever they come. Captions never wait for them; only
the end of the stream does.
"""

from __future__ import annotations

from typing import Protocol

from pipeline.items import Frame, Job, JobKey, Outcome, RequestKey, TaskKind
from pipeline.records import BaseRecord, FinalRecord
from pipeline.scenes import SceneTrack
from pipeline.stream_params import StreamParams
from pipeline.text.generated_summaries import GeneratedSummaries
from pipeline.text.hypotheses_to_records import Tier
from pipeline.text.transcripts_to_summaries import TranscriptsToSummaries, summary_method


class JobSource(Protocol):
    """What makes jobs one after the other, one in flight at most, and records of what came of them."""

    @property
    def is_done(self) -> bool:
        """Whether it was finished and nothing is due or in flight."""
        ...

    def take_job(self) -> Job | None:
        """Return the job that is to be done now, once."""
        ...

    def accept(self, outcome: Outcome) -> list[BaseRecord]:
        """Take the outcome of the job in flight and return the records that come of it."""
        ...

    def finish(self) -> None:
        """Begin nothing new but what is due at the end."""
        ...


class StreamJobs:
    """The summaries and scenes of one stream, each only if `params` ask for it.

    Deterministic, and bounded like its parts.

    Args:
        num_channels: of the stream; if there are several, summaries are told who speaks.
        crop_size: pixels of a side of the vision encoder's crops (`SceneTrack`); None: unknown.

    Raises:
        ConfigError: if summaries are to be generated and `tier` cannot.
    """

    def __init__(
        self,
        params: StreamParams,
        stream_id: str,
        tier: Tier,
        *,
        num_channels: int = 1,
        crop_size: int | None = None,
    ) -> None:
        self._extractive: TranscriptsToSummaries | None = None
        self._generated: GeneratedSummaries | None = None
        self._scenes: SceneTrack | None = None
        if params.summary is not None:
            if summary_method(params.summary, tier) == "generated":
                self._generated = GeneratedSummaries(params.summary, stream_id, tier, num_channels=num_channels)
            else:
                self._extractive = TranscriptsToSummaries(params.summary, stream_id, tier)
        if params.scenes is not None:
            self._scenes = SceneTrack(params.scenes, stream_id, tier, crop_size)
        sources: tuple[tuple[TaskKind, JobSource | None], ...] = (
            (TaskKind.DESCRIBE, self._scenes),
            (TaskKind.SUMMARISE, self._generated),
        )
        self._sources: dict[TaskKind, JobSource] = {kind: source for kind, source in sources if source is not None}
        self._in_flight: set[RequestKey] = set()
        self._is_finished = False

    @property
    def num_keyframes_dropped(self) -> int:
        """How many keyframes nobody looked at, because a newer one came or it was too late."""
        return 0 if self._scenes is None else self._scenes.num_dropped

    @property
    def is_done(self) -> bool:
        """Whether `finish` was called and no record will come any more."""
        return self._is_finished and all(source.is_done for source in self._sources.values())

    def push_final(self, final: FinalRecord) -> list[BaseRecord]:
        """Take the next final, in order of sequence; return the records that it makes due.

        Raises:
            RuntimeError: after `finish`.
        """
        if self._generated is not None:
            self._generated.push(final)
        return [] if self._extractive is None else [*self._extractive.push(final)]

    def push_frame(self, frame: Frame) -> None:
        """Take the next frame, in order of media time; ignored without scenes and after `finish`."""
        if self._scenes is not None and not self._is_finished:
            self._scenes.push(frame)

    def take_jobs(self) -> list[Job]:
        """Return the jobs that are to be done now, each once."""
        jobs = [job for source in self._sources.values() if (job := source.take_job()) is not None]
        self._in_flight.update(job.key for job in jobs)
        return jobs

    def accept(self, outcome: Outcome) -> list[BaseRecord]:
        """Take the outcome of a job that was handed out; return the records that come of it. Others are ignored."""
        if not isinstance(outcome.key, JobKey) or outcome.key not in self._in_flight:
            return []
        self._in_flight.discard(outcome.key)
        return self._sources[outcome.key.kind].accept(outcome)

    def finish(self) -> list[BaseRecord]:
        """All finals and frames are in; return what is due at once. More may come of jobs until `is_done`."""
        if self._is_finished:
            return []
        self._is_finished = True
        for source in self._sources.values():
            source.finish()
        return [] if self._extractive is None else [*self._extractive.finish()]
