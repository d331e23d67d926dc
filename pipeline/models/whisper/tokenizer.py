"""Whisper's tokenizer: text, special tokens, languages, and the words that tokens make.

Splitting into words and merging punctuation follow OpenAI's `whisper/tokenizer.py` and `whisper/timing.py`, with these
differences: no token is ever left out (OpenAI's drops an unfinished character at the end), a token of several marks
("),") is treated like one of a single mark, and in languages with spaces only a space starts a word ("12.50", "e-mail";
OpenAI's gives "12" and ".50").
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from pipeline.errors import ModelError
from pipeline.models.byte_level import BYTE_OF
from pipeline.models.weights import ModelFiles, ModelParams, check_hashes, locate_model, read_json

_LANGUAGE_TOKEN = re.compile(r"<\|([a-z]{2,3})\|>")
_UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_PREPENDED = frozenset("\"'“¿([{-")
_APPENDED = frozenset("\"'.。,，!！?？:：”)]}、")  # noqa: RUF001 - the full-width marks are meant
_MARKS = _PREPENDED | _APPENDED
_Group = tuple[str, list[int]]  # text of whole characters, and the indices of the tokens that make it
# Whisper says jw for Javanese; ISO 639-1 says jv.
_ISO_OF_WHISPER = {"jw": "jv"}
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
# GPT-2's vocabulary, which English-only models keep, ends here; the multilingual one has one token more.
_ENGLISH_ONLY_EOT = 50_256


@dataclass(frozen=True, slots=True)
class WordTokens:
    """One word and where its tokens are in the sequence that was split.

    `text` has the leading space that the tokens have. `timed_indices` are the tokens of the word without merged
    punctuation: those give it its times, as in OpenAI's `merge_punctuations`.
    """

    text: str
    token_indices: tuple[int, ...]
    timed_indices: tuple[int, ...]


class WhisperTokenizer:
    """Token ids of one checkpoint. Immutable; safe to share between threads.

    Raises:
        ModelError: if `tokenizer` lacks one of Whisper's special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Text that spells a special token is text: it comes from people, not from us.
        tokenizer.encode_special_tokens = True
        self._bytes: dict[int, bytes] = {}  # of tokens seen so far
        self.sot = self._special("<|startoftranscript|>")
        self.eot = self._special("<|endoftext|>")
        self.transcribe = self._special("<|transcribe|>")
        self.translate = self._special("<|translate|>")
        self.no_speech = self._special("<|nospeech|>", "<|nocaptions|>")
        self.no_timestamps = self._special("<|notimestamps|>")
        self.timestamp_begin = self.no_timestamps + 1
        self.is_multilingual = self.eot != _ENGLISH_ONLY_EOT
        self._token_of_language = self._languages() if self.is_multilingual else {}
        self._language_of_token = {token: language for language, token in self._token_of_language.items()}

    @property
    def languages(self) -> tuple[str, ...]:
        """ISO codes of the languages, in the order of their tokens; ("en",) for an English-only model."""
        return tuple(self._token_of_language) or ("en",)

    @property
    def language_tokens(self) -> tuple[int, ...]:
        """The languages' tokens in ascending order; empty for an English-only model."""
        return tuple(self._language_of_token)

    def language_token(self, language: str) -> int:
        """Return the token of ISO code `language`.

        Raises:
            ValueError: if the model does not know the language.
        """
        token = self._token_of_language.get(_ISO_OF_WHISPER.get(language, language))
        if token is None:
            raise ValueError(f"language {language!r} is not one of this model's: {', '.join(self.languages)}")
        return token

    def language_of(self, token: int) -> str:
        """Return the ISO code of language token `token`.

        Raises:
            ValueError: if it is not a language token.
        """
        if token not in self._language_of_token:
            raise ValueError(f"token {token} is not a language token")
        return self._language_of_token[token]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without special tokens around them; `text` itself is never read as one."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`; special and timestamp tokens give none, broken characters give U+FFFD."""
        text = b"".join(self._bytes_of(token) for token in tokens if token < self.eot)
        return text.decode("utf-8", errors="replace")

    def split_to_words(self, tokens: Sequence[int], language: str) -> list[WordTokens]:
        """Return the words that `tokens` make, punctuation merged into its word.

        The words' texts joined are the decoded text, and every text token's index is in exactly one word; special
        tokens (from end-of-text upwards) are in none.
        """
        characters = self._split_on_characters(tokens)
        if language in _UNSPACED_LANGUAGES:
            return merge_punctuation([_word([group]) for group in characters])
        words: list[list[_Group]] = []
        for group in characters:
            if words and not group[0].startswith(" "):
                words[-1].append(group)
            else:
                words.append([group])
        return merge_punctuation([_word(groups) for groups in words])

    def _split_on_characters(self, tokens: Sequence[int]) -> list[_Group]:
        """Group the tokens so that no character is cut: a group is one token, or those that share characters."""
        decoder = _Utf8Decoder(errors="replace")
        groups: list[_Group] = []
        text, pending = "", []
        for index, token in enumerate(tokens):
            if token >= self.eot:
                continue
            text += decoder.decode(self._bytes_of(token))
            pending.append(index)
            if not decoder.getstate()[0]:
                groups.append((text, pending))
                text, pending = "", []
        if pending:
            text += decoder.decode(b"", final=True)
            groups.append((text, pending))
        return groups

    def _bytes_of(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            name = self._tokenizer.id_to_token(token) or ""
            known = self._bytes[token] = bytes(BYTE_OF[character] for character in name if character in BYTE_OF)
        return known

    def _special(self, *names: str) -> int:
        for name in names:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return int(token)
        raise ModelError(f"the tokenizer has no token {names[0]}: it is not Whisper's")

    def _languages(self) -> dict[str, int]:
        """Return ISO code -> token, in the order of the tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        found = {}
        for token in sorted(added):
            match = _LANGUAGE_TOKEN.fullmatch(added[token].content)
            if match is not None:
                found[_ISO_OF_WHISPER.get(match[1], match[1])] = int(token)
        if not found:
            raise ModelError("the tokenizer has no language tokens: it is not a multilingual Whisper's")
        return found


def merge_punctuation(words: Sequence[WordTokens]) -> list[WordTokens]:
    """Return `words` with opening marks joined to the word behind and closing marks to the word before them."""
    result = list(words)
    behind = len(result) - 1
    for index in range(len(result) - 2, -1, -1):
        mark = result[index]
        if mark.text.startswith(" ") and _PREPENDED.issuperset(mark.text.strip()):
            word = result[behind]
            result[behind] = WordTokens(
                mark.text + word.text, mark.token_indices + word.token_indices, word.timed_indices
            )
            del result[index]
            behind -= 1
        else:
            behind = index
    merged: list[WordTokens] = []
    for word in result:
        if merged and not merged[-1].text.endswith(" ") and _APPENDED.issuperset(word.text):
            last = merged.pop()
            merged.append(
                WordTokens(last.text + word.text, last.token_indices + word.token_indices, last.timed_indices)
            )
        else:
            merged.append(word)
    return merged


def _word(groups: Sequence[_Group]) -> WordTokens:
    """Return the word that `groups` make; the marks at its ends do not count for its times."""
    first, last = 0, len(groups)
    while first < last and _MARKS.issuperset(groups[first][0].strip()):
        first += 1
    while first < last and _MARKS.issuperset(groups[last - 1][0].strip()):
        last -= 1
    inside = groups[first:last] or groups  # a word of marks only has their times
    return WordTokens("".join(text for text, _ in groups), _indices_of(groups), _indices_of(inside))


def _indices_of(groups: Sequence[_Group]) -> tuple[int, ...]:
    return tuple(index for _, indices in groups for index in indices)


def load_tokenizer(model: ModelParams) -> WhisperTokenizer:
    """Return the tokenizer of `model`, its files checked.

    Raises:
        WeightsHashError: if a pinned file is not the right one.
        ModelError: if the model is missing or its tokenizer cannot be used.
    """
    files = locate_model(model.name, model.revision)
    if files.tokenizer in files.pins:
        # Only what is read here is checked here; the weights are checked by who reads them.
        check_hashes(replace(files, pins={files.tokenizer: files.pins[files.tokenizer]}))
    return WhisperTokenizer(_from_json(files.tokenizer) if files.tokenizer is not None else _from_vocabulary(files))


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception for every fault of the file
        raise ModelError(f"cannot use {path} as a tokenizer: {exc}") from exc


def _from_vocabulary(files: ModelFiles) -> Tokenizer:
    """Build the tokenizer of a checkpoint that has vocab.json and merges.txt only."""
    vocabulary, merges = files.directory / "vocab.json", files.directory / "merges.txt"
    try:
        tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    except Exception as exc:  # the library raises bare Exception for every fault of the files
        raise ModelError(f"cannot use {vocabulary} and {merges} as a tokenizer: {exc}") from exc
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    specials = _added_tokens(files.directory)
    for content, token in specials:
        # Ids are given in the order of adding, so a list with holes would shift all that follow.
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        if tokenizer.token_to_id(content) != token:
            raise ModelError(f"{files.directory}: token {content!r} should be {token}; its added tokens have holes")
    return tokenizer


def _added_tokens(directory: Path) -> list[tuple[str, int]]:
    """Return the added tokens and their ids in ascending order, from whichever file lists them."""
    found: list[tuple[str, int]] = []
    if (directory / "added_tokens.json").is_file():
        for content, token in read_json(directory / "added_tokens.json").items():
            if isinstance(token, int):
                found.append((content, token))
    elif (directory / "tokenizer_config.json").is_file():
        entries: Any = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder")
        for token, entry in entries.items() if isinstance(entries, dict) else ():
            if str(token).isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
                found.append((entry["content"], int(token)))
    if not found:
        raise ModelError(f"{directory} lists no added tokens: neither tokenizer.json, added_tokens.json nor its config")
    return sorted(found, key=lambda item: item[1])
