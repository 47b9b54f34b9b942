"""convert: MNN graphs from the ONNX graphs, every attention fused with its KV cache.

Reads the ONNX graphs.
Writes the common part of all bundles: graphs whose linear layers have no weights, embedding, tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

STAGE = Stage(
    "convert",
    tools=("MNN", "onnx", "tokenizers"),
    footprint=Footprint(500, 0.02, 10, 2),
    inputs={"onnx": "export"},
)


def run(onnx: Path, destination: Path) -> Path:
    """Convert the graphs in a folder of the export stage; the quantize stage adds the weights.

    Raises:
        ManifestError: The ONNX folder differs from its manifest.
        ConversionError: The converter failed, or wrote an unexpected graph.
    """
    from hf2mnn.mnn.bundle import convert_model

    with open_stage(STAGE, destination, {"onnx": onnx}) as stage:
        stage.results.update(convert_model(onnx, stage.folder))
    return destination
