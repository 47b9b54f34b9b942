"""The report of a model as one HTML file: it needs no network, runs no script, and prints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf2mnn import __version__
from hf2mnn.evaluation.findings import CACHE_TOLERANCE
from hf2mnn.reference.golden import Golden
from hf2mnn.report import cells, examples, plots, provenance
from hf2mnn.report.console import cell
from hf2mnn.report.evidence import Evidence, Row
from hf2mnn.report.svg import Style, styles

TEMPLATES = Path(__file__).parent
PORTABLE = "onnxruntime"
"""The row of the ONNX graphs: no bundle, so nothing to choose."""


@dataclass(frozen=True)
class Verdict:
    """good: whether no required conversion misses a gate; failed and found: table rows with their findings, of those
    that miss a gate and of those that keep them.
    """

    good: bool
    sentence: str
    choice: str
    failed: list[dict[str, Any]]
    found: list[dict[str, Any]]


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def verdict(evidence: Evidence, table: pd.DataFrame) -> Verdict:
    known = {row.name: {"findings": row.findings, "diagnosed": row.layers is not None} for row in evidence.rows}
    rows = [{**row, **known[row["variant"]]} for row in table.to_dict("records") if row["variant"] in known]
    failed = [row for row in rows if row["verdict"] == "FAIL"]
    required = [row["variant"] for row in failed if row["required"]]
    others = [row["variant"] for row in failed if not row["required"]]
    if not failed:
        sentence = (
            f"All {len(rows)} conversions keep their gates." if len(rows) != 1 else "The conversion keeps its gates."
        )
    elif required:
        sentence = f"{_names(required)} {'misses' if len(required) == 1 else 'miss'} a gate that must be kept."
        sentence += f" So {'does' if len(others) == 1 else 'do'} {_names(others)}, not required." if others else ""
    else:
        sentence = f"Every required conversion keeps its gates; {_names(others)}, not required,"
        sentence += f" {'does' if len(others) == 1 else 'do'} not."
    kept = [row for row in rows if row["verdict"] == "pass" and row["variant"] != PORTABLE and pd.notna(row["bytes"])]
    choice = ""
    if kept:
        least = min(kept, key=lambda row: row["bytes"])
        figures = {column: cell(column, least[column]) for column in ("bytes", "top1_agreement", "mean_kld")}
        choice = (
            f"The smallest that keeps them is {least['variant']}: {figures['bytes']}, the same first choice as PyTorch"
            f" at {figures['top1_agreement']} of positions, mean KL divergence {figures['mean_kld']} nats."
        )
    return Verdict(not required, sentence, choice, failed, [r for r in rows if r["findings"] and r not in failed])


def _whole(row: Row) -> pd.Series:
    return row.figures[row.figures["group"] == "all"].set_index("figure")["value"]


def _size_table(rows: list[Row], failed: set[str]) -> pd.DataFrame:
    ends = {"mean_kld": "mean_kld", "low": "mean_kld_low", "high": "mean_kld_high"}
    made = [
        {"name": row.name, "megabytes": row.summary["bytes"] / 1e6, "failed": row.name in failed}
        | {"candidate": row.name != PORTABLE}
        | {column: float(row.summary[figure]) for column, figure in ends.items()}
        for row in rows
    ]
    return pd.DataFrame(made)


def _layer_plots(rows: list[Row], looks: dict[str, Style]) -> list[Markup]:
    """Accumulated and then local error of each part that was looked at, the parts side by side."""
    diagnosed = [row for row in rows if row.layers is not None and len(row.layers)]
    shown = []
    for kind, column, what in (("layers", "mnn_error", "accumulated error"), ("local", "mnn_local", "local error")):
        for part, title in (("vision", "Vision tower"), ("decoder", "Decoder")):
            parts = {row.name: row.layers[row.layers["part"] == part] for row in diagnosed}
            curves = {name: plots.depth_table(layers, column) for name, layers in parts.items() if len(layers)}
            if not curves:
                continue
            if kind == "layers" and PORTABLE in looks:
                portable = plots.depth_table(parts[next(iter(curves))], "onnx_error")
                curves = {PORTABLE: portable} | curves
            svg = plots.layer_plot(curves, looks, f"{kind}-{part}", f"{title}, {what}", "relative error")
            shown.append(Markup(svg))
    return shown


def _plots(evidence: Evidence, budgets: dict[str, pd.Series], failed: set[str]) -> dict[str, Any]:
    """SVG by name; None of what was not measured."""
    looks = styles([row.name for row in evidence.rows])
    shown: dict[str, Any] = dict.fromkeys(("size", "percentiles", "budget", "speed", "cache"))
    shown["layers"] = _layer_plots(evidence.rows, looks)
    if evidence.rows:
        shown["size"] = Markup(plots.size_plot(_size_table(evidence.rows, failed), looks))
        shown["percentiles"] = Markup(plots.percentile_plot({row.name: _whole(row) for row in evidence.rows}, looks))
    if budgets:
        shown["budget"] = Markup(plots.budget_plot(budgets))
    if evidence.speed:
        measured = styles(list(dict.fromkeys([*looks, *evidence.speed["bundles"]])))
        if len(evidence.speed["bundles"]) > 1:
            shown["speed"] = Markup(plots.speed_plot(evidence.speed, measured))
        if evidence.cache is not None and len(evidence.cache):
            shown["cache"] = Markup(plots.cache_plot(evidence.cache, measured))
    return shown


def _tables(evidence: Evidence, budgets: dict[str, pd.Series]) -> dict[str, Any]:
    known = evidence.cache is not None and len(evidence.cache)
    return {
        "figures": cells.figures(evidence),
        "parts": cells.parts(evidence),
        "accuracy": cells.accuracy(evidence),
        "parity": cells.parity(evidence, CACHE_TOLERANCE),
        "budget": cells.budget(budgets) if budgets else None,
        "strays": cells.strays(evidence),
        "speed": cells.speed(evidence.speed) if evidence.speed else None,
        "cache": cells.cache(evidence.cache) if known else None,
    }


def _machine(speed: dict[str, Any] | None) -> str:
    if not speed:
        return ""
    machine, sides = speed["machine"], speed["image"]
    image = f", an image of {' × '.join(map(str, sides))} pixels" if sides else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, MNN"
        f" {machine['MNN']}; {speed['threads']} threads, {speed['prompt_tokens']} tokens in, {speed['answer_tokens']}"
        f" out{image}; {speed['repeats']} runs in turns."
    )


def render_page(evidence: Evidence, table: pd.DataFrame) -> str:
    """HTML. `table` has a row for "pytorch" and one for each conversion of `evidence` (`hf2mnn.report.table`)."""
    # What a bundle that does not run has said is nothing; it stays in the verdict, the table and the provenance.
    ran = replace(evidence, rows=[row for row in evidence.rows if not row.summary.get("fault")])
    budgets = {
        row.name: row.budget.set_index("source")["mean_kld"].astype(float)
        for row in ran.rows
        if row.budget is not None and len(row.budget)
    }
    told = verdict(evidence, table)
    golden = Golden(evidence.reference)
    shown = examples.choose(golden, {row.name: row.answers for row in ran.rows})
    stages = provenance.stages(evidence)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        model=evidence.model,
        version=__version__,
        verdict=told,
        comparison=cells.comparison(table),
        meanings={label: meaning for label, _, meaning in cells.FIGURES.values()},
        tables=_tables(ran, budgets),
        plots=_plots(ran, budgets, {row["variant"] for row in told.failed}),
        cache_tolerance=CACHE_TOLERANCE,
        machine=_machine(evidence.speed),
        baseline=(evidence.speed or {}).get("baseline", ""),
        differing=[example for example in shown if example.others],
        agreeing=[example for example in shown if not example.others],
        images=examples.images_of(golden, shown),
        total=len(golden.records),
        checkpoint=provenance.checkpoint(evidence),
        variants=provenance.variants(evidence),
        stages=stages,
        resources=provenance.resources(stages),
        files=provenance.files(stages),
    )
