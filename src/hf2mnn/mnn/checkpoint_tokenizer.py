"""The fast tokenizer of a Hugging Face checkpoint: its files, as far as they can be written for MNN's engine.

Supported are byte-level BPE, split by a pattern and normalized by NFC or not at all (the Qwen families, Llama 3), and
BPE over characters with byte fallback, whose words begin with a meta space (Llama 2, Mistral). Other tokenizers are
rejected: they would be written as tokenizers with other ids.

Ids are those of a rendered chat, `tokenizer(text, add_special_tokens=False)` in transformers. The chat template writes
begin-of-text tokens itself, so post-processors that add them are ignored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.facts import chat_template, read_object, stop_ids
from hf2mnn.checkpoint.folder import read_json
from hf2mnn.core.errors import CheckpointError
from hf2mnn.mnn.template import render

TOKENIZER_FILE = "tokenizer.json"
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

    path: Path  # tokenizer.json, for messages
    spec: dict[str, Any]  # its contents, as transformers loads them
    added: list[dict[str, Any]]  # added tokens, sorted by id
    ids: dict[str, int]  # of all tokens, by text
    meta_spaces: MetaSpaces | None  # None for byte-level BPE
    stop: list[int]  # ids of end-of-text tokens
    eos: str  # or ""
    bos: str  # or ""
    clean_up_spaces: bool  # whether decoding removes spaces before punctuation
    template: str


def read_checkpoint_tokenizer(checkpoint: Path) -> CheckpointTokenizer:
    """Read tokenizer.json and tokenizer_config.json of a checkpoint, its chat template and its stop ids.

    Raise CheckpointError if a file, the chat template or every end-of-text token is missing, or a part of the tokenizer
    is not supported.
    """
    path = checkpoint / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; save the checkpoint with its fast tokenizer (tokenizer.json)")
    stored, config = read_json(path), read_object(checkpoint / "tokenizer_config.json")
    with invalid_tokenizer(path):
        spec = _as_loaded(stored, config)
        added = sorted(spec.get("added_tokens") or [], key=lambda token: token["id"])
        _check_options(spec, added)
        meta_spaces = _meta_spaces(spec.get("normalizer"), spec.get("pre_tokenizer"))
        ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in added}
        eos, bos = (_token_text(config.get(key)) for key in ("eos_token", "bos_token"))
        stop = _stop_ids(checkpoint, eos, ids)
        template = chat_template(checkpoint)
        if meta_spaces and meta_spaces.prepend == "first":
            _check_first(template, {"bos_token": bos, "eos_token": eos}, added)
        clean_up = config.get("clean_up_tokenization_spaces") is True
        return CheckpointTokenizer(path, spec, added, ids, meta_spaces, stop, eos, bos, clean_up, template)


@contextmanager
def invalid_tokenizer(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Raise CheckpointError in place of errors, of these and other types, that a tokenizer.json causes."""
    try:
        yield
    except UnsupportedError as error:
        part, kind = error.args
        raise CheckpointError(
            f"{path}: {part} {kind or 'none'} cannot be written for MNN's tokenizer; choose a checkpoint with"
            " byte-level BPE (as Qwen and Llama 3) or BPE with byte fallback (as Llama 2 and Mistral)"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, struct.error, *errors) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer of the tokenizers library: {error!r}; save it again"
        ) from error


def components(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the components of a normalizer, for example; `key` has those of a sequence, which may be nested."""
    if spec is None or spec["type"] != "Sequence":
        return [spec] if spec else []
    return [component for part in spec[key] for component in components(part, key)]


def _as_loaded(spec: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json as transformers 5 loads it.

    The class LlamaTokenizer reads only vocabulary, merges and added tokens; `legacy` and `add_prefix_space` of the
    configuration determine where a meta space is added.
    """
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return spec
    scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    splitter = {"type": "Metaspace", "replacement": META_SPACE, "prepend_scheme": scheme, "split": False}
    return spec | {"normalizer": None, "pre_tokenizer": splitter}


def _meta_spaces(normalizer: dict[str, Any] | None, splitter: dict[str, Any] | None) -> MetaSpaces | None:
    """Return how the tokenizer adds meta spaces: in its normalizer or in its pre-tokenizer; None if in neither."""
    if splitter is None and normalizer is not None:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE}
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        if steps == [{"type": "Prepend", "prepend": META_SPACE}, replace]:
            return MetaSpaces("text", split_runs=False)
        return MetaSpaces("never", split_runs=False) if steps == [replace] else None
    if normalizer is None and splitter is not None and splitter["type"] == "Metaspace":
        scheme = splitter.get("prepend_scheme") or ("always" if splitter.get("add_prefix_space", True) else "never")
        if splitter["replacement"] == META_SPACE and scheme in ("always", "first", "never"):
            return MetaSpaces(scheme, splitter.get("split") is not False)
    return None


def _check_first(template: str, tokens: dict[str, str], added: list[dict[str, Any]]) -> None:
    """Check that prompts begin with an added token, because the engine does not know which text is the first."""
    tokens = {name: text for name, text in tokens.items() if text}
    prompt = render(template, [{"role": "user", "content": "a"}], tokens)
    if prompt is None or not prompt.startswith(tuple(token["content"] for token in added)):
        raise UnsupportedError("pre-tokenizer", "Metaspace before the first text, which a chat begins with,")


def _check_options(spec: dict[str, Any], added: list[dict[str, Any]]) -> None:
    """Check for options that the engine lacks."""
    normalizer, model = spec.get("normalizer"), spec["model"]
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
    # Files of old releases do not name the type; only BPE has merges.
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        raise UnsupportedError("model", model.get("type"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedError("model", f"BPE with {option}")


def _stop_ids(checkpoint: Path, eos: str, ids: dict[str, int]) -> list[int]:
    """Return the stop ids of the checkpoint and the id of `eos`, at which applications stop too."""
    if eos and eos not in ids:
        raise CheckpointError(
            f"{checkpoint / 'tokenizer_config.json'}: eos_token {eos!r} is not a token; name one of the vocabulary"
        )
    return sorted({*stop_ids(checkpoint), *([ids[eos]] if eos else [])})


def _token_text(token: str | dict[str, Any] | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""
