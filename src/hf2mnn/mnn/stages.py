"""The `mnn` stage: the graphs by MNN's converter, with their manifest."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.mnn.bundle import TOOLS, make_base


def convert_graphs(onnx_folder: Path, destination: Path) -> Path:
    """What all bundles of a model have in common, every attention fused, proved; the `quantize` stage adds weights.

    Raises:
        ManifestError: the ONNX folder is not what its manifest says.
        ConversionError: the converter failed, or wrote something other than it was asked for.
    """
    upstream = Manifest.load(onnx_folder)
    upstream.verify()
    manifest = Manifest("mnn", {"onnx": upstream.digest()}, {}, tool_versions(*TOOLS), sources=upstream.sources)
    with stage_folder(destination, manifest) as folder:
        make_base(onnx_folder, folder)
    return destination
