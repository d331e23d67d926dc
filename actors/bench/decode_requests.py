"""What `surtitle bench decoder` decodes: utterances that the detector finds in recordings, and prefixes of them.

A request is a snapshot as a live stream would send it: an utterance as heard so far. Where the recordings hold fewer
utterances than asked for, the longest ones are cut at chunk boundaries as well, chosen by seed, each cut once.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.bench.media import Clip, find_reference, load_clips, read_samples
from pipeline.audio.chunks_to_utterances import ChunksToUtterances, VadParams
from pipeline.audio.samples_to_chunks import SamplesToChunks
from pipeline.errors import MediaError
from pipeline.items import UtteranceClosed, UtteranceOpened
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ, ms_to_samples

CADENCE_SAMPLES = ms_to_samples(640)
"""New sound between two snapshots of an utterance; also the least speech of one. The bench's own, not the settings':
figures of two runs are about the same requests."""

_CHECKOUT = Path(__file__).parent.parent.parent
_MAKE_MEDIA_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class SpokenUtterance:
    """One utterance of a recording: `samples` int16[n] from media sample `start_sample` on."""

    recording: str
    language: str
    number: int
    start_sample: int
    onset_sample: int
    last_speech_sample: int
    samples: NDArray[np.int16]

    @property
    def end_sample(self) -> int:
        """Media time behind its last sample."""
        return self.start_sample + len(self.samples)

    def series_ends(self) -> list[int]:
        """Return where a live stream's snapshots of it end, in media samples: every 640 ms of speech, and its end."""
        first = max(self.start_sample, self.onset_sample) + CADENCE_SAMPLES
        first += -first % CHUNK_SAMPLES
        return [*range(first, min(self.last_speech_sample, self.end_sample), CADENCE_SAMPLES), self.end_sample]

    def cut_ends(self) -> list[int]:
        """Return the chunk boundaries, in media samples, at which it can be cut with a snapshot before the cut."""
        first = self.onset_sample + 2 * CADENCE_SAMPLES
        return list(range(first + -first % CHUNK_SAMPLES, self.end_sample, CHUNK_SAMPLES))


@dataclass(frozen=True, slots=True)
class Cut:
    """An utterance as heard up to media sample `end_sample`."""

    utterance: SpokenUtterance
    end_sample: int

    @property
    def samples(self) -> NDArray[np.int16]:
        """int16[n]: what was heard."""
        return self.utterance.samples[: self.end_sample - self.utterance.start_sample]

    @property
    def name(self) -> str:
        """How people find it: recording, utterance, length."""
        whole = "" if self.end_sample == self.utterance.end_sample else "the first "
        seconds = len(self.samples) / SAMPLE_RATE_HZ
        return f"{whole}{seconds:.2f} s of utterance {self.utterance.number} of {self.utterance.recording}"

    @property
    def previous(self) -> Cut | None:
        """The snapshot 640 ms before this one, whose text is its draft; None if too little was said by then."""
        end_sample = self.end_sample - CADENCE_SAMPLES
        has_speech = end_sample - self.utterance.onset_sample >= CADENCE_SAMPLES
        return Cut(self.utterance, end_sample) if has_speech else None


def load_recordings(media: Path | None) -> list[Clip]:
    """Return the recordings at `media`: a sound file, a folder with a manifest, or None for the project's demo.

    Raises:
        SourceNotFound: if there is none.
        MediaError: if one cannot be used, or the demo cannot be made.
    """
    if media is not None and media.is_dir():
        return load_clips(media)
    path = media if media is not None else make_demo()
    reference = find_reference(path)
    language = reference.language if reference is not None else "en"
    return [Clip(path.name, language, reference.text if reference is not None else "", read_samples(path))]


def make_demo() -> Path:
    """Return the recording that `make demo` captions, made now if it is not there yet.

    Raises:
        MediaError: if this is not a checkout, or a tool to make it with is missing.
    """
    script, folder = _CHECKOUT / "scripts" / "make_media.py", _CHECKOUT / "media"
    if not script.is_file():
        raise MediaError("the demo recording is made in a checkout of surtitle: give --media FILE or --media DIR")
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_MAKE_MEDIA_TIMEOUT_S)
    if done.returncode:
        raise MediaError(f"the demo recording cannot be made ({done.stderr.strip()}): or give --media FILE")
    return folder / "demo.wav"


def find_spoken_utterances(clip: Clip, params: VadParams) -> list[SpokenUtterance]:
    """Return the utterances that the service would find in `clip`."""
    chunker, detector = SamplesToChunks(1), ChunksToUtterances(params, 0)
    chunks = [*chunker.push(clip.samples[np.newaxis]), *chunker.flush()]
    events = [event for chunk in chunks for event in detector.push(chunk)]
    events += detector.flush(len(clip.samples))
    opened = [event for event in events if isinstance(event, UtteranceOpened)]
    closed = [event for event in events if isinstance(event, UtteranceClosed)]
    return [
        SpokenUtterance(
            recording=clip.name,
            language=clip.language,
            number=number,
            start_sample=first.start_sample,
            onset_sample=first.onset_sample,
            last_speech_sample=last.last_speech_sample,
            samples=clip.samples[first.start_sample : last.end_sample],
        )
        for number, (first, last) in enumerate(zip(opened, closed, strict=True), start=1)
    ]


def choose_cuts(utterances: Sequence[SpokenUtterance], num_requests: int, seed: int) -> list[Cut]:
    """Return `num_requests` distinct cuts: whole utterances, chosen by seed if there are more, then prefixes.

    Raises:
        MediaError: if there are not that many.
    """
    chance = np.random.default_rng(seed)
    whole = [Cut(utterance, utterance.end_sample) for utterance in utterances]
    if len(whole) >= num_requests:
        return [whole[i] for i in sorted(chance.permutation(len(whole))[:num_requests])]
    longest_first = sorted(utterances, key=lambda utterance: -len(utterance.samples))
    pools = [
        [Cut(utterance, int(end)) for end in chance.permutation(utterance.cut_ends())] for utterance in longest_first
    ]
    cuts = whole
    while len(cuts) < num_requests and any(pools):
        cuts += [pool.pop() for pool in pools if pool]
    if len(cuts) < num_requests:
        raise MediaError(
            f"the media give {len(cuts)} different requests, {num_requests} were asked for: "
            "give longer media (--media) or ask for fewer (--requests)"
        )
    return cuts[:num_requests]
