"""Finals in, extractive summaries out: a rolling one every few minutes of media time and a closing one.

A summary is made of the stream's own sentences, in the order in which they were said; `pipeline.text.ranking` chooses
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, model_validator

from pipeline.errors import ConfigError
from pipeline.params import Params
from pipeline.records import FinalRecord, SummaryRecord
from pipeline.text.sentences import ends_sentence, split_sentences, words_of

MS_PER_MINUTE = 60_000


class SummaryParams(Params):
    """When a summary is due, who writes it, and how long it is."""

    method: Literal["auto", "extractive", "generated"] = Field(
        default="auto",
        description="extractive: sentences that were said; generated: the model writes it (tier phi4); "
        "auto: generated where the tier can",
    )
    every_minutes: float = Field(
        default=5.0, ge=0.1, le=1_440.0, description="media time between two rolling summaries, in minutes"
    )
    num_sentences: int = Field(default=3, ge=1, le=20, description="sentences of a rolling summary")
    num_closing_sentences: int = Field(default=5, ge=1, le=50, description="sentences of the closing summary")
    max_sentences_open: int = Field(
        default=80,
        ge=10,
        le=500,
        description="sentences held since the last rolling summary; at this number the better half is kept",
    )
    max_sentences_kept: int = Field(
        default=60, ge=10, le=500, description="sentences kept from rolling summaries for the closing one"
    )
    max_join_gap_ms: int = Field(
        default=2_000, ge=0, le=60_000, description="pause over which an unfinished sentence still goes on"
    )
    max_sentence_chars: int = Field(
        default=600, ge=80, le=5_000, description="an unfinished sentence longer than this is taken as it is"
    )
    max_text_chars: int = Field(
        default=12_000,
        ge=1_000,
        le=100_000,
        description="generated: text handed to the model for one summary, about four characters a token",
    )

    @model_validator(mode="after")
    def _check_counts(self) -> SummaryParams:
        if self.num_sentences > self.max_sentences_open // 2:
            raise ValueError(
                f"num_sentences={self.num_sentences} is more than half of "
                f"max_sentences_open={self.max_sentences_open}: raise max_sentences_open or ask for a shorter summary"
            )
        if self.num_closing_sentences > self.max_sentences_kept:
            raise ValueError(
                f"num_closing_sentences={self.num_closing_sentences} is more than max_sentences_kept="
                f"{self.max_sentences_kept}: raise max_sentences_kept or ask for a shorter summary"
            )
        return self


def summary_method(params: SummaryParams, tier: Literal["edge", "phi4"]) -> Literal["extractive", "generated"]:
    """Return who makes the summaries of a stream on `tier`.

    Raises:
        ConfigError: if they are to be generated and the tier cannot.
    """
    can_generate = tier == "phi4"
    if params.method == "generated" and not can_generate:
        raise ConfigError(
            f"summary method 'generated' needs models that write text, and tier {tier!r} has none: "
            "use extractive or auto, or a checkpoint of the phi4 tier"
        )
    return "generated" if can_generate and params.method != "extractive" else "extractive"


@dataclass(frozen=True, slots=True)
class _Sentence:
    """One sentence as said. `start_ms` orders; `sequence` is the final that it began in."""

    text: str
    language: str
    channel: int
    sequence: int
    start_ms: int
    end_ms: int

    @property
    def order(self) -> tuple[int, int]:
        return (self.start_ms, self.sequence)


@dataclass(slots=True)
class Coverage:
    """The finals that a summary covers: sequences and media time, both inclusive."""

    covers_from: int
    covers_to: int
    start_ms: int
    end_ms: int

    @staticmethod
    def with_final(coverage: Coverage | None, final: FinalRecord) -> Coverage:
        """Return `coverage` (changed in place, if there is one) with `final`."""
        if coverage is None:
            return Coverage(final.sequence, final.sequence, final.start_ms, final.end_ms)
        coverage.covers_to = max(coverage.covers_to, final.sequence)
        coverage.start_ms = min(coverage.start_ms, final.start_ms)
        coverage.end_ms = max(coverage.end_ms, final.end_ms)
        return coverage


class TranscriptsToSummaries:
    """The summaries of one stream. Deterministic; what it holds is bounded by `SummaryParams`, however long the stream.

    A rolling summary is due when a final reaches the next whole multiple of `every_minutes`; it covers that final and
    all before it that no rolling summary covers yet. A stretch in which nobody spoke gives none, and its finals count
    to the next. The closing summary covers the whole stream: it chooses among the sentences kept from the
    rolling summaries and the tail behind the last of them.

    Not safe for threads. `push` costs microseconds but where a summary is due: then tens of milliseconds, at most a
    few hundred.
    """

    def __init__(self, params: SummaryParams, stream_id: str, tier: Literal["edge", "phi4"]) -> None:
        # Here, so that only streams that ask for summaries pay the half second, and before they are live.
        from pipeline.text.ranking import choose_central  # noqa: PLC0415

        self._choose_central = choose_central
        self._params = params
        self._stream_id = stream_id
        self._tier: Literal["edge", "phi4"] = tier
        self._every_ms = round(params.every_minutes * MS_PER_MINUTE)
        self._due_ms = self._every_ms
        self._unfinished: dict[int, _Sentence] = {}  # one a channel
        self._open: list[_Sentence] = []
        self._kept: list[_Sentence] = []
        self._since_rolling: Coverage | None = None
        self._since_start: Coverage | None = None
        self._is_finished = False

    def push(self, final: FinalRecord) -> list[SummaryRecord]:
        """Take the next final, in order of sequence; return the rolling summary that it makes due, or nothing.

        Raises:
            RuntimeError: after `finish`.
        """
        if self._is_finished:
            raise RuntimeError("this summary is finished: make a new TranscriptsToSummaries for a new stream")
        self._since_rolling = Coverage.with_final(self._since_rolling, final)
        self._since_start = Coverage.with_final(self._since_start, final)
        self._take_sentences(final)
        if final.end_ms < self._due_ms:
            return []
        self._due_ms = (final.end_ms // self._every_ms + 1) * self._every_ms
        self._close_unfinished()
        if not self._open:
            return []
        chosen = self._choose(self._open, self._params.num_sentences)
        record = self._record("rolling", chosen, self._since_rolling)
        self._kept += chosen
        if len(self._kept) > self._params.max_sentences_kept:
            self._kept = self._choose(self._kept, max(1, self._params.max_sentences_kept // 2))
        self._open = []
        self._since_rolling = None
        return [record]

    def finish(self) -> list[SummaryRecord]:
        """Return the closing summary, or nothing if nothing was said. Further calls return nothing."""
        if self._is_finished:
            return []
        self._is_finished = True
        self._close_unfinished()
        candidates = sorted([*self._kept, *self._open], key=lambda sentence: sentence.order)
        self._kept, self._open = [], []
        if not candidates or self._since_start is None:
            return []
        chosen = self._choose(candidates, self._params.num_closing_sentences)
        return [self._record("closing", chosen, self._since_start)]

    def _take_sentences(self, final: FinalRecord) -> None:
        text = final.text.strip()
        if not text:
            return
        piece = _Sentence(text, final.language, final.channel, final.sequence, final.start_ms, final.end_ms)
        before = self._unfinished.pop(final.channel, None)
        if before is not None:
            if (
                before.language == piece.language
                and piece.start_ms - before.end_ms <= self._params.max_join_gap_ms
                and len(before.text) < self._params.max_sentence_chars
            ):
                piece = replace(before, text=f"{before.text} {piece.text}", end_ms=piece.end_ms)
            else:
                self._open.append(before)
        sentences = [text[: self._params.max_sentence_chars] for text in split_sentences(piece.text) if words_of(text)]
        self._open += [replace(piece, text=text) for text in sentences]
        if sentences and not ends_sentence(piece.text):
            self._unfinished[final.channel] = self._open.pop()
        if len(self._open) > self._params.max_sentences_open:
            self._open = self._choose(self._open, self._params.max_sentences_open // 2)

    def _close_unfinished(self) -> None:
        self._open += self._unfinished.values()
        self._open.sort(key=lambda sentence: sentence.order)
        self._unfinished.clear()

    def _choose(self, sentences: Sequence[_Sentence], count: int) -> list[_Sentence]:
        texts = [sentence.text for sentence in sentences]
        return [sentences[index] for index in self._choose_central(texts, count, _main_language(sentences))]

    def _record(
        self, scope: Literal["rolling", "closing"], chosen: Sequence[_Sentence], coverage: Coverage
    ) -> SummaryRecord:
        return SummaryRecord(
            stream=self._stream_id,
            start_ms=coverage.start_ms,
            end_ms=coverage.end_ms,
            text=" ".join(sentence.text for sentence in chosen),
            scope=scope,
            covers_from=coverage.covers_from,
            covers_to=coverage.covers_to,
            language=_main_language(chosen),
            tier=self._tier,
        )


def _main_language(sentences: Iterable[_Sentence]) -> str:
    """Return the language that most characters are in; the first one on a tie."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts[sentence.language] += len(sentence.text)
    return counts.most_common(1)[0][0]
