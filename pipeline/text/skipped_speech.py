"""Speech that a final passes over, found by its word times, and how a second look at it is put in.

Greedy decoding of a long utterance sometimes ends early or steps over a sentence, mostly where another voice begins. No
probability tells: what is there is right. But the attention that gives word times must go somewhere, so the skipped
speech shows as a tail without words, a hole between two words, or one word of several seconds (docs/decisions/0007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from pipeline.items import Hypothesis, Word
from pipeline.params import Params
from pipeline.text.stable_prefix import normalise_unit, split_units
from pipeline.timebase import ms_to_samples


class SkippedSpeechParams(Params):
    """When a final is looked at a second time."""

    max_looks: int = Field(default=4, ge=0, le=8, description="stretches of one final decoded again, at most; 0: none")
    min_hole_ms: int = Field(
        default=1_200, ge=500, le=15_000, description="speech without a word, between two or behind the last"
    )
    min_word_ms: int = Field(default=2_000, ge=1_000, le=15_000, description="a word that takes longer hides others")
    shortened_by_ms: int = Field(
        default=800, ge=100, le=5_000, description="end of a stretch left out when a look at all of it found nothing"
    )
    margin_ms: int = Field(default=200, ge=0, le=1_000, description="sound taken along on both sides of a stretch")
    min_logprob: float = Field(
        default=-0.6, le=0.0, description="average log-probability below which the second look is not believed"
    )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Samples of an utterance (from its start) that words are missing in.

    `first` and `last` say where: words[first:last] lie within, unless `last` is `first`: then nothing does. With
    `is_shortened` the end of the stretch is left out, because the words there drew all attention at the first look.
    """

    start_sample: int
    end_sample: int
    first: int
    last: int
    is_shortened: bool = False

    @property
    def is_hole(self) -> bool:
        """Whether no word lies within."""
        return self.first == self.last


def find_skipped(words: Sequence[Word], speech_end_sample: int, params: SkippedSpeechParams) -> list[Stretch]:
    """Return the stretches of an utterance in which words seem to be missing, in order."""
    min_hole, min_word = ms_to_samples(params.min_hole_ms), ms_to_samples(params.min_word_ms)
    found: list[Stretch] = []
    for index, word in enumerate(words):
        length = word.end_sample - word.start_sample
        before = found[-1] if found else None
        if before is not None and not before.is_hole and before.last == index and length >= min_hole:
            # The next word is long as well: what is missing began before it and goes on behind it.
            found[-1] = Stretch(before.start_sample, word.end_sample, before.first, index + 1)
        elif length >= min_word:
            found.append(Stretch(word.start_sample, word.end_sample, index, index + 1))
        end_sample = words[index + 1].start_sample if index + 1 < len(words) else speech_end_sample
        if end_sample - word.end_sample >= min_hole:
            found.append(Stretch(word.end_sample, end_sample, index + 1, index + 1))
    return found


def num_units_before_skipped(hypothesis: Hypothesis, speech_end_sample: int, params: SkippedSpeechParams) -> int | None:
    """Return how many units of the text stand before the first stretch in which words seem to be missing.

    None if there is no such stretch behind which a word stands, or nothing is known because no word has a time.
    """
    skipped = find_skipped(hypothesis.words, speech_end_sample, params)
    if not skipped or skipped[0].first == len(hypothesis.words):
        return None
    joint = _joint(hypothesis)
    return (
        0 if joint is None else len(split_units(joint.join(word.text for word in hypothesis.words[: skipped[0].first])))
    )


def shortened(stretch: Stretch, params: SkippedSpeechParams) -> Stretch | None:
    """Return `stretch` without its end, for another look, or None if that would leave too little."""
    end_sample = stretch.end_sample - ms_to_samples(params.shortened_by_ms)
    if stretch.is_hole or stretch.is_shortened or end_sample - stretch.start_sample < ms_to_samples(params.min_hole_ms):
        return None
    return replace(stretch, end_sample=end_sample, is_shortened=True)


def put_in(final: Hypothesis, look: Hypothesis, stretch: Stretch, offset_samples: int) -> Hypothesis | None:
    """Return `final` with the words that a second look at `stretch` found, or None if it found none that fit.

    `look` heard the sound from sample `offset_samples` of the utterance on.
    """
    joint = _joint(final)
    if joint is None or look.guard is not None:
        return None
    before, behind = final.words[: stretch.first], final.words[stretch.last :]
    within = final.words[stretch.first : stretch.last]
    moved = [
        replace(word, start_sample=word.start_sample + offset_samples, end_sample=word.end_sample + offset_samples)
        for word in look.words
    ]
    num_again = _num_overlapping(moved, behind)
    hidden_by = {normalise_unit(word.text) for word in within}
    if num_again > 1 and hidden_by <= {normalise_unit(word.text) for word in moved}:
        # An earlier look put that sentence in without room for it; this one heard where it was said.
        behind = behind[num_again:]
    inner = _merge(_without_neighbours(moved, before, behind), within, stretch)
    if inner is None:
        return None
    words = (*before, *_placed(inner, before[-1].end_sample if before else 0, behind), *behind)
    num_tokens = len(final.tokens) + len(look.tokens)
    logprob = final.average_logprob * len(final.tokens) + look.average_logprob * len(look.tokens)
    return replace(
        final,
        text=joint.join(word.text for word in words),
        words=words,
        average_logprob=logprob / max(1, num_tokens),
        num_passes=final.num_passes + look.num_passes,
    )


def _merge(found: list[Word], within: Sequence[Word], stretch: Stretch) -> list[Word] | None:
    """Return the words of a stretch, out of those found and those that were there; None if nothing is new."""
    if stretch.is_hole:
        return found or None
    if len(found) < 2:
        return None
    heard = [normalise_unit(word.text) for word in found]
    hidden_by = [normalise_unit(word.text) for word in within]
    if not stretch.is_shortened and all(word in heard for word in hidden_by):
        return found if len(found) > len(within) else None
    if heard[-1] == hidden_by[0]:
        found = found[:-1]
    if len(within) > 1:
        return [within[0], *found, *within[1:]]
    # A sentence that was stepped over stands in front of the word that begins the next one.
    return [*found, *within] if stretch.is_shortened or within[0].text[:1].isupper() else [*within, *found]


def _joint(final: Hypothesis) -> str | None:
    """Return what stands between the words of the text, or None if the text is not its words in a row."""
    texts = [word.text for word in final.words]
    return next((joint for joint in (" ", "") if joint.join(texts) == final.text), None)


def _without_neighbours(found: Sequence[Word], before: Sequence[Word], behind: Sequence[Word]) -> list[Word]:
    """Return `found` without what stands before the stretch and behind it already, as margins let it in."""
    words = list(found)
    words = words[_num_overlapping(before, words) :]
    return words[: len(words) - _num_overlapping(words, behind)]


def _num_overlapping(first: Sequence[Word], second: Sequence[Word]) -> int:
    """Return how many words at the end of `first` are those at the start of `second`, at most."""
    left, right = [[normalise_unit(word.text) for word in words] for words in (first, second)]
    longest = min(len(left), len(right))
    return next((count for count in range(longest, 0, -1) if left[-count:] == right[:count]), 0)


def _placed(words: Sequence[Word], floor: int, behind: Sequence[Word]) -> list[Word]:
    """Return `words` with times in order, between `floor` and the word behind."""
    ceiling = behind[0].start_sample if behind else None
    placed: list[Word] = []
    for word in words:
        start, end = max(word.start_sample, floor), max(word.end_sample, floor)
        if ceiling is not None:
            start, end = min(start, ceiling), min(end, ceiling)
        placed.append(replace(word, start_sample=start, end_sample=end))
        floor = end
    return placed
