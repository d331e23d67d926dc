"""How many live streams a processor holds, from the speed of its parts. Plain arithmetic: docs/capacity.md walks it."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_PER_S = 12.5
"""Decoder tokens of one second of sound: one in 80 ms."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one live stream asks for.

    While somebody speaks (`speech_share` of the time) a partial is asked for every `cadence_s`. On average it covers
    `window_s` of sound; its prompt has the tokens of that sound, `num_instruction_tokens` and the draft of
    `num_draft_tokens`, and `num_new_tokens` passes of a single token follow. An utterance of `utterance_s` has one
    final more. With video a scene of `num_crops` crops is described every `scene_s`, in `num_scene_tokens` of text.
    """

    speech_share: float = 0.6
    cadence_s: float = 0.64
    window_s: float = 5.0
    num_instruction_tokens: int = 12
    num_draft_tokens: int = 18
    num_new_tokens: float = 4.0
    utterance_s: float = 6.0
    scene_s: float = 10.0
    num_crops: int = 7  # 1280 x 720: a grid of 3 x 2, and the whole
    num_picture_tokens: int = 1_596
    num_scene_tokens: int = 60

    @property
    def snapshots_per_s(self) -> float:
        """Partials and finals a second of the stream."""
        return self.speech_share * (1 / self.cadence_s + 1 / self.utterance_s)

    @property
    def num_prompt_tokens(self) -> float:
        """Tokens that a snapshot's first pass is fed."""
        return self.window_s * TOKENS_PER_S + self.num_instruction_tokens + self.num_draft_tokens


@dataclass(frozen=True, slots=True)
class Speeds:
    """What the parts do, each as if it had the processor for itself."""

    encoder_s_per_audio_s: float
    crops_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Projection:
    """Seconds of the processor that one second of a stream costs, by part, and how many streams that makes."""

    encoder_s: float
    prefill_s: float
    decode_s: float
    scenes_s: float
    usable_share: float

    @property
    def num_streams(self) -> float:
        """Streams with sound alone."""
        return self.usable_share / (self.encoder_s + self.prefill_s + self.decode_s)

    @property
    def num_streams_with_video(self) -> float:
        """Streams whose scenes are described too."""
        return self.usable_share / (self.encoder_s + self.prefill_s + self.decode_s + self.scenes_s)


def project(speeds: Speeds, load: Load | None = None, *, usable_share: float = 0.7) -> Projection:
    """Return what a stream of `load` costs; new streams are refused above `usable_share` of the processor."""
    load = load or Load()
    rate = load.snapshots_per_s
    scene_s = load.num_crops / speeds.crops_per_s
    scene_s += (load.num_picture_tokens + load.num_instruction_tokens) / speeds.prefill_tokens_per_s
    scene_s += load.num_scene_tokens / speeds.decode_tokens_per_s
    return Projection(
        encoder_s=rate * load.window_s * speeds.encoder_s_per_audio_s,
        prefill_s=rate * load.num_prompt_tokens / speeds.prefill_tokens_per_s,
        decode_s=rate * load.num_new_tokens / speeds.decode_tokens_per_s,
        scenes_s=scene_s / load.scene_s,
        usable_share=usable_share,
    )
