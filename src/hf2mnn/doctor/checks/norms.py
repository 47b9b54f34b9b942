"""Gamma and beta of normalizations, and whether two operators read the same bytes.

MNN's own re-quantization (a .mnn file to another) writes a new weight file and leaves `external` of every LayerNorm
where the old file had it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf2mnn.doctor.checks.graph import AGAIN
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Model, external

LARGEST, TINY = 1e4, 1e-20
"""Beyond these no gamma or beta of a trained model is, but nearly every number that other bytes make as float32."""
STRANGE = 0.02
"""Share of numbers beyond, from which on bytes are taken for others."""
WRONG = "what follows is multiplied by other numbers than in the checkpoint: the answers are nonsense"


def _overlaps(model: Model) -> list[tuple[str, str, set[str]]]:
    """Pairs of operators of which one reads bytes that the other reads, and not exactly the same; with their types."""
    found, last = [], None
    ranges = ((op["main"]["external"], op) for op in external(model.graph))
    for begin, end, op in sorted(((at[0], at[0] + sum(at[1:]), op) for at, op in ranges), key=lambda one: one[:2]):
        if begin == end:
            continue
        if last and begin < last[1] and (begin, end) != last[:2]:
            found.append((op["name"], last[2]["name"], {op["type"], last[2]["type"]}))
        if last is None or end > last[1]:
            last = begin, end, op
    return found


def norm_stale(model: Model) -> Iterator[Finding]:
    """A LayerNorm that points into another operator's bytes, or at bytes that make no gamma."""
    overlaps = [f"{one} reads bytes of {other}" for one, other, types in _overlaps(model) if "LayerNorm" in types]
    strange = [] if overlaps or model.foreign else [f"{name}: {why}" for name, why in _strange(model)]
    count = len(model.graph.of_type("LayerNorm")) + len(list(model.graph.rotary_norms))
    if overlaps or strange:
        yield Finding(
            "norm_stale",
            Severity.ERROR,
            model.path.name,
            "a normalization reads its gamma and beta from the wrong place",
            f"{len(overlaps or strange)} of {count}: {(overlaps or strange)[0]}",
            WRONG,
            f"{AGAIN}; MNN's converter leaves these offsets behind when it re-quantizes a .mnn file",
        )


def weights_overlap(model: Model) -> Iterator[Finding]:
    """The same between linear layers: a graph put together with offsets of another."""
    overlaps = [(one, other) for one, other, types in _overlaps(model) if "LayerNorm" not in types]
    if overlaps:
        yield Finding(
            "weights_overlap",
            Severity.ERROR,
            model.path.name,
            "two operators read parts of each other's weights",
            f"{len(overlaps)} pairs, the first is {overlaps[0][0]} and {overlaps[0][1]}",
            "at least one of them has weights that are not its own: the answers are nonsense",
            AGAIN,
        )


def _parameters(model: Model) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, gamma and beta of every normalization that reads them from the weight file, and of those that are a part of
    a rotation, which reads them from the graph alone.
    """
    for op in model.graph.of_type("LayerNorm"):
        if place := op["main"].get("external"):
            sizes = [size // 4 * 4 for size in place[1:3]]
            values = np.frombuffer(model.file.raw(place[0], sum(sizes)), np.float32)
            yield op["name"], values[: sizes[0] // 4], values[sizes[0] // 4 :]
    for name, norm in model.graph.rotary_norms:
        yield name, *(np.array(norm.get(key, []), np.float32) for key in ("gamma", "beta"))


def _strange(model: Model) -> Iterator[tuple[str, str]]:
    rotary = dict(model.graph.rotary_norms)
    for name, gamma, beta in _parameters(model):
        values = np.abs(np.concatenate([gamma, beta]))
        if not values.size:
            if name in rotary:
                yield name, "the graph holds no gamma for it, and the engine leaves it out"
            continue
        beyond = ~(values <= LARGEST) | ((values < TINY) & (values > 0))
        if beyond.mean() > STRANGE or not np.isfinite(values).all():
            yield name, f"{beyond.sum()} of {values.size} numbers are NaN, over {LARGEST:g} or below {TINY:g}"


def norm_zero(model: Model) -> Iterator[Finding]:
    """Gamma all zero, or beta all zero where other normalizations of the graph have one."""
    gammas, betas, some = [], [], False
    rotary = dict(model.graph.rotary_norms)
    rms = {op["name"] for op in model.graph.of_type("LayerNorm") if op["main"].get("useRMSNorm")} | set(rotary)
    for name, gamma, beta in _parameters(model):
        if gamma.size and not gamma.any():
            gammas.append(name)
        elif name not in rms and beta.size:
            some |= bool(beta.any())
            betas += [] if beta.any() else [name]
    if gammas:
        yield Finding(
            "norm_zero",
            Severity.ERROR,
            f"{(model.path if gammas[0] in rotary else model.weights).name}: {gammas[0]}",
            "the gamma of a normalization is zero",
            f"{len(gammas)}: {', '.join(gammas[:3])}",
            "nothing of what the layer reads comes through",
            AGAIN,
        )
    if betas and some:
        yield Finding(
            "norm_zero",
            Severity.WARNING,
            f"{model.weights.name}: {betas[0]}",
            "the beta of a normalization is zero, where others of the graph have one",
            f"{len(betas)}: {', '.join(betas[:3])}",
            WRONG,
            AGAIN,
        )
