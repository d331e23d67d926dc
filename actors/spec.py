"""What somebody asks for when a stream is started, and what is known of a stream afterwards."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints

from pipeline.params import Params
from pipeline.stream_params import StreamParams
from pipeline.text.transcripts_to_summaries import SummaryParams
from pipeline.vision.params import SceneParams

Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]

StreamState = Literal["opening", "live", "closing", "ended", "failed"]


class StreamSpec(Params):
    """A stream to start. What is not given is as in the configuration."""

    source: str = Field(min_length=1, max_length=4_096, repr=False, description="path of the media file")
    stream_id: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$", description="id of the stream; none: made from name and time"
    )
    pace: Literal["realtime", "fast"] = Field(
        default="realtime", description="realtime: as fast as it would sound; fast: as fast as it can be heard"
    )
    language: Literal["auto"] | Language | None = Field(
        default=None, description="ISO 639-1 code of the speech, or auto"
    )
    languages: tuple[Language, ...] | None = Field(
        default=None, max_length=100, description="the only languages that auto may choose"
    )
    translate_to: tuple[Language, ...] | None = Field(
        default=None, max_length=100, description="languages every final is translated to"
    )
    summary_minutes: float | None = Field(
        default=None, ge=0, le=1_440, description="media time between two summaries, in minutes; 0: no summaries"
    )
    has_scenes: bool | None = Field(
        default=None, description="look at the video and say what it shows when that changes (tier phi4)"
    )
    has_partials: bool | None = Field(default=None, description="publish revisable partials")
    channels: Literal["mix", "split"] | None = Field(
        default=None, description="mix: one channel of utterances for all; split: each channel has its own"
    )
    scheduling: Literal["by_time", "by_sample"] = Field(
        default="by_time",
        description="when partials are taken; by_sample: every one is answered before more is heard (reproducible)",
    )

    def stream_params(self, configured: StreamParams) -> StreamParams:
        """Return `configured` with what this asks for.

        Raises:
            pydantic.ValidationError: if the two do not go together.
        """
        captions = {
            name: value
            for name in ("language", "languages", "translate_to", "has_partials")
            if (value := getattr(self, name)) is not None
        }
        values = configured.model_dump()
        values["captions"] |= captions
        if self.summary_minutes is not None:
            summary = configured.summary or SummaryParams()
            values["summary"] = (
                summary.model_dump() | {"every_minutes": self.summary_minutes} if self.summary_minutes else None
            )
        if self.has_scenes is not None:
            values["scenes"] = (configured.scenes or SceneParams()).model_dump() if self.has_scenes else None
        return StreamParams.model_validate(values)


class StreamStatus(Params):
    """What the gateway knows of a stream that it runs or ran."""

    stream_id: str
    state: StreamState
    message: str = Field(default="", description="why it failed, if it did")
    started_at: str = Field(description="UTC, ISO 8601")
    ended_at: str | None = None
    has_heard_all: bool = Field(default=False, description="whether its media was heard to its end")


def make_stream_id(source: str) -> str:
    """Return a new stream id: the end of the source's name, for people, the time, and four random bytes.

    Of a URL only the path is used: its authority may hold a password, its query a key.
    """
    path = urlsplit(source).path if "://" in source else source
    name = path.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:24].lower() or "stream"
    return f"{readable}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
