"""Checks of the values in a weight file: evenly spaced rows of a large weight, and all scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from hf2mnn.core.errors import QuantizationError
from hf2mnn.doctor.artifacts import MnnModel
from hf2mnn.doctor.checks.graph import CONVERT_AGAIN
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.weights import Operator

ROWS = 16
"""Number of rows of a weight that are read."""
AT_ONCE = 1 << 22
"""Number of float weights in memory at a time."""
LARGEST = 1e3
"""Maximum of a plausible weight; a scale with a flipped exponent bit exceeds it."""
RUN, GAP, COARSE = 32, 3, 0.5
"""A weight counts as re-quantized if in a fraction COARSE of all runs of RUN weights no two distinct q are nearer than
GAP, which fewer bits leave."""


def sampled(operator: Operator) -> list[int]:
    """Return the indices of up to ROWS evenly spaced rows."""
    return np.unique(np.linspace(0, operator.outputs - 1, ROWS).astype(int)).tolist()


def weights_of_another(model: MnnModel) -> Iterator[Finding]:
    """Report quantized weights without a header of their shape.

    If the file has the right size, another conversion has written into it: MNN's converter stages weights in its
    working directory under a fixed name.
    """
    if not model.foreign:
        return
    size, read = model.weights.stat().st_size, model.graph.external_size()
    if size != read:
        message = "the weight file belongs to another graph"
    elif len(model.foreign) > 1:
        message = "another model's weights were written into the file: two conversions ran in one directory"
    else:
        message = "the weight of an operator was overwritten"
    evidence = f"{len(model.foreign)} of {len(model.quantized)} headers are invalid; {size:,} of {read:,} bytes"
    effect = "the engine loads the model without an error, and its output is wrong"
    cure = f"use graph and weight file of one conversion, or {CONVERT_AGAIN}"
    yield Finding(
        where=f"{model.weights.name}: {model.foreign[0]}", message=message, evidence=evidence, effect=effect, cure=cure
    )


def _matching(model: MnnModel, condition: Callable[[MnnModel, Operator], bool]) -> list[str]:
    """Return the names of operators for which a condition holds; those that other checks report are skipped."""
    names = []
    for operator in [] if model.foreign else model.operators:
        try:
            if condition(model, operator):
                names.append(operator.name)
        except QuantizationError:
            continue
    return names


def _constant(model: MnnModel, operator: Operator) -> bool:
    """Return whether most rows are constant; models may have a few such rows, of unused tokens."""
    rows = sampled(operator)
    constant = [np.ptp(model.weight_file.rows(operator, row, row + 1)) == 0 for row in rows]
    return sum(constant) > len(rows) / 2


def weights_constant(model: MnnModel) -> Iterator[Finding]:
    """Report constant weights.

    MNN's converter writes them when it re-quantizes a model without its weight file; incomplete downloads have them,
    too.
    """
    if names := _matching(model, _constant):
        yield Finding(
            where=f"{model.weights.name}: {names[0]}",
            message="all weights of an operator are equal",
            evidence=f"{len(names)} of {len(model.operators)} operators, in most of up to {ROWS} rows each",
            effect="wrong output: these layers return the same for every input",
            cure=CONVERT_AGAIN,
        )


def _implausible(model: MnnModel, operator: Operator) -> bool:
    with np.errstate(invalid="ignore"):
        if operator.stored and operator.stored["type"] != FLOAT16:
            return not np.abs(model.weight_file.alpha(operator)).max(initial=0) <= LARGEST
        step = max(AT_ONCE // operator.inputs, 1)
        spans = ((begin, min(begin + step, operator.outputs)) for begin in range(0, operator.outputs, step))
        return any(not np.abs(model.weight_file.rows(operator, *s)).max(initial=0) <= LARGEST for s in spans)


def weights_not_finite(model: MnnModel) -> Iterator[Finding]:
    """Report scales, zero points or floating-point weights that are NaN, infinite or over LARGEST; all are read."""
    if names := _matching(model, _implausible):
        yield Finding(
            where=f"{model.weights.name}: {names[0]}",
            message="weights or scales are NaN, infinite, or implausibly large",
            evidence=f"{len(names)} of {len(model.operators)} operators have a value that is NaN or over {LARGEST:g}",
            effect="the output becomes NaN, or these values dominate it",
            cure=f"{CONVERT_AGAIN}; if it persists, check the checkpoint with 'hf2mnn fetch'",
        )


def on_a_grid(q: np.ndarray) -> bool:
    """Return whether q, int8 [rows, inputs], takes few evenly spaced values in most runs of neighbours.

    Weights that were rounded once have adjacent q in nearly every run: at 6 to 8 bits, no layer of the embedded model
    had more than 0.4 % of runs without, with any method and block. Rounded from 4 bits to 8, all had none in 100 % of
    runs. Rounding from 5 bits to 6 cannot be detected.
    """
    runs = q[:, : q.shape[1] // RUN * RUN].reshape(-1, RUN).astype(np.int16)
    gaps = np.diff(np.sort(runs, axis=1), axis=1)
    nearest = np.where(gaps > 0, gaps, np.iinfo(np.int16).max).min(axis=1)
    several = (gaps > 0).sum(axis=1) >= 3
    return bool((several & (nearest >= GAP)).sum() > COARSE * len(runs))


def _coarse(model: MnnModel, operator: Operator) -> bool:
    if operator not in model.quantized or model.weight_file.header(operator).bits < 6:
        return False
    rows = [model.weight_file.quantized(operator, row, row + 1).q for row in sampled(operator)]
    return on_a_grid(np.concatenate(rows))


def requantized(model: MnnModel) -> Iterator[Finding]:
    """Report weights of 6 to 8 bits with few evenly spaced values: they had 2 to 5 bits before."""
    names = _matching(model, _coarse)
    if len(names) > len(model.operators) / 10:
        yield Finding(
            severity=Severity.WARNING,
            where=f"{model.weights.name}: {names[0]}",
            message="the weights were quantized twice: to fewer bits before these",
            evidence=f"in {len(names)} of {len(model.operators)} operators, q is on a coarser grid",
            effect="as large as its bits, and as inexact as the fewer bits before",
            cure="quantize the floating-point checkpoint, or a prequantized one with method: checkpoint",
        )


MODEL_CHECKS = (weights_of_another, weights_constant, weights_not_finite, requantized)
