"""`surtitle bench peer`: another live speech system and surtitle, on the same sound and machine, one after the other.

Both are seen from outside and judged by one measure (`peer_measure`). What is fair in it, and what is not comparable:
docs/peers.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.bench.latency import Percentiles
from actors.bench.live import LiveOptions, find_utterances, open_bench
from actors.bench.media import MANIFEST_NAME, Clip, load_stream, write_wav
from actors.bench.peer_client import Playback, play
from actors.bench.peer_measure import (
    Spoken,
    View,
    ViewLatencies,
    find_seconds_behind,
    measure_views,
    time_reference,
    view_records,
)
from actors.bench.peer_process import open_peer, split_command
from actors.bench.peer_protocols import PROTOCOLS
from actors.bench.processes import ProcessUsage, watch_processes
from actors.bench.rounds import LATE
from actors.settings import Settings
from pipeline.errors import ConfigError, MediaError, ServiceError
from pipeline.records import FinalRecord
from pipeline.timebase import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str], None]

_WARM_UP_S = 6.0
_WARM_UP_DEADLINE_S = 60.0
_DEADLINE_RATIO = 2.0
"""A peer's stream is given up so many times its length after its start."""

_FIGURES = ("first_word_ms", "emission_lag_ms", "commit_lag_ms", "finalisation_ms")


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Whom to measure, on what. Stream i starts `stagger_ms` * i late, on both sides."""

    command: str
    url: str
    media: Path
    protocol: str = "whisperlivekit"
    seconds: float = 60.0
    language: str = "en"
    num_streams: int = 1
    stagger_ms: int = 1_000
    start_timeout_s: float = 180.0
    has_surtitle: bool = True
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class Side:
    """One system: all its streams together, and what its processes used."""

    latencies: ViewLatencies
    ends: tuple[str, ...]
    seconds_behind: tuple[float, ...]
    ended_late_s: tuple[float, ...]
    usage: ProcessUsage
    audio_s: float

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values; times in milliseconds, memory in MiB."""
        total = self.latencies
        return {
            **{name: Percentiles.of(getattr(total, name)).to_json() for name in _FIGURES},
            "wer": round(total.words.rate, 5),
            "num_words": total.num_words,
            "num_words_right": total.num_words_right,
            "num_utterances": total.num_utterances,
            "num_utterances_never_final": total.num_utterances_never_final,
            "cpu_s_per_audio_s": round(self.usage.cpu_s / self.audio_s, 4),
            "peak_private_mib": round(self.usage.peak_private_bytes / 2**20, 1),
            "num_processes": self.usage.num_processes,
            "ends": list(self.ends),
            "max_s_behind": round(max(self.seconds_behind), 1),
            "max_ended_late_s": round(max(self.ended_late_s), 1),
        }


@dataclass(frozen=True, slots=True)
class PeerReport:
    """Both systems on one sound. Ratios are the peer's figure over surtitle's: above 1, surtitle's is lower."""

    protocol: str
    model: str
    media: str
    seconds: float
    num_streams: int
    stagger_ms: int
    peer: Side
    surtitle: Side | None

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values."""
        peer = self.peer.to_json()
        surtitle = None if self.surtitle is None else self.surtitle.to_json()
        return {
            "protocol": self.protocol,
            "model": self.model,
            "media": self.media,
            "seconds": round(self.seconds, 2),
            "streams": self.num_streams,
            "stagger_ms": self.stagger_ms,
            "num_cpus": len(os.sched_getaffinity(0)),
            "peer": peer,
            "surtitle": surtitle,
            "ratios": None if surtitle is None else _ratios(peer, surtitle),
        }

    def __rich__(self) -> RenderableType:
        """Return the table that people see."""
        from actors.bench.peer_table import peer_table  # noqa: PLC0415 - tables know the reports, not the other way

        return peer_table(self)


def run_peer(options: PeerOptions, on_progress: Progress | None = None) -> PeerReport:
    """Measure the peer, then surtitle, and return both. SIGINT and SIGTERM end the peer first, then this.

    Raises:
        ConfigError: if command, URL or protocol make no sense.
        MediaError: if the media cannot be used, or nobody knows what is said in it.
        ServiceError: if a system does not start, or ends while streams play.
        asyncio.CancelledError: after a signal.
    """

    async def run() -> PeerReport:
        with _cancelled_by_signals():
            return await measure_peer(options, on_progress)

    return asyncio.run(run())


async def measure_peer(options: PeerOptions, on_progress: Progress | None = None) -> PeerReport:
    """Do what `run_peer` does, on a running event loop and without taking signals."""
    report = on_progress or (lambda _text: None)
    command = split_command(options.command)
    if options.protocol not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {options.protocol!r}: give one of {', '.join(sorted(PROTOCOLS))}")
    clip, has_reference = await asyncio.to_thread(load_stream, options.media, options.seconds, options.language)
    if not has_reference:
        raise MediaError(
            f"nobody knows what is said in {options.media}: latencies are those of the words of a reference. "
            f"Put its text into {MANIFEST_NAME} beside it, or into a file of the same name ending in .txt"
        )
    playbacks, usage = await _play_peer(options, command, clip, report)
    seen, own_usage = (await _play_surtitle(options, clip, report)) if options.has_surtitle else ((), None)
    report("finding when each word was said")
    spoken = await asyncio.to_thread(find_spoken, clip, options.settings)
    audio_s = options.num_streams * clip.seconds
    return PeerReport(
        protocol=options.protocol,
        model=options.settings.model.name,
        media=clip.name,
        seconds=clip.seconds,
        num_streams=options.num_streams,
        stagger_ms=options.stagger_ms,
        peer=await asyncio.to_thread(_judge, [_Seen.of(played) for played in playbacks], spoken, usage, audio_s),
        surtitle=None if own_usage is None else await asyncio.to_thread(_judge, seen, spoken, own_usage, audio_s),
    )


def find_spoken(clip: Clip, settings: Settings) -> Spoken:
    """Return when the words of the clip's text are said: by the word times of surtitle's finals on its sound.

    Finals are a function of the samples, so they are made here once, as fast as can be, without partials.
    """
    import torch  # noqa: PLC0415 - seconds, and not needed while the peer plays

    from actors.threads import choose_num_threads  # noqa: PLC0415
    from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings  # noqa: PLC0415
    from pipeline.decode.embeddings_to_hypotheses import DecodeEngine  # noqa: PLC0415
    from pipeline.local import LocalModels, caption_samples  # noqa: PLC0415

    torch.set_num_threads(choose_num_threads(settings.model.decoder_threads, "decoder"))
    models = LocalModels(
        UtterancesToEmbeddings(settings.model, settings.encoder), DecodeEngine(settings.model, settings.decoder)
    )
    params = settings.stream_params()
    captions = params.captions.model_copy(update={"has_partials": False, "translate_to": ()})
    params = params.model_copy(update={"captions": captions, "summary": None})
    records = caption_samples(clip.samples[None], params, models)
    finals = [record for record in records if isinstance(record, FinalRecord)]
    return time_reference(clip.text, clip.language, finals, find_utterances(clip.samples, settings.vad))


@dataclass(frozen=True, slots=True)
class _Seen:
    """One stream of either side: its views, the wall time of sample 0 on their clock, and how it ended."""

    views: Sequence[View]
    anchor_ms: float
    end: str
    end_ms: float

    @staticmethod
    def of(playback: Playback) -> _Seen:
        return _Seen(playback.views, playback.start_ms, playback.end, playback.end_ms)


def _judge(streams: Sequence[_Seen], spoken: Spoken, usage: ProcessUsage, audio_s: float) -> Side:
    total = ViewLatencies()
    for stream in streams:
        total.add(measure_views(stream.views, stream.anchor_ms, spoken, is_complete=stream.end == "done"))
    length_ms = 1_000 * audio_s / len(streams)
    return Side(
        latencies=total,
        ends=tuple(stream.end for stream in streams),
        seconds_behind=tuple(
            0.0 if stream.end == "done" else find_seconds_behind(stream.views, spoken) for stream in streams
        ),
        ended_late_s=tuple((stream.end_ms - stream.anchor_ms - length_ms) / 1_000 for stream in streams),
        usage=usage,
        audio_s=audio_s,
    )


async def _play_peer(
    options: PeerOptions, command: list[str], clip: Clip, report: Progress
) -> tuple[list[Playback], ProcessUsage]:
    protocol = PROTOCOLS[options.protocol]
    report("starting the peer")
    async with open_peer(command, options.url, options.start_timeout_s) as peer:
        report("warming the peer up")
        beginning = clip.samples[: round(_WARM_UP_S * SAMPLE_RATE_HZ)]
        warm_up = await play(options.url, protocol(), beginning, _WARM_UP_DEADLINE_S)
        if warm_up.end == "closed":
            raise ServiceError(f"the peer hung up while it was warmed up: {peer.describe_end()}")
        report(f"playing {options.num_streams} streams of {clip.seconds:.0f} s to the peer")

        async def play_one(index: int) -> Playback:
            await asyncio.sleep(index * options.stagger_ms / 1_000)
            return await play(options.url, protocol(), clip.samples, _DEADLINE_RATIO * clip.seconds)

        async with watch_processes([peer.pid]) as usage:
            try:
                async with asyncio.TaskGroup() as group:
                    playing = [group.create_task(play_one(index)) for index in range(options.num_streams)]
            except* ServiceError as failed:
                raise failed.exceptions[0] from failed
        if not peer.is_running:
            raise ServiceError(f"the peer ended while streams played: {peer.describe_end()}")
    return [task.result() for task in playing], usage


async def _play_surtitle(options: PeerOptions, clip: Clip, report: Progress) -> tuple[list[_Seen], ProcessUsage]:
    """Measure surtitle with the parts of `bench live`, on a file that holds the same samples."""
    with tempfile.TemporaryDirectory(prefix="surtitle-peer-") as name:
        folder = Path(name)
        path = folder / "media.wav"
        write_wav(path, clip.samples)
        entry = {"file": path.name, "language": clip.language, "text": clip.text}
        (folder / MANIFEST_NAME).write_text(json.dumps([entry]), encoding="utf-8")
        live_options = LiveOptions(
            path, options.num_streams, options.settings, stagger_ms=options.stagger_ms, keeps_records=True
        )
        async with open_bench(live_options, options.num_streams, report) as bench:
            live = await bench.play(options.num_streams, options.stagger_ms)
    streams: list[_Seen] = []
    for stream in live.streams:
        anchor_ms = stream.anchor_ms or 0.0
        end = {"ended": "done", LATE: "behind"}.get(stream.ended_as, stream.ended_as)
        end_ms = anchor_ms + 1_000 * clip.seconds + (stream.ended_late_ms or 0.0)
        # Without an anchor nothing was heard.
        views = view_records(stream.received) if stream.anchor_ms is not None else []
        streams.append(_Seen(views, anchor_ms, end, end_ms))
    return streams, live.usage


@contextlib.contextmanager
def _cancelled_by_signals() -> Any:
    """Within the block the first SIGINT or SIGTERM cancels the task that runs it; more change nothing."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def cancel() -> None:
        if task is not None and not task.cancelling():
            task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _ratios(peer: dict[str, Any], surtitle: dict[str, Any]) -> dict[str, float | None]:
    """Return the peer's figures over surtitle's; None where one of them is missing or zero."""
    pairs = {
        f"{name}_{percentile}": (peer[name][percentile], surtitle[name][percentile])
        for name in _FIGURES
        for percentile in ("p50", "p95")
    }
    pairs |= {name: (peer[name], surtitle[name]) for name in ("wer", "cpu_s_per_audio_s")}
    return {name: round(theirs / ours, 3) if theirs and ours else None for name, (theirs, ours) in pairs.items()}
