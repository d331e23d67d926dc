"""One stream, without I/O, threads or a clock: chunks and outcomes in, snapshots and records out.

Both drivers use it: `pipeline/local.py` by samples (the oracle), `actors/session.py` by events. What it emits
depends only on the chunks, on the outcomes, and, for partials, on when the driver asks for snapshots and how often
it wants them.

    stream.push(chunk)            sound goes in
    stream.due_snapshots()        what should be encoded and decoded now, finals first
    stream.accept(outcome)        what came of it
    stream.take_records()         what is to be published, in order for each key
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.audio.chunks_to_utterances import Checkpoint, ChunksToUtterances, VadParams
from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.audio.tail import AudioTail
from pipeline.final_in_progress import FinalInProgress
from pipeline.items import (
    Chunk,
    Failure,
    Gap,
    Hypothesis,
    Outcome,
    Snapshot,
    SnapshotKey,
    Task,
    UtteranceClosed,
    UtteranceOpened,
    tasks_of,
)
from pipeline.open_utterance import PAUSE_MS, OpenUtterance
from pipeline.records import BaseRecord, FinalRecord, HealthRecord
from pipeline.stream_params import AUTO, StreamParams
from pipeline.text.hypotheses_to_records import Tier, Utterance, to_partial
from pipeline.text.in_order import InOrder
from pipeline.text.stable_prefix import StablePrefix
from pipeline.text.transcripts_to_summaries import TranscriptsToSummaries
from pipeline.timebase import ms_to_samples, samples_to_ms

_NEW_SPEECH_MS = 160
"""Less new speech than a syllable changes no word."""
_MIN_ADVANCE_MS = 500
"""A partial's window is not moved by less than this: word times cost a little too."""
_LAST_SPEECH_MS = 80
"""New speech that is worth a partial when it is the end of a word."""


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
        self._next_sequence = start.next_sequence
        self._next_utterance = start.next_utterance
        self._end_sample = start.start_sample
        self._history_samples = ms_to_samples(_history_ms(params.vad))
        self._records: list[BaseRecord] = []
        self._ordered: dict[Task, InOrder[BaseRecord]] = {
            task: InOrder(start.next_sequence) for task in tasks_of(params.captions.translate_to, is_final=True)
        }
        self._summariser = None if params.summary is None else TranscriptsToSummaries(params.summary, stream_id, tier)
        self._closing_event: HealthRecord | None = None
        self._has_ended = False
        self._emit_health("resumed" if start.is_resumed else "started")

    # -- sound in ---------------------------------------------------------------------------------

    def push(self, item: Chunk | Gap) -> None:
        """Take the next item of the chunker."""
        if isinstance(item, Gap):
            self._records.append(
                HealthRecord(
                    stream=self.stream_id,
                    event="gap",
                    start_ms=samples_to_ms(item.start_sample),
                    end_ms=samples_to_ms(item.end_sample),
                    message=item.reason,
                )
            )
            return
        self._tails[item.channel].append(item)
        self._end_sample = max(self._end_sample, item.end_sample)
        for event in self._detectors[item.channel].push(item):
            self._on_event(event)
        if (utterance := self._open.get(item.channel)) is not None:
            utterance.hear(self._detectors[item.channel].last_speech_sample, item)
        self._trim(item.channel)

    def finish(self) -> None:
        """Close what is open: the sound has ended. `ended` follows when the last final is out."""
        self._finish("ended", "")

    def fail(self, message: str) -> None:
        """Close what is open after the source failed. `failed` with `message` follows the last final."""
        self._finish("failed", message)

    def _finish(self, event: Literal["ended", "failed"], message: str) -> None:
        if self._closing_event is not None:
            return
        real_end_sample = self.chunker.end_sample
        for chunk in self.chunker.flush():
            self.push(chunk)
        for detector in self._detectors:
            for closed in detector.flush():
                self._on_event(closed)
        self._end_sample = real_end_sample
        end_ms = samples_to_ms(real_end_sample)
        self._closing_event = HealthRecord(
            stream=self.stream_id, event=event, start_ms=end_ms, end_ms=end_ms, message=message
        )
        self._end_if_done()

    # -- snapshots out ----------------------------------------------------------------------------

    def due_snapshots(self, cadence_ms: int | None = None) -> list[Snapshot]:
        """Return what should be served now, finals first; each is returned once.

        Args:
            cadence_ms: what the stages can bear now, for live streams: kept within the parameters' bounds. None: the
                cadence by samples.
        """
        due, self._finals_due = self._finals_due, []
        if self.params.captions.has_partials and self._closing_event is None:
            for utterance in sorted(self._open.values(), key=lambda u: u.number):
                if self._is_partial_due(utterance, cadence_ms):
                    due.append(self._take_partial(utterance))
        return due

    def _is_partial_due(self, utterance: OpenUtterance, cadence_ms: int | None) -> bool:
        params = self.params.snapshots
        end_sample = self._tails[utterance.channel].end_sample
        if (
            utterance.in_flight_revision is not None
            or end_sample - utterance.onset_sample < ms_to_samples(params.min_speech_ms)
        ):  # fmt: skip
            return False
        soonest_ms = params.cadence_ms if cadence_ms is None else params.min_cadence_ms
        wanted_ms = min(max(soonest_ms, cadence_ms or 0), params.max_cadence_ms)
        new_speech_ms = samples_to_ms(utterance.new_speech_samples)
        has_paused = samples_to_ms(end_sample - utterance.speech_end_sample) >= PAUSE_MS
        if has_paused or utterance.is_opening:
            wanted_ms = soonest_ms
        since = max(utterance.snapshot_end_sample, utterance.start_sample)
        is_worth_it = new_speech_ms >= (_LAST_SPEECH_MS if has_paused else _NEW_SPEECH_MS)
        return is_worth_it and end_sample - since >= ms_to_samples(wanted_ms)

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
        """Take the outcome of one task of a snapshot; late outcomes of overtaken partials are ignored."""
        closed = self._closed.get(outcome.key.utterance)
        if closed is not None:
            self._accept_final(closed, outcome)
            return
        for utterance in self._open.values():
            if utterance.number == outcome.key.utterance and utterance.in_flight_revision == outcome.key.revision:
                self._accept_partial(utterance, outcome)
                return

    def _accept_partial(self, utterance: OpenUtterance, outcome: Outcome) -> None:
        utterance.in_flight_revision = None
        if isinstance(outcome, Failure):
            return
        if outcome.guard is not None:
            self._publish_partial(
                utterance, outcome, utterance.stable.show_doubtful(utterance.window.whole_text(outcome.text))
            )
            return
        window = utterance.window
        window.accept(outcome)
        heard_samples = utterance.snapshot_end_sample - utterance.start_sample
        if heard_samples >= ms_to_samples(self.params.snapshots.keep_language_after_ms):
            utterance.language = outcome.language
        heard = utterance.heard(outcome, self.params.skipped_speech)
        shown = utterance.stable.revise(window.whole_text(outcome.text), heard)
        if self._publish_partial(utterance, outcome, shown):
            utterance.num_shown += 1
        if self._may_advance(utterance, utterance.snapshot_end_sample):
            keep_samples = ms_to_samples(self.params.snapshots.window_ms)
            window.advance(outcome, utterance.stable.num_confirmed, utterance.snapshot_end_sample, keep_samples)

    def _publish_partial(self, utterance: OpenUtterance, outcome: Hypothesis, seen: tuple[str, int] | None) -> bool:
        """Publish what is to be seen of `outcome`, text and stable characters; return whether there was any text."""
        if seen is None or not seen[0]:
            return False
        described = self._describe(utterance, utterance.snapshot_end_sample)
        self._records.append(to_partial(described, outcome, *seen))
        return True

    def _accept_final(self, closed: FinalInProgress, outcome: Outcome) -> None:
        for task, record in closed.accept(outcome):
            self._release(task, closed.sequence, record)
        if (look := closed.take_snapshot()) is not None:
            self._finals_due.append(look)
        if closed.is_done:
            del self._closed[outcome.key.utterance]
        self._end_if_done()

    def _release(self, task: Task, sequence: int, record: BaseRecord) -> None:
        for released in self._ordered[task].put(sequence, record):
            self._records.append(released)
            if self._summariser is not None and isinstance(released, FinalRecord):
                self._records.extend(self._summariser.push(released))

    def _end_if_done(self) -> None:
        if self._closing_event is None or self._closed or self._has_ended:
            return
        self._has_ended = True
        if self._summariser is not None:
            self._records.extend(self._summariser.finish())
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
            return  # it began behind a cut in the padding of the last chunk: there is no sound, and no partial, of it
        snapshot = self._snapshot(utterance, end_sample, is_final=True)
        self._finals_due.append(snapshot)
        self._closed[utterance.number] = FinalInProgress(
            self._describe(utterance, end_sample),
            snapshot,
            sequence=self._next_sequence,
            reason=event.reason,
            speech_end_sample=min(event.last_speech_sample, end_sample),
            params=self.params.skipped_speech,
        )
        self._next_sequence += 1

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
        utterance = self._open.get(channel)
        if utterance is not None:
            keep_from = min(keep_from, utterance.start_sample)
        self._tails[channel].drop_before(keep_from)

    def _emit_health(self, event: Literal["started", "resumed"]) -> None:
        now_ms = samples_to_ms(self._end_sample)
        self._records.append(HealthRecord(stream=self.stream_id, event=event, start_ms=now_ms, end_ms=now_ms))


def _history_ms(vad: VadParams) -> int:
    """Return how far behind the newest sample an utterance that opens now can begin.

    It opens when `min_speech_ms` of speech came together, in the worst case one window at a time with almost a
    hangover between them.
    """
    return vad.windows(vad.min_speech_ms) * vad.hangover_ms + vad.onset_ms + vad.pre_roll_ms + 1_000


def by_chunk_index(items: Iterable[Chunk | Gap]) -> Iterator[list[Chunk | Gap]]:
    """Group the chunks of all channels that cover the same 80 ms: snapshots are taken between groups."""
    group: list[Chunk | Gap] = []
    for item in items:
        if group and isinstance(item, Chunk) and isinstance(group[-1], Chunk) and item.index != group[-1].index:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
