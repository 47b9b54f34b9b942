"""NFC as string replacements, the only normalizer of MNN's engine that can express it.

MNN's exporter writes NFC as a table of single code points, which does not compose, and replaces the joiner of emoji
sequences and most control characters by spaces. Characters and combining classes come from Python's Unicode data and
results from tokenizers, whose NFC is the one to match.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from itertools import groupby

from tokenizers.normalizers import NFC

Replacement = tuple[str, str]  # text, content
LONGEST_RUN = 4  # marks on one letter that are ordered, whatever their order was
GENERAL = "COMBINING"  # first word of the names of marks for several scripts


@functools.cache
def nfc_replacements() -> tuple[Replacement, ...]:
    """Return NFC as replacements, to be applied in order, each to the whole text.

    Canonical singletons come first, then marks in the wrong order, then base and mark to composed character, shorter
    compositions before longer ones, conjoining Hangul jamo included. The list is complete for single characters, and
    for marks of one script; docs/tokenizers.md has the rest and the engine's time.
    """
    nfc = functools.cache(NFC().normalize_str)
    singletons: dict[str, str] = {}
    composed: list[str] = []
    pairs: dict[str, str] = {}
    for character in map(chr, range(0x110000)):
        codes = unicodedata.decomposition(character)
        decomposition = "" if codes.startswith("<") else "".join(chr(int(code, 16)) for code in codes.split())
        if not decomposition:
            continue
        if nfc(character) != character:
            singletons[character] = nfc(character)
        elif nfc(decomposition) == character:
            pairs[decomposition] = character
            composed.append(character)
    # A mark after a composed character may belong before the mark inside that character.
    marks = sorted({pair[1] for pair in pairs})
    ordered, first, back = _orders(set(marks))
    for character in composed:
        for mark in marks:
            if (text := character + mark) not in pairs and nfc(text) != text:
                pairs[text] = nfc(text)
    for syllable in map(chr, range(0xAC00, 0xD7A4)):
        jamo = unicodedata.normalize("NFD", syllable)
        pairs[jamo if len(jamo) == 2 else unicodedata.normalize("NFC", jamo[:2]) + jamo[2]] = syllable
    depth = {text: len(unicodedata.normalize("NFD", text)) for text in pairs}
    compositions = sorted(pairs.items(), key=lambda pair: (depth[pair[0]], pair))
    return (*singletons.items(), *ordered, *first, *compositions, *back)


def _orders(composing: set[str]) -> tuple[list[Replacement], list[Replacement], list[Replacement]]:
    """Return swaps of adjacent marks of one script, for runs of up to `LONGEST_RUN` marks.

    The first list sorts by combining class: marks move behind those of lower classes, by at least one in each pass over
    the swaps of their class; the highest class is first. Of the marks for several scripts it has the `composing` ones.
    The second moves composing marks to their letter, where no mark of their own class is between; the third moves those
    back that did not compose. tokenizers' Unicode data is older than Python's, so it decides on each pair.
    """
    nfc, scripts = NFC().normalize_str, defaultdict(list)
    for mark in filter(unicodedata.combining, map(chr, range(0x110000))):
        script = unicodedata.name(mark).split()[0]
        if script != GENERAL or mark in composing:
            scripts[script].append(mark)
    ordered, first, back = [], [], []
    for script, marks in scripts.items():
        for _, equal in groupby(sorted(marks, key=unicodedata.combining, reverse=True), unicodedata.combining):
            swapped = [
                mark + other for mark in equal for other in marks if nfc(mark + other) == other + mark != mark * 2
            ]
            ordered += [(pair, pair[::-1]) for pair in swapped] * (LONGEST_RUN - 1)
            if script != GENERAL:
                moved = [pair for pair in swapped if pair[0] in composing and pair[1] not in composing]
                first += [(pair[::-1], pair) for pair in moved] * (LONGEST_RUN - 1)
                back += [(pair, pair[::-1]) for pair in moved] * (LONGEST_RUN - 1)
    return ordered, first, back
