from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import WhisperTokenizerFast

from pipeline.errors import ModelError, WeightsHashError
from pipeline.models.known import WHISPER_BASE
from pipeline.models.weights import ModelParams, locate_model
from pipeline.models.whisper.tokenizer import WhisperTokenizer, WordTokens, load_tokenizer, merge_punctuation


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return load_tokenizer(ModelParams())


def tokenizer_file() -> Path:
    path = locate_model("whisper-base").tokenizer
    assert path is not None
    return path


@pytest.fixture(scope="module")
def library() -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file()))


def test_special_tokens_are_whispers(tokenizer: WhisperTokenizer) -> None:
    # OpenAI's multilingual vocabulary (whisper/tokenizer.py).
    assert (tokenizer.eot, tokenizer.sot) == (50_257, 50_258)
    assert (tokenizer.translate, tokenizer.transcribe) == (50_358, 50_359)
    assert tokenizer.no_speech == 50_362
    assert (tokenizer.no_timestamps, tokenizer.timestamp_begin) == (50_363, 50_364)
    assert tokenizer.is_multilingual


def test_languages_are_in_the_order_of_their_tokens(tokenizer: WhisperTokenizer) -> None:
    assert len(tokenizer.languages) == 99
    assert tokenizer.languages[:5] == ("en", "zh", "de", "es", "ru")
    assert tokenizer.language_tokens == tuple(range(50_259, 50_358))
    for language, token in zip(tokenizer.languages, tokenizer.language_tokens, strict=True):
        assert tokenizer.language_token(language) == token
        assert tokenizer.language_of(token) == language


def test_javanese_has_its_iso_code_and_whispers_own(tokenizer: WhisperTokenizer) -> None:
    assert "jv" in tokenizer.languages
    assert "jw" not in tokenizer.languages
    assert tokenizer.language_token("jw") == tokenizer.language_token("jv") == 50_356


def test_an_unknown_language_or_token_is_refused(tokenizer: WhisperTokenizer) -> None:
    for language in ("xx", "english", "", "EN"):
        with pytest.raises(ValueError, match="is not one of"):
            tokenizer.language_token(language)
    with pytest.raises(ValueError, match="not a language token"):
        tokenizer.language_of(tokenizer.sot)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_survives_encoding(tokenizer: WhisperTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert all(token < tokenizer.eot for token in tokens)
    assert tokenizer.decode(tokens) == text


def test_text_that_spells_a_special_token_stays_text(tokenizer: WhisperTokenizer) -> None:
    assert tokenizer.eot not in tokenizer.encode("stop <|endoftext|> <|en|>")


def test_special_and_timestamp_tokens_give_no_text(tokenizer: WhisperTokenizer) -> None:
    tokens = [tokenizer.sot, *tokenizer.encode(" yes"), 50_400, 51_864, tokenizer.eot]
    assert tokenizer.decode(tokens) == " yes"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50_256), max_size=12))
def test_decoding_equals_the_librarys(tokenizer: WhisperTokenizer, library: Tokenizer, tokens: list[int]) -> None:
    assert tokenizer.decode(tokens) == library.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 51_864), max_size=20), st.sampled_from(["en", "de", "ja", "zh"]))
def test_words_hold_every_text_token_once_and_all_of_the_text(
    tokenizer: WhisperTokenizer, tokens: list[int], language: str
) -> None:
    words = tokenizer.split_to_words(tokens, language)
    indices = [index for word in words for index in word.token_indices]
    assert indices == [index for index, token in enumerate(tokens) if token < tokenizer.eot]
    assert "".join(word.text for word in words) == tokenizer.decode(tokens)
    assert all(word.timed_indices and set(word.timed_indices) <= set(word.token_indices) for word in words)


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", " Hello world.", [" Hello", " world."]),
        ("en", "No leading space, though.", ["No", " leading", " space,", " though."]),
        ("en", ' He said: "stop (now)!" Twice...', [" He", " said:", ' "stop', ' (now)!"', " Twice..."]),
        ("en", " It's 12.50, e-mail me", [" It's", " 12.50,", " e-mail", " me"]),
        ("de", " Überraschend große Bäume", [" Überraschend", " große", " Bäume"]),
        ("es", " ¿Qué tal?", [" ¿Qué", " tal?"]),
        ("en", " 🎉🎈 party", [" 🎉🎈", " party"]),
        ("en", "", []),
    ],
)
def test_languages_with_spaces_split_at_them(
    tokenizer: WhisperTokenizer, language: str, text: str, words: list[str]
) -> None:
    found = tokenizer.split_to_words(tokenizer.encode(text), language)
    assert [word.text for word in found] == words


def test_languages_without_spaces_split_between_characters(tokenizer: WhisperTokenizer) -> None:
    tokens = tokenizer.encode("お早う、世界。🎉")
    words = [word.text for word in tokenizer.split_to_words(tokens, "ja")]
    assert "".join(words) == "お早う、世界。🎉"
    assert len(words) > 3
    assert not any("\ufffd" in word or word in "、。" for word in words)


def test_merged_punctuation_does_not_change_a_words_times(tokenizer: WhisperTokenizer) -> None:
    tokens = tokenizer.encode(' (yes), "no"')
    words = tokenizer.split_to_words(tokens, "en")
    assert [word.text for word in words] == [" (yes),", ' "no"']
    for word in words:
        inside = tokenizer.decode([tokens[index] for index in word.timed_indices])
        assert inside.strip(' ("),') in {"yes", "no"}
        assert len(word.timed_indices) < len(word.token_indices)


def test_an_unfinished_character_is_not_left_out(tokenizer: WhisperTokenizer) -> None:
    tokens = tokenizer.encode(" party 🎉")
    words = tokenizer.split_to_words(tokens[:-1], "en")
    assert words[-1].text == " \ufffd"
    (lone,) = tokenizer.split_to_words(tokenizer.encode("🎉")[:1], "en")
    assert lone == WordTokens("\ufffd", (0,), (0,))


def test_marks_alone_are_merged_with_each_other() -> None:
    def word(text: str, index: int) -> WordTokens:
        return WordTokens(text, (index,), (index,))

    merged = merge_punctuation([word(" (", 0), word(' "', 1), word("a", 2), word(".", 3), word('"', 4), word(")", 5)])
    assert merged == [WordTokens(' ( "a.")', (0, 1, 2, 3, 4, 5), (2,))]
    assert merge_punctuation([word(" (", 0)]) == [word(" (", 0)]
    assert merge_punctuation([]) == []


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def write_slow_files(directory: Path, *, where: str) -> None:
    """Write the tokenizer as vocab.json and merges.txt, its added tokens in the file `where`."""
    library = json.loads(tokenizer_file().read_text())
    added = {token["content"]: token["id"] for token in library["added_tokens"]}
    (directory / "vocab.json").write_text(json.dumps(library["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in library["model"]["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    if where == "added_tokens.json":
        content: dict[str, object] = dict(added)
    else:
        content = {"added_tokens_decoder": {str(token): {"content": text} for text, token in added.items()}}
    (directory / where).write_text(json.dumps(content))


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_vocabulary_and_merges_give_the_same_tokenizer(
    tokenizer: WhisperTokenizer, directory: Path, where: str
) -> None:
    write_slow_files(directory, where=where)
    other = load_tokenizer(ModelParams(name=str(directory)))
    text = " Größere Überraschungen: 12.50 €, 世界 <|en|> 🎉"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.decode(other.encode(text)) == text
    assert (other.sot, other.eot, other.languages) == (tokenizer.sot, tokenizer.eot, tokenizer.languages)


def test_a_directory_saved_by_transformers_gives_the_same_tokenizer(
    tokenizer: WhisperTokenizer, directory: Path
) -> None:
    WhisperTokenizerFast(tokenizer_file=str(tokenizer_file())).save_pretrained(directory)
    other = load_tokenizer(ModelParams(name=str(directory)))
    assert other.encode(" yes, 世界") == tokenizer.encode(" yes, 世界")
    assert other.language_tokens == tokenizer.language_tokens


def test_an_english_only_model_has_one_language(directory: Path) -> None:
    library = json.loads(tokenizer_file().read_text())
    vocabulary = library["model"]["vocab"]
    # English-only checkpoints keep GPT-2's vocabulary: 50,256 tokens, then the special ones.
    vocabulary = {text: token for text, token in vocabulary.items() if token < 50_256}
    library["model"]["vocab"] = vocabulary
    library["model"]["merges"] = [merge for merge in library["model"]["merges"] if _joined(merge) in vocabulary]
    for token in library["added_tokens"]:
        token["id"] -= 1
    library["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(library))
    tokenizer = load_tokenizer(ModelParams(name=str(directory)))
    assert (tokenizer.eot, tokenizer.is_multilingual) == (50_256, False)
    assert tokenizer.languages == ("en",)
    assert tokenizer.language_tokens == ()


def _joined(merge: str | list[str]) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": "1.0", "model": {"type": "BPE"}}', "\u0000"])
def test_a_broken_tokenizer_file_is_a_model_error(directory: Path, content: str) -> None:
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(ModelParams(name=str(directory)))


def write_without(directory: Path, content: str) -> None:
    library = json.loads(tokenizer_file().read_text())
    library["added_tokens"] = [token for token in library["added_tokens"] if token["content"] != content]
    (directory / "tokenizer.json").write_text(json.dumps(library))


def test_a_tokenizer_of_another_model_is_refused(directory: Path) -> None:
    write_without(directory, "<|translate|>")
    with pytest.raises(ModelError, match=r"<\|translate\|>"):
        load_tokenizer(ModelParams(name=str(directory)))


def test_a_special_token_that_nothing_here_uses_may_be_missing(directory: Path, tokenizer: WhisperTokenizer) -> None:
    write_without(directory, "<|startofprev|>")
    assert load_tokenizer(ModelParams(name=str(directory))).sot == tokenizer.sot


def test_added_tokens_with_holes_are_refused(directory: Path) -> None:
    write_slow_files(directory, where="added_tokens.json")
    added = json.loads((directory / "added_tokens.json").read_text())
    del added["<|de|>"]
    (directory / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ModelError, match="holes"):
        load_tokenizer(ModelParams(name=str(directory)))


def test_a_pinned_tokenizer_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = locate_model("whisper-base")
    for path, pin in zip((*files.weights, files.config), (*WHISPER_BASE.weights, WHISPER_BASE.config), strict=True):
        target = tmp_path / pin.package / pin.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
        (tmp_path / pin.package / "__init__.py").touch()
    wrong = tmp_path / WHISPER_BASE.tokenizer.package / WHISPER_BASE.tokenizer.path
    shutil.copyfile(tokenizer_file(), wrong)
    wrong.write_text(wrong.read_text() + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WeightsHashError, match=r"tokenizer\.json"):
        load_tokenizer(ModelParams())
