"""Requests through one decode engine, for benchmarks: together or one by one, with drafts and without, and as series.

Whatever the model: a request is an utterance as heard up to some moment, encoded as a final, so that all ways get the
same embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.bench.decode_report import SeriesResult
from actors.bench.decode_requests import Cut, SpokenUtterance
from pipeline.audio.encoders import SnapshotEncoder
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.runner import Context
from pipeline.errors import StageError
from pipeline.items import TRANSCRIBE, DecodeRequest, Embeddings, Failure, Hypothesis, RequestKey, Snapshot, SnapshotKey


@dataclass(frozen=True, slots=True)
class Item:
    """One request, ready to be decoded any way."""

    name: str
    language: str
    draft: tuple[int, ...]
    embeddings: Embeddings

    def request(self, *, has_draft: bool, is_final: bool) -> DecodeRequest:
        """Return what the engine is asked."""
        draft = self.draft if has_draft else ()
        return DecodeRequest(self.embeddings.key, is_final, self.language, (), draft, (TRANSCRIBE,))


@dataclass(frozen=True, slots=True)
class Run:
    """One way once: a text for each item. `num_steps` are forward passes, whatever the number of their rows."""

    tokens: list[tuple[int, ...]]
    guards: list[str | None]
    num_passes: int
    num_steps: int
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Text tokens with the end of each text."""
        return sum(len(tokens) + 1 for tokens in self.tokens)

    @property
    def num_guarded(self) -> int:
        """Texts that a guard has cut."""
        return sum(guard is not None for guard in self.guards)


Compare = Callable[[Sequence[Item], Run, Run], None]
"""Told the items of a round, the run without drafts and the run with them."""


class EngineRuns:
    """An encoder and an engine, and the ways through them.

    Args:
        encoder: what makes embeddings of cuts.
        engine: what decodes them; nobody else uses it meanwhile.
        language: ISO 639-1 code that is told to the engine; None: that of the recording.
    """

    def __init__(self, encoder: SnapshotEncoder, engine: DecodeEngine, language: str | None = None) -> None:
        self._encoder = encoder
        self._engine = engine
        self._language = language

    def item(self, index: int, cut: Cut, draft: tuple[int, ...]) -> Item:
        """Return the request number `index` (from 0).

        Raises:
            StageError: if it cannot be encoded.
        """
        language = self._language or cut.utterance.language
        # As a final: float32, the same for all ways.
        snapshot = Snapshot(
            key=request_key(index),
            channel=0,
            is_final=True,
            start_sample=cut.utterance.start_sample,
            samples=cut.samples,
            language=language,
            languages=(),
            draft=(),
            tasks=(TRANSCRIBE,),
        )
        (embeddings,) = self._encoder.encode([snapshot])
        name = f"request {index + 1} ({cut.name})"
        if isinstance(embeddings, Failure):
            raise StageError(f"{name} cannot be encoded: {embeddings.message}")
        return Item(name, language, draft, embeddings)

    def decode(
        self,
        items: Sequence[Item],
        *,
        has_drafts: bool = False,
        is_batched: bool = True,
        is_final: bool = True,
    ) -> tuple[list[Hypothesis], int]:
        """Return the engine's hypotheses of `items`, in their order, and its number of steps.

        Raises:
            StageError: if one fails.
        """
        engine, num_steps = self._engine, 0
        found: dict[RequestKey, Hypothesis] = {}
        for batch in [items] if is_batched else [[item] for item in items]:
            for item in batch:
                engine.submit(item.request(has_draft=has_drafts, is_final=is_final), Context(item.embeddings))
            while engine.has_work:
                for outcome in engine.step():
                    if isinstance(outcome, Failure):
                        name = next(item.name for item in items if item.embeddings.key == outcome.key)
                        raise StageError(f"{name} failed in the decoder: {outcome.message}")
                    found[outcome.key] = outcome
                num_steps += 1
        return [found[item.embeddings.key] for item in items], num_steps

    def run(self, items: Sequence[Item], *, has_drafts: bool, is_batched: bool, is_final: bool = True) -> Run:
        """Decode `items` one way, timed.

        Raises:
            StageError: if one fails.
        """
        started = time.perf_counter()
        hypotheses, num_steps = self.decode(items, has_drafts=has_drafts, is_batched=is_batched, is_final=is_final)
        seconds = time.perf_counter() - started
        return Run(
            tokens=[hypothesis.tokens for hypothesis in hypotheses],
            guards=[hypothesis.guard for hypothesis in hypotheses],
            num_passes=sum(hypothesis.num_passes for hypothesis in hypotheses),
            num_steps=num_steps,
            seconds=seconds,
        )

    def run_series(self, utterances: Sequence[SpokenUtterance], compare: Compare) -> SeriesResult:
        """Decode every utterance as a live stream does, all of them in step, with drafts and without.

        Raises:
            StageError: if a request fails.
        """
        counts = SeriesResult()
        drafts: dict[int, tuple[int, ...]] = {}
        ends = [utterance.series_ends() for utterance in utterances]
        for round_number in range(max(map(len, ends), default=0)):
            open_ones = [index for index in range(len(utterances)) if round_number < len(ends[index])]
            cuts = {index: Cut(utterances[index], ends[index][round_number]) for index in open_ones}
            counts += self._run_round(cuts, drafts, compare)
        return counts

    def _run_round(self, cuts: Mapping[int, Cut], drafts: dict[int, tuple[int, ...]], compare: Compare) -> SeriesResult:
        """Decode one snapshot of each utterance, and note what it is for the next: the draft."""
        items = [self.item(index, cut, drafts.get(index, ())) for index, cut in cuts.items()]
        plain = self.run(items, has_drafts=False, is_batched=True)
        drafted = self.run(items, has_drafts=True, is_batched=True)
        compare(items, plain, drafted)
        for index, tokens, guard in zip(cuts, drafted.tokens, drafted.guards, strict=True):
            if guard is None:  # the tokens of others must not become a draft
                drafts[index] = tokens
        return SeriesResult(
            num_snapshots=len(items),
            num_tokens=plain.num_tokens,
            passes_with_drafts=drafted.num_passes,
            passes_without_drafts=plain.num_passes,
            steps_with_drafts=drafted.num_steps,
            steps_without_drafts=plain.num_steps,
        )


def request_key(index: int) -> SnapshotKey:
    """Return the key of request number `index`, from 0."""
    # A stream each: one request must never overtake another.
    return SnapshotKey(f"bench-{index + 1}", 1, 1)
