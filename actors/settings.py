"""The configuration: every value of the service, where it came from, and what is wrong with it.

Precedence, lowest first: the defaults in the code, a file (`configs/NAME.yaml`, by name or path), the environment
(`SURTITLE_SECTION__KEY`), flags (`--set section.key=value` and the flags that stand for one key). Sections are the
parameter models of the stages; they are documented where the stages are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError

from actors.dispatch import DispatchParams
from actors.job_queue import JobParams
from actors.service_params import RayParams, ServiceParams
from actors.settings_layers import (
    CONFIG_VARIABLE,
    Override,
    from_environment,
    from_file,
    from_overrides,
    resolve_config,
)
from actors.settings_problems import Given, Problem, check_keys, explain, leaves_of
from actors.store import RedisParams, public_address
from ingest.source import AudioParams
from pipeline.audio.chunks_to_utterances import VadParams
from pipeline.audio.encoder_window import EncoderParams
from pipeline.decode.embeddings_to_hypotheses import DecoderParams
from pipeline.errors import ConfigError
from pipeline.models.weights import ModelParams
from pipeline.params import Params
from pipeline.stream_params import CaptionParams, SnapshotParams, StreamParams
from pipeline.text.skipped_speech import SkippedSpeechParams
from pipeline.text.transcripts_to_summaries import SummaryParams
from pipeline.vision.params import SceneParams, VisionParams

DEFAULT_CONFIG = "edge"


class Settings(Params):
    """Everything that can be configured. One section a stage; `null` switches an optional section off."""

    runtime: Literal["ray", "local"] = Field(
        default="ray", description="ray: stages as Serve deployments; local: in this process, for small devices"
    )
    model: ModelParams = ModelParams()
    audio: AudioParams = AudioParams()
    vad: VadParams = VadParams()
    snapshots: SnapshotParams = SnapshotParams()
    captions: CaptionParams = CaptionParams()
    skipped_speech: SkippedSpeechParams = SkippedSpeechParams()
    summary: SummaryParams | None = Field(default=None, description="null: no summaries")
    scenes: SceneParams | None = Field(default=None, description="null: pictures are not looked at")
    encoder: EncoderParams = EncoderParams()
    vision: VisionParams = VisionParams()
    decoder: DecoderParams = DecoderParams()
    dispatch: DispatchParams = DispatchParams()
    jobs: JobParams = JobParams()
    redis: RedisParams = RedisParams()
    service: ServiceParams = ServiceParams()
    ray: RayParams = RayParams()

    def stream_params(self) -> StreamParams:
        """Return the parameters that a stream has unless its specification says otherwise."""
        return StreamParams(
            vad=self.vad,
            snapshots=self.snapshots,
            captions=self.captions,
            skipped_speech=self.skipped_speech,
            summary=self.summary,
            scenes=self.scenes,
        )


@dataclass(frozen=True, slots=True)
class EffectiveValue:
    """One line of `surtitle config show`."""

    key: str
    value: str
    origin: str
    description: str


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings and, for every key that was given, by what."""

    settings: Settings
    origins: Mapping[str, str]

    def effective_values(self) -> list[EffectiveValue]:
        """Return every key with its value (secrets hidden), origin and meaning, in the order of the sections."""
        return [
            EffectiveValue(key, _shown(key, value), self.origins.get(key, "default"), description)
            for key, value, description in leaves_of(self.settings)
        ]


def load_settings(
    config: str | None = None,
    overrides: Iterable[Override] = (),
    environ: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Return the settings of `config` (a name in configs/ or a path; None: $SURTITLE_CONFIG, or `edge`).

    Raises:
        ConfigError: naming file, environment variable or flag, the key, the value and the fix.
    """
    environ = os.environ if environ is None else environ
    name = config or environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG
    given = {item.key: item for item in from_file(resolve_config(name), Settings)}
    for item in [*from_environment(environ, Settings), *from_overrides(overrides, Settings)]:
        # A later layer that gives a whole section replaces what earlier ones said about its keys.
        given = {key: old for key, old in given.items() if not key.startswith(f"{item.key}.")} | {item.key: item}
    settings, problems = _validate(given)
    if settings is None:
        more = f" (and {len(problems) - 1} more; see `surtitle config check`)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}")
    return LoadedSettings(settings, {key: item.origin for key, item in given.items()})


def check_config(name: str) -> list[Problem]:
    """Return all that is wrong with configuration file `name` (a name in configs/ or a path).

    Raises:
        ConfigError: if it cannot be read at all or is not YAML.
    """
    _, problems = _validate({item.key: item for item in from_file(resolve_config(name), Settings)})
    return problems


def _validate(given: Mapping[str, Given]) -> tuple[Settings | None, list[Problem]]:
    problems = check_keys(given.values(), Settings)
    if problems:
        return None, problems
    values: dict[str, Any] = {}
    for item in given.values():
        *sections, key = item.key.split(".")
        target = values
        for section in sections:
            inner = target.get(section)
            if not isinstance(inner, dict):
                inner = target[section] = {}
            target = inner
        target[key] = item.value
    try:
        return Settings.model_validate(values), []
    except ValidationError as exc:
        return None, explain(exc, given, Settings)


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, SecretStr):
        return "(hidden)"
    if key == "redis.url":
        return public_address(str(value))
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
