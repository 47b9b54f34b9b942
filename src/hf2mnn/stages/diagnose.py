"""diagnose: the causes of a variant's error, layer by layer and source by source.

Reads the reference, the ONNX graphs, the baseline and a bundle.
Writes layers.parquet, budget.parquet and findings.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

if TYPE_CHECKING:
    from hf2mnn.evaluation.findings import Finding

STAGE = Stage(
    "diagnose",
    tools=("MNN", "onnx", "onnxruntime", "numpy"),
    # The engine, and ONNX Runtime with one graph at a time.
    footprint=Footprint(1500, 4.4, 60, 240),
    inputs={"reference": "reference", "onnx": "export", "baseline": "baseline", "bundle": "quantize"},
)


def run(
    reference: Path,
    onnx: Path,
    baseline: Path,
    bundle: Path,
    destination: Path,
    threads: int,
    time_limit: float,
) -> list[Finding]:
    """Diagnose a bundle; one that does not run is a finding, not a failure.

    Raises:
        ManifestError: An input differs from its manifest.
        EngineError: The engine was stopped.
    """
    from hf2mnn.evaluation.diagnose import diagnose
    from hf2mnn.reference.golden import Golden

    folders = {"reference": reference, "onnx": onnx, "baseline": baseline, "bundle": bundle}
    with open_stage(STAGE, destination, folders, {"threads": threads}) as stage:
        findings = diagnose(Golden(reference), onnx, baseline, bundle, stage.folder, threads, time_limit)
        stage.results["findings"] = [finding.message for finding in findings]
    return findings
