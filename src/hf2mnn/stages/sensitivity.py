"""sensitivity: a checkpoint and its answers to the calibration set -> measured.csv and candidates.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.options import CalibrationAnswers, CheckpointFolder, Out, Threads, WeightsKept
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "sensitivity",
    tools=("torch", "transformers", "numba"),
    footprint=Footprint(3000, 6.0, 120, 1200),
    inputs={"checkpoint": "fetch", "calibration": "reference"},
)


def run(
    checkpoint: CheckpointFolder,
    calibration: CalibrationAnswers,
    destination: Out,
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits to measure with, 2 to 8; repeat for more.", min=2, max=8)
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples to measure with.", min=1)] = 32,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> Path:
    """Measure the divergence of the answers when one operator alone is quantized, for bits: auto.

    Example: hf2mnn sensitivity results/shapes-vl/checkpoint --calibration results/shapes-vl/reference/calibration
        --out results/shapes-vl/sensitivity
    """
    from hf2mnn.config.schema import Calibration
    from hf2mnn.quant.sensitivity import measure_sensitivity
    from hf2mnn.reference.pytorch import set_torch_threads

    bits = sorted(set(bits or Calibration().bits))
    folders = {"checkpoint": checkpoint, "calibration": calibration}
    settings = {"bits": bits, "examples": examples, "threads": threads}
    with open_stage(STAGE, destination, folders, settings) as stage:
        set_torch_threads(threads)
        stage.results.update(measure_sensitivity(checkpoint, calibration, stage.folder, bits, examples, weights))
    return destination
