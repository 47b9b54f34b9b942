"""Write a checkpoint's tokenizer as `tokenizer.mtok`, the file of MNN's LLM engine.

The format is that of MNN 3.6.1: docs/transformers/tokenizer.md in MNN's repository, and for the rest the engine's
reader, `PipelineTokenizer::load_vocab_binary`. A text header (`430 4`; the numbers of special, stop and prefix ids; the
ids) is followed by a little-endian body: normalizer, pre-tokenizer, model, decoder, added tokens, chat template,
end-of-text token, flags, begin-of-text token. A string is a u16 byte count and UTF-8. There are no prefix tokens.

Meta spaces stay spaces until the text is split into words. The engine's merging takes quadratic time, so it must stay
inside a word where no merge crosses a word boundary.
"""

from __future__ import annotations

import functools
import json
import re
import struct
import unicodedata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel

from hf2mnn.checkpoint.facts import DEFAULT, chat_template, chat_templates, read_object
from hf2mnn.core.errors import BundleError, CheckpointError
from hf2mnn.core.files import atomic_file
from hf2mnn.mnn import engine_facts, template
from hf2mnn.mnn.checkpoint_tokenizer import (
    BYTE_TOKENS,
    META_SPACE,
    TOKENIZER_FILE,
    CheckpointTokenizer,
    MetaSpaces,
    UnsupportedError,
    components,
    invalid_tokenizer,
    read_checkpoint_tokenizer,
)
from hf2mnn.mnn.engine_facts import SPLIT_BEHAVIORS, Decoder, Model, Normalizer, PreTokenizer

_u8, _u32 = struct.Struct("<B").pack, struct.Struct("<I").pack

# Patterns that split words with meta spaces, which are still spaces: before each run of spaces, or before each space.
SPLIT_RUNS, SPLIT_EACH = " *[^ ]+| +", " [^ ]*|[^ ]+"

# Regular expressions that the engine's matcher runs as tokenizers does. It also accepts, but runs differently: \d and
# \w (other sets of characters), \p{Lu} (as \p{L}), lazy quantifiers (as greedy), characters outside ASCII (by
# category), ^ and $ (literally), look-around other than (?!...).
_ESCAPE = r"\\(?:[rntfvsS]|[pP]\{[LNMPS]\}|[^\sA-Za-z0-9])"
_SUPPORTED_PATTERN = re.compile(
    rf"(?:(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\\\[\]&])+\]|\((?:\?:|\?i:|\?!|(?!\?))|\)|\||[^\\\[\]()|^$*+?{{}}])"
    r"(?:(?:[*+?]|\{\d+(?:,\d*)?\})(?![*+?{]))?)+"
)


def write_tokenizer(checkpoint: Path, destination: Path) -> None:
    """Write the tokenizer of a checkpoint to `destination`, atomically and with reproducible bytes."""
    content = encode_tokenizer(checkpoint)
    with atomic_file(destination) as partial:
        partial.write_bytes(content)


def encode_tokenizer(checkpoint: Path) -> bytes:
    """Return the bytes of tokenizer.mtok for a checkpoint; raise CheckpointError as `read_checkpoint_tokenizer`."""
    tokenizer = read_checkpoint_tokenizer(checkpoint)
    spec, added, stop = tokenizer.spec, tokenizer.added, tokenizer.stop
    with invalid_tokenizer(tokenizer.path):
        special = [token["id"] for token in added if token["special"]]
        kind, ids = f"{engine_facts.TOKENIZER_MAGIC} {engine_facts.PIPELINE}", " ".join(map(str, special + stop))
        return b"".join(
            [
                f"{kind}\n{len(special)} {len(stop)} 0\n{ids}\n".encode(),
                _meta_space_parts(tokenizer.meta_spaces, spec["model"]["merges"])
                if tokenizer.meta_spaces
                else _normalizer(spec.get("normalizer")) + _pre_tokenizer(spec.get("pre_tokenizer")),
                _model(tokenizer),
                _decoder(spec.get("decoder"), tokenizer.meta_spaces is None),
                _u32(len(added)),
                *map(_added_token, added),
                _u32(len(tokenizer.template.encode())),
                tokenizer.template.encode(),
                _string(tokenizer.eos),
                _u8(engine_facts.CLEAN_UP_SPACES if tokenizer.clean_up_spaces else 0),
                _string(tokenizer.bos),
            ]
        )


def unreached_words(checkpoint: Path) -> list[str]:
    """Return texts of tokens that only `ignore_merges` reaches; raise CheckpointError for an invalid tokenizer.json."""
    path = checkpoint / TOKENIZER_FILE
    stored, unreached = read_object(path), []
    with invalid_tokenizer(path, Exception):  # the library raises bare exceptions
        if not stored["model"].get("ignore_merges"):
            return []
        tokenizer = Tokenizer.from_str(json.dumps(stored))
        merging = Tokenizer.from_str(json.dumps(stored | {"model": stored["model"] | {"ignore_merges": False}}))
        for token, number in stored["model"]["vocab"].items():
            if [piece.id for piece in merging.model.tokenize(token)] != [number]:
                text = tokenizer.decoder.decode([token])
                if [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == [token]:
                    unreached.append(text)
    return unreached


def tokenizer_differences(checkpoint: Path) -> list[str]:
    """Return a message for each difference of the engine that a checkpoint's tokenizer and chat template cause.

    docs/bundle.md lists all known differences. Raise CheckpointError if the chat template or the tokenizer is invalid.
    """
    messages = []
    if words := unreached_words(checkpoint):
        examples = ", ".join(map(repr, words[:3]))
        messages.append(f"{len(words)} words of one token become several tokens of the same text ({examples})")
    text, others = chat_template(checkpoint), sorted(chat_templates(checkpoint).keys() - {DEFAULT})
    if others:
        messages.append(f"the bundle has the chat template {DEFAULT}, not {', '.join(others)}")
    if "tojson" in text:
        messages.append("the engine writes the keys of tools and their arguments in another order")
    try:
        constructs = template.unsupported(text)
    except BundleError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if constructs:
        messages.append(f"the chat template has constructs that the engine's Jinja lacks: {'; '.join(constructs)}")
    return messages


@functools.cache
def nfc_replacements() -> tuple[tuple[str, str], ...]:
    """Return NFC as string replacements, to be applied in order, each to the whole text.

    MNN's exporter writes NFC as a table of single code points, which does not compose, and replaces the joiner of emoji
    sequences and most control characters by spaces. Here canonical singletons come first, then base and mark to
    composed character, shorter compositions before longer ones, conjoining Hangul jamo included. They cost the engine
    0.3 ms for a short text, 2 ms for 10 kB of English and 95 ms for 10 kB of Korean. Characters come from Python's
    Unicode data and results from tokenizers, whose NFC is the one to match. The list is complete for single characters
    and for marks in canonical order; see docs/bundle.md for others.
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
    for character in composed:
        for mark in marks:
            if (text := character + mark) not in pairs and nfc(text) != text:
                pairs[text] = nfc(text)
    for syllable in map(chr, range(0xAC00, 0xD7A4)):
        jamo = unicodedata.normalize("NFD", syllable)
        pairs[jamo if len(jamo) == 2 else unicodedata.normalize("NFC", jamo[:2]) + jamo[2]] = syllable
    depth = {text: len(unicodedata.normalize("NFD", text)) for text in pairs}
    return (*singletons.items(), *sorted(pairs.items(), key=lambda pair: (depth[pair[0]], pair)))


def _meta_space_parts(words: MetaSpaces, merges: list[Any]) -> bytes:
    """Return normalizer and pre-tokenizer for words with meta spaces."""
    steps = [_u8(Normalizer.REPLACE) + _string(META_SPACE) + _string(" ")]
    if words.prepend == "text":
        steps.append(_u8(Normalizer.PREPEND) + _string(" "))
    splits = []
    if words.prepend == "always":
        splits.append(_u8(PreTokenizer.METASPACE) + _string(" ") + _u8(True))
    # A merge that crosses words joins the end of one and the beginning of the next.
    texts = ("".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges)
    if words.split_runs or not any(META_SPACE in text.lstrip(META_SPACE) for text in texts):
        pattern = SPLIT_EACH if words.split_runs else SPLIT_RUNS
        splits.append(_u8(PreTokenizer.SPLIT) + _string(pattern) + _u8(False) + _u8(SPLIT_BEHAVIORS["Isolated"]))
    splits.append(_u8(PreTokenizer.METASPACE) + _string(META_SPACE) + _u8(False))
    return _sequence(Normalizer.SEQUENCE, steps) + _sequence(PreTokenizer.SEQUENCE, splits)


def _normalizer(spec: dict[str, Any] | None) -> bytes:
    if spec is None:
        return _u8(Normalizer.NONE)
    match spec["type"]:
        case "NFC":
            replacements = nfc_replacements()
        case "Replace" if "String" in spec["pattern"]:
            replacements = ((spec["pattern"]["String"], spec["content"]),)
        case "Sequence":
            return _sequence(Normalizer.SEQUENCE, [_normalizer(part) for part in spec["normalizers"]])
        case kind:
            raise UnsupportedError("normalizer", kind)
    parts = [_u8(Normalizer.REPLACE) + _string(pattern) + _string(content) for pattern, content in replacements]
    return _sequence(Normalizer.SEQUENCE, parts)


def _pre_tokenizer(spec: dict[str, Any] | None) -> bytes:
    if spec is None:
        return _u8(PreTokenizer.NONE)
    match spec["type"]:
        case "ByteLevel":
            if spec["add_prefix_space"]:
                raise UnsupportedError("pre-tokenizer", "ByteLevel with add_prefix_space")
            return _u8(PreTokenizer.BYTE_LEVEL) + _u8(spec.get("use_regex", True))
        case "Split":
            pattern, behavior = spec["pattern"].get("Regex"), spec["behavior"]
            if not pattern or not pattern.isascii() or not _SUPPORTED_PATTERN.fullmatch(pattern):
                raise UnsupportedError("pre-tokenizer", f"Split by {spec['pattern']!r}")
            if behavior not in SPLIT_BEHAVIORS:
                raise UnsupportedError("pre-tokenizer", f"Split with the behavior {behavior}")
            flags = _u8(spec["invert"]) + _u8(SPLIT_BEHAVIORS[behavior])
            return _u8(PreTokenizer.SPLIT) + _string(pattern) + flags
        case "Sequence":
            return _sequence(PreTokenizer.SEQUENCE, [_pre_tokenizer(part) for part in spec["pretokenizers"]])
        case kind:
            raise UnsupportedError("pre-tokenizer", kind)


def _decoder(spec: dict[str, Any] | None, byte_level: bool = False) -> bytes:
    if spec is None or byte_level != (spec["type"] == "ByteLevel"):
        raise UnsupportedError("decoder", spec and spec["type"])
    match spec["type"]:
        case "ByteLevel":
            return _u8(Decoder.BYTE_LEVEL)
        case "ByteFallback":
            return _u8(Decoder.BYTE_FALLBACK)
        case "Fuse":
            return _u8(Decoder.FUSE)
        case "Replace" if "String" in spec["pattern"]:
            return _u8(Decoder.REPLACE) + _string(spec["pattern"]["String"]) + _string(spec["content"])
        case "Strip":
            return _u8(Decoder.STRIP) + _string(spec["content"]) + _u32(spec["start"]) + _u32(spec["stop"])
        case "Metaspace":
            prepended = spec.get("prepend_scheme", "always") != "never"
            return _u8(Decoder.METASPACE) + _string(spec["replacement"]) + _u8(prepended)
        case "Sequence":
            return _sequence(Decoder.SEQUENCE, [_decoder(part) for part in spec["decoders"]])
        case kind:
            raise UnsupportedError("decoder", kind)


def _model(tokenizer: CheckpointTokenizer) -> bytes:
    """Return the BPE model: vocabulary sorted by bytes and merges by ids, because the engine bisects both."""
    vocab: dict[str, int] = tokenizer.spec["model"]["vocab"]
    _check_vocabulary(tokenizer)
    texts = {number: text for text, number in vocab.items()}
    alphabet = ByteLevel(add_prefix_space=False, use_regex=False)
    for token in tokenizer.added:
        # The engine matches added tokens before the model gets the text. These entries are for decoding, which maps the
        # byte alphabet back; no text contains the empty string as a token.
        encoded = token["content"]
        if tokenizer.meta_spaces is None:
            encoded = "".join(piece for piece, _ in alphabet.pre_tokenize_str(encoded))
        unambiguous = vocab.get(encoded, token["id"]) == token["id"]
        texts[token["id"]] = encoded if unambiguous and not token["special"] else ""

    merges: dict[tuple[int, int], int] = {}
    for rank, merge in enumerate(tokenizer.spec["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{tokenizer.path}: merge {rank} names a token that is not in the vocabulary; save it again"
            )
        merges[vocab[left], vocab[right]] = rank

    entries = sorted(texts.items(), key=lambda entry: (entry[1].encode(), entry[0]))
    row = struct.Struct("<III")
    return b"".join(
        [
            _u8(Model.BPE),
            _u32(len(entries)),
            _u8(bool(tokenizer.spec["model"].get("byte_fallback"))),
            _u8(False),  # the pre-tokenizer maps bytes; with True the engine would map them again
            _u32(len(merges)),
            *(_string(text) + _u32(number) for number, text in entries),
            *(row.pack(left, right, rank) for (left, right), rank in sorted(merges.items())),
        ]
    )


def _check_vocabulary(tokenizer: CheckpointTokenizer) -> None:
    spec, vocabulary = tokenizer.spec, tokenizer.spec["model"]["vocab"].keys()
    if tokenizer.meta_spaces is None:
        kinds = [part["type"] for part in components(spec.get("pre_tokenizer"), "pretokenizers")]
        if "ByteLevel" not in kinds or not vocabulary >= set(ByteLevel.alphabet()):
            raise UnsupportedError("model", "BPE that is not byte-level")
    elif not spec["model"].get("byte_fallback") or not vocabulary >= BYTE_TOKENS:
        raise UnsupportedError("model", "BPE without byte fallback")
    # The engine's table has one row for each entry, and it writes past its end for a larger id. tokenizers renumbers
    # added tokens after a gap.
    if sorted(tokenizer.ids.values()) != list(range(len(tokenizer.ids))):
        raise CheckpointError(
            f"{tokenizer.path}: the ids of tokens and added tokens are not 0, 1, 2, ...; save it again"
        )


def _added_token(token: dict[str, Any]) -> bytes:
    flags = bytes([token["special"], token["lstrip"], token["rstrip"]])
    return _u32(token["id"]) + flags + _string(token["content"])


def _sequence(code: int, parts: list[bytes]) -> bytes:
    return _u8(code) + _u32(len(parts)) + b"".join(parts)


def _string(value: str) -> bytes:
    encoded = value.encode()
    if len(encoded) > 0xFFFF:
        raise CheckpointError(
            f"a string of {len(encoded)} bytes ({encoded[:20]!r}...) exceeds the 65535 bytes of MNN's tokenizer file;"
            " choose another checkpoint"
        )
    return struct.pack("<H", len(encoded)) + encoded
