"""The embedding: a bfloat16 file of its own, or levels that it shares with lm_head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hf2mnn.checkpoint.folder import LFS_POINTER
from hf2mnn.core.errors import BundleError
from hf2mnn.doctor.checks.config import place
from hf2mnn.doctor.decoder import DecoderSizes, decoder_sizes
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle
from hf2mnn.evaluation.causes import differing, wrong_rows
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.embedding import BITS, TIED, beside, embedding_in_weights, embedding_rows, parse_tied, tied_settings
from hf2mnn.quant.weights import Operator, operators

SAMPLE = 256
"""Rows that are looked at, evenly spread."""
NOISE = "the engine says that it has loaded, and every token is read as noise: nonsense"
AGAIN = "convert the checkpoint again, so that config and weights are of one conversion"
NARROW, WIDE = 4.0, 6.0
"""Standard deviation of log2 of what is not zero: weights of a layer have about 1.6 (a normal distribution) to 2.5.
Half floats read as bfloat16 have 8 times that, because the lowest bits of their exponent become its highest."""


def _file(bundle: Bundle) -> Path | None:
    """The embedding's own file, None where it has none or that is not there."""
    path = bundle.file("embedding_file")
    return path if not embedding_in_weights(bundle.model) and path.is_file() else None


def _sizes(bundle: Bundle) -> DecoderSizes | None:
    found = decoder_sizes(bundle)
    return found if found and found.hidden and found.vocabulary else None


def _sample(path: Path, row: int) -> bytes:
    """SAMPLE rows of `row` bytes each."""
    count = path.stat().st_size // row
    with path.open("rb") as file:
        parts = []
        for at in np.unique(np.linspace(0, max(count - 1, 0), min(count, SAMPLE)).astype(int)).tolist():
            file.seek(at * row)
            parts.append(file.read(row))
    return b"".join(parts)


def _spread(values: np.ndarray) -> float:
    """Infinite where a value is no number."""
    values = np.abs(values.astype(np.float32))
    if not np.isfinite(values).all():
        return float("inf")
    values = values[values > 0]
    return float(np.log2(values).std()) if len(values) else 0.0


def embedding_size(bundle: Bundle) -> Iterator[Finding]:
    path, sizes = _file(bundle), _sizes(bundle)
    if path is None:
        return
    with path.open("rb") as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        yield _wrong_size(
            bundle,
            path,
            "the embedding is a Git LFS pointer, not the file itself",
            f"{path.stat().st_size} bytes that begin with {LFS_POINTER.decode()!r}",
            "run 'git lfs pull' in its folder",
        )
        return
    if sizes is None or parse_tied(bundle.model.get(TIED)):
        return
    size, row = path.stat().st_size, 2 * sizes.hidden
    needed, shape = sizes.vocabulary * row, f"{sizes.vocabulary} rows of {sizes.hidden} bfloat16"
    if size == 2 * needed and _spread(np.frombuffer(_sample(path, 2 * row), np.float32)) < NARROW:
        yield _wrong_size(
            bundle,
            path,
            "the embedding is in float32, where the engine reads bfloat16",
            f"{size} bytes are {sizes.vocabulary} rows of {sizes.hidden} float32",
            "write its upper halves (bfloat16); 'hf2mnn mnn' does",
        )
    elif size < needed:
        yield _wrong_size(
            bundle,
            path,
            f"the embedding is too short for {sizes.vocabulary} tokens",
            f"{size} bytes where {shape} take {needed}",
            "copy the file again; if it is whole, it is another model's",
        )
    elif size % row:
        yield _wrong_size(
            bundle,
            path,
            "the embedding has no whole number of rows",
            f"{size} bytes are no multiple of {row}, a row of {sizes.hidden} bfloat16",
            "it is another model's, or of another type; take the one that was made with this decoder",
        )


def _wrong_size(bundle: Bundle, path: Path, sentence: str, evidence: str, cure: str) -> Finding:
    effect = "the engine says that it has loaded; tokens are read as others, or as what lay in memory: nonsense"
    return Finding("embedding_size", Severity.ERROR, path.name, sentence, evidence, effect, cure)


def embedding_values(bundle: Bundle) -> Iterator[Finding]:
    path, sizes = _file(bundle), _sizes(bundle)
    if path is None or sizes is None or any(embedding_size(bundle)) or parse_tied(bundle.model.get(TIED)):
        return
    raw = _sample(path, 2 * sizes.hidden)
    values = np.frombuffer(raw, ml_dtypes.bfloat16)
    spread, other = _spread(values), _spread(np.frombuffer(raw, np.float16))
    rows = values.astype(np.float32).reshape(-1, sizes.hidden)
    if not (rows != rows[0]).any():
        what = "zero" if not rows.any() else "the same row everywhere"
        yield Finding(
            "embedding_values",
            Severity.ERROR,
            path.name,
            f"the embedding is {what}",
            f"{len(rows)} rows were looked at, evenly spread over the file",
            "the model cannot tell one token from another: it answers the same to everything",
            "copy the file again, or convert the checkpoint again",
        )
    elif spread > WIDE and other < NARROW:
        yield Finding(
            "embedding_values",
            Severity.ERROR,
            path.name,
            "the embedding is in float16, where the engine reads bfloat16",
            f"read as bfloat16 the sizes of its values spread over {spread:.1f} powers of two (standard deviation),"
            f" read as float16 over {other:.1f}; weights have about 2",
            "every token is read as noise: the model answers nonsense",
            "write it as bfloat16; 'hf2mnn mnn' does",
        )
    elif spread > WIDE:
        yield Finding(
            "embedding_values",
            Severity.ERROR,
            path.name,
            "the embedding holds no weights",
            f"read as bfloat16 the sizes of its values spread over {spread:.1f} powers of two (standard deviation);"
            " weights have about 2",
            "every token is read as noise: the model answers nonsense",
            "copy the file again, or convert the checkpoint again",
        )


def _in_head(head: Operator) -> dict[str, Any] | None:
    """What `tie_embeddings` must say; None where lm_head is stored in a way that the engine reads no embedding of."""
    if head.stored is None:
        return None
    if head.stored["type"] == FLOAT16:
        return {"weight_offset": head.parts[0][0], "quant_bit": 16}
    right = tied_settings(head)
    return right if right["quant_bit"] in BITS else None


def tied_embedding(bundle: Bundle) -> Iterator[Finding]:
    decoder = bundle.models.get("decoder")
    try:
        tied = parse_tied(bundle.model.get(TIED))
    except BundleError as error:
        yield Finding(
            "tied_embedding",
            Severity.ERROR,
            place(bundle, TIED),
            "the config does not say where in the decoder's weights the embedding is",
            str(error),
            NOISE,
            AGAIN,
        )
        return
    if tied is None or decoder is None:
        return
    head = operators(decoder.graph)[-1]
    path = decoder.weights if tied["weight_offset"] else bundle.file("embedding_file")
    if not path.is_file():
        return
    right, size = _in_head(head), path.stat().st_size
    ends = {
        "weights": tied["weight_offset"] + head.size * tied["quant_bit"] // 8,
        "scales": tied["alpha_offset"] + tied["alpha_size"],
    }
    beyond = {what: end for what, end in ends.items() if end > size}
    where = place(bundle, TIED)
    if beyond:
        ends_at = ", ".join(f"{what} end at byte {end}" for what, end in beyond.items())
        yield Finding(
            "tied_embedding",
            Severity.ERROR,
            where,
            f"the embedding is said to be where {path.name} has no bytes",
            f"{ends_at}, the file has {size}",
            NOISE,
            AGAIN,
        )
        return
    if bundle.facts and not bundle.facts["tie_word_embeddings"]:
        yield Finding(
            "tied_embedding",
            Severity.ERROR,
            where,
            "the embedding is read out of lm_head, which in this model is another weight",
            "tie_word_embeddings of the checkpoint is false",
            NOISE,
            "give the embedding a file of its own: 'embedding: file' in config.yaml",
        )
    if not tied["weight_offset"]:
        return
    if right is None:
        yield Finding(
            "tied_embedding",
            Severity.ERROR,
            where,
            "the embedding is read out of lm_head, which is stored in a way that the engine reads no embedding of",
            f"lm_head is {head.name}, stored as {'float32' if head.stored is None else head.stored['aMaxOrBits']}"
            f" {'' if head.stored is None else 'bits; the engine reads 4, 8 and 16'}".rstrip(),
            NOISE,
            "give the embedding a file of its own: 'embedding: file' in config.yaml",
        )
        return
    # One block a row may be written as a block of that length.
    given = tied | {"quant_block": 0 if tied["quant_block"] == head.inputs else tied["quant_block"]}
    if wrong := differing(given, right):
        said = ", ".join(f"{key} is {value}, the graph's is {wanted}" for key, value, wanted in wrong)
        yield Finding(
            "tied_embedding",
            Severity.ERROR,
            where,
            "the embedding is not read from where lm_head is, or not as it is stored",
            f"lm_head is {head.name}: {said}",
            NOISE,
            AGAIN,
        )


def embedding_differs(bundle: Bundle) -> Iterator[Finding]:
    """Only with the checkpoint; the whole embedding is read."""
    right = bundle.checkpoint.stored(bundle.checkpoint.family.embedding) if bundle.checkpoint else None
    tied, decoder = parse_tied(bundle.model.get(TIED)), bundle.models.get("decoder")
    if right is None or decoder is None or (tied and tied["quant_bit"] not in BITS):
        return
    if any(embedding_size(bundle)) or any(embedding_values(bundle)) or any(tied_embedding(bundle)):
        return
    path = decoder.weights if embedding_in_weights(bundle.model) else bundle.file("embedding_file")
    sizes = _sizes(bundle)
    if sizes and right.shape != (sizes.vocabulary, sizes.hidden):
        sentence = "the checkpoint's embedding has another shape"
        evidence = f"it is {list(right.shape)}, the decoder's {[sizes.vocabulary, sizes.hidden]}"
    else:
        sentence, evidence = "the embedding is not the checkpoint's", ""
        evidence = wrong_rows(beside(embedding_rows(path, tied, right.shape), right), tied)
    if evidence:
        yield Finding(
            "embedding_differs",
            Severity.ERROR,
            path.name,
            sentence,
            evidence,
            "tokens are taken for others: nonsense, or an answer in other words than the model's",
            "convert this checkpoint again, or give --checkpoint the one that the bundle was made of",
        )


CHECKS = (embedding_size, embedding_values, tied_embedding, embedding_differs)
