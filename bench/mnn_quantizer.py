"""MNN's converter with its own quantization of weights.

hf2mnn does not use it: the benchmark compares with it, and tests show what it does without a message. It stores other
bits and blocks than requested, and rounds constants to float16.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.bundle import ADAPT, DECODER, PARTS
from hf2mnn.mnn.convert import FUSE, convert_onnx, write_graph
from hf2mnn.mnn.graph import Graph, check_fused, check_size, check_supported
from hf2mnn.onnx.initializers import load_graph
from hf2mnn.quant.formats import WeightFormat


def options(form: WeightFormat) -> list[str]:
    """Return the converter's options; boolean options always have a value, because their bare forms are inverted."""
    if form.bits == 32:
        return []
    if form.bits == 16:
        return ["--fp16"]
    block = [f"--weightQuantBlock={form.block}"] if form.block else []
    return [
        f"--weightQuantBits={form.bits}",
        *block,
        f"--weightQuantAsymmetric={int(not form.symmetric)}",
        f"--weightQuantScaleBit={form.scale_bits}",
        *(["--hqq"] if form.method == "hqq" else []),
    ]


def convert(
    source: Path,
    destination: Path,
    form: WeightFormat | None = None,
    fuse: bool = True,
    adapted: onnx.ModelProto | None = None,
) -> Graph:
    """Convert an ONNX file to `destination` (.mnn) and its weight file, float32 by default; return the graph."""
    weights = destination.with_name(f"{destination.name}.weight")
    graph = convert_onnx(source, weights, [*([FUSE] if fuse else []), *options(form or WeightFormat())], adapted)
    write_graph(graph, destination)
    return graph


def _convert_part(part: str, onnx_folder: Path, folder: Path, form: WeightFormat, fuse: bool) -> Graph:
    name, source = PARTS[part]
    model = load_graph(onnx_folder / source)
    ADAPT[part](model)
    graph = convert(onnx_folder / source, folder / name, form, fuse, model)
    check_supported(graph, name)
    check_size(graph, f"{name}.weight", (folder / f"{name}.weight").stat().st_size)
    check_weights(graph, name, form)
    return graph


def convert_decoder(
    onnx_folder: Path, folder: Path, layers: int, form: WeightFormat | None = None, fuse: bool = True
) -> Graph:
    """Write llm.mnn and its weight file; return the graph.

    Raises:
        ConversionError: An attention is not fused, or a weight is not stored in `form`.
    """
    graph = _convert_part("decoder", onnx_folder, folder, form or WeightFormat(), fuse)
    check_fused(graph, DECODER, layers)
    return graph


def convert_vision(onnx_folder: Path, folder: Path, form: WeightFormat | None = None) -> Graph:
    """Write visual.mnn and its weight file; return the graph.

    Raises:
        ConversionError: A weight is not stored in `form`.
    """
    return _convert_part("vision", onnx_folder, folder, form or WeightFormat(), fuse=True)


def check_weights(graph: Graph, name: str, form: WeightFormat) -> None:
    """Check that every linear layer is stored in the requested format.

    Raises:
        ConversionError: One is not; the message names it and its format.
    """
    for weight in graph.weights():
        if form.bits >= 16:
            valid = weight.bits == form.bits
        else:
            # One scale per channel is a block of all inputs, and all that MNN has for a patch embedding.
            blocks = {form.block, 0} if weight.inputs == form.block or weight.kernel > 1 else {form.block}
            stored = (weight.bits, weight.symmetric, weight.scale_bits)
            valid = stored == (form.bits, form.symmetric, form.scale_bits) and weight.block in blocks
        if not valid:
            raise ConversionError(
                f"{name}: layer {weight.name} ({weight.inputs} inputs) is stored with {weight.bits} bits, block"
                f" {weight.block or 'channel'}, instead of {form.bits} bits, block {form.block or 'channel'}; use a"
                " block that is a multiple of 16 and divides the layer's inputs"
            )
