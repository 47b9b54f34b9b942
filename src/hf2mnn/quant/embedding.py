"""The embedding of a bundle: a bfloat16 file of its own, or the quantized lm_head of a tied model.

The engine reads single rows at run time (`diskembedding.cpp` of MNN 3.6.1), from lm_head only with 4 or 8 bits.
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
from hf2mnn.mnn.bundle_config import read_config
from hf2mnn.mnn.engine_facts import QUANTIZED_EMBEDDING_BITS, TIE_EMBEDDINGS_KEYS
from hf2mnn.quant.blob import SCALE_TYPES, Quantized, header, unpack
from hf2mnn.quant.formats import LM_HEAD, WeightFormat
from hf2mnn.quant.weights import Operator

TIED = "tie_embeddings"
"""Key of llm_config.json with the position of an embedding in lm_head."""
RowPairs = Iterator[tuple[np.ndarray, np.ndarray]]


def check_tied(model: dict[str, Any], form: WeightFormat) -> None:
    """Raise QuantizationError if the engine cannot read the embedding of model.json from an lm_head of this format."""
    if not model["tie_word_embeddings"]:
        raise QuantizationError(f"{LM_HEAD}: the model's embedding is another weight; use embedding: file")
    if form.bits not in QUANTIZED_EMBEDDING_BITS:
        raise QuantizationError(
            f"{LM_HEAD}: the engine reads an embedding of 4 or 8 bits, but the format has {form.bits}; use embedding:"
            " file"
        )


def tied_settings(operator: Operator) -> dict[str, Any]:
    """Return the value of `tie_embeddings` in llm_config.json for an embedding in `operator` of the written file."""
    (offset, _), (scales, size), _ = operator.parts
    bits, pairs = operator.stored["aMaxOrBits"], 2 if operator.stored["readType"] else 1
    blocks = size // (operator.outputs * pairs * operator.scale_type.itemsize)
    head, _ = header(operator.outputs, operator.inputs, blocks, bits)
    return {
        "weight_offset": offset + len(head),
        "alpha_offset": scales,
        "alpha_size": size,
        "quant_bit": bits,
        "quant_block": operator.inputs // blocks if blocks > 1 else 0,
        "alpha_dtype": "fp16" if operator.scale_type == np.float16 else "fp32",
    }


def parse_tied(stored: Any) -> dict[str, Any] | None:
    """Parse `tie_embeddings` of llm_config.json, a list if by llmexport; None if missing. BundleError if invalid."""
    if stored is None:
        return None
    *required, half = TIE_EMBEDDINGS_KEYS
    if isinstance(stored, list):
        stored = dict(zip(TIE_EMBEDDINGS_KEYS, stored, strict=False))
        stored["alpha_dtype"] = "fp16" if stored.pop(half, 0) else "fp32"
    valid = isinstance(stored, dict) and all(isinstance(stored.get(key), int) for key in required)
    if not valid or min(stored[key] for key in required) < 0:
        raise BundleError(
            f"{TIED} of {MODEL_CONFIG} does not have the position of an embedding ({', '.join(required)}); convert the"
            " checkpoint again"
        )
    return {"alpha_dtype": "fp32", **stored}


def embedding_in_weights(llm_config: dict[str, Any]) -> bool:
    """Return whether the embedding is in the decoder's weight file; at offset 0, it is quantized in its own file."""
    tied = parse_tied(llm_config.get(TIED))
    return tied is not None and tied["weight_offset"] != 0


def read_tied(bundle: Path) -> dict[str, Any] | None:
    """Return `tied_settings` of a bundle; None if the embedding has a file of its own."""
    return parse_tied(read_config(bundle, MODEL_CONFIG).get(TIED))


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise BundleError(
            f"{path} ends before byte {offset + size}, where {MODEL_CONFIG} has the embedding: it is truncated, make it"
            " again"
        )
    return content


def embedding_rows(path: Path, tied: dict[str, Any] | None, table: StoredTensor) -> RowPairs:
    """Yield rows of an embedding as the engine reads them, with those of the checkpoint's `table` in bfloat16.

    Both are float32 [rows, hidden], some rows at a time. `path` is the file of the embedding, or the weight file of the
    decoder with the position `tied` (`tied_settings`). Raise BundleError if the file is truncated.
    """
    (vocabulary, hidden), offset, bits = table.shape, 0, 16
    if tied is not None:
        offset, bits = tied["weight_offset"], tied["quant_bit"]
        dtype = SCALE_TYPES[16 if tied["alpha_dtype"] == "fp16" else 32]
        stored = np.frombuffer(_read(path, tied["alpha_offset"], tied["alpha_size"]), dtype).astype(np.float32)
        alpha = stored.reshape(vocabulary, hidden // (tied["quant_block"] or hidden), -1)
    for index, exact in enumerate(table_blocks(table)):
        start = index * ROWS_AT_ONCE
        content = _read(path, offset + start * hidden * bits // 8, len(exact) * hidden * bits // 8)
        if tied is None:
            rows = np.frombuffer(content, ml_dtypes.bfloat16).reshape(exact.shape).astype(np.float32)
        else:
            q, pairs = unpack(content, exact.size, bits), alpha[start : start + len(exact)]
            zero_points = pairs[:, :, 0] if pairs.shape[2] == 2 else None
            rows = Quantized(q.reshape(exact.shape), pairs[:, :, -1], zero_points).dequantize()
        yield rows, exact.astype(ml_dtypes.bfloat16).astype(np.float32)


def embedding_blocks(bundle: Path, onnx_folder: Path) -> RowPairs:
    """Yield rows of a bundle's embedding and of the checkpoint's, as `embedding_rows` does."""
    tied = read_tied(bundle)
    path = bundle / (f"{DECODER}.weight" if tied else EMBEDDING)
    return embedding_rows(path, tied, embedding_table(onnx_folder))
