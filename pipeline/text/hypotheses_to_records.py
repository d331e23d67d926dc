"""Hypotheses to records: pure functions from what the decoder answered to what consumers read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from pipeline.items import UNDETERMINED, CloseReason, Hypothesis, Task, TaskKind, Word
from pipeline.records import ErrorRecord, FinalRecord, PartialRecord, TranslationRecord, WordRecord
from pipeline.timebase import samples_to_ms

Tier = Literal["edge", "phi4"]


@dataclass(frozen=True, slots=True)
class Utterance:
    """What records need to know of the utterance that a hypothesis is about."""

    stream_id: str
    number: int
    channel: int
    start_sample: int
    end_sample: int
    tier: Tier
    is_language_given: bool


def task_name(task: Task) -> str:
    """Return the task as written in records: `transcribe`, `translate:en`."""
    return task.kind.value if task.target_language is None else f"{task.kind.value}:{task.target_language}"


def to_partial(utterance: Utterance, hypothesis: Hypothesis, shown: str, stable_chars: int) -> PartialRecord:
    """Return the partial for a revision; `shown` and `stable_chars` come from the utterance's `StablePrefix`."""
    return PartialRecord(**_speech_fields(utterance, hypothesis), text=shown, stable_chars=stable_chars)


def to_final(utterance: Utterance, hypothesis: Hypothesis, sequence: int, reason: CloseReason) -> FinalRecord:
    """Return the final of an utterance, its words on the stream's media clock."""
    return FinalRecord(
        **_speech_fields(utterance, hypothesis),
        text=hypothesis.text.strip(),
        words=[_to_word_record(word, utterance.start_sample) for word in hypothesis.words],
        sequence=sequence,
        close_reason=reason.value,
        average_logprob=round(hypothesis.average_logprob, 4),
    )


def to_translation(utterance: Utterance, hypothesis: Hypothesis, sequence: int) -> TranslationRecord:
    """Return the translation that belongs to final `sequence`.

    Raises:
        ValueError: if the hypothesis is not a translation.
    """
    target_language = hypothesis.task.target_language
    if hypothesis.task.kind is not TaskKind.TRANSLATE or target_language is None:
        raise ValueError(f"expected a translation, got task {hypothesis.task}")
    return TranslationRecord(
        **_speech_fields(utterance, hypothesis),
        text=hypothesis.text.strip(),
        sequence=sequence,
        target_language=target_language,
    )


def to_error(utterance: Utterance, task: Task, sequence: int, message: str) -> ErrorRecord:
    """Return the record that stands in the place of one that failed for good."""
    return ErrorRecord(
        stream=utterance.stream_id,
        start_ms=samples_to_ms(utterance.start_sample),
        end_ms=samples_to_ms(utterance.end_sample),
        utterance=utterance.number,
        sequence=sequence,
        task=task_name(task),
        message=message,
    )


def _speech_fields(utterance: Utterance, hypothesis: Hypothesis) -> dict[str, Any]:
    source = "given" if utterance.is_language_given else "detected"
    if hypothesis.language == UNDETERMINED:
        source = "tier"  # nobody said it: these models do not tell
    return {
        "stream": utterance.stream_id,
        "start_ms": samples_to_ms(utterance.start_sample),
        "end_ms": samples_to_ms(utterance.end_sample),
        "utterance": utterance.number,
        "revision": hypothesis.key.revision,
        "channel": utterance.channel,
        "language": hypothesis.language,
        "language_source": cast(Literal["given", "detected", "tier"], source),
        "tier": utterance.tier,
        "guard": hypothesis.guard,
    }


def _to_word_record(word: Word, offset_samples: int) -> WordRecord:
    return WordRecord(
        text=word.text,
        start_ms=samples_to_ms(offset_samples + word.start_sample),
        end_ms=samples_to_ms(offset_samples + word.end_sample),
        probability=round(word.probability, 4),
    )
