"""What is refused before anything is begun: what the models that answer cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.items import TaskKind
from pipeline.models.phi4.languages import check_translation
from pipeline.stream_params import AUTO, StreamParams

if TYPE_CHECKING:
    from actors.stages import StagesInfo


def check_stream(params: StreamParams, info: StagesInfo) -> None:
    """Refuse what a stream asks for and `info`'s models cannot do, before anything is published.

    Raises:
        ConfigError: naming what was asked for and what is possible.
    """
    check_languages(params, info)
    if params.scenes is not None:
        if info.eyes is None:
            raise ConfigError(
                f"scenes were asked for, but {_models(info)} has no eyes: use a model of tier phi4, or no scenes"
            )
        check_task(TaskKind.DESCRIBE, info)
    if params.summary is not None and params.summary.method == "generated":
        check_task(TaskKind.SUMMARISE, info, instead="set summary.method to extractive")


def check_languages(params: StreamParams, info: StagesInfo) -> None:
    """Refuse languages that the models do not know, and pairs that they do not translate.

    Raises:
        ConfigError: naming the language and what is possible.
    """
    captions = params.captions
    asked = [*captions.languages, *([] if captions.language == AUTO else [captions.language])]
    for language in asked:
        if language not in info.languages:
            raise ConfigError(
                f"language {language!r} is not one that {info.model} transcribes; "
                f"use auto or one of: {', '.join(info.languages)}"
            )
    for language in captions.translate_to:
        if language not in info.translates_to:
            raise ConfigError(
                f"{info.model} does not translate to {language!r}; it translates to: {', '.join(info.translates_to)}"
            )
    if info.tier == "phi4":
        for language in captions.translate_to:
            check_translation(None if captions.language == AUTO else captions.language, language)


def check_task(kind: TaskKind, info: StagesInfo, *, instead: str = "") -> None:
    """Refuse a kind of job that the models do not do.

    Raises:
        ConfigError: naming tier and model. `instead` is another way out.
    """
    if kind not in info.tasks:
        way_out = f", or {instead}" if instead else ""
        raise ConfigError(f"{_models(info)} cannot {kind.value}: use a model of tier phi4{way_out}")


def _models(info: StagesInfo) -> str:
    return f"tier {info.tier} ({info.model})"
