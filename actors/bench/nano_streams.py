"""How many live streams of the closed world this machine holds: `actors.bench.sweep` with speech that was made for it.

The model tells no word times, so that there is no emission lag to be judged; finals and their lateness are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.bench.live import LiveOptions
from actors.bench.media import MANIFEST_NAME, Clip, write_wav
from actors.bench.search import SweepLimits
from actors.bench.sweep import SweepOptions, SweepReport, run_sweep
from actors.settings import Settings

LIMITS = SweepLimits(max_first_word_p95_ms=None, max_emission_lag_p95_ms=None)
"""A final at most 1.2 s behind the last speech, in 95 of 100 utterances; words, finals and streams as elsewhere."""

DEFAULT_MAX_STREAMS = 16


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How far a sweep goes: streams at once, seconds of a round, different sentences in it."""

    max_streams: int = DEFAULT_MAX_STREAMS
    seconds: float = 30.0
    num_sentences: int = 12
    limits: SweepLimits = field(default=LIMITS)


def sweep_streams(
    clips: Sequence[Clip],
    folder: Path,
    settings: Settings,
    options: StreamOptions,
    on_progress: Callable[[str], None] | None = None,
) -> SweepReport:
    """Write `clips` into `folder` and play them, joined, in rounds of more and more streams.

    Raises:
        MediaError: if there is no speech in them.
        ServiceError, StoreError, ModelError: if the service does not start, or breaks.
    """
    entries = []
    for clip in clips:
        write_wav(folder / clip.name, clip.samples)
        entries.append({"file": clip.name, "language": clip.language, "text": clip.text})
    (folder / MANIFEST_NAME).write_text(json.dumps(entries), encoding="utf-8")
    live = LiveOptions(folder, settings=settings, seconds=options.seconds, language=clips[0].language)
    return run_sweep(SweepOptions(live, max_streams=options.max_streams, limits=options.limits), on_progress)
