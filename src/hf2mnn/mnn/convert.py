"""MNN's converter, called so that it can neither harm nor deceive: in a child process, in a folder of its own, and
judged by what it wrote.

It answers True and exits 0 whatever happened, and stages weights in its working directory, where two at once corrupt
each other. The wheel's console script and `MNN.tools` are never used: they install packages and report usage.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf2mnn.core.errors import ConversionError, MachineError
from hf2mnn.core.shortage import ended_by_others, full
from hf2mnn.machine.child import environment
from hf2mnn.mnn.graph import Graph
from hf2mnn.onnx.initializers import float_values

# Python has this signal ignored; the converter does not look whether what it writes arrives.
CALL = (
    "import sys, _tools, signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL);"
    " from hf2mnn.machine.child import end_with; end_with(int(sys.argv[1]));"
    " _tools.mnnconvert(['mnnconvert', *sys.argv[2:]])"
)
TIME_LIMIT = 4 * 3600
DUMP_LIMIT = 900
"""Seconds."""
ROOM = 1 << 16
"""Bytes; a disk with less is full."""
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
        MachineError: the disk is full.
        OSError: a file grew larger than is allowed.
    """
    command = [sys.executable, "-c", CALL, str(os.getpid()), *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired:
        raise ConversionError(f"MNN's converter was stopped after {time_limit:.0f} s: {' '.join(arguments)}") from None
    said = done.stdout + done.stderr
    if ended := ended_by_others("MNN's converter", done.returncode):
        raise ConversionError(ended)
    if done.returncode == -signal.SIGXFSZ:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if shutil.disk_usage(folder).free < ROOM:
        raise MachineError(full(folder))
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ConversionError(f"MNN's converter died ({how}); its last words: {_last_words(said)}")
    return said


def _last_words(said: str, lines: int = 3) -> str:
    kept = [line.strip() for line in said.splitlines() if line.strip()]
    return " / ".join(kept[-lines:]) or "none"


def read_graph(path: Path, time_limit: float = DUMP_LIMIT) -> Graph:
    """What is really inside a .mnn file, by the converter's own dump.

    Raises:
        ConversionError: the file is missing or is no MNN model, or the converter crashed on it or took longer than
            `time_limit` seconds.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ConversionError(f"there is no MNN model {path}")
    with tempfile.TemporaryDirectory(prefix="hf2mnn-") as folder:
        said = run_converter(
            ["-f", "MNN", "--modelFile", str(path), "--JsonFile", "graph.json"], Path(folder), time_limit
        )
        dump = Path(folder, "graph.json")
        if not dump.is_file():
            raise ConversionError(f"{path} is not a model that MNN's converter can read: {_last_words(said)}")
        try:
            content = json.loads(dump.read_bytes())
        except ValueError:
            raise ConversionError(
                f"MNN's converter wrote only a part of the graph of {path}: see whether a disk is full or a quota used"
                " up, and run the same command again"
            ) from None
        try:
            return Graph.checked(content)
        except (ValueError, TypeError) as error:
            raise ConversionError(f"{path} is not a model that can be read ({error}); convert it again") from None


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


def convert_onnx(
    source: Path,
    destination: Path,
    weights: WeightFormat,
    fuse: bool = True,
    finish: Callable[[Graph, Path], None] | None = None,
) -> Graph:
    """Convert an ONNX file to `destination` (.mnn) and `destination`.weight. Gives the graph that was written.

    `fuse` is there for the tests that show what happens without it; `finish` may change the graph and its weight file
    before they get their names, and replace operators that the converter does not know.

    Raises:
        ConversionError: nothing was written, with the converter's reason (an unsupported op is named by it).
    """
    source, destination = Path(source).resolve(), Path(destination).resolve()
    with tempfile.TemporaryDirectory(prefix="hf2mnn-", dir=destination.parent) as name:
        folder = Path(name)
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", "model.mnn", "--bizCode", "hf2mnn"]
        arguments += ["--saveExternalData=1", *([FUSE] if fuse else []), *weights.options()]
        said = run_converter([*arguments, *(["--allowCustomOp"] if finish else [])], folder)
        model, data = folder / "model.mnn", folder / "model.mnn.weight"
        if not model.is_file() or not data.is_file():
            unsupported = [line.strip() for line in said.splitlines() if "Not Support" in line or "not support" in line]
            reason = " / ".join(unsupported) or _last_words(said)
            raise ConversionError(f"MNN's converter wrote no model from {source.name}: {reason}")
        graph = read_graph(model)
        graph.drop_unused_inputs()
        graph.restore_constants(float_values(source))
        if finish:
            finish(graph, data)
        data.replace(destination.with_name(destination.name + ".weight"))
        write_graph(graph, destination)
    return graph
