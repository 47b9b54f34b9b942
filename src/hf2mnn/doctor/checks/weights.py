"""The numbers in a weight file. Of a large weight a few rows are looked at, evenly spread, and all its scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from hf2mnn.core.errors import QuantizationError
from hf2mnn.doctor.checks.graph import AGAIN
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Model
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.weights import LEVELS, Operator

ROWS = 16
"""Rows of a weight that are looked at."""
AT_ONCE = 1 << 22
"""Float weights that are in memory at a time."""
LARGEST = 1e3
"""No weight of a trained model is so large; a scale with a flipped exponent is at once."""
RUN, GAP, COARSE = 32, 3, 0.5
"""Levels of 6 bits or more are looked at in runs of so many; no two nearer than GAP in a share COARSE of them is what
fewer bits leave."""


def sampled(operator: Operator) -> list[int]:
    return np.unique(np.linspace(0, operator.outputs - 1, ROWS).astype(int)).tolist()


def weights_of_another(model: Model) -> Iterator[Finding]:
    """A quantized weight has a header with its shape. Where the file has the right size and the headers do not fit,
    another conversion has written into it: MNN's converter stages weights in its working directory, under one name.
    """
    foreign, quantized = model.foreign, [o for o in model.operators if o.stored and o.stored["type"] == LEVELS]
    if not foreign:
        return
    size, read = model.weights.stat().st_size, model.graph.external_size()
    sentence = (
        "another model's weights were written into it: two conversions ran in one directory"
        if size == read and len(foreign) > 1
        else "it is not this graph's weight file"
        if size != read
        else "the weight of an operator was overwritten"
    )
    yield Finding(
        "weights_of_another",
        Severity.ERROR,
        f"{model.weights.name}: {foreign[0]}",
        sentence,
        f"{len(foreign)} of {len(quantized)} quantized weights have no header of their shape where the graph reads"
        f" them; {size:,} bytes, {read:,} are read",
        "the engine says that it has loaded it, and answers nonsense",
        f"put graph and weight file of one conversion together, or {AGAIN}",
    )


def _intact(model: Model) -> list[Operator]:
    """Nothing is said of numbers in a file that is another's."""
    return [] if model.foreign else model.operators


def _constant(model: Model, operator: Operator) -> bool:
    """Whether most rows have one value only; a few such rows a real model may have, of tokens that are never used."""
    rows = sampled(operator)
    same = [np.ptp(model.file.rows(operator, row, row + 1)) == 0 for row in rows]
    return sum(same) > len(rows) / 2


def _matching(model: Model, holds: Callable[[Model, Operator], bool]) -> list[str]:
    """Names of operators; one whose weight cannot be read has another check."""
    found = []
    for operator in _intact(model):
        try:
            if holds(model, operator):
                found.append(operator.name)
        except QuantizationError:
            continue
    return found


def weights_constant(model: Model) -> Iterator[Finding]:
    """What MNN's converter leaves when it re-quantizes a model whose weight file it does not find; or a download that
    only reserved its bytes.
    """
    found = _matching(model, _constant)
    if found:
        yield Finding(
            "weights_constant",
            Severity.ERROR,
            f"{model.weights.name}: {found[0]}",
            "all weights of an operator are the same number",
            f"{len(found)} of {len(model.operators)} operators, in most of up to {ROWS} rows each",
            "these layers give the same for every input: the answers are nonsense",
            AGAIN,
        )


def _absurd(model: Model, operator: Operator) -> bool:
    with np.errstate(invalid="ignore"):
        if operator.stored and operator.stored["type"] != FLOAT16:
            return not np.abs(model.file.alpha(operator)).max(initial=0) <= LARGEST
        step = max(AT_ONCE // operator.inputs, 1)
        spans = ((at, min(at + step, operator.outputs)) for at in range(0, operator.outputs, step))
        return any(not np.abs(model.file.rows(operator, *span)).max(initial=0) <= LARGEST for span in spans)


def weights_not_finite(model: Model) -> Iterator[Finding]:
    """NaN, infinite or absurd scales, zeros, or floating-point weights; every one is looked at."""
    found = _matching(model, _absurd)
    if found:
        yield Finding(
            "weights_not_finite",
            Severity.ERROR,
            f"{model.weights.name}: {found[0]}",
            "weights or their scales are NaN, infinite, or absurdly large",
            f"{len(found)} of {len(model.operators)} operators have one over {LARGEST:g} or that is no number",
            "whatever touches them becomes NaN or drowns everything else",
            f"{AGAIN}; if it comes back, 'hf2mnn source' checks the checkpoint",
        )


def on_a_grid(levels: np.ndarray) -> bool:
    """Whether levels, int8 [rows, inputs], lie on a grid of few values in most runs of neighbours.

    Weights that were rounded once have levels next to each other in nearly every run: at 6 to 8 bits, no layer of the
    embedded model had more than 0.4 % of runs without, whatever method and block; rounded from 4 bits to 8, all had
    none in 100 % of runs. From 5 bits to 6 nothing can be told.
    """
    runs = levels[:, : levels.shape[1] // RUN * RUN].reshape(-1, RUN).astype(np.int16)
    gaps = np.diff(np.sort(runs, axis=1), axis=1)
    nearest = np.where(gaps > 0, gaps, np.iinfo(np.int16).max).min(axis=1)
    several = (gaps > 0).sum(axis=1) >= 3
    return bool((several & (nearest >= GAP)).sum() > COARSE * len(runs))


def _coarse(model: Model, operator: Operator) -> bool:
    if not operator.stored or operator.stored["type"] != LEVELS or model.file.header(operator).bits < 6:
        return False
    rows = [model.file.levels(operator, row, row + 1).levels for row in sampled(operator)]
    return on_a_grid(np.concatenate(rows))


def requantized(model: Model) -> Iterator[Finding]:
    """Levels of 6 to 8 bits that take few values, evenly spaced: they were 2 to 5 bits before."""
    found = _matching(model, _coarse)
    if len(found) > len(model.operators) / 10:
        yield Finding(
            "requantized",
            Severity.WARNING,
            f"{model.weights.name}: {found[0]}",
            "its weights were quantized twice: to fewer bits before these",
            f"in {len(found)} of {len(model.operators)} operators the levels lie on a grid of few values in most runs"
            f" of {RUN} weights",
            "it is as large as its bits say, and as inexact as the fewer bits that it had before",
            "quantize the floating-point checkpoint; 'hf2mnn quantize' with method: checkpoint takes over packed levels"
            " as they are",
        )
