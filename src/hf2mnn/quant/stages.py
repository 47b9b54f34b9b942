"""The `quantize` stage: a bundle with its weights, and its manifest."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.files import sha256
from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.mnn.bundle import TOOLS, describe
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.variant import Choice, make_variant


def quantize(
    onnx_folder: Path,
    base: Path,
    destination: Path,
    choice: Choice,
    threads: int,
    activations: Path | None = None,
    source: Path | None = None,
    plan: Path | None = None,
) -> Path:
    """A bundle of a model. `base` is the `mnn` stage's folder; `activations` is that stage's folder, for calibrated
    methods; `source` the source stage's, for the levels of a packed checkpoint; `plan` the file that the choice's plan
    was read from.

    Raises:
        ManifestError: an input is not what its manifest says.
        QuantizationError: an operator cannot be stored as chosen.
        ConversionError: MNN's converter failed, or wrote something other than it was given.
    """
    folders = {"onnx": onnx_folder, "base": base, "activations": activations, "source": source}
    inputs = {name: Manifest.load(folder) for name, folder in folders.items() if folder}
    for upstream in inputs.values():
        upstream.verify()
    digests = {name: upstream.digest() for name, upstream in inputs.items()}
    settings = describe(choice.decoder, choice.vision, choice.engine)
    settings["embedding"] = choice.embedding
    if plan:
        digests["plan"] = sha256(plan)
    manifest = Manifest("quantize", digests, settings, tool_versions(*TOOLS, "numba"))
    manifest.places = {"plan": str(plan)} if plan else {}
    manifest.sources = {name: files for upstream in inputs.values() for name, files in upstream.sources.items()}
    with stage_folder(destination, manifest) as folder:
        methods = Methods(activations, source)
        manifest.results = make_variant(onnx_folder, base, folder, choice, methods, threads)
        for name, value in manifest.results.items():
            print(f"{name.replace('_', ' ')}: {value:,}", flush=True)
    return destination
