"""Phi-4-multimodal's tokenizer: text and special tokens, kept apart.

Special tokens come from names that this program spells out, never from text: what people say or type may spell them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.errors import ModelError
from pipeline.models.byte_level import BYTE_OF

USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
END = "<|end|>"
END_OF_TEXT = "<|endoftext|>"
PICTURE = "<|endoftext10|>"
SOUND = "<|endoftext11|>"
_NEEDED = (USER, ASSISTANT, SYSTEM, END, END_OF_TEXT, PICTURE, SOUND)
_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Phi4Tokenizer:
    """Token ids of one checkpoint. Immutable; safe to share between threads.

    Raises:
        ModelError: if `tokenizer` lacks a token that prompts need, or would read one out of text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._specials = {added.content: int(token) for token, added in tokenizer.get_added_tokens_decoder().items()}
        self._names = {token: name for name, token in self._specials.items()}
        missing = [name for name in _NEEDED if name not in self._specials]
        if missing:
            raise ModelError(f"the tokenizer has no token {', '.join(missing)}: it is not Phi-4-multimodal's")
        self.num_text_tokens = min(self._specials.values())
        """Tokens below this are text, all others are special."""
        self._tokenizer = tokenizer
        # Some of the published special tokens (<|tool|> and its like) are not marked as such, and a switch that
        # leaves special tokens alone leaves those in. A tokenizer without added tokens knows none of them.
        self._text = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._text.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._text.pre_tokenizer = tokenizer.pre_tokenizer
        self._bytes: dict[int, bytes] = {}  # of tokens seen so far
        for name in self._specials:
            if any(token >= self.num_text_tokens for token in self.encode(name)):
                raise ModelError(
                    f"the tokenizer's vocabulary of text has the special token {name}: text could spell it"
                )

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: of a turn, and of all."""
        return frozenset((self.special(END), self.special(END_OF_TEXT)))

    def special(self, name: str) -> int:
        """Return the special token `name`.

        Raises:
            ModelError: if there is none of that name.
        """
        token = self._specials.get(name)
        if token is None:
            raise ModelError(f"the tokenizer has no special token {name}")
        return token

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, all of them text: what spells a special token is spelled out."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without a character at the end of which bytes are still to come.

        Nothing else is left out: special tokens show as their names, and what is no UTF-8, or no token, as U+FFFD.
        """
        return _Utf8Decoder(errors="replace").decode(b"".join(self._bytes_of(token) for token in tokens))

    def _bytes_of(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token].encode()
        name = self._tokenizer.id_to_token(token) if token >= 0 else None
        if name is None:
            return _UNKNOWN
        return b"".join(bytes([BYTE_OF[character]]) if character in BYTE_OF else _UNKNOWN for character in name)


def load_tokenizer(directory: Path) -> Phi4Tokenizer:
    """Return the tokenizer of the checkpoint in `directory`.

    Raises:
        ModelError: if its `tokenizer.json` is missing or cannot be used.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no tokenizer.json: fetch the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception for every fault of the file
        raise ModelError(f"cannot use {path} as a tokenizer: {exc}") from exc
    return Phi4Tokenizer(tokenizer)
