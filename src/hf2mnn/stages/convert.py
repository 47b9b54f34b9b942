"""convert: the ONNX graphs as MNN's, every attention fused with its KV cache.

Reads the ONNX graphs.
Writes what all bundles of a model share: graphs whose linear layers have no weights yet, embedding, tokenizer.
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
        ManifestError: The ONNX folder is not what its manifest says.
        ConversionError: The converter failed, or wrote something other than it was asked for.
    """
    from hf2mnn.mnn.bundle import make_base

    with open_stage(STAGE, destination, {"onnx": onnx}) as stage:
        stage.results.update(make_base(onnx, stage.folder))
    return destination
