"""The checks by what they examine, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf2mnn.doctor.artifacts import Bundle, MnnModel, OnnxFile
from hf2mnn.doctor.checks import attention, config, embedding, files, precision, tokenizer, weights
from hf2mnn.doctor.findings import Findings

Check = Callable[[Any], Findings]
CHECKS: dict[type, tuple[Check, ...]] = {
    Bundle: (
        files.file_changed,
        files.settings_edited,
        precision.vision_bits,
        *config.CHECKS,
        *embedding.CHECKS,
        *tokenizer.CHECKS,
        precision.fp16_overflow,
    ),
    MnnModel: (
        *files.GRAPH_CHECKS,
        *attention.MODEL_CHECKS,
        *files.WEIGHT_CHECKS,
        *weights.RANGE_CHECKS,
        *weights.VALUE_CHECKS,
        *precision.MODEL_CHECKS,
    ),
    OnnxFile: (files.unreadable_onnx, *attention.ONNX_CHECKS),
}
