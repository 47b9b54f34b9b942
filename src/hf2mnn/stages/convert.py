"""convert: ONNX graphs -> the common part of all bundles: MNN graphs, embedding, tokenizer.

Every attention is fused with its KV cache, and linear layers have no weights.
"""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.options import OnnxArgument, Out
from hf2mnn.core.stage import Footprint, Stage, open_stage

STAGE = Stage(
    "convert",
    tools=("MNN", "onnx", "tokenizers", "transformers"),
    footprint=Footprint(700, 0.02, 10, 2),
    inputs={"onnx": "export"},
)


def run(onnx: OnnxArgument, destination: Out) -> Path:
    """Convert the ONNX graphs to MNN graphs without weights, check that every attention is fused, compare tokenizers.

    Example: hf2mnn convert results/shapes-vl/onnx --out results/shapes-vl/graphs
    """
    from hf2mnn.mnn.bundle import TOKENIZER, convert_model
    from hf2mnn.mnn.tokenizer_probe import compare_tokenizers

    with open_stage(STAGE, destination, {"onnx": onnx}) as stage:
        stage.results.update(convert_model(onnx, stage.folder))
        stage.results["tokenizer_differences"] = compare_tokenizers(onnx, stage.folder / TOKENIZER)
    return destination
