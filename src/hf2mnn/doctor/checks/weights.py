"""Checks of the values in a weight file, and of the byte ranges that operators read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np

from hf2mnn.core.errors import CheckpointError, QuantizationError
from hf2mnn.doctor.artifacts import MnnModel, sampled_rows
from hf2mnn.doctor.checks.files import CONVERT_AGAIN
from hf2mnn.doctor.findings import Finding, Findings, Severity
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.folding import FOLDED
from hf2mnn.quant.formats import LM_HEAD
from hf2mnn.quant.weights import Operator

MAXIMUM, MINIMUM = 1e4, 1e-20
"""Range of gamma and beta in trained models; nearly all other bytes, read as float32, are outside."""
IMPLAUSIBLE = 0.02  # fraction of values outside the range from which bytes do not count as gamma or beta
EFFECT = "wrong output: values are scaled by other numbers than in the checkpoint"
ROWS = 16  # number of evenly spaced rows of a weight that are read
AT_ONCE = 1 << 22  # number of float weights in memory at a time
LARGEST = 1e3  # maximum of a plausible weight; a scale with a flipped exponent bit exceeds it
RUN, GAP, COARSE = 32, 3, 0.5
"""A weight counts as re-quantized if in a fraction COARSE of all runs of RUN weights no two distinct q are nearer than
GAP, which fewer bits leave."""
TOLERANCE = {2: 0.9, 3: 0.6, 4: 0.4, 5: 0.2, 6: 0.1, 7: 0.1, 8: 0.1, 16: 0.01, 32: 0.001}
"""Relative error by bits: about four times the errors in docs/benchmarks/quantization.md. An unrelated matrix of the
same scale has about 1.4."""
LLMEXPORT_NAME = re.compile(r"/(?P<layer>layers\.\d+)/(?P<part>\w+)/(?P<name>\w+)/Linear")
"""Names that llmexport gives to the decoder's linear layers."""


def _overlaps(model: MnnModel) -> list[tuple[str, str, set[str]]]:
    """Return names and types of pairs of operators whose byte ranges overlap without being equal."""
    overlaps, last = [], (0, 0, {})
    readers = [op for op in model.graph.ops if isinstance(op.get("main"), dict) and op["main"].get("external")]
    ranges = [(op["main"]["external"][0], sum(op["main"]["external"]), op) for op in readers]
    for begin, end, op in sorted(ranges, key=lambda entry: entry[:2]):
        if begin < end and begin < last[1] and (begin, end) != last[:2]:
            overlaps.append((op["name"], last[2]["name"], {op["type"], last[2]["type"]}))
        last = max(last, (begin, end, op), key=lambda entry: entry[1])
    return overlaps


def norm_stale(model: MnnModel) -> Findings:
    """Report a LayerNorm whose `external` offset points into another operator, or not at gamma and beta."""
    problems = [f"{name} reads bytes of {other}" for name, other, types in _overlaps(model) if "LayerNorm" in types]
    if not problems and not model.foreign:
        problems = list(_implausible_norms(model))
    if problems:
        count = len(model.graph.of_type("LayerNorm")) + len(list(model.graph.rotary_norms))
        message = "a normalization reads gamma and beta from a wrong offset"
        cure = f"{CONVERT_AGAIN}; MNN's converter keeps stale offsets when it re-quantizes a .mnn file"
        yield Finding(model.path.name, message, f"{len(problems)} of {count}: {problems[0]}", EFFECT, cure)


def weights_overlap(model: MnnModel) -> Findings:
    """Report linear layers with overlapping byte ranges: a graph with the offsets of another."""
    overlaps = [(name, other) for name, other, types in _overlaps(model) if "LayerNorm" not in types]
    if overlaps:
        evidence = f"{len(overlaps)} pairs, the first is {overlaps[0][0]} and {overlaps[0][1]}"
        effect = "wrong output: at least one of them reads weights of another"
        yield Finding(model.path.name, "the weights of two operators overlap", evidence, effect, CONVERT_AGAIN)


def _norms(model: MnnModel) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield name, gamma and beta of normalizations with external weights and of those inside a RoPE operator."""
    for op in model.graph.of_type("LayerNorm"):
        if external := op["main"].get("external"):
            sizes = [size // 4 * 4 for size in external[1:3]]
            values = np.frombuffer(model.weight_file.raw(external[0], sum(sizes)), np.float32)
            yield op["name"], values[: sizes[0] // 4], values[sizes[0] // 4 :]
    for name, norm in model.graph.rotary_norms:
        yield name, *(np.array(norm.get(key, []), np.float32) for key in ("gamma", "beta"))


def _implausible_norms(model: MnnModel) -> Iterator[str]:
    rotary = dict(model.graph.rotary_norms)
    for name, gamma, beta in _norms(model):
        values = np.abs(np.concatenate([gamma, beta]))
        outside = ~(values <= MAXIMUM) | ((values < MINIMUM) & (values > 0))
        if not values.size and name in rotary:
            yield f"{name}: the graph holds no gamma for it, and the engine skips it"
        elif values.size and (outside.mean() > IMPLAUSIBLE or not np.isfinite(values).all()):
            yield f"{name}: {outside.sum()} of {values.size} values are NaN, over {MAXIMUM:g} or below {MINIMUM:g}"


def norm_zero(model: MnnModel) -> Findings:
    """Report a gamma of zeros, or a beta of zeros where other normalizations of the graph have one."""
    rotary = dict(model.graph.rotary_norms)
    rms = {op["name"] for op in model.graph.of_type("LayerNorm") if op["main"].get("useRMSNorm")} | set(rotary)
    gammas, others = [], {}
    for name, gamma, beta in _norms(model):
        if gamma.size and not gamma.any():
            gammas.append(name)
        elif beta.size and name not in rms:
            others[name] = beta.any()
    betas = [name for name, nonzero in others.items() if not nonzero] if any(others.values()) else []
    for names, severity, message, effect in (
        (gammas, Severity.ERROR, "gamma of a normalization is zero", "wrong output: the normalization returns zeros"),
        (betas, Severity.WARNING, "beta of a normalization is zero, and others are not", EFFECT),
    ):
        if names:
            where = f"{(model.path if names[0] in rotary else model.weights).name}: {names[0]}"
            evidence = f"{len(names)}: {', '.join(names[:3])}"
            yield Finding(where, message, evidence, effect, CONVERT_AGAIN, severity=severity)


def _sampled(operator: Operator) -> list[tuple[int, int]]:
    """Return begin and end of up to ROWS evenly spaced rows."""
    return [(row, row + 1) for row in sampled_rows(operator.outputs, ROWS).tolist()]


def weights_of_another(model: MnnModel) -> Findings:
    """Report quantized weights without a header of their shape: MNN's converter stages weights under a fixed name."""
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
    yield Finding(f"{model.weights.name}: {model.foreign[0]}", message, evidence, effect, cure)


def _matching(model: MnnModel, condition: Callable[[MnnModel, Operator], bool]) -> list[str]:
    """Return the names of operators for which a condition holds; those that other checks report are skipped."""
    names = []
    for operator in [] if model.foreign else model.operators:
        with suppress(QuantizationError):
            if condition(model, operator):
                names.append(operator.name)
    return names


def _constant(model: MnnModel, operator: Operator) -> bool:
    """Return whether most rows are constant; models may have a few such rows, of unused tokens."""
    rows = _sampled(operator)
    constant = [np.ptp(model.weight_file.rows(operator, *row)) == 0 for row in rows]
    return sum(constant) > len(rows) / 2


def weights_constant(model: MnnModel) -> Findings:
    """Report constant weights: of incomplete downloads, or re-quantized by the converter without the weight file."""
    if names := _matching(model, _constant):
        message = "all weights of an operator are equal"
        evidence = f"{len(names)} of {len(model.operators)} operators, in most of up to {ROWS} rows each"
        effect = "wrong output: these layers return the same for every input"
        yield Finding(f"{model.weights.name}: {names[0]}", message, evidence, effect, CONVERT_AGAIN)


def _implausible(model: MnnModel, operator: Operator) -> bool:
    with np.errstate(invalid="ignore"):
        if operator.stored and operator.stored["type"] != FLOAT16:
            return not np.abs(model.weight_file.alpha(operator)).max(initial=0) <= LARGEST
        step = max(AT_ONCE // operator.inputs, 1)
        spans = ((begin, min(begin + step, operator.outputs)) for begin in range(0, operator.outputs, step))
        return any(not np.abs(model.weight_file.rows(operator, *s)).max(initial=0) <= LARGEST for s in spans)


def weights_not_finite(model: MnnModel) -> Findings:
    """Report scales, zero points or floating-point weights that are NaN, infinite or over LARGEST; all are read."""
    if names := _matching(model, _implausible):
        message = "weights or scales are NaN, infinite, or implausibly large"
        evidence = f"{len(names)} of {len(model.operators)} operators have a value that is NaN or over {LARGEST:g}"
        effect = "the output becomes NaN, or these values dominate it"
        cure = f"{CONVERT_AGAIN}; if it persists, check the checkpoint with 'hf2mnn fetch'"
        yield Finding(f"{model.weights.name}: {names[0]}", message, evidence, effect, cure)


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
    rows = [model.weight_file.quantized(operator, *row).q for row in _sampled(operator)]
    return on_a_grid(np.concatenate(rows))


def requantized(model: MnnModel) -> Findings:
    """Report weights of 6 to 8 bits with few evenly spaced values: they had 2 to 5 bits before."""
    names = _matching(model, _coarse)
    if len(names) > len(model.operators) / 10:
        message = "the weights were quantized twice: to fewer bits before these"
        evidence = f"in {len(names)} of {len(model.operators)} operators, q is on a coarser grid"
        effect = "as large as its bits, and as inexact as the fewer bits before"
        cure = "quantize the floating-point checkpoint, or a prequantized one with method: checkpoint"
        yield Finding(f"{model.weights.name}: {names[0]}", message, evidence, effect, cure, severity=Severity.WARNING)


def _parameter(name: str, decoder: str) -> str | None:
    """Return the transformers parameter of an operator, if its name tells; `decoder` is the decoder's module."""
    if name in ("logits", "/lm/lm_head/Linear", LM_HEAD):
        return f"{LM_HEAD}.weight"
    if match := LLMEXPORT_NAME.fullmatch(name):
        return f"{decoder}.{match['layer']}.{match['part']}.{match['name']}.weight"
    return f"{name}.weight" if name.startswith("model.") else None


def _error(model: MnnModel, operator: Operator) -> float | None:
    """Return the relative error of the sampled rows of a linear layer; None if the checkpoint has no such weight."""
    parameter = _parameter(operator.name, model.checkpoint.family.decoder)
    try:
        stored = model.checkpoint.stored(parameter) if parameter and operator.kernel == 1 else None
        if stored is None:
            return None
        if stored.shape != (operator.outputs, operator.inputs):
            return np.inf
        rows = _sampled(operator)
        right = np.concatenate([stored.rows(*row) for row in rows]).astype(np.float64)
        error = np.concatenate([model.weight_file.rows(operator, *row) for row in rows]) - right
    except (CheckpointError, QuantizationError):
        return None
    return float(np.linalg.norm(error) / np.linalg.norm(right)) if right.any() else None


def _bits(operator: Operator) -> int:
    if operator.stored is None:
        return 32
    return 16 if operator.stored["type"] == FLOAT16 else operator.stored["aMaxOrBits"]


def not_the_checkpoint(model: MnnModel) -> Findings:
    """Compare linear layers with the checkpoint, except in bundles with folded scales (awq), which differ by design."""
    if model.checkpoint is None or model.foreign or (model.path.parent / FOLDED).is_file():
        return
    errors = [(operator, error) for operator in model.operators if (error := _error(model, operator)) is not None]
    wrong = [(error, _bits(o), o.name) for o, error in errors if not error <= TOLERANCE.get(_bits(o), 0.9)]
    if wrong:
        error, bits, worst = max(wrong, key=lambda entry: entry[:2])
        message = "the weights differ from the checkpoint's"
        evidence = f"{len(wrong)} of {len(errors)} layers compared; relative error {error:.2g} in {worst} ({bits} bits)"
        effect = "another model's output, or wrong output: weights were swapped, damaged or overwritten"
        cure = f"{CONVERT_AGAIN}; check that --checkpoint is the checkpoint of this bundle"
        yield Finding(f"{model.weights.name}: {wrong[0][2]}", message, evidence, effect, cure)


RANGE_CHECKS = (norm_stale, norm_zero, weights_overlap)
VALUE_CHECKS = (weights_of_another, weights_constant, weights_not_finite, requantized, not_the_checkpoint)
