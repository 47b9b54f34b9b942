"""quantize: a bundle of MNN graphs with the checkpoint's weights in the chosen formats.

Reads the ONNX graphs, MNN's graphs, and the inputs of the methods: layer inputs, prequantized checkpoint, plan.
Writes the bundle, and weights.csv with a row for each operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

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
    onnx: Path,
    graphs: Path,
    destination: Path,
    choice: Choice,
    threads: int,
    calibration: Path | None = None,
    checkpoint: Path | None = None,
    plan: Path | None = None,
) -> Path:
    """Make a bundle.

    Raises:
        ManifestError: An input differs from its manifest.
        QuantizationError: An operator cannot be stored in the chosen format.
        ConversionError: MNN's converter failed, or wrote an unexpected graph.
    """
    from hf2mnn.quant.methods import Methods
    from hf2mnn.quant.variant import make_variant

    folders = {"onnx": onnx, "graphs": graphs, "calibration": calibration, "checkpoint": checkpoint}
    files = {"plan": plan} if plan else {}
    with open_stage(STAGE, destination, folders, choice.settings(), files=files, paths=files) as stage:
        methods = Methods(calibration, checkpoint)
        figures = make_variant(onnx, graphs, stage.folder, choice, methods, threads)
        for name, value in figures.items():
            print(f"{name.replace('_', ' ')}: {value:,}", flush=True)
        layout = ("decoder_layout", "layout_reason")
        known = {name: value for name, value in stage.inputs["graphs"].results.items() if name in layout}
        stage.results.update(figures | known)
    return destination
