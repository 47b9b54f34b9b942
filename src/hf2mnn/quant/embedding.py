"""Where a bundle's embedding is: in a bfloat16 file of its own, or in the quantized lm_head, which a tied model shares.

The engine reads rows as they are asked for (`diskembedding.cpp` of MNN 3.6.1), from lm_head only with 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.errors import BundleError, QuantizationError
from hf2mnn.mnn.bundle import DECODER, EMBEDDING, MODEL_CONFIG, ROWS_AT_ONCE, embedding_table, table_blocks
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.mnn.paths import read_config
from hf2mnn.quant.blob import SCALE_TYPES, header, unpack
from hf2mnn.quant.names import LM_HEAD
from hf2mnn.quant.weights import Operator

TIED = "tie_embeddings"
BITS = (4, 8)
POSITIONS = ("weight_offset", "alpha_offset", "alpha_size", "quant_bit", "quant_block", "half")
"""What the places of a list mean; the last, whether scales are half floats, may be left out (`llmconfig.hpp`)."""


def check_tied(model: dict[str, Any], form: WeightFormat) -> None:
    """Raises QuantizationError where the engine cannot read the embedding from lm_head; `model` is model.json."""
    if not model["tie_word_embeddings"]:
        raise QuantizationError(f"{LM_HEAD}: the model's embedding is another weight; use embedding: file")
    if form.bits not in BITS:
        raise QuantizationError(
            f"{LM_HEAD}: the engine reads an embedding of 4 or 8 bits, this one gets {form.bits}; use embedding: file"
        )


def tied_settings(operator: Operator) -> dict[str, Any]:
    """What llm_config.json says of an embedding in `operator`, as it was written."""
    (offset, _), (scales, size), _ = operator.parts
    stored = operator.stored
    blocks = size // (operator.outputs * (1 if stored["readType"] == 0 else 2))
    blocks //= 2 if stored["scaleStorage"] == "FP16" else 4
    head, _ = header(operator.outputs, operator.inputs, blocks, stored["aMaxOrBits"])
    return {
        "weight_offset": offset + len(head),
        "alpha_offset": scales,
        "alpha_size": size,
        "quant_bit": stored["aMaxOrBits"],
        "quant_block": operator.inputs // blocks if blocks > 1 else 0,
        "alpha_dtype": "fp16" if stored["scaleStorage"] == "FP16" else "fp32",
    }


def parse_tied(stored: Any) -> dict[str, Any] | None:
    """The same out of llm_config.json's `tie_embeddings`, which llmexport writes as a list; None where there is none.

    Raises:
        BundleError: it is neither form.
    """
    if stored is None:
        return None
    if isinstance(stored, list):
        stored = dict(zip(POSITIONS, stored, strict=False))
        stored["alpha_dtype"] = "fp16" if stored.pop("half", 0) else "fp32"
    whole = isinstance(stored, dict) and all(isinstance(stored.get(key), int) for key in POSITIONS[:-1])
    if not whole or min(stored[key] for key in POSITIONS[:-1]) < 0:
        raise BundleError(f"{TIED} of {MODEL_CONFIG} does not say where the embedding is; convert the checkpoint again")
    return {"alpha_dtype": "fp32", **stored}


def embedding_in_weights(model: dict[str, Any]) -> bool:
    """Whether the engine reads the embedding out of the decoder's weight file; `model` is llm_config.json.

    An embedding that begins at 0 is quantized, in the embedding's own file. Raises BundleError as `parse_tied` does.
    """
    tied = parse_tied(model.get(TIED))
    return tied is not None and tied["weight_offset"] != 0


def tied_in(bundle: Path) -> dict[str, Any] | None:
    """Where lm_head is the embedding, `tied_settings` as the bundle has them."""
    return parse_tied(read_config(bundle, MODEL_CONFIG).get(TIED))


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        found = file.read(size)
    if len(found) != size:
        raise BundleError(f"{path} ends before the embedding that {MODEL_CONFIG} says is there: it was cut short")
    return found


def _tied_rows(path: Path, tied: dict[str, Any], shape: tuple[int, int]) -> Iterator[np.ndarray]:
    (rows, hidden), bits = shape, tied["quant_bit"]
    block = tied["quant_block"] or hidden
    dtype = SCALE_TYPES[16 if tied["alpha_dtype"] == "fp16" else 32]
    stored = np.frombuffer(_read(path, tied["alpha_offset"], tied["alpha_size"]), dtype).astype(np.float32)
    alpha = stored.reshape(rows, hidden // block, -1)
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        packed = _read(path, tied["weight_offset"] + start * hidden * bits // 8, count * hidden * bits // 8)
        levels = unpack(packed, count * hidden, bits).reshape(count, -1, block).astype(np.float32)
        pairs = alpha[start : start + count]
        values = levels * pairs[:, :, -1:]
        yield (values + pairs[:, :, :1] if pairs.shape[2] == 2 else values).reshape(count, hidden)


def embedding_rows(path: Path, tied: dict[str, Any] | None, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """float32 [rows, hidden] of an embedding of `shape`, a block at a time, as the engine reads it: bfloat16, or where
    `tied` says, in `path`.

    Raises:
        BundleError: the embedding is not whole.
    """
    if tied is not None:
        yield from _tied_rows(path, tied, shape)
        return
    vocabulary, hidden = shape
    for at in range(0, vocabulary, ROWS_AT_ONCE):
        found = _read(path, 2 * at * hidden, 2 * hidden * min(ROWS_AT_ONCE, vocabulary - at))
        yield np.frombuffer(found, ml_dtypes.bfloat16).reshape(-1, hidden).astype(np.float32)


def beside(rows: Iterator[np.ndarray], right: StoredTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of an embedding with the checkpoint's rounded to bfloat16, both float32 [rows, hidden]."""
    for block, exact in zip(rows, table_blocks(right), strict=True):
        yield block, exact.astype(ml_dtypes.bfloat16).astype(np.float32)


def embedding_blocks(bundle: Path, onnx_folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The bundle's embedding and the checkpoint's, as `beside` gives them.

    Raises:
        BundleError: the embedding is not whole.
    """
    right, tied = embedding_table(onnx_folder), tied_in(bundle)
    path = bundle / (f"{DECODER}.weight" if tied else EMBEDDING)
    return beside(embedding_rows(path, tied, right.shape), right)
