"""An utterance that somebody is still speaking: what is known of it between two partials."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.items import Chunk, Hypothesis
from pipeline.stream_params import NUM_OPENING_SNAPSHOTS
from pipeline.text.partial_window import PartialWindow
from pipeline.text.skipped_speech import SkippedSpeechParams, num_units_before_skipped
from pipeline.text.stable_prefix import Heard, StablePrefix
from pipeline.timebase import samples_to_ms

PAUSE_MS = 160
"""Longer than a stop consonant is silent: a word has ended."""

_NUM_OPENING_PARTIALS = 2
"""So many partials of an utterance are shown at the minimum cadence: the first has often a wrong first word."""


@dataclass(slots=True)
class OpenUtterance:
    """The state of one. All samples count from the stream's start.

    `new_speech_samples` is the speech since the last snapshot; it counts every chunk to the end of its last speech.
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

    def heard(self, hypothesis: Hypothesis, params: SkippedSpeechParams) -> Heard:
        """Return what the stable prefix needs to know of the sound of the partial that was in flight."""
        window_samples = self.snapshot_end_sample - self.window.start_sample
        speech_end_sample = min(self.speech_end_sample - self.window.start_sample, window_samples)
        num_certain = num_units_before_skipped(hypothesis, speech_end_sample, params)
        return Heard(
            samples_to_ms(self.snapshot_end_sample - self.start_sample),
            has_paused=samples_to_ms(self.snapshot_end_sample - self.speech_end_sample) >= PAUSE_MS,
            num_certain=None if num_certain is None else self.window.num_head_units + num_certain,
            average_logprob=hypothesis.average_logprob,
        )
