"""MNN's converter, called so that it can neither harm nor deceive: in a child process, in a folder of its own, and
judged by what it wrote.

It answers True and exits 0 whatever happened, and stages weights in its working directory, where two at once corrupt
each other. The wheel's console script and `MNN.tools` are never used: they install packages and report usage.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from hf2mnn.errors import ConversionError
from hf2mnn.mnn.graph import Graph

CALL = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
TIME_LIMIT = 4 * 3600
FUSE = "--transformerFuse"


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of linear layers are stored.

    bits: 32 and 16 are float; 2 to 8 are integers with a scale (and a zero point unless `symmetric`) a block.
    block: input channels that share a scale; 0 for one scale an output channel.
    scale_bits: 16 or 32, the float type of scales and zero points.
    method: "rtn" rounds to nearest; "hqq" searches scales as half-quadratic quantization does (much slower).
    """

    bits: int = 32
    block: int = 0
    symmetric: bool = False
    scale_bits: int = 16
    method: str = "rtn"

    def options(self) -> list[str]:
        """Command line of the converter; boolean options are always given a value, their bare forms are inverted."""
        if self.bits == 32:
            return []
        if self.bits == 16:
            return ["--fp16"]
        block = [f"--weightQuantBlock={self.block}"] if self.block else []
        return [
            f"--weightQuantBits={self.bits}",
            *block,
            f"--weightQuantAsymmetric={int(not self.symmetric)}",
            f"--weightQuantScaleBit={self.scale_bits}",
            *(["--hqq"] if self.method == "hqq" else []),
        ]


def run_converter(arguments: list[str], folder: Path, time_limit: float = TIME_LIMIT) -> str:
    """Run the converter with `folder` as working directory and give back what it printed.

    Raises:
        ConversionError: it crashed or took longer than `time_limit` seconds. Its exit code says no more than that.
    """
    command = [sys.executable, "-c", CALL, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired:
        raise ConversionError(f"MNN's converter was stopped after {time_limit:.0f} s: {' '.join(arguments)}") from None
    said = done.stdout + done.stderr
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ConversionError(f"MNN's converter died ({how}); its last words: {_last_words(said)}")
    return said


def _last_words(said: str, lines: int = 3) -> str:
    kept = [line.strip() for line in said.splitlines() if line.strip()]
    return " / ".join(kept[-lines:]) or "none"


def read_graph(path: Path) -> Graph:
    """What is really inside a .mnn file, by the converter's own dump.

    Raises:
        ConversionError: the file is missing or is no MNN model.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ConversionError(f"there is no MNN model {path}")
    with tempfile.TemporaryDirectory(prefix="hf2mnn-") as folder:
        said = run_converter(["-f", "MNN", "--modelFile", str(path), "--JsonFile", "graph.json"], Path(folder))
        dump = Path(folder, "graph.json")
        if not dump.is_file():
            raise ConversionError(f"{path} is not a model that MNN's converter can read: {_last_words(said)}")
        return Graph(json.loads(dump.read_text()))


def write_graph(graph: Graph, path: Path) -> None:
    """Build a .mnn file from a graph; external weights stay where the graph says they are.

    MNN stamps each file with a random id; ours is drawn from the contents, so the same model has the same bytes.
    """
    graph.content["mnn_uuid"] = ""
    text = json.dumps(graph.content, sort_keys=True)
    graph.content["mnn_uuid"] = str(uuid.uuid5(uuid.NAMESPACE_URL, text))
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=path.parent) as folder:
        Path(folder, "graph.json").write_text(json.dumps(graph.content))
        said = run_converter(["-f", "JSON", "--modelFile", "graph.json", "--MNNModel", "model.mnn"], Path(folder))
        built = Path(folder, "model.mnn")
        if not built.is_file():
            raise ConversionError(f"MNN's converter did not build {path.name} from its graph: {_last_words(said)}")
        built.replace(path)


def float_constants(path: Path) -> dict[str, np.ndarray]:
    """float32 constants that an ONNX file holds itself, by name: all but the weights."""
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if not uses_external_data(tensor)}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    floats = {name: tensor for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    return {name: numpy_helper.to_array(tensor) for name, tensor in floats.items()}


def convert_onnx(source: Path, destination: Path, weights: WeightFormat, fuse: bool = True) -> Graph:
    """Convert an ONNX file to `destination` (.mnn) and `destination`.weight. Gives the graph that was written.

    `fuse` is there for the tests that show what happens without it.

    Raises:
        ConversionError: nothing was written, with the converter's reason (an unsupported op is named by it).
    """
    source, destination = Path(source).resolve(), Path(destination).resolve()
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=destination.parent) as name:
        folder = Path(name)
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", "model.mnn", "--bizCode", "hf2mnn"]
        said = run_converter(
            [*arguments, "--saveExternalData=1", *([FUSE] if fuse else []), *weights.options()], folder
        )
        model, data = folder / "model.mnn", folder / "model.mnn.weight"
        if not model.is_file() or not data.is_file():
            unsupported = [line.strip() for line in said.splitlines() if "Not Support" in line or "not support" in line]
            reason = " / ".join(unsupported) or _last_words(said)
            raise ConversionError(f"MNN's converter wrote no model from {source.name}: {reason}")
        graph = read_graph(model)
        graph.drop_unused_inputs()
        graph.restore_constants(float_constants(source))
        data.replace(destination.with_name(destination.name + ".weight"))
        write_graph(graph, destination)
    return graph
