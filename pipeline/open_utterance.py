"""An utterance that somebody is still speaking: what is known of it between two partials."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.final_in_progress import FinalInProgress
from pipeline.items import Chunk, Hypothesis, RequestKey
from pipeline.stream_params import NUM_OPENING_SNAPSHOTS, SnapshotParams
from pipeline.text.partial_window import PartialWindow
from pipeline.text.skipped_speech import SkippedSpeechParams, num_units_before_skipped
from pipeline.text.stable_prefix import Heard, StablePrefix
from pipeline.timebase import ms_to_samples, samples_to_ms

_PAUSE_MS = 160
"""Longer than a stop consonant is silent: a word has ended."""
_NEW_SPEECH_MS = 160
"""Less new speech than a syllable changes no word."""
_LAST_SPEECH_MS = 80
"""New speech that is worth a partial when it is the end of a word."""

_NUM_OPENING_PARTIALS = 2
"""So many partials of an utterance are shown at the minimum cadence: the first has often a wrong first word."""


@dataclass(slots=True)
class OpenUtterance:
    """The state of one. All samples count from the stream's start.

    `new_speech_samples` is the speech since the last snapshot; it counts every chunk to the end of its last speech.
    `early` is its final if it ends with the pause that it is in, and `shown_early` what of it was shown.
    """

    number: int
    channel: int
    start_sample: int
    onset_sample: int
    speech_end_sample: int
    new_speech_samples: int
    stable: StablePrefix
    revision: int = 0
    in_flight_revision: int | None = None
    snapshot_end_sample: int = 0
    num_shown: int = 0
    language: str | None = None
    early: FinalInProgress | None = None
    shown_early: Hypothesis | None = None
    window: PartialWindow = field(init=False)

    def __post_init__(self) -> None:
        """Begin with a window over all of it."""
        self.window = PartialWindow(self.start_sample)

    @property
    def is_opening(self) -> bool:
        """Whether its partials come at the minimum cadence, whatever the load."""
        return self.num_shown < _NUM_OPENING_PARTIALS and self.revision < NUM_OPENING_SNAPSHOTS

    def hear(self, speech_end_sample: int, chunk: Chunk) -> None:
        """Take note of the next chunk, after which the last speech ends at `speech_end_sample`."""
        began = max(self.speech_end_sample, chunk.start_sample)
        self.new_speech_samples += max(0, speech_end_sample - began)
        self.speech_end_sample = speech_end_sample

    def is_partial_due(
        self, end_sample: int, params: SnapshotParams, cadence_ms: int | None, *, has_early_soon: bool = False
    ) -> bool:
        """Return whether the sound up to `end_sample` is to be looked at now; `cadence_ms` as in `due_snapshots`.

        If an early final comes soon in every pause, it shows the words before the pause.
        """
        has_enough = end_sample - self.onset_sample >= ms_to_samples(params.min_speech_ms)
        if self.in_flight_revision is not None or self.early is not None or not has_enough:
            return False
        soonest_ms = params.cadence_ms if cadence_ms is None else params.min_cadence_ms
        wanted_ms = min(max(soonest_ms, cadence_ms or 0), params.max_cadence_ms)
        new_speech_ms = samples_to_ms(self.new_speech_samples)
        has_paused = samples_to_ms(end_sample - self.speech_end_sample) >= _PAUSE_MS
        if has_paused and has_early_soon:
            return False
        if has_paused or self.is_opening:
            wanted_ms = soonest_ms
        since = max(self.snapshot_end_sample, self.start_sample)
        is_worth_it = new_speech_ms >= (_LAST_SPEECH_MS if has_paused else _NEW_SPEECH_MS)
        return is_worth_it and end_sample - since >= ms_to_samples(wanted_ms)

    def forget_early(self) -> tuple[RequestKey, ...]:
        """Give up the early final, if there is one; return the keys of what it waited for."""
        early, self.early, self.shown_early = self.early, None, None
        return () if early is None else early.keys

    def heard(self, hypothesis: Hypothesis, params: SkippedSpeechParams, *, is_whole: bool = False) -> Heard:
        """Return what the stable prefix needs to know of the sound of `hypothesis`: up to the last snapshot's end.

        It begins with the window or, if `is_whole`, with the utterance.
        """
        start_sample, num_before = (
            (self.start_sample, 0) if is_whole else (self.window.start_sample, self.window.num_head_units)
        )
        speech_end_sample = min(self.speech_end_sample, self.snapshot_end_sample) - start_sample
        num_certain = num_units_before_skipped(hypothesis, speech_end_sample, params)
        return Heard(
            samples_to_ms(self.snapshot_end_sample - self.start_sample),
            has_paused=samples_to_ms(self.snapshot_end_sample - self.speech_end_sample) >= _PAUSE_MS,
            num_certain=None if num_certain is None else num_before + num_certain,
            average_logprob=hypothesis.average_logprob,
        )
