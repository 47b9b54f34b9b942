"""export: a checkpoint -> decoder.onnx, embedding.onnx, vision.onnx, model.json and the tokenizer's files."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.options import CheckpointFolder, Out
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "export",
    tools=("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
    footprint=Footprint(1000, 0.02, 30, 2),
    inputs={"checkpoint": "fetch"},
)


def run(checkpoint: CheckpointFolder, destination: Out) -> Path:
    """Export decoder (with explicit KV cache), vision tower and embedding as ONNX.

    Example: hf2mnn export results/shapes-vl/checkpoint --out results/shapes-vl/onnx
    """
    from hf2mnn.checkpoint.folder import Checkpoint
    from hf2mnn.onnx.export import OPSET, export_graphs

    with open_stage(STAGE, destination, {"checkpoint": checkpoint}, {"opset": OPSET}) as stage:
        source = stage.inputs["checkpoint"]
        stage.manifest.provenance = {"checkpoint": {**source.settings, "files": source.outputs}, **source.provenance}
        export_graphs(Checkpoint(checkpoint), stage.folder)
    return destination
