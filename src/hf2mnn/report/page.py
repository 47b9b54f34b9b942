"""Page of a model: one HTML file that needs no network, runs no script, and prints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf2mnn import __version__
from hf2mnn.evaluation.findings import CACHE_TOLERANCE
from hf2mnn.figures import GREEDY, PREDICTIONS, PROBABILITIES, on_page
from hf2mnn.reference.golden import Golden
from hf2mnn.report import cells, examples, plots, provenance
from hf2mnn.report.console import cell
from hf2mnn.report.evidence import Evidence, VariantEvidence
from hf2mnn.report.svg import Style, assign_styles
from hf2mnn.report.table import FAIL, PASS

LOADER = PackageLoader("hf2mnn", "report")
TEMPLATES = Environment(loader=LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ONNX = "onnxruntime"
"""Name of the variant that runs the ONNX graphs; it has no bundle."""


class Verdict(NamedTuple):
    """Summary of the gates, with the table rows of variants that need an explanation."""

    passed: bool  # Whether all required variants pass.
    text: str
    choice: str  # The smallest variant that passes, in words; empty where none does.
    failed: list[dict[str, Any]]  # Variants that miss a gate, with their findings.
    flagged: list[dict[str, Any]]  # Variants that pass and have findings.


def _misses(names: list[str]) -> str:
    joined = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"{joined} {'miss' if len(names) > 1 else 'misses'}"


def verdict(evidence: Evidence, table: pd.DataFrame) -> Verdict:
    """Summarize the verdicts of a summary table."""
    known = {v.name: {"findings": v.findings, "diagnosed": v.layers is not None} for v in evidence.variants}
    rows = [{**row, **known[row["variant"]]} for row in table.to_dict("records") if row["variant"] in known]
    failed = [row for row in rows if row["verdict"] == FAIL]
    required = [row["variant"] for row in failed if row["required"]]
    optional = [row["variant"] for row in failed if not row["required"]]
    if required:
        text = f"{_misses(required)} a required gate."
        text += f" {_misses(optional)} an optional gate." if optional else ""
    elif optional:
        text = f"All required variants pass; {_misses(optional)} an optional gate."
    else:
        text = f"All {len(rows)} variants pass their gates." if len(rows) != 1 else "The variant passes its gates."
    passed = [row for row in rows if row["verdict"] == PASS and row["variant"] != ONNX and pd.notna(row["bytes"])]
    choice = ""
    if passed:
        smallest = min(passed, key=lambda row: row["bytes"])
        size, top1, kld = (cell(column, smallest[column]) for column in ("bytes", "top1_agreement", "mean_kld"))
        choice = f"The smallest variant that passes is {smallest['variant']}: {size}, "
        choice += f"top-1 agreement with PyTorch {top1}, mean KL divergence {kld} nats."
    flagged = [row for row in rows if row["findings"] and row not in failed]
    return Verdict(not required, text, choice, failed, flagged)


def _size_table(variants: list[VariantEvidence], failed: set[str]) -> pd.DataFrame:
    """Return the table of `plots.size_plot`."""
    table = pd.DataFrame([{"name": variant.name, **variant.summary} for variant in variants])
    table[["mean_kld", "low", "high"]] = table[["mean_kld", "mean_kld_low", "mean_kld_high"]].astype(float)
    names = table["name"]
    return table.assign(megabytes=table["bytes"] / 1e6, failed=names.isin(failed), candidate=names != ONNX)


def _layer_plots(variants: list[VariantEvidence], styles: dict[str, Style]) -> list[Markup]:
    """Plot accumulated and then local errors, vision tower and decoder side by side."""
    diagnosed = {variant.name: variant.layers for variant in variants if variant.layers is not None}
    plotted = []
    for kind, column, label in (("layers", "mnn_error", "accumulated error"), ("local", "local_error", "local error")):
        for part, title in (("vision", "Vision tower"), ("decoder", "Decoder")):
            layers = {name: rows for name, table in diagnosed.items() if len(rows := table[table["part"] == part])}
            curves = {name: plots.depth_table(table, column) for name, table in layers.items()}
            if not curves:
                continue
            if kind == "layers" and ONNX in styles:
                curves = {ONNX: plots.depth_table(next(iter(layers.values())), "onnx_error")} | curves
            plotted.append(plots.layer_plot(curves, styles, f"{kind}-{part}", f"{title}, {label}", "relative error"))
    return plotted


def _plots(evidence: Evidence, budgets: dict[str, pd.Series], failed: set[str]) -> dict[str, Any]:
    """Return the plots as SVG by name; None for what was not measured."""
    variants, speed, cache = evidence.variants, evidence.speed, evidence.cache
    styles = assign_styles([variant.name for variant in variants])
    timed = assign_styles(list(dict.fromkeys([*styles, *speed["bundles"]]))) if speed else {}
    values = {variant.name: variant.group("all")["value"] for variant in variants}
    return {
        "size": plots.size_plot(_size_table(variants, failed), styles) if variants else None,
        "percentiles": plots.percentile_plot(values, styles) if variants else None,
        "budget": plots.budget_plot(budgets) if budgets else None,
        "speed": plots.speed_plot(speed, timed) if speed and len(speed["bundles"]) > 1 else None,
        "cache": plots.cache_plot(cache, timed) if speed and cache is not None and len(cache) else None,
        "layers": _layer_plots(variants, styles),
    }


def render_page(evidence: Evidence, table: pd.DataFrame) -> str:
    """Return the page as HTML; `table` is the summary of the same variants (`hf2mnn.report.table.make_table`)."""
    # A bundle that does not run has no figures: it appears in the verdict, the table and the provenance only.
    ran = replace(evidence, variants=[v for v in evidence.variants if not v.summary.get("fault")])
    diagnosed = [variant for variant in ran.variants if variant.budget is not None and len(variant.budget)]
    budgets = {variant.name: variant.budget.set_index("source")["mean_kld"].astype(float) for variant in diagnosed}
    summary, golden = verdict(evidence, table), Golden(evidence.reference)
    shown = examples.choose_examples(golden, {variant.name: variant.answers for variant in ran.variants})
    folders = evidence.stage_folders()
    return TEMPLATES.get_template("page.html.jinja").render(
        model=evidence.model,
        version=__version__,
        verdict=summary,
        comparison=cells.comparison(table),
        meanings={figure.label: figure.description for figure in on_page(PREDICTIONS, PROBABILITIES, GREEDY)},
        tables={
            "figures": cells.figures(ran),
            "parts": cells.parts(ran),
            "accuracy": cells.accuracy(ran),
            "parity": cells.parity(ran),
            "budget": cells.budget(budgets) if budgets else None,
            "first_out_of_tolerance": cells.first_out_of_tolerance(ran),
            "speed": cells.speed(ran.speed) if ran.speed else None,
            "cache": cells.cache(ran.cache) if ran.cache is not None and len(ran.cache) else None,
        },
        plots=_plots(ran, budgets, {row["variant"] for row in summary.failed}),
        cache_tolerance=CACHE_TOLERANCE,
        speed=evidence.speed,
        examples=shown,
        images=examples.embed_images(golden, shown),
        total=len(golden.records),
        checkpoint=provenance.checkpoint_origin(evidence),
        settings=provenance.variant_settings(evidence),
        tokenizer=provenance.tokenizer_differences(folders),
        commands=[provenance.command_line(manifest) for manifest in folders.values()],
        resources=provenance.stage_resources(folders),
        files=provenance.listed_files(folders),
    )
