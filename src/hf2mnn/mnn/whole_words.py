"""`ignore_merges`: words that are one token although no merges lead to them, for MNN's engine, which only merges.

After the bytes of a word have become letters, a mark is put before each word and removed again, except before words of
a list. Merges of the lowest ranks join the mark and the pieces of such a word to its token. No other text reaches them,
because only the listed words keep the mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARK = "\x01"
"""Character before a word. It is none of the letters that stand for bytes, and sorts before them: the engine takes the
last of several texts of an id for decoding.
"""
_NEVER = "\x80"  # matches nothing, but makes the engine use std::wregex, whose ^ and $ are anchors


@dataclass(frozen=True)
class WholeWords:
    """Words of one token that merging alone splits; `pieces` are what it leaves of each, by token."""

    pieces: dict[str, list[str]] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        """Regular expression of a mark that is not before one of the words."""
        return f"^{MARK}(?!{_one_of(self.pieces)}$)|{_NEVER}"

    def entries(self, vocabulary: dict[str, int], first: int) -> tuple[dict[str, int], list[tuple[int, int]]]:
        """Return entries for marked words and their beginnings, with ids from `first` on, and merges of ids in order.

        The entry of a complete word has the id of its token, whose text has no mark: from there on neither has that of
        a longer word.
        """
        ids = {MARK: first} | {MARK + word: vocabulary[word] for word in self.pieces}
        merges: dict[tuple[int, int], None] = {}
        for pieces in self.pieces.values():
            text, left = MARK, first
            for piece in pieces:
                text += piece
                merges[left, vocabulary[piece]] = None
                if text.removeprefix(MARK) in self.pieces:
                    text = text.removeprefix(MARK)
                helper = first + len(ids) - len(self.pieces)
                left = vocabulary[text] if text in vocabulary else ids.setdefault(text, helper)
        return ids, list(merges)


def find_whole_words(tokenizer: PreTrainedTokenizerFast) -> WholeWords:
    """Return the words of one token that merging alone splits; none without `ignore_merges`."""
    backend, words = tokenizer.backend_tokenizer, {}
    if not getattr(backend.model, "ignore_merges", False) or not backend.pre_tokenizer or not backend.decoder:
        return WholeWords()
    backend.model.ignore_merges = False
    for token in sorted(backend.get_vocab(with_added_tokens=False)):
        pieces = [piece.value for piece in backend.model.tokenize(token)]
        text = backend.decoder.decode([token]) if pieces != [token] else ""
        if text and [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == [token]:
            words[token] = pieces
    backend.model.ignore_merges = True
    return WholeWords(words)


def _one_of(words: Iterable[str]) -> str:
    """Return a regular expression for words, with each common beginning once: the engine's matcher backtracks."""
    rest: dict[str, list[str]] = {}
    for word in words:
        if word:
            rest.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(letter) + _one_of(ends) for letter, ends in rest.items()]
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}" if branches else ""
