"""`ignore_merges`: words of one token that no merges lead to, as Llama 3 has them, are one token in the engine too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.mnn.tokenizer_file import parse_tokenizer
from hf2mnn.mnn.tokenizer_probe import engine_ids
from hf2mnn.mnn.whole_words import find_whole_words
from support import SHAPES_VL
from tokenizing import Engine

# One is the beginning of another, one has letters of regular expressions, one is a piece of a longer word's pieces.
WORDS = (
    " vi\u1ec7c",
    " ka\u017ed",
    " ka\u017ed\u00e9",
    " girdi",
    "\u0131ld\u0131",
    "\u0131ld\u0131\u011f\u0131",
    ".:.::",
    " .**\n",
)
WORDS += (
    " \u0445\u0430\u0440\u0430\u043a\u0442\u0435\u0440",
    " \u0445\u0430\u0440\u0430\u043a\u0442\u0435\u0440\u0438\u0441\u0442\u0438\u043a\u0438",
    " cats",
    "^$|(?!",
)


def with_words(folder: Path) -> None:
    """Write the demonstration tokenizer with tokens for WORDS that no merges lead to."""
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    stored = json.loads((SHAPES_VL / "tokenizer.json").read_text())
    vocabulary, added = stored["model"]["vocab"], stored["added_tokens"]
    for word in WORDS:
        vocabulary["".join(piece for piece, _ in letters.pre_tokenize_str(word))] = len(vocabulary)
    for number, token in enumerate(added):
        token["id"] = len(vocabulary) + number
    stored["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((SHAPES_VL / name).read_text())


@pytest.fixture(scope="module")
def checkpoint(make_once: Callable[..., Path]) -> Path:
    return make_once("whole-words", with_words)


@pytest.fixture(scope="module")
def encode(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Engine(checkpoint, tmp_path_factory.mktemp("engine") / "bundle") as engine:
        yield lambda texts: engine("tokenizer_encode", texts)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return lambda texts: tokenizer(texts, add_special_tokens=False).input_ids


def test_whole_words_are_one_token(encode: Any, reference: Any, checkpoint: Path) -> None:
    assert encode(list(WORDS)) == reference(list(WORDS))
    assert [len(ids) for ids in encode(list(WORDS))] == [1] * len(WORDS)
    assert len(find_whole_words(load_tokenizer(checkpoint)).pieces) == len(WORDS)


def test_words_within_others_are_merged(encode: Any, reference: Any) -> None:
    texts = [
        f"{before}{word}{after}" for word in WORDS for before in ("", "a", "!", " ") for after in ("", "n", "!", " 1")
    ]
    assert encode(texts) == reference(texts)
    assert any(len(ids) > 3 for ids in encode(texts))


@given(
    st.lists(st.sampled_from([*WORDS, *(word[:-1] for word in WORDS), "a", " ", "\n", ".", ":", "*", "1"]), max_size=8)
)
def test_random_texts_of_words(encode: Any, reference: Any, parts: list[str]) -> None:
    texts = ["".join(parts), " ".join(parts)]
    assert encode(texts) == reference(texts)


def test_the_file_reads_as_the_checkpoints_tokens_and_merges(checkpoint: Path) -> None:
    """Marks and beginnings of words are no tokens: their ids have no embedding."""
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    file = parse_tokenizer(encode_tokenizer(checkpoint), checkpoint)
    assert file.whole_words
    assert file.known == set(range(len(stored["model"]["vocab"]) + len(stored["added_tokens"])))
    assert len(file.merges) == len(stored["model"]["merges"])


def test_engine_ids_need_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.mtok").write_bytes(encode_tokenizer(checkpoint))
    assert engine_ids(tmp_path / "tokenizer.mtok", [WORDS[0], ""])[1] == []
