"""A tokenizer file of MNN's LLM engine as it stands on disk, whoever wrote it: `tokenizer.mtok` and `tokenizer.txt`.

The engine reads both without a look at where they end (`Tokenizer::createTokenizer` and
`PipelineTokenizer::load_vocab_binary` of MNN 3.6.1), so a file that was cut short or changed makes it read, or write,
past its memory. Here every count is held against the bytes that are there before anything is made of it.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.core.errors import BundleError
from hf2mnn.mnn.tokenizer import MAGIC, PIPELINE

KINDS = {0: "sentencepiece", 1: "tiktoken", 2: "bert", 3: "huggingface", PIPELINE: "pipeline"}
"""What the second number of the file says; all but the last are text (`tokenizer.txt`)."""
HUGGINGFACE = "huggingface"
LARGEST = 1 << 28
"""Bytes of a file that is read at all; the largest vocabularies take a few million."""
DEEPEST = 8
"""Sequences in sequences of a normalizer, splitter or decoder."""


@dataclass(frozen=True)
class TokenizerFile:
    """tokens: text by id, in the byte alphabet where the model is byte-level BPE, b"" for one that only stands in
    `added`. merges: rank by the texts of its halves. added: text by id. template, eos, bos: "" where there is none.
    """

    kind: str
    special: tuple[int, ...]
    stop: tuple[int, ...]
    tokens: dict[int, bytes]
    merges: dict[tuple[bytes, bytes], int]
    added: dict[int, bytes]
    template: str = ""
    eos: str = ""
    bos: str = ""

    @property
    def known(self) -> set[int]:
        return self.tokens.keys() | self.added.keys()

    def text(self, number: int) -> str | None:
        """What a token is; of an added one its own text."""
        found = self.added.get(number, self.tokens.get(number))
        return None if found is None else found.decode(errors="replace")


class _Cursor:
    """The binary part, front to back."""

    def __init__(self, content: bytes, position: int, path: Path) -> None:
        self.content, self.position, self.path = content, position, path

    def fail(self, what: str) -> NoReturn:
        raise BundleError(f"{self.path} is no tokenizer that MNN's engine can read: {what}; copy or export it again")

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def raw(self, size: int) -> bytes:
        if size > self.left:
            self.fail(f"it ends {size - self.left} bytes too soon")
        self.position += size
        return self.content[self.position - size : self.position]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self.raw(struct.calcsize(f"<{form}")))
        return value

    def count(self, smallest: int) -> int:
        """A u32 of entries that take at least `smallest` bytes each."""
        count = self.number("I")
        if count * smallest > self.left:
            self.fail(f"it counts {count} entries where {self.left} bytes are left")
        return count

    def string(self) -> bytes:
        return self.raw(self.number("H"))


def _numbers_and_strings(form: str) -> Callable[[_Cursor, int], None]:
    """Skips u8 (B), u32 (I) and strings (s)."""

    def skip(cursor: _Cursor, _: int) -> None:
        for kind in form:
            if kind == "s":
                cursor.string()
            else:
                cursor.number(kind)

    return skip


def _table(cursor: _Cursor, _: int) -> None:
    for _ in range(cursor.count(6)):
        cursor.number("I")
        cursor.string()


def _bert(cursor: _Cursor, depth: int) -> None:
    if cursor.raw(4)[2]:
        _table(cursor, depth)


def _sequence(parts: dict[int, Callable[[_Cursor, int], None]]) -> Callable[[_Cursor, int], None]:
    def skip(cursor: _Cursor, depth: int) -> None:
        for _ in range(cursor.count(1)):
            _part(cursor, parts, depth + 1)

    return skip


NORMALIZERS: dict[int, Callable[[_Cursor, int], None]] = {
    **{kind: _numbers_and_strings(form) for kind, form in enumerate(["", "", "s", "ss"])},
    5: _numbers_and_strings("BBBB"),
    6: _table,
    7: _bert,
    8: _numbers_and_strings("BB"),
}
NORMALIZERS[4] = _sequence(NORMALIZERS)
SPLITTERS = {kind: _numbers_and_strings(form) for kind, form in enumerate(["", "B", "B", "sB", "sBB", ""])}
SPLITTERS[6] = _sequence(SPLITTERS)
DECODERS = {kind: _numbers_and_strings(form) for kind, form in enumerate(["", "", "sB", "sB", "", "ss", "sII"])}
DECODERS[7] = _sequence(DECODERS)


def _part(cursor: _Cursor, parts: dict[int, Callable[[_Cursor, int], None]], depth: int = 0) -> None:
    kind = cursor.number("B")
    if kind not in parts or depth > DEEPEST:
        cursor.fail(f"byte {cursor.position - 1} is {kind}, which is no kind of a part")
    parts[kind](cursor, depth)


def _vocabulary(cursor: _Cursor, count: int, after: int = 0) -> dict[int, bytes]:
    """`count` entries of text and id, each with `after` bytes more."""
    tokens = {}
    if count * (6 + after) > cursor.left:
        cursor.fail(f"it counts {count} tokens where {cursor.left} bytes are left")
    for _ in range(count):
        text, number = cursor.string(), cursor.number("I")
        cursor.raw(after)
        # The engine's table has as many rows as there are entries; it writes past its end for a greater id.
        if number >= count:
            cursor.fail(f"token {text.decode(errors='replace')!r} has id {number} in a vocabulary of {count}")
        tokens[number] = text
    return tokens


def _model(cursor: _Cursor) -> tuple[dict[int, bytes], dict[tuple[bytes, bytes], int]]:
    kind, count = cursor.number("B"), cursor.number("I")
    if kind == 0:
        cursor.raw(2)
        merged = cursor.number("I")
        tokens = _vocabulary(cursor, count)
        rows = np.frombuffer(cursor.raw(12 * merged), "<u4").reshape(-1, 3).tolist()
        if any(left not in tokens or right not in tokens for left, right, _ in rows):
            cursor.fail("a merge names a token that is not in the vocabulary")
        return tokens, {(tokens[left], tokens[right]): rank for left, right, rank in rows}
    if kind == 1:
        _numbers_and_strings("ssI")(cursor, 0)
        return _vocabulary(cursor, count), {}
    if kind == 2:
        cursor.raw(5)
        return _vocabulary(cursor, count, 8), {}
    return cursor.fail(f"its model is of kind {kind}")


def _text(cursor: _Cursor, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        cursor.fail("its chat template is no UTF-8")


def _binary(cursor: _Cursor, special: tuple[int, ...], stop: tuple[int, ...]) -> TokenizerFile:
    _part(cursor, NORMALIZERS)
    _part(cursor, SPLITTERS)
    tokens, merges = _model(cursor)
    _part(cursor, DECODERS)
    added = {}
    for _ in range(cursor.count(9)):
        number = cursor.number("I")
        cursor.raw(3)
        added[number] = cursor.string()
    # Each of the rest may be left out.
    template = _text(cursor, cursor.raw(cursor.number("I"))) if cursor.left else ""
    eos = _text(cursor, cursor.string()) if cursor.left else ""
    if cursor.left:
        cursor.raw(1)
    bos = _text(cursor, cursor.string()) if cursor.left else ""
    return TokenizerFile(KINDS[PIPELINE], special, stop, tokens, merges, added, template, eos, bos)


def _lines(cursor: _Cursor, kind: str, special: tuple[int, ...], stop: tuple[int, ...]) -> TokenizerFile:
    first, *lines = cursor.raw(cursor.left).split(b"\n")
    try:
        counted = [int(number) for number in first.split()]
    except ValueError:
        counted = []
    count, merged = (*counted, 0, 0)[:2]
    if not 0 < count <= len(lines) or not 0 <= merged <= len(lines) - count:
        cursor.fail(f"it counts {count} tokens and {merged} merges in {len(lines)} lines")
    tokens = lines[:count]
    if kind != HUGGINGFACE:
        try:
            tokens = [base64.b64decode(line.partition(b" ")[0], validate=True) for line in tokens]
        except binascii.Error:
            cursor.fail("a token is not written in base64")
    pairs = [line.partition(b" ")[::2] for line in lines[count : count + merged]]
    return TokenizerFile(
        kind, special, stop, dict(enumerate(tokens)), {pair: rank for rank, pair in enumerate(pairs)}, {}
    )


def parse_tokenizer(content: bytes, path: Path) -> TokenizerFile:
    """The bytes of a tokenizer file; `path` is for messages.

    Raises:
        BundleError: it is none, or was cut short.
    """
    cursor = _Cursor(content, 0, path)
    if content.startswith(LFS_POINTER):
        raise BundleError(f"{path} is a Git LFS pointer, not the tokenizer; run 'git lfs pull' in its folder")
    head, counts, ids, *_ = (*content.split(b"\n", 3), b"", b"", b"")[:4]
    try:
        magic, kind = (int(number) for number in head.split())
        sizes = [int(number) for number in counts.split()]
        numbers = [int(number) for number in ids.split()]
    except ValueError:
        cursor.fail(f"it does not begin with '{MAGIC}' and a kind")
    if magic != MAGIC or kind not in KINDS:
        cursor.fail(f"it begins with '{magic} {kind}', not with '{MAGIC}' and a kind from 0 to {max(KINDS)}")
    if len(sizes) != 3 or min(sizes) < 0 or sum(sizes) != len(numbers) or min(numbers, default=0) < 0:
        cursor.fail(f"its second line counts other than the {len(numbers)} ids of the third")
    cursor.raw(len(head) + len(counts) + len(ids) + 3)
    special, stop = tuple(numbers[: sizes[0]]), tuple(numbers[sizes[0] : sizes[0] + sizes[1]])
    if KINDS[kind] == KINDS[PIPELINE]:
        return _binary(cursor, special, stop)
    return _lines(cursor, KINDS[kind], special, stop)


def read_tokenizer(path: Path) -> TokenizerFile:
    """Raises BundleError where it is not there, or as `parse_tokenizer` does."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise BundleError(f"{path} has {size} bytes, which no tokenizer has; copy or export it again")
        return parse_tokenizer(path.read_bytes(), path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); copy or export it again") from None
