"""Media time as whole samples of 16 kHz mono sound.

Every time in the program is a whole number of samples; milliseconds exist in configuration and in
records only, and this module is the one place that converts between them.
"""

from __future__ import annotations

SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_MS = SAMPLE_RATE_HZ // 1_000
CHUNK_MS = 80
CHUNK_SAMPLES = CHUNK_MS * SAMPLES_PER_MS
"""One chunk: 1,280 samples, one decoder token of sound (docs/architecture.md, "Time")."""


def ms_to_samples(ms: float) -> int:
    """Return the nearest whole number of samples to `ms` milliseconds."""
    return round(ms * SAMPLES_PER_MS)


def samples_to_ms(samples: int) -> int:
    """Return the media time in whole milliseconds that has passed at sample `samples` (floor)."""
    return samples // SAMPLES_PER_MS
