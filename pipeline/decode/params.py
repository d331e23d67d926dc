"""Parameters of the shared decoder."""

from __future__ import annotations

from pydantic import Field

from pipeline.decode.guards import GuardParams
from pipeline.decode.scheduler import SchedulerParams
from pipeline.params import Params


class DecoderParams(Params):
    """Parameters of the shared decoder."""

    scheduler: SchedulerParams = SchedulerParams()
    guards: GuardParams = GuardParams()
    slot_tokens: int = Field(
        default=4_096,
        ge=512,
        le=131_072,
        description="phi4: room of a slot for prompt (sound and pictures too) and text, 128 KiB a token in bfloat16; "
        "512 hold 30 s of sound",
    )
    chains_translations: bool = Field(
        default=True, description="phi4: translate behind the transcript, which is better than from the sound alone"
    )
    max_description_tokens: int = Field(default=96, ge=8, le=4_096, description="text tokens of a scene, at most")
    max_summary_tokens: int = Field(default=256, ge=8, le=4_096, description="text tokens of a summary, at most")
    max_answer_tokens: int = Field(default=256, ge=8, le=4_096, description="text tokens of an answer, at most")
