"""Check of the weights against a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from hf2mnn.core.errors import CheckpointError, QuantizationError
from hf2mnn.doctor.artifacts import MnnModel
from hf2mnn.doctor.checks.graph import CONVERT_AGAIN
from hf2mnn.doctor.checks.weights import sampled
from hf2mnn.doctor.findings import Finding
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.folding import FOLDED
from hf2mnn.quant.formats import LM_HEAD
from hf2mnn.quant.weights import Operator

TOLERANCE = {2: 0.9, 3: 0.6, 4: 0.4, 5: 0.2, 6: 0.1, 7: 0.1, 8: 0.1, 16: 0.01, 32: 0.001}
"""Relative error by bits: about four times the errors in docs/benchmarks/quantization.md. An unrelated matrix of the
same scale has about 1.4."""
LLMEXPORT_NAME = re.compile(r"/(?P<layer>layers\.\d+)/(?P<part>\w+)/(?P<name>\w+)/Linear")
"""Names that llmexport gives to the decoder's linear layers."""


def _parameter(name: str, decoder: str) -> str | None:
    """Return the transformers parameter of an operator, if its name tells; `decoder` is the decoder's module."""
    if name in ("logits", "/lm/lm_head/Linear", LM_HEAD):
        return f"{LM_HEAD}.weight"
    if match := LLMEXPORT_NAME.fullmatch(name):
        return f"{decoder}.{match['layer']}.{match['part']}.{match['name']}.weight"
    return f"{name}.weight" if name.startswith("model.") else None


def _error(model: MnnModel, operator: Operator, parameter: str) -> float | None:
    """Return the relative error of the sampled rows; None if the checkpoint has no such weight."""
    try:
        stored = model.checkpoint.stored(parameter)
    except CheckpointError:
        return None
    if stored is None:
        return None
    if stored.shape != (operator.outputs, operator.inputs):
        return np.inf
    error, norm = 0.0, 0.0
    for row in sampled(operator):
        right = stored.rows(row, row + 1).astype(np.float64)
        error += float(np.square(model.weight_file.rows(operator, row, row + 1) - right).sum())
        norm += float(np.square(right).sum())
    return (error / norm) ** 0.5 if norm else None


def _bits(operator: Operator) -> int:
    if operator.stored is None:
        return 32
    return 16 if operator.stored["type"] == FLOAT16 else operator.stored["aMaxOrBits"]


def not_the_checkpoint(model: MnnModel) -> Iterator[Finding]:
    """Compare rows of every linear layer whose name tells its module with the checkpoint.

    A bundle with folded scales (awq) is skipped: its weights differ from the checkpoint's by design.
    """
    if model.checkpoint is None or model.foreign or (model.path.parent / FOLDED).is_file():
        return
    wrong, compared = {}, 0
    for operator in model.operators:
        parameter = _parameter(operator.name, model.checkpoint.family.decoder)
        if parameter is None or operator.kernel != 1:
            continue
        try:
            error = _error(model, operator, parameter)
        except QuantizationError:
            continue
        compared += error is not None
        if error is not None and not error <= TOLERANCE.get(_bits(operator), 0.9):
            wrong[operator.name] = error, _bits(operator)
    if wrong:
        worst = max(wrong, key=wrong.__getitem__)
        error, bits = wrong[worst]
        yield Finding(
            where=f"{model.weights.name}: {next(iter(wrong))}",
            message="the weights differ from the checkpoint's",
            evidence=f"{len(wrong)} of {compared} layers compared; relative error {error:.2g} in {worst} ({bits} bits)",
            effect="another model's output, or wrong output: weights were swapped, damaged or overwritten",
            cure=f"{CONVERT_AGAIN}; check that --checkpoint is the checkpoint of this bundle",
        )


MODEL_CHECKS = (not_the_checkpoint,)
