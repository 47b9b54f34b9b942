"""baseline: the float32 bundle of a model and its runs, which the diagnoses of all variants compare with.

Reads the reference, the ONNX graphs and MNN's graphs.
Writes the bundle, which is as large as the model in float32, and its logits.
"""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

STAGE = Stage(
    "baseline",
    tools=("MNN", "onnx", "numpy"),
    footprint=Footprint(1500, 4.2, 60, 240),
    inputs={"reference": "reference", "onnx": "export", "graphs": "convert"},
)


def run(reference: Path, onnx: Path, graphs: Path, destination: Path, threads: int, time_limit: float) -> Path:
    """Make the float32 bundle, and run it with both our and the engine's resizing of images.

    Raises:
        ManifestError: An input differs from its manifest.
        EngineError: The engine failed or was stopped.
    """
    from hf2mnn.evaluation.error_budget import BUNDLE, Runs
    from hf2mnn.mnn.bundle import EngineSettings
    from hf2mnn.quant.formats import WeightFormat
    from hf2mnn.quant.methods import Methods
    from hf2mnn.quant.variant import Choice, make_variant
    from hf2mnn.reference.golden import Golden

    folders = {"reference": reference, "onnx": onnx, "graphs": graphs}
    with open_stage(STAGE, destination, folders, {"threads": threads}) as stage:
        bundle = stage.folder / BUNDLE
        bundle.mkdir()
        exact = Choice(WeightFormat(), WeightFormat(), EngineSettings())
        make_variant(onnx, graphs, bundle, exact, Methods(), max(threads, 1))
        Runs(Golden(reference), bundle, onnx, threads, time_limit).save_baseline(stage.folder)
    return destination
