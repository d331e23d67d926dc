"""What `surtitle bench peer` prints for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actors.bench.peer import PeerReport, Side

_ROWS = (
    ("first word", "first_word_ms"),
    ("emission lag, first seen", "emission_lag_ms"),
    ("commit lag", "commit_lag_ms"),
    ("finalisation", "finalisation_ms"),
)


def peer_table(report: PeerReport) -> RenderableType:
    """Return the figures of both systems side by side, with ratios, and how their streams ended below."""
    figures = report.to_json()
    peer, surtitle, ratios = figures["peer"], figures["surtitle"], figures["ratios"] or {}
    title = (
        f"{report.num_streams} streams of {report.seconds:.0f} s at once, {figures['num_cpus']} cores, "
        f"the peer ({report.protocol}) and surtitle ({report.model}) one after the other"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("p50 / p95, ms")
    for name in ("peer", "surtitle", "peer / surtitle"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, key in _ROWS:
        ratio = " / ".join(_ratio(ratios.get(f"{key}_{percentile}")) for percentile in ("p50", "p95"))
        table.add_row(label, _times(peer, key), _times(surtitle, key), ratio)
    table.add_section()
    table.add_row("WER", *(_percent(side) for side in (peer, surtitle)), _ratio(ratios.get("wer")))
    table.add_row(
        "CPU s per second of audio",
        *("-" if side is None else f"{side['cpu_s_per_audio_s']:.3f}" for side in (peer, surtitle)),
        _ratio(ratios.get("cpu_s_per_audio_s")),
    )
    table.add_row(
        "memory at most, MiB",
        *("-" if side is None else f"{side['peak_private_mib']:,.0f}" for side in (peer, surtitle)),
        "",
    )
    lines = [_say_end("peer", report.peer)]
    if report.surtitle is not None:
        lines.append(_say_end("surtitle", report.surtitle))
    return Group(table, Text("\n".join(lines)))


def _say_end(name: str, side: Side) -> str:
    figures = side.to_json()
    ends = Counter(side.ends)
    said = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    late = f"the last one {figures['max_ended_late_s']:.1f} s after its sound"
    if set(ends) != {"done"}:
        late = f"when given up still {figures['max_s_behind']:.1f} s behind"
    return (
        f"{name}: streams {said}, {late}; {figures['num_words_right']} of {figures['num_words']} words right; "
        f"{figures['num_utterances_never_final']} of {figures['num_utterances']} utterances never final"
    )


def _times(side: dict[str, Any] | None, key: str) -> str:
    if side is None or side[key]["p50"] is None:
        return "-"
    return f"{side[key]['p50']:,.0f} / {side[key]['p95']:,.0f}"


def _percent(side: dict[str, Any] | None) -> str:
    return "-" if side is None else f"{100 * side['wer']:.1f} %"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
