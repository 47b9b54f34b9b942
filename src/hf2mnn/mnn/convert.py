"""MNN's converter: ONNX to a graph, and graphs to and from .mnn files.

The converter exits with 0 after any error, and writes temporary weights to its working directory. So it runs in a child
process and in a folder of its own, and only its output files count. The console script of the wheel and `MNN.tools` are
not used: they install packages and report usage.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from hf2mnn.core.errors import ConversionError, MachineError
from hf2mnn.core.machine_errors import disk_full_message, explain_kill
from hf2mnn.machine.child import child_environment
from hf2mnn.mnn.graph import Graph
from hf2mnn.onnx.initializers import float_values, stored_initializers

# Python ignores SIGXFSZ, and the converter does not check whether its writes succeed.
CALL = (
    "import sys, _tools, signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL);"
    " from hf2mnn.machine.child import die_with_parent; die_with_parent(int(sys.argv[1]));"
    " _tools.mnnconvert(['mnnconvert', *sys.argv[2:]])"
)
TIME_LIMIT = 4 * 3600  # time limit of a conversion in seconds
DUMP_TIME_LIMIT = 900  # time limit of reading a .mnn file in seconds
MIN_FREE = 1 << 16  # free bytes below which a disk counts as full
FUSE = "--transformerFuse"  # option that fuses attentions with their KV cache
CUSTOM_OPERATORS = "--allowCustomOp"  # option that passes on operators that the converter does not know


def run_converter(arguments: Sequence[str], folder: Path, time_limit: float = TIME_LIMIT) -> str:
    """Run the converter in `folder`, and return its output; exit code 0 does not mean success.

    Raise ConversionError after a crash or `time_limit` seconds, MachineError if the disk is full, and OSError if a file
    exceeded the limit of file sizes.
    """
    if find_spec("_tools") is None:
        raise ModuleNotFoundError("MNN is not installed", name="MNN")
    command = [sys.executable, "-c", CALL, str(os.getpid()), *arguments]
    try:
        process = subprocess.run(
            command,
            cwd=folder,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired:
        raise ConversionError(
            f"MNN's converter was stopped after {time_limit:.0f} s: {' '.join(arguments)}; run it again on a faster or"
            " less busy machine"
        ) from None
    output, code = process.stdout + process.stderr, process.returncode
    if killed := explain_kill("MNN's converter", code):
        raise ConversionError(killed)
    if code == -signal.SIGXFSZ:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if shutil.disk_usage(folder).free < MIN_FREE:
        raise MachineError(disk_full_message(folder))
    if code != 0:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ConversionError(f"MNN's converter crashed ({reason}); its last output: {_last_lines(output)}")
    return output


def _last_lines(output: str, count: int = 3) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "none"


def read_graph(path: Path, time_limit: float = DUMP_TIME_LIMIT) -> Graph:
    """Read a graph from its JSON form or a .mnn file (floats rounded to six decimals), or raise ConversionError."""
    path = Path(path).resolve()
    if not path.is_file():
        raise ConversionError(f"{path} does not exist: give the path of an MNN model")
    try:
        return Graph.checked(json.loads(path.read_bytes()) if path.suffix == ".json" else _dump(path, time_limit))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path} is not a valid MNN model ({error}); convert it again") from None


def _dump(path: Path, time_limit: float) -> Any:
    """Return the JSON form of a .mnn file."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-") as folder:
        arguments = ["-f", "MNN", "--modelFile", str(path), "--JsonFile", "graph.json"]
        output = run_converter(arguments, Path(folder), time_limit)
        dump = Path(folder, "graph.json")
        if not dump.is_file():
            raise ConversionError(f"{path} is not a model that MNN's converter can read: {_last_lines(output)}")
        try:
            return json.loads(dump.read_bytes())
        except ValueError:
            raise ConversionError(
                f"MNN's converter wrote only a part of the graph of {path}: free space on the disk or raise its quota,"
                " then run the same command again"
            ) from None


def write_graph(graph: Graph, path: Path) -> None:
    """Write a .mnn file, or raise ConversionError; the weight file is not changed.

    The converter gives each file a random id. It is replaced by a hash of the content, so that equal models have equal
    bytes.
    """
    graph.content["mnn_uuid"] = ""
    text = json.dumps(graph.content, sort_keys=True)
    graph.content["mnn_uuid"] = str(uuid.uuid5(uuid.NAMESPACE_URL, text))
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=path.parent) as folder:
        Path(folder, "graph.json").write_text(json.dumps(graph.content))
        output = run_converter(["-f", "JSON", "--modelFile", "graph.json", "--MNNModel", "model.mnn"], Path(folder))
        built = Path(folder, "model.mnn")
        if not built.is_file():
            raise ConversionError(f"MNN's converter did not build {path.name} from its graph: {_last_lines(output)}")
        built.replace(path)


def _save_adapted(model: onnx.ModelProto, source: Path, folder: Path) -> Path:
    """Write a changed graph of the ONNX file `source` to `folder`, with links to the weight files that it uses.

    Raise ExportError if one is missing or too short; the converter would use zeros without a message.
    """
    stored = stored_initializers(source)
    used = {tensor.name for tensor in model.graph.initializer if uses_external_data(tensor)}
    for path in {stored[name].path for name in used}:
        (folder / path.name).symlink_to(path.resolve())
    onnx.save(model, folder / source.name)
    return folder / source.name


def convert_onnx(
    source: Path, weights: Path, options: Sequence[str] = (FUSE,), adapted: onnx.ModelProto | None = None
) -> Graph:
    """Convert an ONNX file, or its graph `adapted`, to a graph with exact constants, and write its weight file.

    Raise ConversionError with the converter's reason if it fails; nothing is written.
    """
    source, weights = Path(source).resolve(), Path(weights).resolve()
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=weights.parent) as name:
        folder = Path(name)
        if adapted is not None:
            source = _save_adapted(adapted, source, folder)
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", "model.mnn", "--bizCode", "hf2mnn"]
        output = run_converter([*arguments, "--saveExternalData=1", *options], folder)
        model, data = folder / "model.mnn", folder / "model.mnn.weight"
        if not model.is_file() or not data.is_file():
            unsupported = [line.strip() for line in output.splitlines() if "not support" in line.lower()]
            reason = " / ".join(unsupported) or _last_lines(output)
            raise ConversionError(f"MNN's converter wrote no model from {source.name}: {reason}")
        graph = read_graph(model)
        graph.content["mnn_uuid"] = ""
        graph.drop_unused_inputs()
        graph.restore_constants(float_values(source))
        data.replace(weights)
    return graph
