"""The tokenizer of a Hugging Face checkpoint, as far as it can be written for MNN's engine.

Supported are byte-level BPE, split by a pattern and normalized by NFC or not at all (the Qwen families, Llama 3), and
BPE over characters with byte fallback, whose words begin with a meta space (Llama 2, Mistral). Other tokenizers are
rejected: they would be written as tokenizers with other ids.

Ids are those of a rendered chat, `tokenizer(text, add_special_tokens=False)` in transformers. The chat template writes
begin-of-text tokens itself, so post-processors that add them are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.facts import chat_template, stop_ids
from hf2mnn.checkpoint.tokenizer import contents, load_tokenizer
from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.template import render
from hf2mnn.mnn.whole_words import WholeWords, find_whole_words

META_SPACE = "\u2581"
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}  # tokens of single bytes in BPE with byte fallback


class UnsupportedError(Exception):
    """A part of a tokenizer, and its kind, that cannot be written for MNN's engine."""


@dataclass(frozen=True)
class MetaSpaces:
    """Splitting of text into words that begin with a meta space.

    `prepend` is where one is added: "text" before each text between added tokens, "always" before each text that does
    not begin with one, "first" the same before a prompt only, "never" nowhere.
    """

    prepend: str
    split_runs: bool  # whether text is split before each meta space of a run, not before the run alone


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A tokenizer of a supported kind."""

    folder: Path  # for messages
    spec: dict[str, Any]  # in the layout of tokenizer.json
    added: list[dict[str, Any]]  # added tokens, sorted by id
    ids: dict[str, int]  # of all tokens, by text
    meta_spaces: MetaSpaces | None  # None for byte-level BPE
    whole_words: WholeWords
    stop: list[int]  # ids of end-of-text tokens
    eos: str  # or ""
    bos: str  # or ""
    template: str


def read_checkpoint_tokenizer(checkpoint: Path) -> CheckpointTokenizer:
    """Load the tokenizer of a checkpoint with transformers, and read its chat template and its stop ids.

    Raise CheckpointError if transformers cannot load it, the chat template or every end-of-text token is missing, or a
    part of the tokenizer is not supported.
    """
    loaded = load_tokenizer(checkpoint)
    spec = contents(loaded)
    with unsupported_parts(checkpoint):
        added = sorted(spec["added_tokens"], key=lambda token: token["id"])
        for token in added:  # a token that was special in one file and is not in another is still not decoded
            token["special"] = loaded.backend_tokenizer.decode([token["id"]], skip_special_tokens=True) == ""
        if loaded.split_special_tokens:
            raise UnsupportedError("option", "split_special_tokens")
        _check_options(spec, added)
        meta_spaces = _meta_spaces(spec["normalizer"], spec["pre_tokenizer"])
        whole_words = find_whole_words(loaded)
        if meta_spaces and whole_words.pieces:
            raise UnsupportedError("model", "BPE with ignore_merges and meta spaces")
        ids, eos, bos = loaded.get_vocab(), loaded.eos_token or "", loaded.bos_token or ""
        stop = sorted({*stop_ids(checkpoint, loaded), *([ids[eos]] if eos else [])})  # applications stop at eos too
        template = chat_template(checkpoint, loaded)
        if meta_spaces and meta_spaces.prepend == "first":
            _check_first(template, {"bos_token": bos, "eos_token": eos}, added)
        return CheckpointTokenizer(checkpoint, spec, added, ids, meta_spaces, whole_words, stop, eos, bos, template)


@contextmanager
def unsupported_parts(folder: Path) -> Iterator[None]:
    """Raise CheckpointError in place of UnsupportedError."""
    try:
        yield
    except UnsupportedError as error:
        part, kind = error.args
        raise CheckpointError(
            f"the tokenizer of {folder}: {part} {kind or 'none'} cannot be written for MNN's tokenizer; choose a"
            " checkpoint with byte-level BPE (as Qwen and Llama 3) or BPE with byte fallback (as Llama 2 and Mistral)"
        ) from None


def components(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the components of a normalizer, for example; `key` has those of a sequence, which may be nested."""
    if spec is None or spec["type"] != "Sequence":
        return [spec] if spec else []
    return [component for part in spec[key] for component in components(part, key)]


def _meta_spaces(normalizer: dict[str, Any] | None, splitter: dict[str, Any] | None) -> MetaSpaces | None:
    """Return how the tokenizer adds meta spaces: in its normalizer or in its pre-tokenizer; None if in neither."""
    if splitter is None and normalizer is not None:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE}
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        if steps == [{"type": "Prepend", "prepend": META_SPACE}, replace]:
            return MetaSpaces("text", split_runs=False)
        return MetaSpaces("never", split_runs=False) if steps == [replace] else None
    if normalizer is None and splitter and (splitter["type"], splitter.get("replacement")) == ("Metaspace", META_SPACE):
        return MetaSpaces(splitter["prepend_scheme"], splitter["split"])
    return None


def _check_first(template: str, tokens: dict[str, str], added: list[dict[str, Any]]) -> None:
    """Check that prompts begin with an added token, because the engine does not know which text is the first."""
    tokens = {name: text for name, text in tokens.items() if text}
    prompt = render(template, [{"role": "user", "content": "a"}], tokens)
    if prompt is None or not prompt.startswith(tuple(token["content"] for token in added)):
        raise UnsupportedError("pre-tokenizer", "Metaspace before the first text, which a chat begins with,")


def _check_options(spec: dict[str, Any], added: list[dict[str, Any]]) -> None:
    """Check for options that the engine lacks."""
    normalizer, model = spec["normalizer"], spec["model"]
    nfc = [part for part in components(normalizer, "normalizers") if part["type"] == "NFC"]
    if len(nfc) > 1:  # each is a megabyte
        raise UnsupportedError("normalizer", "NFC more than once")
    # ByteLevel only moves offsets, and transformers ignores templates for the text of a chat template.
    for part in components(spec.get("post_processor"), "processors"):
        if part["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise UnsupportedError("post-processor", part["type"])
    # The engine finds added tokens in the text before normalization.
    for token in added:
        if token["single_word"]:
            raise UnsupportedError("added token", f"{token['content']!r} with single_word")
        if normalizer and not nfc and token.get("normalized"):
            raise UnsupportedError("added token", f"{token['content']!r} with normalized")
    if model["type"] != "BPE":
        raise UnsupportedError("model", model["type"])
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedError("model", f"BPE with {option}")
