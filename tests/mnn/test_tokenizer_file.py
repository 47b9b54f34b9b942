"""Reading tokenizer files: contents as written, and one typed error for everything else."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from hf2mnn.checkpoint.facts import chat_template
from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.core.errors import BundleError
from hf2mnn.mnn.tokenizer import encode_tokenizer
from hf2mnn.mnn.tokenizer_file import parse_tokenizer, read_tokenizer
from support import SHAPES_VL

PATH = Path("tokenizer.mtok")


@pytest.fixture(scope="module")
def content() -> bytes:
    return encode_tokenizer(SHAPES_VL)


def test_written_file_is_read(content: bytes) -> None:
    stored = json.loads((SHAPES_VL / "tokenizer.json").read_text())
    read = parse_tokenizer(content, PATH)
    added = {token["id"]: token["content"].encode() for token in stored["added_tokens"]}
    assert read.added == added
    assert {number: text for number, text in read.tokens.items() if number not in added} == {
        number: text.encode() for text, number in stored["model"]["vocab"].items()
    }
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]
    assert sorted(read.merges, key=read.merges.get) == [(left.encode(), right.encode()) for left, right in pairs]
    assert read.template == chat_template(SHAPES_VL)
    assert (read.eos, [read.text(number) for number in read.stop]) == ("<|im_end|>", ["<|im_end|>"])


@pytest.mark.parametrize(
    ("kind", "lines"),
    [(3, ["a", "b", "ab"]), (1, [base64.b64encode(text).decode() for text in (b"a", b"b", b"ab")])],
    ids=["huggingface", "tiktoken"],
)
def test_text_formats_are_read(kind: int, lines: list[str], tmp_path: Path) -> None:
    counts, merges = ("3 1", ["a b"]) if kind == 3 else ("3", [])
    text = "\n".join([f"430 {kind}", "1 1 0", "2 2", counts, *lines, *merges, ""])
    (tmp_path / "tokenizer.txt").write_text(text)
    read = read_tokenizer(tmp_path / "tokenizer.txt")
    assert read.tokens == {0: b"a", 1: b"b", 2: b"ab"}
    assert (read.special, read.stop, list(read.merges)) == ((2,), (2,), [(b"a", b"b")] if merges else [])


@pytest.fixture
def short(tmp_path: Path) -> bytes:
    """A file without the thousands of replacements for NFC."""
    stored = json.loads((SHAPES_VL / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored | {"normalizer": None}))
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).symlink_to(SHAPES_VL / name)
    return encode_tokenizer(tmp_path)


def test_truncated_files_are_rejected(short: bytes) -> None:
    """Parts after the added tokens are optional."""
    for end in range(0, short.index(b"{%") - 4, 31):
        with pytest.raises(BundleError, match=r"is not a tokenizer file that MNN's engine can read"):
            parse_tokenizer(short[:end], PATH)


def test_changed_files_are_rejected_or_read(short: bytes) -> None:
    """There is no other error, and no table larger than the file."""
    random_, rejected = random.Random(0), 0
    for _ in range(300):
        content = bytearray(short)
        for _ in range(random_.randrange(1, 4)):
            content[random_.randrange(len(short))] = random_.randrange(256)
        try:
            parse_tokenizer(bytes(content), PATH)
        except BundleError as error:
            assert str(error).startswith("tokenizer.mtok is not a tokenizer file")
            rejected += 1
    assert 30 < rejected < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER + b"/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"", "does not begin with '430'"),
        (b"<!DOCTYPE html>\n<html>\n", "does not begin with '430'"),
        (b"431 4\n0 0 0\n\n", "begins with '431 4'"),
        (b"430 9\n0 0 0\n\n", "begins with '430 9'"),
        (b"430 4\n2 1 0\n1 2\n", "does not count the 2 ids"),
        (b"430 4\n0 0 0\n\n" + b"\x04\x01\x00\x00\x00" * 40, "is not the code of a part"),
        (b"430 4\n0 0 0\n\n\x00\x00\x00\xff\xff\xff\xff\x00\x00\xff\xff\xff\xff", "4294967295 tokens"),
        (b"430 3\n0 0 0\n\n99 1\na\n", "counts 99 tokens"),
        (b"430 1\n0 0 0\n\n1\n***\n", "base64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_rejected(content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_tokenizer(content, PATH)


def test_ids_beyond_the_vocabulary_are_rejected(content: bytes) -> None:
    """For such an id the engine writes past the end of its table."""
    read = parse_tokenizer(content, PATH)
    entry = b"\x01\x00a" + next(n for n, text in read.tokens.items() if text == b"a").to_bytes(4, "little")
    assert content.count(entry) == 1
    with pytest.raises(BundleError, match=r"token 'a' has id 1048576 in a vocabulary of 563"):
        parse_tokenizer(content.replace(entry, b"\x01\x00a\x00\x00\x10\x00"), PATH)


def test_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        read_tokenizer(tmp_path / "tokenizer.mtok")
