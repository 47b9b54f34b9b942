"""baseline: reference, ONNX graphs, MNN graphs -> the float32 bundle and its logits, to diagnose all variants with."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.options import GraphsFolder, OnnxFolder, Out, ReferenceFolder, Threads, TimeLimit
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "baseline",
    tools=("MNN", "onnx", "numpy"),
    footprint=Footprint(1500, 4.2, 60, 240),
    inputs={"reference": "reference", "onnx": "export", "graphs": "convert"},
)


def run(
    reference: ReferenceFolder,
    onnx: OnnxFolder,
    graphs: GraphsFolder,
    destination: Out,
    threads: Threads = 2,
    time_limit: TimeLimit = 7200,
) -> Path:
    """Make and run the float32 bundle that the diagnoses of all variants compare with.

    Example: hf2mnn baseline --reference results/shapes-vl/reference/evaluation --onnx results/shapes-vl/onnx
        --graphs results/shapes-vl/graphs --out results/shapes-vl/baseline

    It runs with both our and the engine's resizing of images.
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
