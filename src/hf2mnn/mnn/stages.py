"""The `mnn` stage: the float bundle by MNN's converter, with its manifest."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.mnn.bundle import TOOLS, EngineSettings, describe, make_float_bundle
from hf2mnn.mnn.convert import WeightFormat


def convert_float(onnx_folder: Path, destination: Path) -> Path:
    """ONNX to a float32 bundle, every attention fused, proved.

    Raises:
        ManifestError: the ONNX folder is not what its manifest says.
        ConversionError: the converter failed, or wrote something other than it was asked for.
    """
    upstream = Manifest.load(onnx_folder)
    upstream.verify()
    settings = describe(WeightFormat(), WeightFormat(), EngineSettings())
    manifest = Manifest("mnn", {"onnx": upstream.digest()}, settings, tool_versions(*TOOLS))
    with stage_folder(destination, manifest) as folder:
        make_float_bundle(onnx_folder, folder, EngineSettings())
    return destination
