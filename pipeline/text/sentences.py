"""Text cut into sentences and words, for any language, without data files.

What a summary ranks are sentences; a library's own splitter would need models that are fetched at run time.
"""

# ruff: noqa: RUF001  (the marks of other scripts look like ASCII ones and are meant as they are)
from __future__ import annotations

import re

# A dot, mark or ellipsis with its closing quotes and brackets, then white space. Scripts without spaces end a
# sentence at the full-width mark alone.
_BOUNDARY = re.compile(r"[.!?…؟۔।॥።]+[\"'”’»)\]]*\s+|[。！？｡]+[」』”’）]*\s*")
_ENDS_SENTENCE = re.compile(r"[.!?…؟۔।॥።。！？｡][\"'”’»)\]」』）]*$")
_LAST_TOKEN = re.compile(r"([^\W_]+)\.$")
_ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "no", "vol", "fig", "approx", "dept"}
) | {
    *(
        "gen",
        "col",
        "sgt",
        "capt",
        "rev",
        "hon",
        "bzw",
        "ca",
        "evtl",
        "ggf",
        "nr",
        "vgl",
        "sig",
        "dott",
        "avv",
        "sra",
        "mme",
    )
}
# Runs of letters and digits with inner apostrophes and hyphens ("don't", "forty-two").
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
# Scripts that write words without spaces: Thai, Lao, Myanmar, Khmer, Kana, Han, Hangul is spaced and not among them.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)

_UNSPACED_MARKS = "。！？、，：；｡「」『』（）"


def split_sentences(text: str) -> list[str]:
    """Return the sentences of `text` in order, stripped; nothing but white space is lost between them.

    A mark ends no sentence behind an initial or a common abbreviation ("Dr.", "J.") or before a small letter.
    """
    sentences: list[str] = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        head = text[start : match.end()].rstrip()
        following = text[match.end() : match.end() + 1]
        if following.islower() or _ends_in_abbreviation(head):
            continue
        sentences.append(head.lstrip())
        start = match.end()
    tail = text[start:].strip()
    return [*sentences, tail] if tail else sentences


def ends_sentence(text: str) -> bool:
    """Return whether `text` ends with the mark of a finished sentence."""
    return _ENDS_SENTENCE.search(text.rstrip()) is not None and not _ends_in_abbreviation(text.rstrip())


def joint(before: str, behind: str) -> str:
    """Return what stands between two texts said in a row: nothing where both scripts have no spaces, else one."""
    edges = before.rstrip()[-1:], behind.lstrip()[:1]
    is_unspaced = all(_UNSPACED.match(edge) or (edge and edge in _UNSPACED_MARKS) for edge in edges)
    return "" if is_unspaced else " "


def words_of(text: str) -> tuple[str, ...]:
    """Return the case-folded words of `text`; scripts written without spaces give overlapping pairs of characters.

    Pairs stand in for words in retrieval over Chinese, Japanese and Thai (Nie et al., "On the use of words and n-grams
    for Chinese information retrieval", IRAL 2000).
    """
    words: list[str] = []
    for token in _WORD.findall(text.casefold()):
        position = 0
        for run in _UNSPACED.finditer(token):
            words += [token[position : run.start()]] if run.start() > position else []
            characters = run.group()
            words += [characters[i : i + 2] for i in range(max(1, len(characters) - 1))]
            position = run.end()
        words += [token[position:]] if position < len(token) else []
    return tuple(words)


def _ends_in_abbreviation(head: str) -> bool:
    match = _LAST_TOKEN.search(head)
    if match is None:
        return False
    token = match.group(1)
    return (len(token) == 1 and token.isupper()) or token.lower() in _ABBREVIATIONS
