"""Write a checkpoint's tokenizer as `tokenizer.mtok`, the file of MNN's LLM engine.

The format is that of MNN 3.6.1: docs/transformers/tokenizer.md in MNN's repository, and for the rest the engine's
reader, `PipelineTokenizer::load_vocab_binary`. A text header (`430 4`; the numbers of special, stop and prefix ids; the
ids) is followed by a little-endian body: normalizer, pre-tokenizer, model, decoder, added tokens, chat template,
end-of-text token, flags, begin-of-text token. A string is a u16 byte count and UTF-8. There are no prefix tokens.

Meta spaces stay spaces until the text is split into words. The engine's merging takes quadratic time, so it must stay
inside a word where no merge crosses a word boundary.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from hf2mnn.checkpoint.facts import DEFAULT, chat_templates, default_template
from hf2mnn.core.errors import BundleError, CheckpointError
from hf2mnn.core.files import atomic_file
from hf2mnn.mnn import engine_facts, template
from hf2mnn.mnn.checkpoint_tokenizer import (
    BYTE_TOKENS,
    META_SPACE,
    CheckpointTokenizer,
    MetaSpaces,
    UnsupportedError,
    components,
    read_checkpoint_tokenizer,
    unsupported_parts,
)
from hf2mnn.mnn.engine_facts import SPLIT_BEHAVIORS, Decoder, Model, Normalizer, PreTokenizer
from hf2mnn.mnn.nfc import nfc_replacements
from hf2mnn.mnn.whole_words import MARK, WholeWords

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
    with unsupported_parts(checkpoint):
        special = [token["id"] for token in added if token["special"]]
        kind, ids = f"{engine_facts.TOKENIZER_MAGIC} {engine_facts.PIPELINE}", " ".join(map(str, special + stop))
        return b"".join(
            [
                f"{kind}\n{len(special)} {len(stop)} 0\n{ids}\n".encode(),
                _meta_space_parts(tokenizer.meta_spaces, spec["model"]["merges"])
                if tokenizer.meta_spaces
                else _normalizer(spec["normalizer"]) + _words(spec["pre_tokenizer"], tokenizer.whole_words),
                _model(tokenizer),
                _decoder(spec["decoder"], tokenizer.meta_spaces is None),
                _u32(len(added)),
                *map(_added_token, added),
                _u32(len(tokenizer.template.encode())),
                tokenizer.template.encode(),
                _string(tokenizer.eos),
                _u8(0),  # transformers cleans up no spaces after BPE
                _string(tokenizer.bos),
            ]
        )


def template_differences(checkpoint: Path) -> list[str]:
    """Return a message for each way in which the engine renders the chat template differently.

    docs/bundle.md lists all known differences. Raise CheckpointError if the chat template is invalid.
    """
    templates = chat_templates(checkpoint)
    text, others = default_template(templates, checkpoint), sorted(templates.keys() - {DEFAULT})
    messages = [f"the bundle has the chat template {DEFAULT}, not {', '.join(others)}"] if others else []
    if "tojson" in text:
        messages.append("the engine writes the keys of tools and their arguments in another order")
    try:
        constructs = template.unsupported(text)
    except BundleError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if constructs:
        messages.append(f"the chat template has constructs that the engine's Jinja lacks: {'; '.join(constructs)}")
    return messages


def _meta_space_parts(words: MetaSpaces, merges: list[Any]) -> bytes:
    """Return normalizer and pre-tokenizer for words with meta spaces."""
    steps = [_u8(Normalizer.REPLACE) + _string(META_SPACE) + _string(" ")]
    if words.prepend == "text":
        steps.append(_u8(Normalizer.PREPEND) + _string(" "))
    splits = []
    if words.prepend == "always":
        splits.append(_u8(PreTokenizer.METASPACE) + _string(" ") + _u8(True))
    # A merge that crosses words joins the end of one and the beginning of the next.
    texts = map("".join, merges)
    if words.split_runs or not any(META_SPACE in text.lstrip(META_SPACE) for text in texts):
        pattern = SPLIT_EACH if words.split_runs else SPLIT_RUNS
        splits.append(_split(pattern, "Isolated"))
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


def _words(spec: dict[str, Any] | None, whole_words: WholeWords) -> bytes:
    """Return the pre-tokenizer of byte-level BPE, with a mark before words of one token."""
    splitter = _pre_tokenizer(spec)
    if not whole_words.pieces:
        return splitter
    mark = _u8(PreTokenizer.METASPACE) + _string(MARK) + _u8(True)
    return _sequence(PreTokenizer.SEQUENCE, [splitter, mark, _split(whole_words.pattern, "Removed")])


def _split(pattern: str, behavior: str, invert: bool = False) -> bytes:
    return _u8(PreTokenizer.SPLIT) + _string(pattern) + _u8(invert) + _u8(SPLIT_BEHAVIORS[behavior])


def _pre_tokenizer(spec: dict[str, Any] | None) -> bytes:
    if spec is None:
        return _u8(PreTokenizer.NONE)
    match spec["type"]:
        case "ByteLevel":
            letters = _u8(PreTokenizer.BYTE_LEVEL) + _u8(spec["use_regex"])
            prefix = _u8(PreTokenizer.METASPACE) + _string(" ") + _u8(True)
            return _sequence(PreTokenizer.SEQUENCE, [prefix, letters]) if spec["add_prefix_space"] else letters
        case "Split":
            pattern, behavior = spec["pattern"].get("Regex"), spec["behavior"]
            if not pattern or not pattern.isascii() or not _SUPPORTED_PATTERN.fullmatch(pattern):
                raise UnsupportedError("pre-tokenizer", f"Split by {spec['pattern']!r}")
            if behavior not in SPLIT_BEHAVIORS:
                raise UnsupportedError("pre-tokenizer", f"Split with the behavior {behavior}")
            return _split(pattern, behavior, spec["invert"])
        case "Digits":
            return _split(r"\p{N}" if spec["individual_digits"] else r"\p{N}+", "Isolated")
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

    merges = [(vocab[left], vocab[right]) for left, right in tokenizer.spec["model"]["merges"]]
    marked, joins = {}, []
    if tokenizer.whole_words.pieces:
        marked, joins = tokenizer.whole_words.entries(vocab, len(texts))
    ranks = {pair: rank for rank, pair in enumerate(dict.fromkeys([*merges, *joins]))}
    pairs = [*texts.items(), *((number, text) for text, number in marked.items())]
    entries = sorted(pairs, key=lambda entry: (entry[1].encode(), entry[0]))
    row = struct.Struct("<III")
    return b"".join(
        [
            _u8(Model.BPE),
            _u32(len(entries)),
            _u8(bool(tokenizer.spec["model"].get("byte_fallback"))),
            _u8(False),  # the pre-tokenizer maps bytes; with True the engine would map them again
            _u32(len(ranks)),
            *(_string(text) + _u32(number) for number, text in entries),
            *(row.pack(left, right, rank) for (left, right), rank in sorted(ranks.items())),
        ]
    )


def _check_vocabulary(tokenizer: CheckpointTokenizer) -> None:
    spec, vocabulary = tokenizer.spec, tokenizer.spec["model"]["vocab"].keys()
    if tokenizer.meta_spaces is None:
        kinds = [part["type"] for part in components(spec["pre_tokenizer"], "pretokenizers")]
        if "ByteLevel" not in kinds or not vocabulary >= set(ByteLevel.alphabet()):
            raise UnsupportedError("model", "BPE that is not byte-level")
    elif not spec["model"].get("byte_fallback") or not vocabulary >= BYTE_TOKENS:
        raise UnsupportedError("model", "BPE without byte fallback")
    # The engine's table has one row for each entry, and it writes past its end for a larger id. tokenizers renumbers
    # added tokens after a gap.
    if sorted(tokenizer.ids.values()) != list(range(len(tokenizer.ids))):
        raise CheckpointError(
            f"{tokenizer.folder}: the ids of tokens and added tokens are not 0, 1, 2, ...; save the tokenizer again"
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
