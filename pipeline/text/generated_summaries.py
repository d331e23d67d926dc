"""Finals in, summaries written by the model out: due as the extractive ones are, but each takes a job.

A job's text is what was said since the last rolling summary. It is bounded, and so is what is held: what no longer fits
falls out at its old end, and the summary then covers what the model did read. The rolling summaries themselves are kept
for the closing one; when they become many, one more job makes one text of them ("Recursively Summarizing Books with
Human Feedback", Wu et al. 2021, https://arxiv.org/abs/2109.10862, does so with chapters).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.items import Failure, Hypothesis, Job, JobKey, Outcome, Task, TaskKind
from pipeline.records import BaseRecord, ErrorRecord, FinalRecord, SummaryRecord
from pipeline.text.hypotheses_to_records import Tier, task_name
from pipeline.text.sentences import joint, split_sentences, words_of
from pipeline.text.transcripts_to_summaries import MS_PER_MINUTE, Coverage, SummaryParams

_SUMMARISE = Task(TaskKind.SUMMARISE)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one final says. `speaker` stands before it, if there are several."""

    text: str
    speaker: str
    sequence: int
    start_ms: int

    @property
    def num_chars(self) -> int:
        """What it takes in a text, with what stands between it and the next."""
        return len(self.speaker) + len(self.text) + 1


class _Stretch:
    """Finals in a row, as far as they may still be handed over: all, or the newest turns of over `max_chars`.

    It is never longer than that by more than a turn, whatever is put in, and no turn is longer than that either.
    """

    def __init__(self, max_chars: int) -> None:
        self.coverage: Coverage | None = None
        self.turns: deque[_Turn] = deque()
        self._max_chars = max_chars
        self._num_chars = 0

    def add(self, final: FinalRecord, speaker: str) -> None:
        """Put the next final in."""
        self.coverage = Coverage.with_final(self.coverage, final)
        if words_of(final.text):
            text = " ".join(final.text.split())[-self._max_chars :]
            self._put(_Turn(text, speaker, final.sequence, final.start_ms))

    def put_behind(self, later: _Stretch) -> None:
        """Put in all of a stretch that follows this one."""
        if later.coverage is not None:
            self.coverage = _both(self.coverage, later.coverage)
        for turn in later.turns:
            self._put(turn)

    def _put(self, turn: _Turn) -> None:
        self.turns.append(turn)
        self._num_chars += turn.num_chars
        # What is left is always too long to be handed over whole, which is how a stretch that lost some is told.
        while self._num_chars - self.turns[0].num_chars > self._max_chars:
            self._num_chars -= self.turns.popleft().num_chars

    def fits(self, max_chars: int) -> bool:
        """Return whether all of it can be handed over in so many characters."""
        return self._num_chars <= max_chars

    def hand_over(self, max_chars: int) -> tuple[str, Coverage]:
        """Return its newest text of up to `max_chars` characters, and what of it that covers.

        Raises:
            RuntimeError: if nothing was said in it.
        """
        if self.coverage is None or not self.turns:
            raise RuntimeError("nothing was said that could be summarised")
        if self.fits(max_chars):
            return _join(self.turns), self.coverage
        taken: deque[_Turn] = deque()
        room_chars = max_chars
        for turn in reversed(self.turns):
            if turn.num_chars > room_chars:
                rest_chars = room_chars - len(turn.speaker) - 1
                text = _end_of(turn.text, rest_chars) or ("" if taken else turn.text[len(turn.text) - rest_chars :])
                if text:
                    taken.appendleft(replace(turn, text=text))
                break
            taken.appendleft(turn)
            room_chars -= turn.num_chars
        oldest = taken[0]
        return _join(taken), replace(self.coverage, covers_from=oldest.sequence, start_ms=oldest.start_ms)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A summary that the closing one will be made of."""

    text: str
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A job without an outcome. `stretch` is what a rolling summary was made of; `kept` made one text of many."""

    key: JobKey
    makes: Literal["rolling", "kept", "closing"]
    coverage: Coverage
    stretch: _Stretch | None = None


class GeneratedSummaries:
    """The summaries of one stream, written by the model. Deterministic; what it holds is bounded by `SummaryParams`.

    A rolling summary is due when a final reaches the next whole multiple of `every_minutes`, and covers what no rolling
    summary covers yet, up to that final. A stretch in which nobody spoke gives none, and its finals count to the next,
    as do those of a summary that failed. One job is in flight at most: a summary that becomes due meanwhile waits, and
    if another one does, they become one. The closing summary is made from the rolling ones and what was said behind
    the last of them.

    Args:
        num_channels: of the stream; if there are several, the text says who speaks.
    """

    def __init__(self, params: SummaryParams, stream_id: str, tier: Tier, *, num_channels: int = 1) -> None:
        self._stream_id = stream_id
        self._tier: Tier = tier
        self._has_speakers = num_channels > 1
        self._max_chars = params.max_text_chars
        self._every_ms = round(params.every_minutes * MS_PER_MINUTE)
        self._due_ms = self._every_ms
        self._open = _Stretch(self._max_chars)
        self._due: _Stretch | None = None
        self._kept: list[_Kept] = []
        self._in_flight: _InFlight | None = None
        self._num_jobs = 0
        self._is_finished = False
        self._is_closing_begun = False

    @property
    def is_done(self) -> bool:
        """Whether no record will come any more."""
        return self._is_finished and self._in_flight is None and self._next_due() is None

    def push(self, final: FinalRecord) -> None:
        """Take the next final, in order of sequence.

        Raises:
            RuntimeError: after `finish`.
        """
        if self._is_finished:
            raise RuntimeError("this summary is finished: make a new GeneratedSummaries for a new stream")
        self._open.add(final, f"Speaker {final.channel + 1}: " if self._has_speakers else "")
        if final.end_ms < self._due_ms:
            return
        self._due_ms = (final.end_ms // self._every_ms + 1) * self._every_ms
        if self._open.turns:
            if self._due is None:
                self._due = self._open
            else:
                self._due.put_behind(self._open)
            self._open = _Stretch(self._max_chars)

    def finish(self) -> None:
        """No final follows: the closing summary is due, if anything was said."""
        self._is_finished = True

    def take_job(self) -> Job | None:
        """Return the job that is to be done now, if there is one; each is returned once."""
        makes = None if self._in_flight is not None else self._next_due()
        if makes is None:
            return None
        stretch: _Stretch | None = None
        if makes == "kept":
            text, coverage = self._kept_text(), self._kept_coverage()
        elif self._due is not None:
            stretch, self._due = self._due, None
            text, coverage = self._rolling_text(stretch)
        else:
            self._is_closing_begun = True
            text, coverage = self._closing_text()
        self._num_jobs += 1
        key = JobKey(self._stream_id, TaskKind.SUMMARISE, self._num_jobs)
        self._in_flight = _InFlight(key, makes, coverage, stretch)
        return Job(key, _SUMMARISE, text=text)

    def accept(self, outcome: Outcome) -> list[BaseRecord]:
        """Take the outcome of the job in flight; return the record that comes of it. Any other outcome is ignored."""
        done = self._in_flight
        if done is None or outcome.key != done.key:
            return []
        self._in_flight = None
        if isinstance(outcome, Failure):
            return [self._failed(done, outcome.message)]
        text = outcome.text.strip()
        if not text:
            because = f" (guard: {outcome.guard})" if outcome.guard else ""
            return [self._failed(done, f"the model wrote no summary{because}")]
        if done.makes != "closing":
            self._kept = self._kept if done.makes == "rolling" else []
            self._kept.append(_Kept(_start_of(text, self._max_chars // 4), done.coverage))
        return [] if done.makes == "kept" else [self._record(done.makes, text, outcome, done.coverage)]

    def _next_due(self) -> Literal["rolling", "kept", "closing"] | None:
        """Return what the next job makes. The kept ones come first: a rolling summary adds to them."""
        if self._due is not None:
            return "kept" if self._has_many_kept else "rolling"
        was_said = bool(self._kept or self._open.turns)
        return "closing" if self._is_finished and was_said and not self._is_closing_begun else None

    @property
    def _has_many_kept(self) -> bool:
        return len(self._kept_text()) > self._max_chars // 2

    def _kept_text(self) -> str:
        return "\n".join(kept.text for kept in self._kept)

    def _kept_coverage(self) -> Coverage:
        return _both(self._kept[0].coverage, self._kept[-1].coverage)

    def _rolling_text(self, stretch: _Stretch) -> tuple[str, Coverage]:
        if stretch.fits(self._max_chars) or not self._kept:
            return stretch.hand_over(self._max_chars)
        before = self._kept[-1].text
        text, coverage = stretch.hand_over(self._max_chars - len(before) - 1)
        return f"{before}\n{text}", coverage

    def _closing_text(self) -> tuple[str, Coverage]:
        if not self._kept:
            return self._open.hand_over(self._max_chars)
        text, coverage = self._kept_text(), self._kept_coverage()
        if self._open.turns:
            tail, _ = self._open.hand_over(self._max_chars - len(text) - 1)
            text = f"{text}\n{tail}"
        return text, coverage if self._open.coverage is None else _both(coverage, self._open.coverage)

    def _failed(self, done: _InFlight, message: str) -> ErrorRecord:
        if done.makes == "kept":
            while self._has_many_kept:
                del self._kept[0]
        elif done.stretch is not None:
            # What nobody could summarise counts to the next one: the one that waits, or the one not yet due.
            later = self._open if self._due is None else self._due
            done.stretch.put_behind(later)
            if self._due is None:
                self._open = done.stretch
            else:
                self._due = done.stretch
        return ErrorRecord(
            stream=self._stream_id,
            start_ms=done.coverage.start_ms,
            end_ms=done.coverage.end_ms,
            utterance=0,
            sequence=0,
            task=task_name(_SUMMARISE),
            message=message,
        )

    def _record(
        self, scope: Literal["rolling", "closing"], text: str, hypothesis: Hypothesis, coverage: Coverage
    ) -> SummaryRecord:
        return SummaryRecord(
            stream=self._stream_id,
            start_ms=coverage.start_ms,
            end_ms=coverage.end_ms,
            text=text,
            scope=scope,
            covers_from=coverage.covers_from,
            covers_to=coverage.covers_to,
            language=hypothesis.language,
            tier=self._tier,
        )


def _both(first: Coverage | None, second: Coverage) -> Coverage:
    """Return what the two cover, `second` being the later one."""
    if first is None:
        return second
    return Coverage(
        first.covers_from,
        second.covers_to,
        min(first.start_ms, second.start_ms),
        max(first.end_ms, second.end_ms),
    )


def _join(turns: deque[_Turn]) -> str:
    """Return the turns as one text: a line each if there are speakers, else one after the other."""
    if turns[0].speaker:
        return "\n".join(turn.speaker + turn.text for turn in turns)
    parts = [turns[0].text]
    for before, turn in zip(turns, list(turns)[1:], strict=False):
        parts += [joint(before.text, turn.text), turn.text]
    return "".join(parts)


def _end_of(text: str, max_chars: int) -> str:
    """Return the last sentences of `text` that fit; nothing if not even one does."""
    start = 0
    for sentence in split_sentences(text):
        start = text.index(sentence, start)
        if len(text) - start <= max_chars:
            return text[start:]
        start += len(sentence)
    return ""


def _start_of(text: str, max_chars: int) -> str:
    """Return the first sentences of `text` that fit, or so many characters if not even one does; on one line."""
    line = " ".join(text.split())
    if len(line) <= max_chars:
        return line
    end = 0
    for sentence in split_sentences(line):
        behind = line.index(sentence, end) + len(sentence)
        if behind > max_chars:
            break
        end = behind
    return line[: end or max_chars]
