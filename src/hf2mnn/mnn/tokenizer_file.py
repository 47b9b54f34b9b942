"""Read tokenizer files of MNN's LLM engine from any source: `tokenizer.mtok` and `tokenizer.txt`.

With a truncated or changed file the engine reads or writes past its memory (`Tokenizer::createTokenizer` and
`PipelineTokenizer::load_vocab_binary` of MNN 3.6.1). Here every count is checked against the bytes that remain, before
memory is allocated.
"""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.core.errors import BundleError
from hf2mnn.core.untrusted import read_bytes
from hf2mnn.mnn.engine_facts import PIPELINE, TOKENIZER_KINDS, TOKENIZER_MAGIC, Decoder, Model, Normalizer, PreTokenizer
from hf2mnn.mnn.whole_words import MARK

HUGGINGFACE = "huggingface"
MAX_SIZE = 1 << 28  # bytes of a file; the largest vocabularies have a few million
MAX_DEPTH = 8  # of nested sequences in a normalizer, pre-tokenizer or decoder


@dataclass(frozen=True)
class TokenizerFile:
    """Contents of a tokenizer file."""

    kind: str  # a value of TOKENIZER_KINDS
    special: tuple[int, ...]  # ids of special tokens
    stop: tuple[int, ...]  # ids of end-of-text tokens
    tokens: dict[int, bytes]  # text by id, in the byte alphabet for byte-level BPE; b"" for one that only `added` has
    merges: dict[tuple[bytes, bytes], int]  # rank by the texts of the two halves
    added: dict[int, bytes]  # text of added tokens by id
    template: str = ""
    eos: str = ""
    bos: str = ""
    whole_words: bool = False  # whether `ignore_merges` is written as marked words

    @property
    def known(self) -> set[int]:
        """Ids of all tokens."""
        return self.tokens.keys() | self.added.keys()

    def text(self, number: int) -> str | None:
        """Return the text of a token, or None for an unknown id."""
        stored = self.added.get(number, self.tokens.get(number))
        return None if stored is None else stored.decode(errors="replace")


class _Cursor:
    """Position in the binary part of a file."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content, self.position, self.path = content, 0, path

    def fail(self, reason: str) -> NoReturn:
        raise BundleError(
            f"{self.path} is not a tokenizer file that MNN's engine can read: {reason}; copy or export it again"
        )

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def raw(self, size: int) -> bytes:
        if size > self.left:
            self.fail(f"it ends {size - self.left} bytes too early")
        self.position += size
        return self.content[self.position - size : self.position]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self.raw(struct.calcsize(f"<{form}")))
        return value

    def count(self, smallest: int) -> int:
        """Read a u32 count of entries of at least `smallest` bytes each."""
        count = self.number("I")
        if count * smallest > self.left:
            self.fail(f"it counts {count} entries, and {self.left} bytes remain")
        return count

    def string(self, size: str = "H") -> bytes:
        return self.raw(self.number(size))

    def text(self, size: str = "H") -> str:
        """Read a string at the end of a file, where it is optional."""
        try:
            return self.string(size).decode() if self.left else ""
        except UnicodeDecodeError:
            self.fail("its chat template is not UTF-8")


# Fields of a part by its code: u8 (B), u32 (I), string (s), table of u32 and string (t), flags of BERT and their table
# (b), sequence of parts (*).
NORMALIZERS = dict.fromkeys(Normalizer, "") | {
    Normalizer.PREPEND: "s",
    Normalizer.REPLACE: "ss",
    Normalizer.SEQUENCE: "*",
    Normalizer.BERT_WITHOUT_TABLE: "BBBB",
    Normalizer.NFKC: "t",
    Normalizer.BERT: "b",
    Normalizer.STRIP: "BB",
}
PRE_TOKENIZERS = dict.fromkeys(PreTokenizer, "") | {
    PreTokenizer.BYTE_LEVEL: "B",
    PreTokenizer.DIGITS: "B",
    PreTokenizer.METASPACE: "sB",
    PreTokenizer.SPLIT: "sBB",
    PreTokenizer.SEQUENCE: "*",
}
DECODERS = dict.fromkeys(Decoder, "") | {
    Decoder.METASPACE: "sB",
    Decoder.WORDPIECE: "sB",
    Decoder.REPLACE: "ss",
    Decoder.STRIP: "sII",
    Decoder.SEQUENCE: "*",
}


def _skip_part(cursor: _Cursor, parts: dict[int, str], depth: int = 0) -> None:
    code = cursor.number("B")
    if code not in parts or depth > MAX_DEPTH:
        cursor.fail(f"byte {cursor.position - 1} is {code}, which is not the code of a part")
    for field in parts[code]:
        if field == "s":
            cursor.string()
        elif field == "*":
            for _ in range(cursor.count(1)):
                _skip_part(cursor, parts, depth + 1)
        elif field == "t" or (field == "b" and cursor.raw(4)[2]):
            for _ in range(cursor.count(6)):
                cursor.number("I")
                cursor.string()
        elif field != "b":
            cursor.number(field)


def _vocabulary(cursor: _Cursor, count: int, extra: int = 0) -> dict[int, bytes]:
    """Read `count` entries of text and id, each followed by `extra` bytes."""
    tokens = {}
    if count * (6 + extra) > cursor.left:
        cursor.fail(f"it counts {count} tokens, and {cursor.left} bytes remain")
    for _ in range(count):
        text, number = cursor.string(), cursor.number("I")
        cursor.raw(extra)
        # The engine's table has one row for each entry, and it writes past its end for a larger id.
        if number >= count:
            cursor.fail(f"token {text.decode(errors='replace')!r} has id {number} in a vocabulary of {count}")
        tokens[number] = text
    return tokens


def _model(cursor: _Cursor) -> tuple[dict[int, bytes], dict[tuple[bytes, bytes], int], bool]:
    """Read vocabulary and merges, and whether whole words are marked (`mnn.whole_words`).

    The mark, beginnings of marked words and their merges follow all others and are left out.
    """
    code, count = cursor.number("B"), cursor.number("I")
    if code == Model.BPE:
        cursor.raw(2)
        merges = cursor.number("I")
        tokens = _vocabulary(cursor, count)
        rows = np.frombuffer(cursor.raw(12 * merges), "<u4").reshape(-1, 3).tolist()
        if any(left not in tokens or right not in tokens for left, right, _ in rows):
            cursor.fail("a merge names a token that is not in the vocabulary")
        mark = next((number for number, text in tokens.items() if text == MARK.encode()), None)
        joins = min((rank for left, _, rank in rows if left == mark), default=None)
        ranks = {(tokens[left], tokens[right]): rank for left, right, rank in rows if joins is None or rank < joins}
        known = tokens if joins is None else {number: text for number, text in tokens.items() if number < mark}
        return known, ranks, joins is not None
    if code == Model.WORDPIECE:
        for _ in range(2):
            cursor.string()
        cursor.number("I")
        return _vocabulary(cursor, count), {}, False
    if code == Model.UNIGRAM:
        cursor.raw(5)
        return _vocabulary(cursor, count, 8), {}, False
    return cursor.fail(f"its model has the unknown code {code}")


def _read_binary(cursor: _Cursor, special: tuple[int, ...], stop: tuple[int, ...]) -> TokenizerFile:
    _skip_part(cursor, NORMALIZERS)
    _skip_part(cursor, PRE_TOKENIZERS)
    tokens, merges, whole_words = _model(cursor)
    _skip_part(cursor, DECODERS)
    added = {}
    for _ in range(cursor.count(9)):
        number = cursor.number("I")
        cursor.raw(3)
        added[number] = cursor.string()
    template, eos = cursor.text("I"), cursor.text()
    if cursor.left:
        cursor.raw(1)
    bos = cursor.text()
    kind = TOKENIZER_KINDS[PIPELINE]
    return TokenizerFile(kind, special, stop, tokens, merges, added, template, eos, bos, whole_words)


def _read_lines(cursor: _Cursor, kind: str, special: tuple[int, ...], stop: tuple[int, ...]) -> TokenizerFile:
    first, *lines = cursor.raw(cursor.left).split(b"\n")
    try:
        counts = [int(number) for number in first.split()]
    except ValueError:
        counts = []
    count, merges = (*counts, 0, 0)[:2]
    if not 0 < count <= len(lines) or not 0 <= merges <= len(lines) - count:
        cursor.fail(f"it counts {count} tokens and {merges} merges in {len(lines)} lines")
    tokens = lines[:count]
    if kind != HUGGINGFACE:
        try:
            tokens = [base64.b64decode(line.partition(b" ")[0], validate=True) for line in tokens]
        except binascii.Error:
            cursor.fail("a token is not in base64")
    pairs = [line.partition(b" ")[::2] for line in lines[count : count + merges]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    return TokenizerFile(kind, special, stop, dict(enumerate(tokens)), ranks, {})


def parse_tokenizer(content: bytes, path: Path) -> TokenizerFile:
    """Parse the bytes of a tokenizer file; raise BundleError with `path` if it is not one, or is truncated."""
    cursor = _Cursor(content, path)
    if content.startswith(LFS_POINTER):
        raise BundleError(f"{path} is a Git LFS pointer, not the tokenizer; run 'git lfs pull' in its folder")
    header = content.split(b"\n", 3)[:3]
    try:
        (magic, kind), sizes, numbers = ([int(number) for number in line.split()] for line in header)
    except ValueError:
        cursor.fail(f"it does not begin with '{TOKENIZER_MAGIC}' and a kind")
    if magic != TOKENIZER_MAGIC or kind not in TOKENIZER_KINDS:
        expected = f"'{TOKENIZER_MAGIC}' and a kind from 0 to {max(TOKENIZER_KINDS)}"
        cursor.fail(f"it begins with '{magic} {kind}', not with {expected}")
    if len(sizes) != 3 or min(sizes) < 0 or sum(sizes) != len(numbers) or min(numbers, default=0) < 0:
        cursor.fail(f"its second line does not count the {len(numbers)} ids of the third")
    cursor.raw(sum(map(len, header)) + 3)
    special, stop = tuple(numbers[: sizes[0]]), tuple(numbers[sizes[0] : sizes[0] + sizes[1]])
    if kind == PIPELINE:
        return _read_binary(cursor, special, stop)
    return _read_lines(cursor, TOKENIZER_KINDS[kind], special, stop)


def read_tokenizer(path: Path) -> TokenizerFile:
    """Read a tokenizer file; raise BundleError if it is missing, too large, or as for `parse_tokenizer`."""
    try:
        content = read_bytes(path, MAX_SIZE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{path} cannot be read ({reason}); copy or export it again") from None
    return parse_tokenizer(content, path)
