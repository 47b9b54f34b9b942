"""Comparison of a bundle's tokenizer, in the engine, with transformers' on a fixed set of texts.

A difference is a fault of the conversion, unless docs/tokenizers.md describes its cause; then it is counted, and named
with examples.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.engine import run_worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TIME_LIMIT = 120.0  # seconds; a few suffice
PER_SCRIPT = 72  # letters, or marks, of a script
PER_TEXT = 12
JOINED = 24  # texts that are encoded at once
VOCABULARY_SAMPLE, MOST_ADDED = 3000, 2000  # tokens
EXAMPLES = 3

DOCUMENTED = re.compile("[\x01-\x03\x85\u2028\u2029]|['\u2019]\u017f")
"""Characters that the engine's pre-tokenizer takes for others."""
SPACES, CONTROLS = " \t\n\r\x0b\x0c\u00a0\u2003\u202f\u3000", (*range(1, 32), *range(0x7F, 0xA0), 0xAD, 0x2028, 0x2029)
TEXTS = {
    "white space": [
        *(f"a{space}b{space * 2}{space}\n{space}c{space * 3}" for space in SPACES),
        *(" ", "\n", " " * 40 + "x" + "\n" * 9, "  a \n\n b\r\n\r\n\tc  \r d \n \n"),
    ],
    "code": [
        "def f(x):\n\treturn {'a': x[1:-1]}  # done\n\n\nprint(f\"{f([1, 2, 3])!r}\")\n",
        '<div class="a-b">&amp;</div>\n<!-- x -->; if (a != b && c <= d) { e[i++] ^= ~f | 0x1F; }\r\n',
        "WHERE a='it''s'; \\frac{1}{2}$$ \\n \\u00e9 {{ x }} {% if %} <0x0A> </s> https://a.b/c?d=e&f=%20",
        "it's I'M we'Re they'LL DON'T o'clock 'x '\u017fa rock'n'roll",
    ],
    "digits": ["0 12 345 6789 12345678901 3.14 1,000,000 1e-9", "2² ½ Ⅷ ① 三十 \u0663\u0664\u0665 \u096a\u096b"],
    "emoji": ["😀😃👍🏽 👨\u200d👩\u200d👧 🇨🇳❤\ufe0f 1\ufe0f\u20e3 a\u200bb\u200cc\ufeffd\u200e"],
    "control": [f"!{c}a!{c}!{c}{c}# {c}1 #{c}\n{c}b!{c} !{c}?" for c in map(chr, CONTROLS)],
}


def compare_tokenizers(checkpoint: Path, tokenizer_file: Path) -> list[dict[str, Any]]:
    """Encode the probes by transformers and by the engine with `tokenizer_file`.

    Probes are joined for speed, and compared one by one where the joined text differs. Return documented differences by
    kind and script: `kind`, `script`, `texts`, `different`, `share` and `examples`. Raise ConversionError for any other
    difference.
    """
    tokenizer, differences = load_tokenizer(checkpoint), []
    probes = make_probes(tokenizer)
    chunks = {"\n".join(part): part for texts in probes.values() for part in _parts(texts, JOINED)}
    suspects = _different(tokenizer, tokenizer_file, list(chunks))
    different = _different(tokenizer, tokenizer_file, [text for joined in suspects for text in chunks[joined]])
    different |= {joined: ids for joined, ids in suspects.items() if not different.keys() & {*chunks[joined]}}
    for (kind, script), texts in sorted(probes.items()):
        joined = ["\n".join(part) for part in _parts(texts, JOINED)]
        wrong = [text for text in (*texts, *joined) if text in different]
        for text in wrong:
            if kind != "marks" and not DOCUMENTED.search(text):
                given, right = different[text]
                raise ConversionError(
                    f"the engine encodes {text[:80]!r} ({kind}) as {_excerpt(given, right)} with the tokenizer of"
                    f" {checkpoint}, and transformers as {_excerpt(right, given)}; report it with the checkpoint's name"
                )
        if wrong:
            counts = {"texts": len(texts), "different": len(wrong), "share": len(wrong) / len(texts)}
            differences.append({"kind": kind, "script": script, **counts, "examples": wrong[:EXAMPLES]})
    return differences


def engine_ids(tokenizer_file: Path, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts in the engine; raise an error as `run_worker`."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-tokenizer-") as scratch:
        result = Path(scratch, "ids.json")
        job = {"tokenizer": str(Path(tokenizer_file).resolve()), "texts": texts, "result": str(result)}
        run_worker("hf2mnn.mnn.worker.tokenize", job, TIME_LIMIT)
        return json.loads(result.read_text())


def make_probes(tokenizer: PreTrainedTokenizerFast) -> dict[tuple[str, str], list[str]]:
    """Return texts by kind, and script or "": `TEXTS`, added tokens, words of the vocabulary, letters, marks."""
    added = sorted(tokenizer.get_added_vocab())[:MOST_ADDED]
    decoded = [tokenizer.decode([n]) for n in range(0, len(tokenizer), max(1, len(tokenizer) // VOCABULARY_SAMPLE))]
    words = [word for word in decoded if word and not re.search("[\0\ufffd]", word) and word not in added]
    probes = {(kind, ""): texts for kind, texts in TEXTS.items()}
    probes["added tokens", ""] = [text for t in added for text in (t, f"a {t} b", f"{t}{t}\n{t}1", f"{t[:-1]} {t}")]
    probes["vocabulary", ""] = [*words, *map("".join, _parts(words, PER_TEXT))]
    scripts: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for character in map(chr, range(0x110000)):
        if (category := unicodedata.category(character)[0]) in "LMN":
            script = re.split("[ -]", unicodedata.name(character, "OTHER"))[0]
            scripts[script][category == "M"].append(character)
    for script, characters in scripts.items():
        letters, marks = (part[:: -(-len(part) // PER_SCRIPT) or 1] for part in characters)
        probes["letters", script] = [f"{''.join(p)} {''.join(p[:3])}, {p[-1]}." for p in _parts(letters, PER_TEXT)]
        orders = ["".join(order) for part in _parts(marks, 3) for order in permutations(part)]
        probes["marks", script] = [f"{letter}{order}a" for letter in letters[:2] or "a" for order in orders]
    return {group: list(dict.fromkeys(texts)) for group, texts in probes.items() if texts}


def _parts(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _different(
    tokenizer: PreTrainedTokenizerFast, tokenizer_file: Path, texts: list[str]
) -> dict[str, tuple[list[int], list[int]]]:
    """Return the engine's and transformers' ids of each text that they encode differently."""
    expected = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    given = engine_ids(tokenizer_file, texts) if texts else []
    return {text: ids for text, *ids in zip(texts, given, expected, strict=True) if ids[0] != ids[1]}


def _excerpt(ids: list[int], other: list[int]) -> list[int]:
    """Return the ids around the first that differs."""
    first = next((at for at, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), len(other))
    return ids[max(0, first - 1) : first + 4]
