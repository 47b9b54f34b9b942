"""Checks of the embedding: a bfloat16 file of its own, or the quantized lm_head."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from hf2mnn.checkpoint.folder import LFS_POINTER, is_lfs_pointer
from hf2mnn.core.errors import BundleError
from hf2mnn.doctor.artifacts import Bundle, sampled_rows
from hf2mnn.doctor.checks.files import GIT_LFS_PULL
from hf2mnn.doctor.findings import Finding, Findings
from hf2mnn.evaluation.causes import differing, wrong_rows
from hf2mnn.mnn.engine_facts import QUANTIZED_EMBEDDING_BITS
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.embedding import TIED, embedding_in_weights, embedding_rows, tied_settings
from hf2mnn.quant.weights import operators

SAMPLE = 256  # number of evenly spaced rows that are read
NOISE = "the engine loads the bundle and reads noise for every token: wrong output"
CONVERT_AGAIN = "convert the checkpoint again, so that configuration and weights are of one conversion"
OWN_FILE = "store the embedding in a file of its own: 'embedding: file' in config.yaml"
NARROW, WIDE = 4.0, 6.0
"""Bounds of the standard deviation of log2 |w| over nonzero weights: 1.6 (normal distribution) to 2.5 in layers of
models, 8 times that in half floats read as bfloat16: the lowest bits of their exponent become its highest."""


def _file(bundle: Bundle) -> Path | None:
    """Return the embedding's own file; None if it has none or the file is missing."""
    path = bundle.embedding
    return path if not embedding_in_weights(bundle.model) and path.is_file() else None


def _shape(bundle: Bundle) -> tuple[int, int] | None:
    """Return [vocabulary, hidden] of the decoder graph, if it has both."""
    shape = bundle.decoder_shape
    return (shape.vocabulary, shape.hidden) if shape.vocabulary and shape.hidden else None


def _sample(path: Path, row: int) -> bytes:
    """Return SAMPLE rows of `row` bytes each."""
    count = path.stat().st_size // row
    return np.memmap(path, np.uint8, "r", shape=(count, row))[sampled_rows(count, SAMPLE)].tobytes() if count else b""


def _spread(values: np.ndarray) -> float:
    """Return the standard deviation of log2 |x| over nonzero values; infinity if one is not finite."""
    values = np.abs(values.astype(np.float32))
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.log2(values[values > 0]).std()) if values.any() else 0.0


def embedding_size(bundle: Bundle) -> Findings:
    """Compare the size of the embedding file with vocabulary x hidden size in bfloat16."""
    path = _file(bundle)
    if path is None:
        return
    size, shape = path.stat().st_size, _shape(bundle)
    if is_lfs_pointer(path):
        message, cure = "the embedding file is a Git LFS pointer", GIT_LFS_PULL
        evidence = f"{size} bytes that begin with {LFS_POINTER.decode()!r}"
    elif shape is None or bundle.tied:
        return
    else:
        (rows, hidden), row = shape, 2 * shape[1]
        if size == 2 * rows * row and _spread(np.frombuffer(_sample(path, 2 * row), np.float32)) < NARROW:
            message = "the embedding is float32, and the engine reads bfloat16"
            evidence = f"{size} bytes are {rows} rows of {hidden} float32"
            cure = "convert it to bfloat16 (the upper halves); 'hf2mnn convert' does"
        elif size < rows * row:
            message = f"the embedding is too short for {rows} tokens"
            evidence = f"{size} bytes, and {rows} rows of {hidden} bfloat16 take {rows * row}"
            cure = "copy the file again; if it is complete, it is another model's"
        elif size % row:
            message = "the size of the embedding is not a whole number of rows"
            evidence = f"{size} bytes are not a multiple of {row}, a row of {hidden} bfloat16"
            cure = "use the file that was converted with this decoder; this one is another model's or of another type"
        else:
            return
    effect = "the engine loads the bundle and reads wrong embeddings, or memory behind them: wrong output"
    yield Finding(path.name, message, evidence, effect, cure)


def embedding_values(bundle: Bundle) -> Findings:
    """Report an embedding of float16 values, zeros, equal rows or noise."""
    path, shape = _file(bundle), _shape(bundle)
    if path is None or shape is None or bundle.tied or any(embedding_size(bundle)):
        return
    raw = _sample(path, 2 * shape[1])
    values = np.frombuffer(raw, ml_dtypes.bfloat16)
    spread, other = _spread(values), _spread(np.frombuffer(raw, np.float16))
    rows = values.astype(np.float32).reshape(-1, shape[1])
    deviation = f"log2 of its values has a standard deviation of {spread:.1f} as bfloat16"
    effect, cure = NOISE, "copy the file again, or convert the checkpoint again"
    if not (rows != rows[0]).any():
        message = f"the embedding is {'the same row for all tokens' if rows.any() else 'zero'}"
        evidence = f"{len(rows)} evenly spaced rows were compared"
        effect = "wrong output: all tokens are the same to the model"
    elif spread > WIDE and other < NARROW:
        message = "the embedding is float16, and the engine reads bfloat16"
        evidence = f"{deviation}, and of {other:.1f} as float16; weights have about 2"
        cure = "convert it to bfloat16; 'hf2mnn convert' does"
    elif spread > WIDE:
        message, evidence = "the embedding file does not hold weights", f"{deviation}; weights have about 2"
    else:
        return
    yield Finding(path.name, message, evidence, effect, cure)


def tied_embedding(bundle: Bundle) -> Findings:
    """Compare `tie_embeddings` with the position and format of lm_head in the weight file."""

    def finding(message: str, evidence: str, cure: str = CONVERT_AGAIN) -> Finding:
        return Finding(bundle.locate(TIED), message, evidence, NOISE, cure)

    try:
        tied = bundle.tied
    except BundleError as error:
        yield finding(f"{TIED} does not give a position in the decoder's weights", str(error))
        return
    if tied is None or "decoder" not in bundle.models:
        return
    head, path = operators(bundle.models["decoder"].graph)[-1], bundle.embedding
    if not path.is_file():
        return
    size, weights = path.stat().st_size, head.size * tied["quant_bit"] // 8
    ends = {"weights": tied["weight_offset"] + weights, "scales": tied["alpha_offset"] + tied["alpha_size"]}
    if beyond := [f"{part} end at byte {end}" for part, end in ends.items() if end > size]:
        yield finding(f"{TIED} points past the end of {path.name}", f"{', '.join(beyond)}, the file has {size}")
        return
    if bundle.info and not bundle.info["tie_word_embeddings"]:
        message = "the embedding is read from lm_head, which is another weight in this model"
        yield finding(message, "tie_word_embeddings of the checkpoint is false", OWN_FILE)
    if not tied["weight_offset"]:
        return
    if head.stored and head.stored["type"] == FLOAT16:
        expected = {"weight_offset": head.parts[0][0], "quant_bit": 16}
    elif head.stored and head.stored["aMaxOrBits"] in QUANTIZED_EMBEDDING_BITS:
        expected = tied_settings(head)
    else:
        form = f"{head.stored['aMaxOrBits']} bits; the engine reads 4, 8 and 16" if head.stored else "float32"
        message = "the embedding is read from lm_head, whose format the engine cannot read as an embedding"
        yield finding(message, f"lm_head is {head.name}, stored as {form}", OWN_FILE)
        return
    # One block per row may also be written as a block of the row's length.
    given = tied | {"quant_block": 0 if tied["quant_block"] == head.inputs else tied["quant_block"]}
    if wrong := differing(given, expected):
        values = ", ".join(f"{key} is {value}, the graph's is {right}" for key, value, right in wrong)
        yield finding(f"{TIED} differs from the position or format of lm_head", f"lm_head is {head.name}: {values}")


def embedding_differs(bundle: Bundle) -> Findings:
    """Compare all rows of the embedding with the checkpoint."""
    stored = bundle.checkpoint.stored(bundle.checkpoint.family.embedding) if bundle.checkpoint else None
    tied, path = bundle.tied, bundle.embedding
    if stored is None or "decoder" not in bundle.models or (tied and tied["quant_bit"] not in QUANTIZED_EMBEDDING_BITS):
        return
    if any(embedding_size(bundle)) or any(embedding_values(bundle)) or any(tied_embedding(bundle)):
        return
    shape = _shape(bundle)
    if shape and stored.shape != shape:
        message = "the embedding of the checkpoint has another shape"
        evidence = f"it is {list(stored.shape)}, the decoder's is {list(shape)}"
    else:
        message = "the embedding differs from the checkpoint's"
        evidence = wrong_rows(embedding_rows(path, tied, stored), tied)
    if evidence:
        cure = "convert this checkpoint again, or pass the checkpoint of this bundle as --checkpoint"
        yield Finding(path.name, message, evidence, "tokens have the embeddings of others: wrong output", cure)


CHECKS = (embedding_size, embedding_values, tied_embedding, embedding_differs)
