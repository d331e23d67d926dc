"""The part of an open utterance that partials still look at: what is stable long enough is not heard again.

An utterance grows while somebody speaks, but its words become stable from the front. Once they have, the sound before
one of them is left out of the next partial's snapshot: what was said there stays as it was shown (`head`), and the
stable words that the window still holds are given to the decoder (`prefix`), so that a cut that hits a word's edge
neither repeats nor loses it. So a partial costs what the last seconds cost, however long the utterance is. Finals
always hear the whole utterance. Trimming at a stable word is what whisper_streaming does with its buffer (Macháček et
al. 2023, https://arxiv.org/abs/2307.14743); that the stable words are given, not only a prompt, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from pipeline.items import Hypothesis, Word
from pipeline.text.stable_prefix import split_units


@dataclass(slots=True)
class PartialWindow:
    """The window of one utterance. All samples count from the stream's start.

    `head` is the text before the window and `head_tokens` its tokens; `prefix` and `draft` are the tokens of the last
    hypothesis within the window: those that are given, and those behind.
    """

    start_sample: int
    head: str = ""
    head_tokens: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()
    _head_units: list[str] = field(default_factory=list)

    @property
    def num_head_units(self) -> int:
        """How many units lie before the window."""
        return len(self._head_units)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the whole utterance so far: the draft of its final."""
        return self.head_tokens + self.prefix + self.draft

    def whole_text(self, text: str) -> str:
        """Return the utterance's text when `text` is that of the window."""
        return f"{self.head} {text.strip()}".strip() if self.head else text.strip()

    def accept(self, hypothesis: Hypothesis) -> None:
        """Take the hypothesis for the window: its tokens behind the prefix are the next draft."""
        self.draft = hypothesis.tokens[len(self.prefix) :]

    def take_draft(self, hypothesis: Hypothesis) -> None:
        """Take the draft from a hypothesis for the whole utterance, if it begins as what is given."""
        given = self.head_tokens + self.prefix
        if hypothesis.tokens[: len(given)] == given:
            self.draft = hypothesis.tokens[len(given) :]

    def advance(self, hypothesis: Hypothesis, num_confirmed_units: int, end_sample: int, keep_samples: int) -> None:
        """Leave out the sound before the last word that begins `keep_samples` or more before `end_sample`.

        All words before it, and itself, must be stable words: the first `num_confirmed_units` units of the whole text
        are. `hypothesis` was accepted for this window, with words.
        """
        words = hypothesis.words
        units = [len(split_units(word.text)) for word in words]
        num_tokens = sum(word.num_tokens for word in words)
        if len(words) != len(split_units(hypothesis.text)) or any(count != 1 for count in units):
            return  # a script without spaces, or words that are no units: the window just grows
        if num_tokens != len(hypothesis.tokens):
            return  # nor where words do not tell their tokens
        num_stable = min(len(words), num_confirmed_units - len(self._head_units))
        latest = end_sample - keep_samples - self.start_sample
        cut = max((k for k in range(1, num_stable) if words[k].start_sample <= latest), default=0)
        if cut:
            self._cut(words, hypothesis.tokens, cut, num_stable)

    def _cut(self, words: tuple[Word, ...], tokens: tuple[int, ...], cut: int, num_stable: int) -> None:
        places = [0, *accumulate(word.num_tokens for word in words)]
        self._head_units += [word.text for word in words[:cut]]
        self.head = " ".join(self._head_units)
        self.head_tokens += tokens[: places[cut]]
        self.prefix = tokens[places[cut] : places[num_stable]]
        self.draft = tokens[places[num_stable] :]
        self.start_sample += words[cut].start_sample
