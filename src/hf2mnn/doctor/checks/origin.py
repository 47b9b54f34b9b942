"""Whether the weights are those of the checkpoint that is named."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from hf2mnn.core.errors import CheckpointError, QuantizationError
from hf2mnn.doctor.checks.graph import AGAIN
from hf2mnn.doctor.checks.weights import sampled
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Model
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.folding import FOLDED
from hf2mnn.quant.names import LM_HEAD
from hf2mnn.quant.weights import Operator

LARGEST = {2: 0.9, 3: 0.6, 4: 0.4, 5: 0.2, 6: 0.1, 7: 0.1, 8: 0.1, 16: 0.01, 32: 0.001}
"""Relative error by bits that no method leaves: about four times those of docs/benchmarks/quantization.md. Another
matrix of the same size is off by about 1.4."""
EXPORTED = re.compile(r"/(?P<layer>layers\.\d+)/(?P<part>\w+)/(?P<name>\w+)/Linear")
"""llmexport's names of the decoder's linear layers."""


def _parameter(name: str, decoder: str) -> str | None:
    """The parameter of the transformers model, where the name says it; `decoder` is the name of its decoder."""
    if name in ("logits", "/lm/lm_head/Linear", LM_HEAD):
        return f"{LM_HEAD}.weight"
    if found := EXPORTED.fullmatch(name):
        return f"{decoder}.{found['layer']}.{found['part']}.{found['name']}.weight"
    return f"{name}.weight" if name.startswith("model.") else None


def _error(model: Model, operator: Operator, parameter: str) -> float | None:
    """Relative error of the sampled rows; None where the checkpoint has no such weight that is read in rows."""
    try:
        exact = model.checkpoint.stored(parameter)
    except CheckpointError:
        return None
    if exact is None:
        return None
    if exact.shape != (operator.outputs, operator.inputs):
        return np.inf
    found, norm = 0.0, 0.0
    for row in sampled(operator):
        right = exact.rows(row, row + 1).astype(np.float64)
        found += float(np.square(model.file.rows(operator, row, row + 1) - right).sum())
        norm += float(np.square(right).sum())
    return (found / norm) ** 0.5 if norm else None


def _bits(operator: Operator) -> int:
    if operator.stored is None:
        return 32
    return 16 if operator.stored["type"] == FLOAT16 else operator.stored["aMaxOrBits"]


def not_the_checkpoint(model: Model) -> Iterator[Finding]:
    """Rows of every linear layer whose module can be told from its name, against the checkpoint's. A bundle
    with folded scales (awq) is left out: its weights are not the checkpoint's by design.
    """
    if model.checkpoint is None or model.foreign or (model.path.parent / FOLDED).is_file():
        return
    off, compared = {}, 0
    for operator in model.operators:
        parameter = _parameter(operator.name, model.checkpoint.family.decoder)
        if parameter is None or operator.kernel != 1:
            continue
        try:
            error = _error(model, operator, parameter)
        except QuantizationError:
            continue
        compared += error is not None
        if error is not None and not error <= LARGEST.get(_bits(operator), 0.9):
            off[operator.name] = error, _bits(operator)
    if off:
        worst = max(off, key=off.__getitem__)
        error, bits = off[worst]
        yield Finding(
            "not_the_checkpoint",
            Severity.ERROR,
            f"{model.weights.name}: {next(iter(off))}",
            "its weights are not the checkpoint's",
            f"{len(off)} of {compared} layers compared; relative error {error:.2g} in {worst}, which has {bits} bits",
            "the answers are another model's, or nonsense: weights were swapped, damaged, or written by two conversions"
            " in one directory",
            f"{AGAIN}; see that --checkpoint is the one that it was made of",
        )
