"""What the benchmarks print for people."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actors.bench.accuracy import AccuracyReport, FileResult
from actors.bench.latency import Percentiles
from actors.bench.live import LiveReport
from actors.bench.memory import MemoryReport
from actors.bench.sweep import SweepReport
from actors.bench.wer import Difference, WordErrors

_MAX_DIFFERENCES_SHOWN = 6


def accuracy_table(report: AccuracyReport) -> RenderableType:
    """Return a table with a row for each recording, the figures in all, and what the live path did besides words."""
    title = f"Word error rate, {report.model}, {report.arithmetic}, language {report.language}"
    table = Table(title=title, title_justify="left")
    for name in ("recording", "words", "live", "offline"):
        table.add_column(name, justify="left" if name == "recording" else "right", no_wrap=True)
    table.add_column("live differs from the reference in", overflow="fold")
    english, others = _split(report.files)
    for row in english:
        _add_row(table, row)
    live, offline = report.pooled
    table.add_section()
    table.add_row(
        "English, all words", str(live.num_reference_words), _percent(live), _percent(offline), "", style="bold"
    )
    for rows in (report.joined, others):
        if rows:
            table.add_section()
        for row in rows:
            _add_row(table, row)
    return Group(table, Text(_summary(report)))


def live_table(report: LiveReport) -> RenderableType:
    """Return a table of the latencies of all streams together, and the other figures below it."""
    total, words, figures = report.latencies, report.words, report.to_json()
    title = f"{len(report.streams)} streams of {report.seconds:.0f} s at once, {report.model}, runtime {report.runtime}"
    table = Table(title=title, title_justify="left")
    table.add_column("ms")
    for name in ("p50", "p95", "mean", "measured"):
        table.add_column(name, justify="right")
    for label, values in (
        ("first word", total.first_word_ms),
        ("emission lag, first seen", total.emission_lag_ms),
        ("emission lag, stable", total.stable_lag_ms),
        ("commit lag", total.commit_lag_ms),
        ("finalisation", total.finalisation_ms),
        ("time between partials", total.cadence_ms),
    ):
        percentiles = Percentiles.of(values)
        table.add_row(
            label, _whole(percentiles.p50), _whole(percentiles.p95), _whole(percentiles.mean), str(percentiles.num)
        )
    everything = f"all {figures['num_processes']} processes"
    if not report.is_whole_service:
        everything = f"{figures['num_processes']} processes, without the cluster or store elsewhere"
    lines = [
        report.arithmetic,
        f"CPU {figures['cpu_s_per_audio_s']:.3f} s per second of audio, {everything}, "
        f"{figures['num_cpus']} cores; memory {figures['memory_mib_at_start']:.0f} MiB at start, "
        f"{figures['memory_mib_peak']:.0f} MiB at most, {figures['memory_mib_per_stream']:.1f} MiB more a stream",
        f"{total.num_finals} finals, {total.num_finals_lost} lost, {total.num_duplicate_finals} twice; "
        f"{figures['num_errors']} errors, {figures['num_gaps']} gaps, {figures['num_streams_failed']} streams failed",
        f"{total.num_stable_words_lost} of {total.num_stable_words} stable words were not kept by the final",
        "WER: no reference text" if words is None else f"WER {_percent(words)} of {words.num_reference_words} words",
    ]
    return Group(table, Text("\n".join(lines)))


def sweep_table(report: SweepReport) -> RenderableType:
    """Return a table with a row for each round, by number of streams, and the largest numbers below it."""
    first = report.rounds[0].report
    title = f"Live streams at once, {first.seconds:.0f} s each, {first.model}, runtime {first.runtime}; latencies in s"
    # Narrow: 80 columns are enough, with the verdict folded.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in (
        "N",
        *(f"{latency}\np50 / p95" for latency in ("first word", "emission", "finalisation")),
        "cadence\nmean / p95",
        "WER",
        "CPU s /\naudio s",
        "MiB /\nstream",
    ):
        table.add_column(name, justify="right")
    table.add_column("limits missed", overflow="fold")
    for played in sorted(report.rounds, key=lambda played: played.num_streams):
        figures = played.report.to_json()
        latencies = (figures[name] for name in ("first_word_ms", "emission_lag_ms", "finalisation_ms"))
        cadence = figures["cadence_ms"]
        table.add_row(
            str(played.num_streams),
            *(f"{_seconds(values['p50'])} / {_seconds(values['p95'])}" for values in latencies),
            f"{_seconds(cadence['mean'])} / {_seconds(cadence['p95'])}",
            "-" if figures["wer"] is None else f"{100 * figures['wer']:.1f} %",
            f"{figures['cpu_s_per_audio_s']:.3f}",
            f"{figures['memory_mib_per_stream']:.1f}",
            Text(_in_words(played.missed) or "none", style="" if played.missed else "green"),
        )
    alone = ", ".join(f"{_in_words((name,))} {number}" for name, number in report.largest_streams_by_limit.items())
    limits = report.limits
    lines = (
        f"largest number within all limits: {report.largest_streams}",
        f"largest number played that kept each limit alone: {alone}",
        f"limits: p95 of finalisation {_limit(limits.max_finalisation_p95_ms)}, first word "
        f"{_limit(limits.max_first_word_p95_ms)}, emission lag {_limit(limits.max_emission_lag_p95_ms)}; "
        f"WER {limits.max_wer_points:g} points above that of one stream; "
        f"{limits.max_finals_lost} finals lost; {limits.max_streams_failed} streams failed; all over in time",
    )
    return Group(table, Text("\n".join(lines)))


def memory_table(report: MemoryReport) -> RenderableType:
    """Return a table of the memory of all processes early and late in a stream, and the growth below it."""
    table = Table(title=f"One stream of {report.media_s / 60:.1f} minutes, {report.model}", title_justify="left")
    table.add_column("MiB")
    for name in (f"after {report.early_s / 60:g} min", "at the end", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    early, late, peak = report.early, report.late, report.peak
    table.add_row("resident", *(_mib(memory.resident_bytes) for memory in (early, late, peak)))
    table.add_row("private", *(_mib(memory.private_bytes) for memory in (early, late, peak)))
    names = sorted(late.private_bytes_by_name, key=lambda name: -late.private_bytes_by_name[name])
    for name in names:
        columns = (_mib(memory.private_bytes_by_name.get(name, 0)) for memory in (early, late, peak))
        table.add_row(Text(f"  {name}"), *columns)
    lines = (
        f"resident memory grew by {report.growth_percent:+.1f} %; at most {report.max_growth_percent:g} % are allowed",
        f"{report.num_finals} finals, {report.num_samples} samples in {report.wall_s:.0f} s",
    )
    return Group(table, Text("\n".join(lines)))


def _split(rows: tuple[FileResult, ...]) -> tuple[list[FileResult], list[FileResult]]:
    return [row for row in rows if row.language == "en"], [row for row in rows if row.language != "en"]


def _add_row(table: Table, row: FileResult) -> None:
    name = row.file if row.language == "en" else f"{row.file} ({row.language})"
    shown = [_arrow(difference) for difference in row.live_differences[:_MAX_DIFFERENCES_SHOWN]]
    if len(row.live_differences) > _MAX_DIFFERENCES_SHOWN:
        shown.append(f"… {len(row.live_differences) - _MAX_DIFFERENCES_SHOWN} more")
    table.add_row(
        Text(name), str(row.live.num_reference_words), _percent(row.live), _percent(row.offline), Text(", ".join(shown))
    )


def _summary(report: AccuracyReport) -> str:
    live, offline = report.pooled
    counts = report.to_json()["live"]
    guarded = counts["guarded_share"] or 0.0
    return (
        f"live is {100 * (live.rate - offline.rate):+.2f} points from offline over the English recordings\n"
        f"{counts['num_stable_words_lost']} of {counts['num_stable_words']} stable words were not kept by the final; "
        f"{100 * guarded:.1f} % of {counts['num_hypotheses']} hypotheses guarded; "
        f"{counts['num_passes']} decoder passes for {counts['num_tokens']} tokens"
    )


def _percent(errors: WordErrors) -> str:
    return f"{100 * errors.rate:.1f} %"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _in_words(limits: tuple[str, ...]) -> str:
    return ", ".join(name.replace("_", " ") for name in limits)


def _whole(value_ms: float | None) -> str:
    return "-" if value_ms is None else f"{value_ms:,.0f}"


def _seconds(value_ms: float | None) -> str:
    return "-" if value_ms is None else f"{value_ms / 1_000:.2f}"


def _limit(value_ms: float | None) -> str:
    return "not judged" if value_ms is None else f"{_seconds(value_ms)} s"


def _arrow(difference: Difference) -> str:
    if not difference.hypothesis:
        return f"-{difference.reference}"
    if not difference.reference:
        return f"+{difference.hypothesis}"
    return f"{difference.reference}→{difference.hypothesis}"
