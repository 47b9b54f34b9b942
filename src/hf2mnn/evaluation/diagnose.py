"""Diagnosis of a bundle: layer comparison, error budget and findings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from hf2mnn.core.errors import BundleFault
from hf2mnn.evaluation import causes, error_budget, layers
from hf2mnn.evaluation.findings import BUDGET, FINDINGS, LAYERS, Finding
from hf2mnn.mnn.bundle import PARTS, parts_in
from hf2mnn.mnn.convert import read_graph
from hf2mnn.onnx.initializers import small_constants
from hf2mnn.reference.golden import Golden


def diagnose(
    golden: Golden, onnx_folder: Path, baseline: Path, bundle: Path, folder: Path, threads: int, time_limit: float
) -> list[Finding]:
    """Write layers.parquet, budget.parquet and findings.json to `folder`; `baseline` is the folder of that stage.

    A bundle that does not run is a finding, not a failure: what was measured before is written. Raises EngineError if
    the engine was stopped.
    """
    facts = json.loads((onnx_folder / "model.json").read_text())
    graphs = {part: read_graph(bundle / PARTS[part][0]) for part in parts_in(onnx_folder)}
    for part, graph in graphs.items():
        # The compared graph is built from the converter's JSON and must compute what the bundle computes.
        graph.restore_constants(small_constants(onnx_folder / f"{part}.onnx"), rounded_only=True)
    findings = causes.wrong_settings(bundle, facts) + causes.wrong_template(bundle, onnx_folder)
    findings += causes.wrong_embedding(bundle, onnx_folder)
    findings += causes.unfused_attention(graphs["decoder"], facts["num_hidden_layers"])
    compared, sources = pd.DataFrame(columns=layers.COLUMNS), pd.DataFrame(columns=error_budget.COLUMNS)
    try:
        compared = layers.compare_layers(golden, onnx_folder, facts, bundle, graphs, threads, time_limit)
        findings += causes.wrong_layers(compared)
        runs = error_budget.Runs(golden, baseline / error_budget.BUNDLE, onnx_folder, threads, time_limit)
        runs.load_baseline(baseline)
        sources = error_budget.budget(runs, bundle)
        findings += causes.wrong_tokens(golden, runs.tokens(bundle), facts.get("image_token_id"))
    except BundleFault as error:
        findings.append(Finding("engine", None, str(error)))
    compared.to_parquet(folder / LAYERS, index=False)
    sources.to_parquet(folder / BUDGET, index=False)
    (folder / FINDINGS).write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    return findings
