"""The checks by what they examine, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hf2mnn.doctor.artifacts import Bundle, MnnModel, OnnxFile
from hf2mnn.doctor.checks import (
    attention,
    checkpoint,
    config,
    embedding,
    files,
    formats,
    graph,
    image,
    norms,
    overflow,
    tokenizer,
    weights,
)
from hf2mnn.doctor.findings import Finding

Check = Callable[[Any], Iterator[Finding]]
CHECKS: dict[type, tuple[Check, ...]] = {
    Bundle: (
        files.file_changed,
        formats.vision_bits,
        *config.CHECKS,
        *image.CHECKS,
        *embedding.CHECKS,
        *tokenizer.CHECKS,
        *overflow.CHECKS,
    ),
    MnnModel: (
        *graph.MODEL_CHECKS,
        *attention.MODEL_CHECKS,
        *files.MODEL_CHECKS,
        *norms.MODEL_CHECKS,
        *weights.MODEL_CHECKS,
        *checkpoint.MODEL_CHECKS,
        *formats.MODEL_CHECKS,
    ),
    OnnxFile: (graph.unreadable_onnx, *attention.ONNX_CHECKS),
}
