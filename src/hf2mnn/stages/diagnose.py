"""diagnose: reference, ONNX graphs, baseline, a bundle -> layers.parquet, budget.parquet and findings.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.options import OnnxFolder, Out, ReferenceFolder, Threads, TimeLimit
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "diagnose",
    tools=("MNN", "onnx", "onnxruntime", "numpy", "transformers"),
    # The engine, and ONNX Runtime with one graph at a time.
    footprint=Footprint(1500, 4.4, 60, 240),
    inputs={"reference": "reference", "onnx": "export", "baseline": "baseline", "bundle": "quantize"},
)


def run(
    reference: ReferenceFolder,
    onnx: OnnxFolder,
    baseline: Annotated[Path, typer.Option(help="Folder of the baseline stage.")],
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    destination: Out,
    threads: Threads = 2,
    time_limit: TimeLimit = 7200,
) -> list:
    """Find the causes of a bundle's error: layer by layer, source by source.

    Example: hf2mnn diagnose --reference results/shapes-vl/reference/evaluation --onnx results/shapes-vl/onnx
        --baseline results/shapes-vl/baseline --bundle results/shapes-vl/bundles/int4
        --out results/shapes-vl/diagnosis/int4

    Return the findings; a bundle that does not run is one of them, not a failure.
    """
    from hf2mnn.evaluation.diagnose import diagnose
    from hf2mnn.mnn.engine import check_bundle
    from hf2mnn.reference.golden import Golden

    folders = {"reference": reference, "onnx": onnx, "baseline": baseline, "bundle": check_bundle(bundle)}
    with open_stage(STAGE, destination, folders, {"threads": threads}) as stage:
        findings = diagnose(Golden(reference), onnx, baseline, bundle, stage.folder, threads, time_limit)
        stage.results["findings"] = [finding.message for finding in findings]
    for finding in findings:
        print(f"{finding.part}: {finding.message}")
    print(f"{len(findings) or 'no'} findings")
    return findings
