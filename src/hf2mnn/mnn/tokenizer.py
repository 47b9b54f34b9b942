"""A Hugging Face fast tokenizer as `tokenizer.mtok`, the file that MNN's LLM engine reads.

The layout is the one of MNN 3.6.1: `docs/transformers/tokenizer.md` in MNN's repository, and where that is silent the
engine's reader, `PipelineTokenizer::load_vocab_binary`. A text header (`430 4`; how many special, stop and prefix ids;
the ids) is followed by a little-endian body: normalizer, pre-tokenizer, model, decoder, added tokens, chat template,
end-of-text token, flags, begin-of-text token. A string is a u16 byte count and UTF-8.

What is written: byte-level BPE, split by a pattern, normalized by NFC or not at all (the Qwen families, Llama 3), and
BPE over characters that falls back to bytes, with words that begin with a meta space (Llama 2, Mistral). Everything
else is refused by name rather than written as something that tokenizes differently.

Ids are those of a rendered chat, `tokenizer(text, add_special_tokens=False)` of transformers: what a post-processor
adds to bare text, such as a begin-of-text token, the chat template writes itself; the file has no prefix tokens.

Meta spaces stay spaces until the text is split into words, and become U+2581 only then, so that merging, which takes
the engine quadratic time, stays within a word where no merge crosses from one into the next.

The engine knows no `ignore_merges`, with which a whole word that is a token is that token, whatever its merges
(Llama 3). It comes to the same for tokens that their merges reach; `unreached_words` lists the others, which the engine
reads as two or more tokens of the same text.

The engine has no NFC. Its normalization table works on single code points, cannot compose, and turns the joiner of
emoji sequences and most control characters into spaces. So NFC becomes a sequence of string replacements, which the
engine does run: canonical singletons first, then base and mark to composed character, shorter compositions before
longer ones. Conjoining Hangul jamo are in it too.

Measured against transformers with the engine of the 3.6.1 wheel, ids are equal for English, Chinese, digits,
punctuation, white space, emoji, special tokens within text, and composed or decomposed accents, and every
character of Unicode 14 is split alike except as said here. They differ for

* U+0001 to U+0003, which the engine's splitter takes for a letter, a number and white space;
* U+0085, U+2028 and U+2029, which it does not take for white space;
* letters and numbers that came with Unicode 15.1 or later, such as U+13853, which only one of the two knows;
* U+017F after an apostrophe, which tokenizers takes for the `s` of a contraction;
* marks that NFC would only put in another order, or compose across a mark that stays in between;
* text after U+0000, which the Python binding drops;
* white space outside ASCII beside an added token that takes the white space beside it (`lstrip`, `rstrip`);
* `<img>...</img>` and `<audio>...</audio>` in a text, which the engine of a model with images takes for files.

The replacements cost the engine 0.3 ms per short text, 2 ms per 10 kB of English and 95 ms per 10 kB of Korean.
Merging takes it quadratic time within one piece of a split: 3300 Chinese characters without punctuation took 4 s, 9900
took 33 s.

Special tokens decode to nothing, which is what transformers does with `skip_special_tokens=True`. The engine's option
`prompt_cache` counts decoded bytes and therefore must stay off. Added tokens that are not special decode to their text.
A token that holds part of a character cannot be decoded alone through the Python binding (UnicodeDecodeError).

The engine's Jinja renders chats as transformers does for templates of the constructs of Qwen2 to Qwen3-VL, Llama 2 and
3, and Mistral (tests/mnn/test_prompts.py), but for white space: `trim` and `strip` take none but space, tab, newline
and carriage return. Elsewhere it differs and does not say so: no `raw` and no `for ... else`; filters it does not know
pass the value on (`default`, `join`, `first`, `last`, `selectattr`, `list`); `raise_exception` does nothing; no slices
of strings, `//`, `**`, `loop.revindex`, escapes like \\x41, defaults of macro arguments, or `if` expression without
`else`; True prints as `true`; the line of a comment stays as an empty line.
"""

from __future__ import annotations

import functools
import json
import re
import struct
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel

from hf2mnn.core.errors import BundleError, CheckpointError
from hf2mnn.core.files import whole_file
from hf2mnn.core.untrusted import read_bytes, read_json
from hf2mnn.mnn.template import render, unsupported

MAGIC, PIPELINE = 430, 4
NORMALIZER_NONE, NORMALIZER_PREPEND, NORMALIZER_REPLACE, NORMALIZER_SEQUENCE = 0, 2, 3, 4
SPLITTER_NONE, SPLITTER_BYTE_LEVEL, SPLITTER_META_SPACE, SPLITTER_PATTERN, SPLITTER_SEQUENCE = 0, 1, 3, 4, 6
SPLIT_BEHAVIOURS = {"Isolated": 0, "Removed": 1}
MODEL_BPE = 0
DECODER_BYTE_LEVEL, DECODER_BYTE_FALLBACK, DECODER_META_SPACE, DECODER_FUSE = 0, 1, 2, 4
DECODER_REPLACE, DECODER_STRIP, DECODER_SEQUENCE = 5, 6, 7
CLEAN_UP_SPACES = 1

META_SPACE = "\u2581"
NAMED = 3
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""Tokens of single bytes, of BPE that falls back to them."""
# Where words with meta spaces, here still spaces, may be cut: before each run of them, or before each one.
RUNS, EACH = " *[^ ]+| +", " [^ ]*|[^ ]+"

# The regular expressions that the engine's own matcher runs as tokenizers does. Not among them although it accepts
# them: \d and \w (other sets of characters), \p{Lu} (read as \p{L}), lazy quantifiers (taken as greedy), characters
# outside ASCII (matched by category), ^ and $ (taken literally), look-around but for (?!...).
_ESCAPE = r"\\(?:[rntfvsS]|[pP]\{[LNMPS]\}|[^\sA-Za-z0-9])"
_SUPPORTED_PATTERN = re.compile(
    rf"(?:(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\\\[\]&])+\]|\((?:\?:|\?i:|\?!|(?!\?))|\)|\||[^\\\[\]()|^$*+?{{}}])"
    r"(?:(?:[*+?]|\{\d+(?:,\d*)?\})(?![*+?{]))?)+"
)


def write_tokenizer(checkpoint: Path, destination: Path) -> None:
    """Write the tokenizer of a checkpoint folder as the file `destination`, whole or not at all, always the same bytes.

    Reads `tokenizer.json`, `tokenizer_config.json`, the chat template (`chat_template.jinja`, `chat_template.json` or
    the one in the configuration) and `generation_config.json`. Raises CheckpointError when the tokenizer, the chat template
    or every end-of-text token is missing, and for a kind of tokenizer that is not written.
    """
    content = encode_tokenizer(checkpoint)
    with whole_file(destination) as partial:
        partial.write_bytes(content)


def encode_tokenizer(checkpoint: Path) -> bytes:
    """The bytes of `tokenizer.mtok`; reads and raises as `write_tokenizer` does."""
    path = checkpoint / "tokenizer.json"
    tokenizer = _read_json(path)
    if tokenizer is None:
        raise CheckpointError(f"{path} is missing; save the checkpoint with its fast tokenizer (tokenizer.json).")
    config = _read_json(checkpoint / "tokenizer_config.json") or {}
    try:
        tokenizer = _as_loaded(tokenizer, config)
        added = sorted(tokenizer.get("added_tokens") or [], key=lambda token: token["id"])
        if _count_nfc(tokenizer.get("normalizer")) > 1:  # each is a megabyte
            raise _unsupported(path, "normalizer", "NFC more than once")
        _refuse_post_processor(tokenizer.get("post_processor"), path)
        _refuse_changed(added, tokenizer.get("normalizer"), path)
        words = _meta_words(tokenizer)
        if words is None:
            cutting = _normalizer(tokenizer.get("normalizer"), path)
            cutting += _pre_tokenizer(tokenizer.get("pre_tokenizer"), path)
        else:
            if words.prepend == "first":
                _refuse_first(chat_template(checkpoint), config, added, path)
            cutting = words.written(tokenizer["model"]["merges"])
        body = [
            cutting,
            _model(tokenizer, added, words is None, path),
            _bytes_or_words(tokenizer.get("decoder"), words is None, path),
            _added_tokens(added, path),
        ]
        special = [token["id"] for token in added if token["special"]]
        stop = _stop_ids(checkpoint, config, _ids(tokenizer["model"]["vocab"], added))
        ends = [_string(_token_text(config.get(key))) for key in ("eos_token", "bos_token")]
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer of the tokenizers library: {error!r}; save it again."
        ) from error
    template = chat_template(checkpoint).encode()
    return b"".join(
        [
            f"{MAGIC} {PIPELINE}\n{len(special)} {len(stop)} 0\n{' '.join(map(str, special + stop))}\n".encode(),
            *body,
            _u32(len(template)),
            template,
            ends[0],
            _u8(CLEAN_UP_SPACES if config.get("clean_up_tokenization_spaces") is True else 0),
            ends[1],
        ]
    )


@functools.cache
def nfc_replacements() -> tuple[tuple[str, str], ...]:
    """NFC as replacements to be made one after the other, each everywhere in the text, as the engine makes them.

    The characters come from Python's Unicode data, the results from tokenizers, whose NFC is the one to be equal to.
    Complete for single characters and for marks in canonical order; see the module's description for the rest.
    """
    nfc = functools.cache(NFC().normalize_str)
    singletons: dict[str, str] = {}
    composed: list[str] = []
    pairs: dict[str, str] = {}
    for character, decomposition in _canonical_decompositions():
        if nfc(character) != character:
            singletons[character] = nfc(character)
        elif nfc(decomposition) == character:
            pairs[decomposition] = character
            composed.append(character)
    # A mark typed after a composed character may belong before the mark that is already in it.
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


def _canonical_decompositions() -> Iterable[tuple[str, str]]:
    for character in map(chr, range(0x110000)):
        decomposition = unicodedata.decomposition(character)
        if decomposition and not decomposition.startswith("<"):
            yield character, "".join(chr(int(code, 16)) for code in decomposition.split())


def _as_loaded(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 takes the file: of its class LlamaTokenizer only vocabulary, merges and added tokens are read,
    and `legacy` and `add_prefix_space` of the configuration say where a meta space is put.
    """
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return tokenizer
    scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    splitter = {"type": "Metaspace", "replacement": META_SPACE, "prepend_scheme": scheme, "split": False}
    return tokenizer | {"normalizer": None, "pre_tokenizer": splitter}


@dataclass(frozen=True)
class _MetaWords:
    """How text becomes words that begin with a meta space.

    prepend: "text" puts one before each text between added tokens, "always" before one that has none there, "first" so
    before a prompt, "never" nowhere. each: text is cut before each meta space, also of a run of them.
    """

    prepend: str
    each: bool

    def written(self, merges: list[Any]) -> bytes:
        """Normalizer and pre-tokenizer."""
        steps = [_u8(NORMALIZER_REPLACE) + _string(META_SPACE) + _string(" ")]
        if self.prepend == "text":
            steps.append(_u8(NORMALIZER_PREPEND) + _string(" "))
        cuts = []
        if self.prepend == "always":
            cuts.append(_u8(SPLITTER_META_SPACE) + _string(" ") + _u8(True))
        if self.each or not any(_crosses(merge) for merge in merges):
            pattern = EACH if self.each else RUNS
            cuts.append(_u8(SPLITTER_PATTERN) + _string(pattern) + _u8(False) + _u8(SPLIT_BEHAVIOURS["Isolated"]))
        cuts.append(_u8(SPLITTER_META_SPACE) + _string(META_SPACE) + _u8(False))
        return b"".join(
            [_u8(NORMALIZER_SEQUENCE), _u32(len(steps)), *steps, _u8(SPLITTER_SEQUENCE), _u32(len(cuts)), *cuts]
        )


def _crosses(merge: str | list[str]) -> bool:
    """Whether it joins the end of a word and the beginning of the next."""
    return META_SPACE in "".join(merge.split(" ") if isinstance(merge, str) else merge).lstrip(META_SPACE)


def _meta_words(tokenizer: dict[str, Any]) -> _MetaWords | None:
    """None where the file does not say so in one of the two usual ways: by a normalizer, or by a pre-tokenizer."""
    normalizer, splitter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if splitter is None and normalizer is not None:
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE}
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        if steps == [{"type": "Prepend", "prepend": META_SPACE}, replaced]:
            return _MetaWords("text", each=False)
        return _MetaWords("never", each=False) if steps == [replaced] else None
    if normalizer is None and splitter is not None and splitter["type"] == "Metaspace":
        scheme = splitter.get("prepend_scheme") or ("always" if splitter.get("add_prefix_space", True) else "never")
        if splitter["replacement"] == META_SPACE and scheme in ("always", "first", "never"):
            return _MetaWords(scheme, splitter.get("split") is not False)
    return None


def _refuse_first(template: str, config: dict[str, Any], added: list[dict[str, Any]], path: Path) -> None:
    """The engine does not know where in a prompt a text stands. Behind an added token it is not the first one."""
    tokens = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token") if config.get(key)}
    prompt = render(template, [{"role": "user", "content": "a"}], tokens)
    if prompt is None or not prompt.startswith(tuple(token["content"] for token in added)):
        raise _unsupported(path, "pre-tokenizer", "Metaspace before the first text, which a chat begins with,")


def unreached_words(checkpoint: Path) -> list[str]:
    """Texts of tokens that `ignore_merges` reads whole although no merges lead to them, which the engine cannot do.

    Raises:
        CheckpointError: the checkpoint's tokenizer.json is no tokenizer.
    """
    path = checkpoint / "tokenizer.json"
    stored = _read_json(path) or {}
    try:
        if not stored["model"].get("ignore_merges"):
            return []
        whole = Tokenizer.from_str(json.dumps(stored))
        merging = Tokenizer.from_str(json.dumps(stored | {"model": stored["model"] | {"ignore_merges": False}}))
        unreached = []
        for token, number in stored["model"]["vocab"].items():
            if [made.id for made in merging.model.tokenize(token)] != [number]:
                text = whole.decoder.decode([token])
                if [piece for piece, _ in whole.pre_tokenizer.pre_tokenize_str(text)] == [token]:
                    unreached.append(text)
    except Exception as error:  # the library raises it as it is
        raise CheckpointError(
            f"{path} is not a tokenizer of the tokenizers library: {error!r}; save it again."
        ) from error
    return unreached


def departures(checkpoint: Path) -> list[str]:
    """What the engine makes otherwise of a checkpoint's prompts, whatever is written for it: a sentence each.

    Raises:
        CheckpointError: the chat template or the tokenizer is none.
    """
    found = []
    if words := unreached_words(checkpoint):
        named = ", ".join(map(repr, words[:NAMED]))
        found.append(f"{len(words)} words that are one token are read as several, which spell the same ({named})")
    try:
        constructs = unsupported(chat_template(checkpoint))
    except BundleError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if constructs:
        found.append(f"the chat template holds what the engine's Jinja does not run: {'; '.join(constructs)}")
    return found


def _count_nfc(spec: dict[str, Any] | None) -> int:
    if spec is None or spec["type"] != "Sequence":
        return int(spec is not None and spec["type"] == "NFC")
    return sum(map(_count_nfc, spec["normalizers"]))


def _normalizer(spec: dict[str, Any] | None, path: Path) -> bytes:
    if spec is None:
        return _u8(NORMALIZER_NONE)
    match spec["type"]:
        case "NFC":
            replacements = nfc_replacements()
        case "Replace" if "String" in spec["pattern"]:
            replacements = ((spec["pattern"]["String"], spec["content"]),)
        case "Sequence":
            parts = [_normalizer(part, path) for part in spec["normalizers"]]
            return _u8(NORMALIZER_SEQUENCE) + _u32(len(parts)) + b"".join(parts)
        case kind:
            raise _unsupported(path, "normalizer", kind)
    parts = [_u8(NORMALIZER_REPLACE) + _string(pattern) + _string(content) for pattern, content in replacements]
    return _u8(NORMALIZER_SEQUENCE) + _u32(len(parts)) + b"".join(parts)


def _pre_tokenizer(spec: dict[str, Any] | None, path: Path) -> bytes:
    if spec is None:
        return _u8(SPLITTER_NONE)
    match spec["type"]:
        case "ByteLevel":
            if spec["add_prefix_space"]:
                raise _unsupported(path, "pre-tokenizer", "ByteLevel with add_prefix_space")
            return _u8(SPLITTER_BYTE_LEVEL) + _u8(spec.get("use_regex", True))
        case "Split":
            pattern, behaviour = spec["pattern"].get("Regex"), spec["behavior"]
            if not pattern or not pattern.isascii() or not _SUPPORTED_PATTERN.fullmatch(pattern):
                raise _unsupported(path, "pre-tokenizer", f"Split by {spec['pattern']!r}")
            if behaviour not in SPLIT_BEHAVIOURS:
                raise _unsupported(path, "pre-tokenizer", f"Split with the behaviour {behaviour}")
            return _u8(SPLITTER_PATTERN) + _string(pattern) + _u8(spec["invert"]) + _u8(SPLIT_BEHAVIOURS[behaviour])
        case "Sequence":
            parts = [_pre_tokenizer(part, path) for part in spec["pretokenizers"]]
            return _u8(SPLITTER_SEQUENCE) + _u32(len(parts)) + b"".join(parts)
        case kind:
            raise _unsupported(path, "pre-tokenizer", kind)


def _bytes_or_words(spec: dict[str, Any] | None, byte_level: bool, path: Path) -> bytes:
    if spec is None or byte_level != (spec["type"] == "ByteLevel"):
        raise _unsupported(path, "decoder", spec and spec["type"])
    return _decoder(spec, path)


def _decoder(spec: dict[str, Any], path: Path) -> bytes:
    match spec["type"]:
        case "ByteLevel":
            return _u8(DECODER_BYTE_LEVEL)
        case "ByteFallback":
            return _u8(DECODER_BYTE_FALLBACK)
        case "Fuse":
            return _u8(DECODER_FUSE)
        case "Replace" if "String" in spec["pattern"]:
            return _u8(DECODER_REPLACE) + _string(spec["pattern"]["String"]) + _string(spec["content"])
        case "Strip":
            return _u8(DECODER_STRIP) + _string(spec["content"]) + _u32(spec["start"]) + _u32(spec["stop"])
        case "Metaspace":
            prepended = spec.get("prepend_scheme", "always") != "never"
            return _u8(DECODER_META_SPACE) + _string(spec["replacement"]) + _u8(prepended)
        case "Sequence":
            parts = [_decoder(part, path) for part in spec["decoders"]]
            return _u8(DECODER_SEQUENCE) + _u32(len(parts)) + b"".join(parts)
        case kind:
            raise _unsupported(path, "decoder", kind)


def _model(tokenizer: dict[str, Any], added: list[dict[str, Any]], byte_level: bool, path: Path) -> bytes:
    """Vocabulary sorted by bytes, merges sorted by the ids of their halves: the engine looks both up by bisection."""
    model = tokenizer["model"]
    # Files of old releases do not name the type; only BPE has merges.
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        raise _unsupported(path, "model", model.get("type"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _unsupported(path, "model", f"BPE with {option}")
    vocab: dict[str, int] = model["vocab"]
    if byte_level and not (_byte_level(tokenizer.get("pre_tokenizer")) and vocab.keys() >= set(ByteLevel.alphabet())):
        raise _unsupported(path, "model", "BPE that is not byte-level")
    if not byte_level and not (model.get("byte_fallback") and vocab.keys() >= BYTES):
        raise _unsupported(path, "model", "BPE that does not fall back to bytes")

    # The engine's table has as many rows as there are entries and writes past its end for a greater id; and tokenizers
    # renumbers added tokens that leave a gap.
    ids = _ids(vocab, added)
    if sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(f"{path}: the ids of tokens and added tokens are not 0, 1, 2, ...; save it again.")
    texts = {number: text for text, number in vocab.items()}
    for token in added:
        # Added tokens are found before the model sees the text; here they stand to be decoded, which reads the byte
        # alphabet back. No text looks up the empty string.
        encoded = _byte_alphabet(token["content"]) if byte_level else token["content"]
        unambiguous = vocab.get(encoded, token["id"]) == token["id"]
        texts[token["id"]] = encoded if unambiguous and not token["special"] else ""

    merges: dict[tuple[int, int], int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(f"{path}: merge {rank} names a token that is not in the vocabulary; save it again.")
        merges[vocab[left], vocab[right]] = rank

    entries = sorted((text.encode(), number) for number, text in texts.items())
    row = struct.Struct("<III")
    return b"".join(
        [
            _u8(MODEL_BPE),
            _u32(len(entries)),
            _u8(bool(model.get("byte_fallback"))),
            _u8(False),  # bytes are mapped by the pre-tokenizer; set, the engine would map them once more
            _u32(len(merges)),
            *(_string(text) + _u32(number) for text, number in entries),
            *(row.pack(left, right, rank) for (left, right), rank in sorted(merges.items())),
        ]
    )


def _byte_level(spec: dict[str, Any] | None) -> bool:
    if spec is None:
        return False
    return spec["type"] == "ByteLevel" or any(_byte_level(part) for part in spec.get("pretokenizers", []))


def _byte_alphabet(text: str) -> str:
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in splitter.pre_tokenize_str(text))


def _ids(vocab: dict[str, int], added: list[dict[str, Any]]) -> dict[str, int]:
    return vocab | {token["content"]: token["id"] for token in added}


def _added_tokens(added: list[dict[str, Any]], path: Path) -> bytes:
    parts = [
        _u32(token["id"]) + bytes([token["special"], token["lstrip"], token["rstrip"]]) + _string(token["content"])
        for token in added
    ]
    return _u32(len(parts)) + b"".join(parts)


def _refuse_changed(added: list[dict[str, Any]], normalizer: dict[str, Any] | None, path: Path) -> None:
    """The engine looks for added tokens in the text as it is, wherever they stand."""
    words = normalizer and not _count_nfc(normalizer)
    for token in added:
        if token["single_word"]:
            raise _unsupported(path, "added token", f"{token['content']!r} with single_word")
        if words and token.get("normalized"):
            raise _unsupported(path, "added token", f"{token['content']!r} with normalized")


def _refuse_post_processor(spec: dict[str, Any] | None, path: Path) -> None:
    """Let pass what adds nothing to a chat's ids: what only moves offsets, and templates, which transformers leaves out
    for text that a chat template wrote.
    """
    if spec is None or spec["type"] in ("ByteLevel", "TemplateProcessing"):
        return
    if spec["type"] != "Sequence":
        raise _unsupported(path, "post-processor", spec["type"])
    for part in spec["processors"]:
        _refuse_post_processor(part, path)


def _stop_ids(checkpoint: Path, config: dict[str, Any], ids: dict[str, int]) -> list[int]:
    listed = (_read_json(checkpoint / "generation_config.json") or {}).get("eos_token_id")
    stop = {listed} if isinstance(listed, int) else set(listed or [])
    if text := _token_text(config.get("eos_token")):
        if text not in ids:
            raise CheckpointError(
                f"{checkpoint / 'tokenizer_config.json'}: eos_token {text!r} is not a token; name one that exists."
            )
        stop.add(ids[text])
    if any(type(number) is not int or not 0 <= number < 1 << 31 for number in stop):
        raise CheckpointError(
            f"{checkpoint / 'generation_config.json'}: {listed!r} are not ids of tokens; save it again."
        )
    if not stop:
        raise CheckpointError(
            f"{checkpoint} names no end-of-text token, so the engine would never stop; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json."
        )
    return sorted(stop)


def chat_template(checkpoint: Path) -> str:
    """The template as Jinja reads it: newlines made one kind, the last one dropped. The engine does neither.

    Raises:
        CheckpointError: there is none.
    """
    path = checkpoint / "chat_template.jinja"
    try:
        if path.is_file():
            template = read_bytes(path).decode()
        else:
            path = checkpoint / "chat_template.json"
            stored = _read_json(path) or _read_json(path := checkpoint / "tokenizer_config.json") or {}
            template = stored.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str | None):
            raise TypeError(f"it is a {type(template).__name__}")
        template and template.encode()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the chat template in {path} is none ({error}); save it again.") from None
    if not template:
        raise CheckpointError(
            f"{checkpoint} has no chat template; put one in chat_template.jinja or tokenizer_config.json."
        )
    return re.sub(r"\r\n|\r", "\n", template).removesuffix("\n")


def _token_text(token: str | dict[str, Any] | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file. CheckpointError when it holds anything else."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; save it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}; save it again.")
    return value


def _unsupported(path: Path, part: str, kind: str | None) -> CheckpointError:
    return CheckpointError(
        f"{path}: {part} {kind or 'none'} cannot be written for MNN's tokenizer; "
        "byte-level BPE as of Qwen and Llama 3 and BPE with byte fallback as of Llama 2 and Mistral are converted."
    )


def _u8(value: int) -> bytes:
    return struct.pack("<B", value)


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _string(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    if len(encoded) > 0xFFFF:
        raise CheckpointError(
            f"A string of {len(encoded)} bytes ({encoded[:20]!r}...) does not fit MNN's tokenizer file."
        )
    return struct.pack("<H", len(encoded)) + encoded
