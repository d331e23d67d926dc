"""One stream, without I/O, threads or a clock: chunks, frames and outcomes in, snapshots, jobs and records out.

Both drivers use it: `pipeline/local.py` by samples (the oracle), `actors/session.py` by events. What it emits depends
only on what it is given, and, for partials, on when the driver asks for snapshots and how often it wants them.

    stream.push(chunk)            sound goes in, and with push_frame(frame) pictures
    stream.due_snapshots()        what should be encoded and decoded now, finals first
    stream.take_jobs()            what else should be done now: summaries, scenes
    stream.accept(outcome)        what came of it
    stream.take_records()         what is to be published, in order for each key
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.audio.chunks_to_utterances import Checkpoint, ChunksToUtterances
from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.audio.tail import AudioTail
from pipeline.final_in_progress import FinalInProgress
from pipeline.items import (
    UNDETERMINED,
    Chunk,
    Failure,
    Frame,
    Gap,
    Hypothesis,
    Job,
    JobKey,
    Outcome,
    RequestKey,
    Snapshot,
    SnapshotKey,
    Task,
    UtteranceClosed,
    UtteranceOpened,
    tasks_of,
)
from pipeline.open_utterance import OpenUtterance
from pipeline.records import BaseRecord, FinalRecord, HealthRecord
from pipeline.stream_jobs import StreamJobs
from pipeline.stream_params import AUTO, StreamParams
from pipeline.text.hypotheses_to_records import Tier, Utterance, to_partial
from pipeline.text.in_order import InOrder
from pipeline.text.stable_prefix import Heard, StablePrefix
from pipeline.timebase import ms_to_samples, samples_to_ms

_EARLY_SOON_MS = 300
"""An early final that begins no later in a pause stands in for the pause's partial."""
_MIN_ADVANCE_MS = 500
"""A partial's window is not moved by less than this: word times cost a little too."""

_Event = Literal["started", "resumed", "gap", "ended", "failed"]


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where a stream's numbering and media clock begin; a resumed one goes on after its last entries."""

    next_sequence: int = 1
    next_utterance: int = 1
    start_sample: int = 0
    is_resumed: bool = False


class Stream:
    """The state of one stream and the rules by which it turns sound into records."""

    def __init__(
        self,
        stream_id: str,
        params: StreamParams,
        *,
        num_channels: int = 1,
        tier: Tier = "edge",
        start: StartPoint | None = None,
        crop_size: int | None = None,
    ) -> None:
        start = start or StartPoint()
        self.stream_id = stream_id
        self.params = params
        self.chunker = SamplesToChunks(num_channels, start_sample=start.start_sample)
        self._tier: Tier = tier
        here = Checkpoint(start.start_sample, start.start_sample)
        self._detectors = [ChunksToUtterances(params.vad, channel, here) for channel in range(num_channels)]
        self._tails = [AudioTail() for _ in range(num_channels)]
        self._open: dict[int, OpenUtterance] = {}  # by channel
        self._closed: dict[int, FinalInProgress] = {}  # by utterance number
        self._finals_due: list[Snapshot] = []
        self._void_keys: list[RequestKey] = []
        self._next_sequence = start.next_sequence
        self._next_utterance = start.next_utterance
        self._history_samples = ms_to_samples(params.vad.history_ms)
        self._post_roll_samples = params.vad.windows(params.vad.post_roll_ms) * ms_to_samples(params.vad.window_ms)
        self._records: list[BaseRecord] = []
        self._ordered: dict[Task, InOrder[BaseRecord]] = {
            task: InOrder(start.next_sequence) for task in tasks_of(params.captions.translate_to, is_final=True)
        }
        self._jobs = StreamJobs(params, stream_id, tier, num_channels=num_channels, crop_size=crop_size)
        self._closing_event: HealthRecord | None = None
        self._has_ended = False
        event: _Event = "resumed" if start.is_resumed else "started"
        self._records.append(self._health(event, start.start_sample, start.start_sample))

    # -- sound and pictures in --------------------------------------------------------------------

    def push(self, item: Chunk | Gap) -> None:
        """Take the next item of the chunker."""
        if isinstance(item, Gap):
            self._records.append(self._health("gap", item.start_sample, item.end_sample, item.reason))
            return
        self._tails[item.channel].append(item)
        for event in self._detectors[item.channel].push(item):
            self._on_event(event)
        if (utterance := self._open.get(item.channel)) is not None:
            utterance.hear(self._detectors[item.channel].last_speech_sample, item)
            if utterance.early is not None and utterance.early.end_sample != self._end_of_final(utterance):
                self._void_keys += utterance.forget_early()
        self._trim(item.channel)

    def push_frame(self, frame: Frame) -> None:
        """Take the next frame of the video, in order of media time; nothing comes of it without `scenes`."""
        if self._closing_event is None:
            self._jobs.push_frame(frame)

    def finish(self) -> None:
        """Close what is open: the sound has ended. `ended` follows when the last final and the last job are out."""
        self._finish("ended", "")

    def fail(self, message: str) -> None:
        """Close what is open after the source failed. `failed` with `message` follows as `ended` does."""
        self._finish("failed", message)

    def _finish(self, event: _Event, message: str) -> None:
        if self._closing_event is not None:
            return
        real_end_sample = self.chunker.end_sample
        for chunk in self.chunker.flush():
            self.push(chunk)
        for detector in self._detectors:
            for closed in detector.flush():
                self._on_event(closed)
        self._closing_event = self._health(event, real_end_sample, real_end_sample, message)
        self._end_if_done()

    # -- snapshots and jobs out -------------------------------------------------------------------

    def due_snapshots(self, cadence_ms: int | None = None) -> list[Snapshot]:
        """Return what should be served now, finals first; each is returned once.

        Args:
            cadence_ms: what the stages can bear now, for live streams, within the parameters' bounds. None: by samples.
        """
        due, self._finals_due = self._finals_due, []
        if self._closing_event is not None:
            return due
        has_early = cadence_ms is not None and self.params.snapshots.prefetches_finals
        has_early_soon = has_early and self.params.vad.post_roll_ms <= _EARLY_SOON_MS
        for utterance in sorted(self._open.values(), key=lambda u: u.number):
            end_sample = self._tails[utterance.channel].end_sample
            if has_early and utterance.early is None and end_sample >= self._end_of_final(utterance):
                snapshot = self._snapshot(utterance, self._end_of_final(utterance), is_final=True)
                utterance.early = self._begin_final(utterance, snapshot, utterance.speech_end_sample)
                due.append(snapshot)
            elif self.params.captions.has_partials and utterance.is_partial_due(
                end_sample, self.params.snapshots, cadence_ms, has_early_soon=has_early_soon
            ):
                due.append(self._take_partial(utterance))
        return due

    def take_jobs(self) -> list[Job]:
        """Return what should be done now besides captions; each is returned once."""
        return self._jobs.take_jobs()

    def take_void_keys(self) -> list[RequestKey]:
        """Return the keys of snapshots handed out whose outcomes nobody needs any more, each once."""
        keys, self._void_keys = self._void_keys, []
        return keys

    def _end_of_final(self, utterance: OpenUtterance) -> int:
        """Return where the utterance ends if nobody speaks on, as the detector will say it."""
        return utterance.speech_end_sample + self._post_roll_samples

    def _take_partial(self, utterance: OpenUtterance) -> Snapshot:
        end_sample = self._tails[utterance.channel].end_sample
        snapshot = self._snapshot(utterance, end_sample, is_final=False)
        utterance.in_flight_revision = utterance.revision
        utterance.snapshot_end_sample = end_sample
        utterance.new_speech_samples = 0
        return snapshot

    def _snapshot(self, utterance: OpenUtterance, end_sample: int, *, is_final: bool) -> Snapshot:
        captions, window = self.params.captions, utterance.window
        utterance.revision += 1
        language = None if captions.language == AUTO else captions.language
        start_sample = utterance.start_sample if is_final else window.start_sample
        if not is_final:
            # A final detects anew from its own sound, so that it never depends on when partials were made.
            language = language or utterance.language
        return Snapshot(
            key=SnapshotKey(self.stream_id, utterance.number, utterance.revision),
            channel=utterance.channel,
            is_final=is_final,
            start_sample=start_sample,
            samples=self._tails[utterance.channel].slice(start_sample, end_sample),
            language=language,
            languages=captions.languages,
            draft=window.tokens if is_final else window.draft,
            tasks=tasks_of(captions.translate_to, is_final=is_final),
            prefix=() if is_final else window.prefix,
            wants_words=not is_final and self._may_advance(utterance, end_sample),
        )

    def _may_advance(self, utterance: OpenUtterance, end_sample: int) -> bool:
        # A language that may still turn out to be another one would take its words with it.
        has_language = utterance.language is not None or self.params.captions.language != AUTO
        room_samples = ms_to_samples(self.params.snapshots.window_ms + _MIN_ADVANCE_MS)
        return has_language and end_sample - utterance.window.start_sample >= room_samples

    # -- outcomes in ------------------------------------------------------------------------------

    def accept(self, outcome: Outcome) -> None:
        """Take the outcome of a job or of one task of a snapshot; late ones of overtaken partials are ignored."""
        if isinstance(outcome.key, JobKey):
            self._records += self._jobs.accept(outcome)
            self._end_if_done()
            return
        closed = self._closed.get(outcome.key.utterance)
        if closed is not None:
            self._accept_final(closed, outcome)
            return
        for utterance in self._open.values():
            if utterance.number == outcome.key.utterance:
                if utterance.early is not None and utterance.early.accept(outcome):
                    self._accept_early_final(utterance, utterance.early)
                elif utterance.in_flight_revision == outcome.key.revision:
                    self._accept_partial(utterance, outcome)
                return

    def _accept_partial(self, utterance: OpenUtterance, outcome: Outcome) -> None:
        utterance.in_flight_revision = None
        if isinstance(outcome, Failure):
            return
        window = utterance.window
        if outcome.guard is None:
            window.accept(outcome)
        heard = utterance.heard(outcome, self.params.skipped_speech)
        self._show(utterance, outcome, window.whole_text(outcome.text), heard)
        if outcome.guard is None and self._may_advance(utterance, utterance.snapshot_end_sample):
            keep_samples = ms_to_samples(self.params.snapshots.window_ms)
            window.advance(outcome, utterance.stable.num_confirmed, utterance.snapshot_end_sample, keep_samples)

    def _accept_early_final(self, utterance: OpenUtterance, early: FinalInProgress) -> None:
        """Show what the final would say: it may come to that, and somebody may speak on."""
        if (look := early.take_snapshot()) is not None:
            self._finals_due.append(look)
        found = early.transcription
        if found is None or found is utterance.shown_early or not self.params.captions.has_partials:
            return
        # A partial that is still in flight has heard less.
        utterance.in_flight_revision = None
        utterance.shown_early = found
        utterance.snapshot_end_sample = early.end_sample
        utterance.new_speech_samples = 0
        heard = utterance.heard(found, self.params.skipped_speech, is_whole=True)
        self._show(utterance, found, found.text.strip(), heard)
        if found.guard is None:
            utterance.window.take_draft(found)

    def _show(self, utterance: OpenUtterance, hypothesis: Hypothesis, text: str, heard: Heard) -> None:
        """Publish what is to be seen when `text` is the utterance's so far."""
        if hypothesis.guard is not None:
            self._publish_partial(utterance, hypothesis, utterance.stable.show_doubtful(text))
            return
        heard_samples = utterance.snapshot_end_sample - utterance.start_sample
        is_enough = heard_samples >= ms_to_samples(self.params.snapshots.keep_language_after_ms)
        if is_enough and hypothesis.language != UNDETERMINED:
            utterance.language = hypothesis.language
        if self._publish_partial(utterance, hypothesis, utterance.stable.revise(text, heard)):
            utterance.num_shown += 1

    def _publish_partial(self, utterance: OpenUtterance, outcome: Hypothesis, seen: tuple[str, int] | None) -> bool:
        """Publish what is to be seen of `outcome`, text and stable characters; return whether there was any text."""
        if seen is None or not seen[0]:
            return False
        described = self._describe(utterance, utterance.snapshot_end_sample)
        self._records.append(to_partial(described, outcome, *seen))
        return True

    def _accept_final(self, closed: FinalInProgress, outcome: Outcome) -> None:
        closed.accept(outcome)
        if (look := closed.take_snapshot()) is not None:
            self._finals_due.append(look)
        self._release_done(outcome.key.utterance, closed)
        self._end_if_done()

    def _release_done(self, number: int, closed: FinalInProgress) -> None:
        for task, record in closed.take_records():
            for released in self._ordered[task].put(closed.sequence, record):
                self._records.append(released)
                if isinstance(released, FinalRecord):
                    self._records += self._jobs.push_final(released)
        if closed.is_done:
            del self._closed[number]

    def _end_if_done(self) -> None:
        if self._closing_event is None or self._closed or self._has_ended:
            return
        self._records += self._jobs.finish()
        if self._jobs.is_done:
            self._has_ended = True
            self._records.append(self._closing_event)

    # -- records out ------------------------------------------------------------------------------

    def take_records(self) -> list[BaseRecord]:
        """Return the records made since the last call, in the order in which they are to be published."""
        records, self._records = self._records, []
        return records

    @property
    def has_ended(self) -> bool:
        """Whether the last record was made."""
        return self._has_ended

    @property
    def has_partial_in_flight(self) -> bool:
        """Whether a partial was handed out and has no outcome yet."""
        return any(utterance.in_flight_revision is not None for utterance in self._open.values())

    @property
    def num_unfinished_finals(self) -> int:
        """How many closed utterances wait for an outcome."""
        return len(self._closed)

    @property
    def num_keyframes_dropped(self) -> int:
        """How many keyframes nobody looked at, because a newer one came or it was too late."""
        return self._jobs.num_keyframes_dropped

    # -- utterances -------------------------------------------------------------------------------

    def _on_event(self, event: UtteranceOpened | UtteranceClosed) -> None:
        if isinstance(event, UtteranceOpened):
            speech_end_sample = self._detectors[event.channel].last_speech_sample
            self._open[event.channel] = OpenUtterance(
                self._next_utterance,
                event.channel,
                event.start_sample,
                event.onset_sample,
                speech_end_sample,
                new_speech_samples=speech_end_sample - event.onset_sample,
                stable=StablePrefix(self.params.vad.hard_limit_ms - self.params.vad.cut_search_ms),
            )
            self._next_utterance += 1
            return
        utterance = self._open.pop(event.channel)
        end_sample = min(event.end_sample, self.chunker.end_sample)
        if end_sample <= utterance.start_sample:
            return  # it began behind a cut in the padding of the last chunk
        final = utterance.early
        if final is None or final.end_sample != end_sample:
            self._void_keys += utterance.forget_early()
            snapshot = self._snapshot(utterance, end_sample, is_final=True)
            final = self._begin_final(utterance, snapshot, min(event.last_speech_sample, end_sample))
            self._finals_due.append(snapshot)
        final.close(self._next_sequence, event.reason)
        self._next_sequence += 1
        self._closed[utterance.number] = final
        self._release_done(utterance.number, final)

    def _begin_final(self, utterance: OpenUtterance, snapshot: Snapshot, speech_end_sample: int) -> FinalInProgress:
        return FinalInProgress(
            self._describe(utterance, snapshot.end_sample),
            snapshot,
            speech_end_sample=speech_end_sample,
            params=self.params.skipped_speech,
        )

    def _describe(self, utterance: OpenUtterance, end_sample: int) -> Utterance:
        return Utterance(
            stream_id=self.stream_id,
            number=utterance.number,
            channel=utterance.channel,
            start_sample=utterance.start_sample,
            end_sample=end_sample,
            tier=self._tier,
            is_language_given=self.params.captions.language != AUTO,
        )

    def _trim(self, channel: int) -> None:
        keep_from = self._tails[channel].end_sample - self._history_samples
        if (utterance := self._open.get(channel)) is not None:
            keep_from = min(keep_from, utterance.start_sample)
        self._tails[channel].drop_before(keep_from)

    def _health(self, event: _Event, start_sample: int, end_sample: int, message: str = "") -> HealthRecord:
        start_ms, end_ms = samples_to_ms(start_sample), samples_to_ms(end_sample)
        return HealthRecord(stream=self.stream_id, event=event, start_ms=start_ms, end_ms=end_ms, message=message)
