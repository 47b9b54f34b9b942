"""plan: sensitivities, ONNX graphs, MNN graphs -> plan.yaml."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.config.budget import parse_budget
from hf2mnn.core.errors import ConfigError
from hf2mnn.core.options import Embedding, GraphsFolder, OnnxFolder, Out
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "plan",
    tools=("scipy",),
    footprint=Footprint(1000, 0.02, 30, 2),
    inputs={"sensitivity": "sensitivity", "onnx": "export", "graphs": "convert"},
)


def run(
    sensitivity: Annotated[Path, typer.Argument(help="Folder of the sensitivity stage.")],
    onnx: OnnxFolder,
    graphs: GraphsFolder,
    destination: Out,
    budget: Annotated[str, typer.Option(help="Bits per weight with scales (4.25), or the bundle's size (850MB).")],
    embedding: Embedding = "file",
) -> Path:
    """Choose the format of each operator with the least divergence within a budget, and write plan.yaml.

    Example: hf2mnn plan results/shapes-vl/sensitivity --onnx results/shapes-vl/onnx --graphs results/shapes-vl/graphs
        --budget 4.25 --out results/shapes-vl/plans/auto

    Raise QuantizationError if the budget cannot be met; the message has the smallest possible one.
    """
    from hf2mnn.quant.plan import make_plan

    try:
        wanted = parse_budget(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    folders = {"sensitivity": sensitivity, "onnx": onnx, "graphs": graphs}
    with open_stage(STAGE, destination, folders, {"budget": asdict(wanted), "embedding": embedding}) as stage:
        chosen = make_plan(sensitivity, onnx, stage.inputs["graphs"], stage.folder, wanted, embedding)
        stage.results.update(chosen)
    return destination
