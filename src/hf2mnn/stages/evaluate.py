"""evaluate: reference, ONNX graphs, bundle -> tables of positions, answers, images, cache parity; figures; summary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.options import OnnxFolder, Out, ReferenceFolder, Threads, TimeLimit
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "evaluate",
    tools=("MNN", "onnxruntime", "tokenizers", "numpy"),
    # The engine has float32 weights where a bundle asks for that (4.0 bytes), and half of that or less where not.
    footprint=Footprint(1500, 4.2, 60, 240),
    inputs={"reference": "reference", "onnx": "export", "bundle": "quantize"},
    # ONNX Runtime casts and transposes weights while it loads them: 5.8 bytes at the peak, 4.5 afterwards.
    exceptions={"onnxruntime": Footprint(800, 5.8, 60, 240)},
)


def run(
    reference: ReferenceFolder,
    onnx: OnnxFolder,
    destination: Out,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle to run in MNN's engine; left out, the ONNX graphs run.")
    ] = None,
    threads: Threads = 2,
    time_limit: TimeLimit = 7200,
    keep_logits: Annotated[
        bool, typer.Option("--keep-logits", help="Also write logits.safetensors, to recompute figures.")
    ] = False,
) -> Path:
    """Answer the evaluation set with a conversion and measure its distance from PyTorch.

    Example: hf2mnn evaluate --reference results/shapes-vl/reference/evaluation --onnx results/shapes-vl/onnx
        --bundle results/shapes-vl/bundles/int4 --out results/shapes-vl/evaluation/int4
    """
    from hf2mnn.evaluation.evaluate import evaluate
    from hf2mnn.mnn.bundle_config import CONFIG, read_config, run_time_settings
    from hf2mnn.mnn.engine import check_bundle
    from hf2mnn.reference.golden import Golden

    folders = {"reference": reference, "onnx": onnx, "bundle": check_bundle(bundle) if bundle else None}
    settings = {"threads": threads} | ({"engine": run_time_settings(read_config(bundle, CONFIG))} if bundle else {})
    tools = ("MNN" if bundle else "onnxruntime", "tokenizers", "numpy")
    with open_stage(STAGE, destination, folders, settings, tools=tools) as stage:
        size = sum(entry["size"] for entry in stage.inputs["bundle" if bundle else "onnx"].outputs.values())
        limit = stage.inputs["reference"].settings["max_new_tokens"]
        summary = evaluate(Golden(reference), onnx, bundle, stage.folder, size, limit, threads, time_limit, keep_logits)
        stage.results.update(measured=(bundle or onnx).name, **summary)
    return destination
