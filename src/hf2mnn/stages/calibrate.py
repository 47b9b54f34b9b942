"""calibrate: a checkpoint and its answers to the calibration set -> sampled rows of the inputs of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.options import CalibrationAnswers, CheckpointFolder, Out, Threads, WeightsKept
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "calibrate",
    tools=("torch", "transformers"),
    footprint=Footprint(3000, 9.0, 60, 120),
    inputs={"checkpoint": "fetch", "calibration": "reference", "evaluation": "reference"},
)


def run(
    checkpoint: CheckpointFolder,
    calibration: CalibrationAnswers,
    destination: Out,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder of the reference stage for the evaluation set: no example may be in both."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Tokens or patches to keep of each layer's inputs.", min=1)] = 4096,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> Path:
    """Record the inputs of each linear layer on the calibration set, for awq and gptq.

    Example: hf2mnn calibrate results/shapes-vl/checkpoint --calibration results/shapes-vl/reference/calibration
        --evaluation results/shapes-vl/reference/evaluation --out results/shapes-vl/calibration

    Raise EvaluationSetError if both sets share an example, ManifestError if the answers are of another checkpoint.
    """
    from hf2mnn.checkpoint.folder import Checkpoint
    from hf2mnn.reference.golden import Golden
    from hf2mnn.reference.pytorch import set_torch_threads
    from hf2mnn.reference.record_inputs import check_no_overlap, record_layer_inputs

    folders = {"checkpoint": checkpoint, "calibration": calibration, "evaluation": evaluation}
    with open_stage(STAGE, destination, folders, {"rows": rows, "threads": threads}) as stage:
        answered = stage.inputs["calibration"]
        if answered.inputs.get("checkpoint") != stage.inputs["checkpoint"].digest():
            raise ManifestError(f"{calibration} has answers of another model than {checkpoint}; run 'hf2mnn reference'")
        golden = Golden(calibration)
        if evaluation:
            check_no_overlap(golden, Golden(evaluation), answered.paths.get("examples", calibration))
        recorded = {name: digest for name, digest in answered.inputs.items() if name != "checkpoint"}
        stage.manifest.provenance = {"calibration": recorded}
        set_torch_threads(threads)
        stage.results.update(record_layer_inputs(Checkpoint(checkpoint), golden, stage.folder, rows, weights))
    return destination
