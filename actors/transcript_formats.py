"""What `POST /v1/audio/transcriptions` asks for and answers: pure functions between forms, finals and OpenAI's formats.

Source: OpenAI's API reference (audio, create transcription) and the types of its Python SDK (`openai.types.audio`).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from pipeline.errors import ModelNotLoaded, RequestRefused
from pipeline.items import UNDETERMINED
from pipeline.records import BaseRecord, ErrorRecord, FinalRecord, HealthRecord
from pipeline.text.captions import to_srt, to_webvtt
from pipeline.text.language_names import language_name

ResponseFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]
Granularity = Literal["segment", "word"]

ANY_MODEL = "whisper-1"
"""What clients of OpenAI's service call its Whisper; here it is whatever model is loaded."""

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})*")
_UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_GRANULARITIES = "timestamp_granularities[]"
_SINGLE = ("model", "language", "prompt", "response_format", "temperature", "stream", "chunking_strategy")
_REPEATED = {_GRANULARITIES: _GRANULARITIES, "timestamp_granularities": _GRANULARITIES}
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class TranscriptionRequest:
    """What a client asks for. `language` is None where it gave none."""

    language: str | None = None
    response_format: ResponseFormat = "json"
    granularities: frozenset[Granularity] = frozenset({"segment"})
    is_streamed: bool = False


def read_request(fields: Mapping[str, Sequence[str]], model: str) -> TranscriptionRequest:
    """Return what the `fields` of a form ask for, where `model` is the name of the loaded one.

    Empty fields count as absent.

    Raises:
        ModelNotLoaded: if another model is asked for.
        RequestRefused: naming a parameter that is unknown, impossible or cannot be honoured.
    """
    given = _given(fields)
    asked_model = _single(given, "model")
    if asked_model is None:
        raise RequestRefused(f"which model? {model!r} is loaded; {ANY_MODEL!r} means it too", "model")
    if asked_model not in {model, ANY_MODEL}:
        raise ModelNotLoaded(
            f"model {asked_model[:80]!r} is not loaded here: {model!r} is, and {ANY_MODEL!r} means it too", "model"
        )
    _check_temperature(_single(given, "temperature"))
    if _single(given, "prompt") is not None:
        raise RequestRefused("a prompt cannot be honoured: the models hear the sound alone; leave it out", "prompt")
    if (_single(given, "chunking_strategy") or "auto") != "auto":
        raise RequestRefused("only auto: where sound is cut is configured for all streams (vad)", "chunking_strategy")
    response_format = _single(given, "response_format") or "json"
    if response_format not in get_args(ResponseFormat):
        raise RequestRefused(f"choose from {', '.join(get_args(ResponseFormat))}", "response_format")
    granularities = frozenset(given.get(_GRANULARITIES, ()))
    if unknown := granularities - set(get_args(Granularity)):
        raise RequestRefused(f"{min(unknown)[:80]!r} is none of segment, word", _GRANULARITIES)
    if granularities and response_format != "verbose_json":
        raise RequestRefused("only response_format verbose_json has timestamps in it", _GRANULARITIES)
    stream = _TRUTHS.get((_single(given, "stream") or "false").lower())
    if stream is None:
        raise RequestRefused("true or false", "stream")
    if stream and response_format not in {"json", "text"}:
        raise RequestRefused("events carry text: with stream=true it is json or text", "response_format")
    return TranscriptionRequest(
        language=_language(_single(given, "language")),
        response_format=cast(ResponseFormat, response_format),
        granularities=cast(frozenset[Granularity], granularities) or frozenset({"segment"}),
        is_streamed=stream,
    )


@dataclass(slots=True)
class Transcript:
    """What a stream has said so far, as far as transcripts need it."""

    finals: list[FinalRecord] = field(default_factory=list)  # those with text
    gaps: list[HealthRecord] = field(default_factory=list)
    missing: ErrorRecord | None = None  # the first final that there is not
    duration_ms: int = 0
    media_failure: str | None = None  # why the media could not be heard to its end

    def take(self, record: BaseRecord) -> None:
        """Take the stream's next record."""
        match record:
            case FinalRecord() if record.text:
                self.finals.append(record)
            case ErrorRecord() if record.sequence and self.missing is None:
                self.missing = record
            case HealthRecord(event="gap"):
                self.gaps.append(record)
            case HealthRecord(event="ended"):
                self.duration_ms = record.end_ms
            case HealthRecord(event="failed"):
                self.media_failure = record.message
            case _:
                pass

    def piece(self, index: int) -> str:
        """Return the text of a final with the space that parts it from the one before: joined, they are the text."""
        is_apart = index > 0 and self.finals[index - 1].language not in _UNSPACED_LANGUAGES
        return f"{' ' if is_apart else ''}{self.finals[index].text}"

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(map(self.piece, range(len(self.finals))))


def to_body(transcript: Transcript, asked: TranscriptionRequest) -> dict[str, Any] | str:
    """Return the answer in the format asked for: an object for JSON, else a text."""
    match asked.response_format:
        case "text":
            return f"{transcript.text}\n"
        case "srt":
            return to_srt(transcript.finals)
        case "vtt":
            return to_webvtt(transcript.finals, transcript.gaps)
        case "json":
            return {"text": transcript.text, "usage": _usage(transcript)}
        case "verbose_json":
            return _verbose(transcript, asked)


def to_delta_event(transcript: Transcript, index: int) -> dict[str, Any]:
    """Return the event of the final at `index`."""
    return {"type": "transcript.text.delta", "delta": transcript.piece(index)}


def to_done_event(transcript: Transcript) -> dict[str, Any]:
    """Return the event behind the last final."""
    return {"type": "transcript.text.done", "text": transcript.text, "usage": _usage(transcript)}


def _verbose(transcript: Transcript, asked: TranscriptionRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": language_name(_main_language(transcript, asked)),
        "duration": _seconds(transcript.duration_ms),
        "text": transcript.text,
    }
    if "segment" in asked.granularities:
        body["segments"] = [_segment(transcript, index) for index in range(len(transcript.finals))]
    if "word" in asked.granularities:
        body["words"] = [
            {"word": word.text.strip(), "start": _seconds(word.start_ms), "end": _seconds(word.end_ms)}
            for final in transcript.finals
            for word in final.words
        ]
    return body | {"usage": _usage(transcript)}


def _segment(transcript: Transcript, index: int) -> dict[str, Any]:
    """Return a final as a segment. Records keep neither tokens nor the probability of silence (`docs/openai.md`)."""
    final = transcript.finals[index]
    data = final.text.encode()
    return {
        "id": index,
        "seek": 0,
        "start": _seconds(final.words[0].start_ms if final.words else final.start_ms),
        "end": _seconds(final.words[-1].end_ms if final.words else final.end_ms),
        "text": transcript.piece(index),
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": final.average_logprob,
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 4),
        "no_speech_prob": 0.0,
    }


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": _seconds(transcript.duration_ms)}


def _main_language(transcript: Transcript, asked: TranscriptionRequest) -> str:
    """Return the language of most of the text."""
    num_chars: Counter[str] = Counter()
    for final in transcript.finals:
        num_chars[final.language] += len(final.text)
    return num_chars.most_common(1)[0][0] if num_chars else asked.language or UNDETERMINED


def _seconds(ms: int) -> float:
    return ms / 1_000


def _given(fields: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the fields that hold something, by the names they are documented under."""
    given: dict[str, list[str]] = {}
    for name, values in fields.items():
        if kept := [value for value in values if value]:
            if name not in _SINGLE and name not in _REPEATED:
                raise RequestRefused("no such parameter, or none that can be honoured: leave it out", name[:80])
            given.setdefault(_REPEATED.get(name, name), []).extend(kept)
    return given


def _single(given: Mapping[str, list[str]], name: str) -> str | None:
    values = given.get(name, [])
    if len(values) > 1:
        raise RequestRefused("given more than once", name)
    return values[0] if values else None


def _check_temperature(value: str | None) -> None:
    try:
        is_zero = value is None or float(value) == 0
    except ValueError:
        is_zero = False
    if not is_zero:
        raise RequestRefused("only 0: the likeliest words are taken, none by chance", "temperature")


def _language(value: str | None) -> str | None:
    language = None if value is None else value.lower()
    if language is not None and not _LANGUAGE.fullmatch(language):
        raise RequestRefused("expected an ISO 639-1 code, as en, or auto", "language")
    return language
