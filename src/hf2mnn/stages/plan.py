"""plan: the format of each operator with the least divergence within a budget.

Reads sensitivities, the ONNX graphs and MNN's graphs.
Writes plan.yaml.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hf2mnn.config.budget import Budget
from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

STAGE = Stage(
    "plan",
    tools=("scipy",),
    footprint=Footprint(1000, 0.02, 30, 2),
    inputs={"sensitivity": "sensitivity", "onnx": "export", "graphs": "convert"},
)


def run(sensitivity: Path, onnx: Path, graphs: Path, destination: Path, budget: Budget, embedding: str) -> Path:
    """Choose formats within `budget`; `embedding` is "file" or "lm_head", as for a variant.

    Raises:
        ManifestError: An input differs from its manifest.
        QuantizationError: The budget cannot be met; the message has the smallest possible one.
    """
    from hf2mnn.quant.plan import make_plan

    folders = {"sensitivity": sensitivity, "onnx": onnx, "graphs": graphs}
    with open_stage(STAGE, destination, folders, {"budget": asdict(budget), "embedding": embedding}) as stage:
        chosen = make_plan(sensitivity, onnx, stage.inputs["graphs"], stage.folder, budget, embedding)
        stage.results.update(chosen)
    return destination
