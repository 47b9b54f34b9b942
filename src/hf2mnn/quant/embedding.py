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


def check_tied(model: dict[str, Any], form: WeightFormat) -> None:
    """Raise QuantizationError if the engine cannot read the embedding from an lm_head of format `form`.

    `model` is model.json.
    """
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
    """Parse `tie_embeddings` of llm_config.json, which llmexport writes as a list; None if the key is missing.

    Raise BundleError if it is neither a list nor an object of valid numbers.
    """
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


def embedding_in_weights(model: dict[str, Any]) -> bool:
    """Return whether the engine reads the embedding from the decoder's weight file; `model` is llm_config.json.

    An embedding at offset 0 is quantized, but in a file of its own. Raises BundleError if `tie_embeddings` is invalid.
    """
    tied = parse_tied(model.get(TIED))
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


def embedding_rows(path: Path, tied: dict[str, Any] | None, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the rows of an embedding as the engine reads them, float32 [rows, hidden], some at a time.

    Args:
        path: File of the embedding, or weight file of the decoder.
        tied: Position in the weight file (`tied_settings`); None for a bfloat16 file.
        shape: Vocabulary and hidden size.
    """
    (vocabulary, hidden), offset, bits = shape, 0, 16
    if tied is not None:
        offset, bits = tied["weight_offset"], tied["quant_bit"]
        dtype = SCALE_TYPES[16 if tied["alpha_dtype"] == "fp16" else 32]
        stored = np.frombuffer(_read(path, tied["alpha_offset"], tied["alpha_size"]), dtype).astype(np.float32)
        alpha = stored.reshape(vocabulary, hidden // (tied["quant_block"] or hidden), -1)
    for start in range(0, vocabulary, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, vocabulary - start)
        content = _read(path, offset + start * hidden * bits // 8, count * hidden * bits // 8)
        if tied is None:
            yield np.frombuffer(content, ml_dtypes.bfloat16).reshape(count, hidden).astype(np.float32)
        else:
            q, pairs = unpack(content, count * hidden, bits), alpha[start : start + count]
            zero_points = pairs[:, :, 0] if pairs.shape[2] == 2 else None
            yield Quantized(q.reshape(count, hidden), pairs[:, :, -1], zero_points).dequantize()


def pair_with_checkpoint(rows: Iterator[np.ndarray], table: StoredTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows of an embedding with those of the checkpoint in bfloat16, both float32 [rows, hidden]."""
    for block, exact in zip(rows, table_blocks(table), strict=True):
        yield block, exact.astype(ml_dtypes.bfloat16).astype(np.float32)


def embedding_blocks(bundle: Path, onnx_folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows of a bundle's embedding and of the checkpoint's, as `pair_with_checkpoint` does."""
    table, tied = embedding_table(onnx_folder), read_tied(bundle)
    path = bundle / (f"{DECODER}.weight" if tied else EMBEDDING)
    return pair_with_checkpoint(embedding_rows(path, tied, table.shape), table)
