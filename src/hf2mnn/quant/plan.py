"""Mixed precision: the format of each operator that costs the answers least within a budget.

Errors of operators that are small and independent add up, so the plan is the choice of one format for each operator
with the smallest sum of divergences whose sum of bytes keeps the budget: a multiple-choice knapsack, solved exactly.
"""

from __future__ import annotations

import math
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
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant.embedding import BITS
from hf2mnn.quant.formats import stored_size
from hf2mnn.quant.names import CANDIDATES, EMBEDDING, LM_HEAD, MEASURED
from hf2mnn.quant.variant import Part
from hf2mnn.quant.weights import Operator

PLAN = "plan.yaml"
DESCRIBED = 400
"""Bytes, at most, by which an operator's format lengthens the graph and weights.csv."""
SMALLEST_KLD = 1e-12
"""A divergence below this is that of other orders of sums."""


def expected_divergence(measured: pd.DataFrame, errors: np.ndarray) -> np.ndarray:
    """Divergence of one operator at weight `errors`, from what was measured of it.

    Along a line through the logarithms of measured divergence and error; beyond them as the square of the error, which
    is how a divergence goes to zero.
    """
    table = measured[measured["weight_error"] > 0].sort_values("weight_error")
    if table.empty:
        return np.zeros(len(errors))
    known, divergence = np.log(table["weight_error"]), np.log(np.maximum(table["mean_kld"], SMALLEST_KLD))
    # A larger error that happened to cost less is noise.
    divergence = np.maximum.accumulate(divergence)
    asked = np.log(np.maximum(errors, 1e-9))
    inside = np.interp(asked, known, divergence)
    beyond = np.minimum(asked - known.iloc[0], 0) + np.maximum(asked - known.iloc[-1], 0)
    return np.exp(inside + 2 * beyond)


def options(measured: pd.DataFrame, candidates: pd.DataFrame, tied: bool) -> pd.DataFrame:
    """`candidates` with a column `kld`; where the embedding is read from lm_head, with what that costs, and without the
    formats of lm_head that the engine cannot read it from.
    """
    found = []
    for name, group in candidates.groupby("operator", sort=False):
        if tied and name == LM_HEAD:
            group = group[group["bits"].isin(BITS)]
        errors = group["weight_error"].to_numpy()
        cost = expected_divergence(measured[measured["operator"] == name], errors)
        if tied and name == LM_HEAD:
            cost = cost + expected_divergence(measured[measured["operator"] == EMBEDDING], errors)
        found.append(group.assign(kld=cost))
    return pd.concat(found, ignore_index=True)


def solve(table: pd.DataFrame, most_bytes: int) -> pd.DataFrame:
    """The rows of `table` (operator, bytes, kld, ...), one of each operator, with the smallest sum of kld whose bytes
    are at most `most_bytes` together. Ties go to fewer bytes.

    Raises:
        QuantizationError: the smallest formats are larger than that.
    """
    names = list(dict.fromkeys(table["operator"]))
    smallest = int(table.groupby("operator")["bytes"].min().sum())
    if smallest > most_bytes:
        weights = int(table.drop_duplicates("operator")["weights"].sum())
        raise QuantizationError(
            f"the budget leaves {most_bytes:,} bytes for weights, their smallest formats take {smallest:,}: give at"
            f" least {math.ceil(8000 * smallest / weights) / 1000} bits a weight, {smallest - most_bytes:,} bytes more"
        )
    table = _undominated(table)
    limit = most_bytes
    while (chosen := _cheapest(table, names, limit))["bytes"].sum() > most_bytes:
        limit -= int(chosen["bytes"].sum()) - most_bytes  # the solver's own tolerance
    return chosen


def _undominated(table: pd.DataFrame) -> pd.DataFrame:
    """Without formats that cost no less than a smaller one of the same operator."""
    ordered = table.sort_values(["bytes", "kld"], kind="stable")
    before = ordered.groupby("operator")["kld"].transform(lambda kld: kld.cummin().shift(fill_value=np.inf))
    return table.loc[sorted(ordered.index[ordered["kld"] < before])]


def _cheapest(table: pd.DataFrame, names: list[str], most_bytes: int) -> pd.DataFrame:
    place = {name: index for index, name in enumerate(names)}
    rows, columns = table["operator"].map(place).to_numpy(), np.arange(len(table))
    one_each = coo_array((np.ones(len(table)), (rows, columns)), shape=(len(names), len(table)))
    size, cost = table["bytes"].to_numpy(float), table["kld"].to_numpy(float)
    solved = milp(
        cost / max(cost.max(), SMALLEST_KLD),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None], -np.inf, most_bytes)],
        integrality=np.ones(len(table)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if solved.x is None:
        raise QuantizationError(f"no plan was found within {most_bytes:,} bytes: {solved.message}")
    return table[solved.x > 0.5].reset_index(drop=True)


def write_plan(chosen: pd.DataFrame, head: list[str], path: Path) -> None:
    """plan.yaml: a line for each operator, to be read, edited and named in config.yaml."""
    lines = [f"# {line}" for line in head]
    for part, rows in chosen.groupby("part", sort=False):
        lines.append(f"{part}:")
        for row in rows.itertuples():
            note = f"{8 * row.bytes / row.weights:.2f} bits a weight, {row.bytes:,} bytes, KL divergence {row.kld:.2g}"
            lines.append(f"  {row.operator}: {{bits: {row.bits}, block: {row.block}}}  # {note}")
    path.write_text("\n".join(lines) + "\n")


def with_bytes(candidates: pd.DataFrame, layers: dict[str, list[Operator]]) -> pd.DataFrame:
    """`candidates` with what each takes in the bundle, `bytes`, and with `weights`; `layers` by part."""
    by_name: dict[str, list[Operator]] = {}
    for operator in [operator for found in layers.values() for operator in found]:
        by_name.setdefault(operator.name, []).append(operator)
    unknown = sorted(set(by_name) - set(candidates["operator"]))
    if unknown:
        raise QuantizationError(f"{unknown[0]}: its sensitivity was not measured; run 'hf2mnn sensitivity' again")
    rows = candidates[candidates["operator"].isin(by_name)].copy()
    forms = [WeightFormat(bits, block) for bits, block in zip(rows["bits"], rows["block"], strict=True)]
    pairs = list(zip(rows["operator"], forms, strict=True))
    rows["bytes"] = [sum(stored_size(operator, form) for operator in by_name[name]) for name, form in pairs]
    rows["weights"] = [sum(operator.size for operator in by_name[name]) for name, _ in pairs]
    return rows


def make_plan(
    sensitivity: Path, onnx_folder: Path, base: Manifest, folder: Path, budget: Budget, embedding: str
) -> dict[str, Any]:
    """Write plan.yaml to `folder`; `base` is the verified manifest of the convert stage.

    Returns:
        bits_per_weight, weight_bytes, and expected_kld in nats.

    Raises:
        QuantizationError: The budget cannot be met; the message has the smallest that can.
    """
    layers = {name: Part(name, onnx_folder, base.folder).operators for name in parts_in(onnx_folder)}
    tied = embedding == LM_HEAD
    measured, candidates = (pd.read_csv(sensitivity / name) for name in (MEASURED, CANDIDATES))
    table = options(measured, with_bytes(candidates, layers), tied)
    everything = [operator for found in layers.values() for operator in found]
    weights = sum(operator.size for operator in everything)
    if budget.bits_per_weight:
        most = int(budget.bits_per_weight * weights / 8)
    else:
        most = budget.bundle_bytes - _beside_weights(base, everything, tied)
    chosen = solve(table, most)
    size, kld = int(chosen["bytes"].sum()), float(chosen["kld"].sum())
    head = [
        f"{8 * size / weights:.3f} bits a weight over {weights:,} weights: {size:,} of {most:,} bytes.",
        f"Expected KL divergence {kld:.3g} nats, the sum of what each operator costs alone.",
        "To pin it: copy this file, and name it as the variant's plan in config.yaml.",
    ]
    write_plan(chosen, head, folder / PLAN)
    print("\n".join(head[:2]), flush=True)
    return {"bits_per_weight": 8 * size / weights, "weight_bytes": size, "expected_kld": kld}


def _beside_weights(bundle: Manifest, operators: list[Operator], tied: bool) -> int:
    """Bytes of a bundle that are not its operators' weights, from those of the `mnn` stage."""
    sizes = {name: entry["size"] for name, entry in bundle.outputs.items()}
    embedding = sizes[EMBEDDING_FILE] if tied else 0
    weights = sum(operator.parts[0][1] for operator in operators)
    return sum(sizes.values()) - weights - embedding + DESCRIBED * len(operators)
