"""Which sentences of a text stand for it. Importing this module costs half a second (sumy imports NLTK's code).

sumy's Reduction ranks them: the sentences that share most words with the others, in the graph of TextRank (Mihalcea and
Tarau, "TextRank: Bringing Order into Texts", EMNLP 2004) ranked by weighted degree. sumy's own TextRank gives every
sentence an edge to itself, so that "good morning" outranks what a meeting is about; its LexRank divides by a zero norm
when no two sentences share a word, and adds floats in the order of hashed sets, so that two processes may choose
differently. NLTK's data files, which would have to be fetched, are for sumy's tokenizers only: words come from
`pipeline.text.sentences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence
from sumy.summarizers.reduction import ReductionSummarizer
from sumy.utils import get_stop_words

from pipeline.text.sentences import words_of


class _UnicodeWords:
    """What sumy asks of a tokenizer."""

    def to_words(self, text: str) -> tuple[str, ...]:
        return words_of(text)


def choose_central(sentences: Sequence[str], count: int, language: str) -> list[int]:
    """Return the indices of the `count` most central of `sentences`, in ascending order.

    Of sentences with the same words only the first is eligible. Ties go to the earlier one. Words of `language`
    (ISO 639-1) that say nothing of a subject do not count, where sumy ships their list. The cost grows with the square
    of the number of sentences: about 60 ms for 80 of common length.
    """
    distinct: dict[tuple[str, ...], int] = {}
    for index, text in enumerate(sentences):
        distinct.setdefault(words_of(text), index)
    if len(distinct) <= count:
        return list(distinct.values())
    tokenizer = _UnicodeWords()
    # sumy's sentences are equal when their texts are; texts differ here, since their words do.
    indices = {Sentence(sentences[index], tokenizer): index for index in distinct.values()}
    summarizer = ReductionSummarizer()
    summarizer.stop_words = _stop_words(language)
    return [indices[sentence] for sentence in summarizer(ObjectDocumentModel([Paragraph(indices)]), count)]


@lru_cache(maxsize=16)
def _stop_words(language: str) -> frozenset[str]:
    if not (language.isascii() and language.isalpha()):
        return frozenset()
    try:
        return frozenset(get_stop_words(language))
    except LookupError:
        return frozenset()
