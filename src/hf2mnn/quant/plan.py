"""Mixed precision: the formats of operators with the smallest expected divergence within a budget.

Small, independent errors of operators add up, so the sum of divergences is minimized within a sum of bytes: a
multiple-choice knapsack problem, solved exactly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hf2mnn.config.budget import Budget
from hf2mnn.core.errors import QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import EMBEDDING as EMBEDDING_FILE
from hf2mnn.mnn.bundle import parts_in
from hf2mnn.mnn.engine_facts import QUANTIZED_EMBEDDING_BITS
from hf2mnn.quant.blob import size
from hf2mnn.quant.formats import CANDIDATES, EMBEDDING, LM_HEAD, MEASURED, WeightFormat
from hf2mnn.quant.variant import Part
from hf2mnn.quant.weights import Operator

PLAN = "plan.yaml"
FORMAT_BYTES = 400
"""Upper bound on the bytes that the format of an operator adds to the graph and to weights.csv."""
SMALLEST_KLD = 1e-12
"""Divergences below this come from another order of sums."""


def expected_divergence(measured: pd.DataFrame, errors: np.ndarray) -> np.ndarray:
    """Return the divergence of one operator at weight errors that were not measured.

    Linear interpolation between the logarithms of measured errors and divergences; outside of their range the
    divergence is proportional to the square of the error, its limit for small errors.
    """
    table = measured[measured["weight_error"] > 0].sort_values("weight_error")
    if table.empty:
        return np.zeros(len(errors))
    known, divergence = np.log(table["weight_error"]), np.log(np.maximum(table["mean_kld"], SMALLEST_KLD))
    wanted = np.log(np.maximum(errors, 1e-9))
    # A larger error with a smaller divergence is noise.
    inside = np.interp(wanted, known, np.maximum.accumulate(divergence))
    beyond = np.minimum(wanted - known.iloc[0], 0) + np.maximum(wanted - known.iloc[-1], 0)
    return np.exp(inside + 2 * beyond)


def options(measured: pd.DataFrame, candidates: pd.DataFrame, tied: bool) -> pd.DataFrame:
    """Return `candidates` with a column `kld`, the expected divergence.

    If the engine reads the embedding from lm_head (`tied`), the divergence of lm_head includes that of the embedding,
    and formats from which the engine cannot read it are left out.
    """
    groups = []
    for name, group in candidates.groupby("operator", sort=False):
        sources = [name]
        if tied and name == LM_HEAD:
            sources.append(EMBEDDING)
            group = group[group["bits"].isin(QUANTIZED_EMBEDDING_BITS)]
        errors = group["weight_error"].to_numpy()
        kld = sum(expected_divergence(measured[measured["operator"] == source], errors) for source in sources)
        groups.append(group.assign(kld=kld))
    return pd.concat(groups, ignore_index=True)


def solve(table: pd.DataFrame, most_bytes: int) -> pd.DataFrame:
    """Choose one row of `table` per operator with the smallest sum of kld; of equal sums, the one with fewer bytes.

    Raise QuantizationError if the smallest formats are larger than `most_bytes`.
    """
    smallest = int(table.groupby("operator")["bytes"].min().sum())
    if smallest > most_bytes:
        weights = int(table.drop_duplicates("operator")["weights"].sum())
        raise QuantizationError(
            f"the budget leaves {most_bytes:,} bytes for weights, but their smallest formats take {smallest:,}: give at"
            f" least {math.ceil(8000 * smallest / weights) / 1000} bits a weight, {smallest - most_bytes:,} bytes more"
        )
    # Drop formats that are neither smaller nor better than another one of the same operator.
    ordered = table.sort_values(["bytes", "kld"], kind="stable")
    before = ordered.groupby("operator")["kld"].transform(lambda kld: kld.cummin().shift(fill_value=np.inf))
    table, limit = table.loc[sorted(ordered.index[ordered["kld"] < before])], most_bytes
    while (chosen := _cheapest(table, limit))["bytes"].sum() > most_bytes:
        limit -= int(chosen["bytes"].sum()) - most_bytes  # the solver has a tolerance
    return chosen


def _cheapest(table: pd.DataFrame, most_bytes: int) -> pd.DataFrame:
    rows, columns = pd.factorize(table["operator"])[0], np.arange(len(table))
    one_each = coo_array((np.ones(len(table)), (rows, columns)))
    sizes, cost = table["bytes"].to_numpy(float), table["kld"].to_numpy(float)
    solution = milp(
        cost / max(cost.max(), SMALLEST_KLD),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None], -np.inf, most_bytes)],
        integrality=np.ones(len(table)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if solution.x is None:
        raise QuantizationError(f"no plan fits into {most_bytes:,} bytes: {solution.message}; report it")
    return table[solution.x > 0.5].reset_index(drop=True)


def write_plan(chosen: pd.DataFrame, head: list[str], path: Path) -> None:
    """Write a line for each row of `chosen`, to read, to edit and to name in config.yaml; `head` are comments."""
    lines = [f"# {line}" for line in head]
    for part, rows in chosen.groupby("part", sort=False):
        lines.append(f"{part}:")
        for row in rows.itertuples():
            note = f"{8 * row.bytes / row.weights:.2f} bits a weight, {row.bytes:,} bytes, KL divergence {row.kld:.2g}"
            lines.append(f"  {row.operator}: {{bits: {row.bits}, block: {row.block}}}  # {note}")
    path.write_text("\n".join(lines) + "\n")


def with_bytes(candidates: pd.DataFrame, layers: list[Operator]) -> pd.DataFrame:
    """Return `candidates` with their `bytes` in the bundle and number of `weights`; `layers` are those of all parts."""
    by_name: dict[str, list[Operator]] = defaultdict(list)
    for operator in layers:
        by_name[operator.name].append(operator)
    if unknown := sorted(set(by_name) - set(candidates["operator"])):
        raise QuantizationError(f"{unknown[0]}: its sensitivity was not measured; run 'hf2mnn sensitivity' again")

    def stored_bytes(row: Any) -> int:
        form = WeightFormat(row.bits, row.block)
        return sum(size(operator.outputs, operator.inputs, form) for operator in by_name[row.operator])

    rows = candidates[candidates["operator"].isin(by_name)]
    weights = [sum(operator.size for operator in by_name[name]) for name in rows["operator"]]
    return rows.assign(bytes=list(map(stored_bytes, rows.itertuples())), weights=weights)


def make_plan(
    sensitivity: Path, onnx_folder: Path, graphs: Manifest, folder: Path, budget: Budget, embedding: str
) -> dict[str, Any]:
    """Write plan.yaml to `folder`; `graphs` is the verified manifest of the convert stage.

    Return bits_per_weight, weight_bytes, and expected_kld in nats. Raise QuantizationError for too small a budget.
    """
    layers = []
    for name in parts_in(onnx_folder):
        layers += Part(name, onnx_folder, graphs.folder).operators
    tied = embedding == LM_HEAD
    measured, candidates = (pd.read_csv(sensitivity / name) for name in (MEASURED, CANDIDATES))
    table = options(measured, with_bytes(candidates, layers), tied)
    weights = sum(operator.size for operator in layers)
    if budget.bits_per_weight:
        most = int(budget.bits_per_weight * weights / 8)
    else:
        # Others are at most those of the convert stage: the JSON form of a graph is longer than its .mnn file.
        others = sum(entry["size"] for name, entry in graphs.outputs.items() if name != EMBEDDING_FILE or not tied)
        others += FORMAT_BYTES * len(layers) - sum(operator.parts[0][1] for operator in layers)
        most = budget.bundle_bytes - others
    chosen = solve(table, most)
    total, kld = int(chosen["bytes"].sum()), float(chosen["kld"].sum())
    head = [
        f"{8 * total / weights:.3f} bits a weight over {weights:,} weights: {total:,} of {most:,} bytes.",
        f"Expected KL divergence {kld:.3g} nats, the sum over all operators quantized alone.",
        "To pin this plan, copy this file and name it as the variant's plan in config.yaml.",
    ]
    write_plan(chosen, head, folder / PLAN)
    print("\n".join(head[:2]), flush=True)
    return {"bits_per_weight": 8 * total / weights, "weight_bytes": total, "expected_kld": kld}
