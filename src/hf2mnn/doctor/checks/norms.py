"""Checks of gamma and beta of normalizations, and of byte ranges that operators share.

MNN's own re-quantization (from a .mnn file to another) writes a new weight file and keeps the `external` offsets of
every LayerNorm from the old one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf2mnn.doctor.artifacts import MnnModel, external_operators
from hf2mnn.doctor.checks.graph import CONVERT_AGAIN
from hf2mnn.doctor.findings import Finding, Severity

MAXIMUM, MINIMUM = 1e4, 1e-20
"""Range of gamma and beta in trained models; nearly all other bytes, read as float32, are outside."""
IMPLAUSIBLE = 0.02
"""Fraction of values outside the range from which bytes do not count as gamma or beta."""
EFFECT = "wrong output: values are scaled by other numbers than in the checkpoint"


def _overlaps(model: MnnModel) -> list[tuple[str, str, set[str]]]:
    """Return names and types of pairs of operators whose byte ranges overlap without being equal."""
    overlaps, last = [], None
    ranges = ((op["main"]["external"], op) for op in external_operators(model.graph))
    ordered = sorted(((e[0], e[0] + sum(e[1:]), op) for e, op in ranges), key=lambda entry: entry[:2])
    for begin, end, op in ordered:
        if begin == end:
            continue
        if last and begin < last[1] and (begin, end) != last[:2]:
            overlaps.append((op["name"], last[2]["name"], {op["type"], last[2]["type"]}))
        if last is None or end > last[1]:
            last = begin, end, op
    return overlaps


def norm_stale(model: MnnModel) -> Iterator[Finding]:
    """Report a LayerNorm whose offset points into another operator, or at bytes that are not gamma and beta."""
    problems = [f"{name} reads bytes of {other}" for name, other, types in _overlaps(model) if "LayerNorm" in types]
    if not problems and not model.foreign:
        problems = [f"{name}: {reason}" for name, reason in _implausible(model)]
    if problems:
        count = len(model.graph.of_type("LayerNorm")) + len(list(model.graph.rotary_norms))
        message = "a normalization reads gamma and beta from a wrong offset"
        evidence = f"{len(problems)} of {count}: {problems[0]}"
        cure = f"{CONVERT_AGAIN}; MNN's converter keeps stale offsets when it re-quantizes a .mnn file"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=EFFECT, cure=cure)


def weights_overlap(model: MnnModel) -> Iterator[Finding]:
    """Report linear layers with overlapping byte ranges: a graph with the offsets of another."""
    overlaps = [(name, other) for name, other, types in _overlaps(model) if "LayerNorm" not in types]
    if overlaps:
        message = "the weights of two operators overlap"
        evidence = f"{len(overlaps)} pairs, the first is {overlaps[0][0]} and {overlaps[0][1]}"
        effect = "wrong output: at least one of them reads weights of another"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=CONVERT_AGAIN)


def _parameters(model: MnnModel) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield name, gamma and beta of normalizations with external weights and of those inside a RoPE operator."""
    for op in model.graph.of_type("LayerNorm"):
        if external := op["main"].get("external"):
            sizes = [size // 4 * 4 for size in external[1:3]]
            values = np.frombuffer(model.weight_file.raw(external[0], sum(sizes)), np.float32)
            yield op["name"], values[: sizes[0] // 4], values[sizes[0] // 4 :]
    for name, norm in model.graph.rotary_norms:
        yield name, *(np.array(norm.get(key, []), np.float32) for key in ("gamma", "beta"))


def _implausible(model: MnnModel) -> Iterator[tuple[str, str]]:
    rotary = dict(model.graph.rotary_norms)
    for name, gamma, beta in _parameters(model):
        values = np.abs(np.concatenate([gamma, beta]))
        if not values.size:
            if name in rotary:
                yield name, "the graph holds no gamma for it, and the engine skips it"
            continue
        outside = ~(values <= MAXIMUM) | ((values < MINIMUM) & (values > 0))
        if outside.mean() > IMPLAUSIBLE or not np.isfinite(values).all():
            yield name, f"{outside.sum()} of {values.size} values are NaN, over {MAXIMUM:g} or below {MINIMUM:g}"


def norm_zero(model: MnnModel) -> Iterator[Finding]:
    """Report a gamma of zeros, or a beta of zeros where other normalizations of the graph have one."""
    gammas, betas, has_beta = [], [], False
    rotary = dict(model.graph.rotary_norms)
    rms = {op["name"] for op in model.graph.of_type("LayerNorm") if op["main"].get("useRMSNorm")} | set(rotary)
    for name, gamma, beta in _parameters(model):
        if gamma.size and not gamma.any():
            gammas.append(name)
        elif name not in rms and beta.size:
            has_beta |= bool(beta.any())
            betas += [] if beta.any() else [name]
    for names, severity, message, effect in (
        (gammas, Severity.ERROR, "gamma of a normalization is zero", "wrong output: the normalization returns zeros"),
        (
            betas if has_beta else [],
            Severity.WARNING,
            "beta of a normalization is zero, and others are not",
            EFFECT,
        ),
    ):
        if names:
            yield Finding(
                severity=severity,
                where=f"{(model.path if names[0] in rotary else model.weights).name}: {names[0]}",
                message=message,
                evidence=f"{len(names)}: {', '.join(names[:3])}",
                effect=effect,
                cure=CONVERT_AGAIN,
            )


MODEL_CHECKS = (norm_stale, norm_zero, weights_overlap)
