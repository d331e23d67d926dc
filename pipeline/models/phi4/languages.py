"""Languages of Phi-4-multimodal, and which of them it translates between.

Lists: model card (https://huggingface.co/microsoft/Phi-4-multimodal-instruct) and technical report
(https://arxiv.org/abs/2503.01743): 23 languages of text, 8 of sound; pictures are asked about in English. Directions:
those of the report's translation tables, from each of the seven others to English and from English to each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Language:
    """One language of the model: its English name as prompts say it, and where besides text the model was taught it."""

    name: str
    is_heard: bool = False
    is_asked_about_pictures: bool = False


ENGLISH = "en"
LANGUAGES: dict[str, Language] = {
    "ar": Language("Arabic"),
    "zh": Language("Chinese", is_heard=True),
    "cs": Language("Czech"),
    "da": Language("Danish"),
    "nl": Language("Dutch"),
    "en": Language("English", is_heard=True, is_asked_about_pictures=True),
    "fi": Language("Finnish"),
    "fr": Language("French", is_heard=True),
    "de": Language("German", is_heard=True),
    "he": Language("Hebrew"),
    "hu": Language("Hungarian"),
    "it": Language("Italian", is_heard=True),
    "ja": Language("Japanese", is_heard=True),
    "ko": Language("Korean"),
    "no": Language("Norwegian"),
    "pl": Language("Polish"),
    "pt": Language("Portuguese", is_heard=True),
    "ru": Language("Russian"),
    "es": Language("Spanish", is_heard=True),
    "sv": Language("Swedish"),
    "th": Language("Thai"),
    "tr": Language("Turkish"),
    "uk": Language("Ukrainian"),
}
"""The languages of text by ISO 639-1 code, in the report's order."""

HEARD = ("en", "zh", "de", "fr", "it", "ja", "es", "pt")
"""Languages of sound, in the model card's order. They are also those that sound is translated between."""


def check_translation(source: str | None, target: str) -> None:
    """Check that sound in `source` can be translated to `target`; a source of None is not known beforehand.

    Raises:
        ConfigError: if the model was not taught the direction; the message names those that it was.
    """
    can = ", ".join(HEARD)
    if target not in HEARD:
        raise ConfigError(f"the model does not translate sound to {target!r}, only to {can}")
    if source is None:
        return
    if source not in HEARD:
        raise ConfigError(f"language {source!r} is not one that the model hears: {can}")
    if source != target and ENGLISH not in {source, target}:
        raise ConfigError(
            f"the model does not translate from {source!r} to {target!r}, only to and from English: choose 'en'"
        )
