"""quantize: ONNX graphs, MNN graphs, inputs of the methods -> a bundle; weights.csv with a row for each operator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf2mnn.core.options import Embedding, OnnxArgument, Out
from hf2mnn.core.stage import Footprint, Stage, open_stage

if TYPE_CHECKING:
    from hf2mnn.quant.variant import Choice

STAGE = Stage(
    "quantize",
    tools=("MNN", "onnx", "numba", "scipy"),
    # gptq needs a matrix of inputs by inputs for the widest layer.
    footprint=Footprint(1200, 0.2, 30, 60),
    inputs={"onnx": "export", "graphs": "convert", "calibration": "calibrate", "checkpoint": "fetch"},
)


def run(
    onnx: OnnxArgument,
    graphs: Annotated[Path, typer.Argument(help="Folder of the convert stage.")],
    destination: Out,
    decoder: Annotated[
        str, typer.Option(help="Weights of the decoder, JSON: bits, block, symmetric, scale_bits, method.")
    ],
    vision: Annotated[str, typer.Option(help="Weights of the vision tower, JSON.")] = '{"bits": 8}',
    engine: Annotated[str, typer.Option(help="Settings of the engine, JSON: precision, memory, threads.")] = "{}",
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml: settings by operator, which override both.")] = None,
    embedding: Embedding = "file",
    calibration: Annotated[Path | None, typer.Option(help="Folder of the calibrate stage, for awq and gptq.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the fetch stage, for the values of an AWQ or GPTQ checkpoint.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads to round with.", min=1)] = 2,
) -> Path:
    """Make a bundle: MNN's graphs with the checkpoint's weights in the chosen formats.

    Example: hf2mnn quantize results/shapes-vl/onnx results/shapes-vl/graphs --out results/shapes-vl/bundles/int4
        --decoder '{"bits": 4, "block": 64}' --vision '{"bits": 8}'
    """
    from hf2mnn.config.plan import load_plan
    from hf2mnn.quant.variant import Choice

    overrides = load_plan(plan).model_dump(exclude_none=True) if plan else {}
    choice = Choice.from_options(decoder, vision, engine, overrides, embedding)
    return quantize(onnx, graphs, destination, choice, threads, calibration, checkpoint, plan)


def quantize(
    onnx: Path,
    graphs: Path,
    destination: Path,
    choice: Choice,
    threads: int,
    calibration: Path | None = None,
    checkpoint: Path | None = None,
    plan: Path | None = None,
) -> Path:
    """Make a bundle; `plan` is the file that the plan in `choice` was read from."""
    from hf2mnn.quant.methods import Methods
    from hf2mnn.quant.variant import make_variant

    folders = {"onnx": onnx, "graphs": graphs, "calibration": calibration, "checkpoint": checkpoint}
    files = {"plan": plan} if plan else {}
    with open_stage(STAGE, destination, folders, choice.settings(), files=files, paths=files) as stage:
        figures = make_variant(onnx, graphs, stage.folder, choice, Methods(calibration, checkpoint), threads)
        for name, value in figures.items():
            print(f"{name.replace('_', ' ')}: {value:,}", flush=True)
        layout = ("decoder_layout", "layout_reason")
        known = {name: value for name, value in stage.inputs["graphs"].results.items() if name in layout}
        stage.results.update(figures | known)
    return destination
