"""Layer comparison: PyTorch, ONNX Runtime and MNN at each tap point, on the same input.

Each tap point (`hf2mnn.reference.golden`) has two relative errors: L2 norms of a difference over that of the right
value. The accumulated error compares with PyTorch and includes the errors of all operators before. The local error
compares with the value that the ONNX graph, cut at every tap point, computes from MNN's own values: it is the error of
one operator, at any depth and for any weight format.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from safetensors.numpy import load_file, save_file

from hf2mnn.core.files import link_or_copy
from hf2mnn.evaluation.fault_patterns import Deviation, recognize_pattern
from hf2mnn.families import get_family
from hf2mnn.metrics import cosine, relative_error
from hf2mnn.mnn.bundle import CONFIG, PARTS
from hf2mnn.mnn.convert import write_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.onnx.deepstack import DEEPSTACK
from hf2mnn.onnx.initializers import load_graph, stored_initializers
from hf2mnn.onnx.session import causal_mask, open_session
from hf2mnn.onnx.tap_points import add_outputs, outputs_by_module, replace_with_inputs, select_tap_points
from hf2mnn.quant.awq import folded_tap_points
from hf2mnn.reference.golden import Golden, GoldenProbe, as_matrix, evenly_spaced

COLUMNS = [
    "probe",
    "part",
    "order",
    "point",
    "operator",
    "onnx_error",
    "onnx_cosine",
    "mnn_error",
    "mnn_cosine",
    "local_error",
    "tolerance",
    "onnx_tolerance",
    "detail",
]
ONNX_TOLERANCE = 1e-3
"""Accumulated error of the ONNX graph: another order of float32 sums brings 1e-6, a wrong operator 0.1 and more."""


@dataclass(frozen=True)
class GraphInputs:
    """Inputs of one graph for one probe.

    Attributes:
        probe: Kind of the probe.
        part: vision or decoder.
        onnx: Inputs of the ONNX graph by name.
        mnn: Inputs of MNN's graph by name, in order.
    """

    probe: str
    part: str
    onnx: dict[str, np.ndarray]
    mnn: dict[str, np.ndarray]


def graph_inputs(probe: GoldenProbe, golden: Golden, facts: dict[str, Any]) -> list[GraphInputs]:
    """Return the inputs of the graphs that a probe runs: the vision tower if it has one image, and the decoder."""
    inputs = []
    if len(probe.images) == 1:
        image, family = golden.image(probe.images[0]), get_family(facts["model_type"], golden.folder)
        vision = family.vision_inputs(image.pixel_values, image.grid_thw, facts)
        inputs.append(GraphInputs(probe.kind, "vision", vision, vision))
    deepstack = {} if probe.deepstack_embeds is None else {DEEPSTACK: probe.deepstack_embeds}
    shared = deepstack | {
        "attention_mask": causal_mask(0, len(probe.inputs_embeds)),
        "position_ids": probe.position_ids.astype(np.int32),
        "logits_index": np.array([0], np.int32),
    }
    past = (facts["num_hidden_layers"], 2, 1, 0, facts["num_key_value_heads"], facts["head_dim"])
    embeds = {"inputs_embeds": probe.inputs_embeds[None], "past_key_values": np.zeros(past, np.float32)}
    mnn = {"input_ids": probe.inputs_embeds[:, None]} | shared
    return [*inputs, GraphInputs(probe.kind, "decoder", embeds | shared, mnn)]


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX graph and its tap points: (tap point, name of the value) in the order of computation."""

    model: onnx.ModelProto
    source: Path
    points: list[tuple[str, str]]

    @classmethod
    def load(cls, folder: Path, part: str) -> OnnxGraph:
        """Load the graph of a part from the folder of the export stage."""
        source = folder / PARTS[part][1]
        model = load_graph(source)
        inner = select_tap_points([output for node in model.graph.node for output in node.output])
        return cls(model, source, [*zip(inner, inner, strict=True), *outputs_by_module(model).items()])

    def run(
        self, inputs: dict[str, np.ndarray], values: list[str], replaced: dict[str, np.ndarray], threads: int
    ) -> dict[str, np.ndarray]:
        """Return values by name in ONNX Runtime; operators read the values `replaced` in place of the graph's own."""
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        add_outputs(model, values)
        names = replace_with_inputs(model, list(replaced))
        with tempfile.TemporaryDirectory(prefix="hf2mnn-layers-") as scratch:
            path = Path(scratch, "graph.onnx")
            onnx.save(model, path)
            for data in {stored.path for stored in stored_initializers(self.source).values()}:
                # ONNX Runtime reads weights in the graph's own folder only, and follows no symbolic link.
                link_or_copy(data.resolve(), Path(scratch, data.name))
            session = open_session(path, threads)
        inputs = inputs | {name: replaced[value] for value, name in names.items()}
        return dict(zip(values, session.run(values, inputs), strict=True))


def unfolded(value: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Return a tap point's value as in the checkpoint, if the bundle divides its channels by `scales`."""
    return value if scales is None else (value.reshape(-1, len(scales)) * scales).reshape(value.shape)


def run_mnn(
    bundle: Path,
    inputs: list[GraphInputs],
    graphs: dict[str, Graph],
    wanted: dict[str, list[str]],
    threads: int,
    time_limit: float,
) -> list[dict[str, np.ndarray]]:
    """Run a bundle's graphs in a child process.

    Args:
        bundle: Folder of the bundle.
        inputs: Inputs of each run.
        graphs: The bundle's graphs by part.
        wanted: Names of the values to return, by part.
        threads: Threads of the engine.
        time_limit: Seconds after which the engine is stopped.

    Returns:
        Values by name for each run.
    """
    with tempfile.TemporaryDirectory(prefix="hf2mnn-layers-") as scratch:
        jobs, outputs = [], {}
        for part in sorted({run.part for run in inputs}):
            file = PARTS[part][0]
            graph, outputs[part] = graphs[part].with_outputs(wanted[part])
            write_graph(graph, Path(scratch, file))
            link_or_copy(bundle / f"{file}.weight", Path(scratch, f"{file}.weight"))
        for index, run in enumerate(inputs):
            fed, result = Path(scratch, f"{index}-fed.safetensors"), Path(scratch, f"{index}.safetensors")
            save_file({name: np.ascontiguousarray(array) for name, array in run.mnn.items()}, fed)
            job = {"graph": str(Path(scratch, PARTS[run.part][0]).resolve()), "part": run.part}
            job |= {"inputs": list(run.mnn), "outputs": list(outputs[run.part].values())}
            jobs.append(job | {"fed": str(fed.resolve()), "result": str(result.resolve())})
        job = {"bundle": str(bundle.resolve()), "graphs": jobs, "threads": threads}
        run_worker("hf2mnn.mnn.worker.layers", job, time_limit)
        results = [load_file(job["result"]) for job in jobs]
    scales = folded_tap_points(bundle)
    return [
        {name: unfolded(result[output], scales.get(name)) for name, output in outputs[run.part].items()}
        for run, result in zip(inputs, results, strict=True)
    ]


def rounding_error(bits: int) -> float:
    """Return the allowed relative error of weights of `bits` bits.

    Rounding brings about 1.7 / 2^bits (uniform noise over a range of six standard deviations); 3.5 times as much is
    allowed. A wrong weight has 0.7 and more.
    """
    return min(0.6, 6 / 2**bits)


def tolerance(linear: bool, bits: int, settings: dict[str, Any]) -> float:
    """Return the allowed local error of an operator.

    Activations rounded to 8 bits, with a few large ones, add up to 0.05 to the error of quantized weights.

    Args:
        linear: Whether it is a linear layer or a convolution.
        bits: Bits of its weights.
        settings: `precision` and `memory` of the engine.
    """
    allowed = 1e-2 if settings["precision"] == "low" else 1e-3 if bits < 32 else 1e-4
    if linear and bits < 16:
        allowed = max(allowed, rounding_error(bits)) + (0.1 if settings["memory"] == "low" else 0.0)
    return allowed


def _operator(point: str, node: onnx.NodeProto) -> str:
    last = point.rpartition(".")[2]
    if last in ("query", "key"):
        return "rotary position embedding"
    if last == "context":
        return "attention"
    names = {"MatMul": "linear layer", "Gemm": "linear layer", "Conv": "convolution", "Mul": "normalization"}
    names |= {"LayerNormalization": "normalization", "Add": "sum"}
    if any(name == f"{point}.bias" for name in node.input) and node.op_type == "Add":
        return "linear layer"
    return names.get(node.op_type, node.op_type)


def _bits(graph: Graph) -> dict[str, int]:
    """Return the bits of each linear layer's weights by the name of its value."""
    return {weight.name.removesuffix(LINEAR): weight.bits for weight in graph.weights()}


def compare_graph(
    inputs: GraphInputs,
    onnx_graph: OnnxGraph,
    pytorch: dict[str, np.ndarray],
    mnn: dict[str, np.ndarray],
    graph: Graph,
    settings: dict[str, Any],
    threads: int,
) -> list[dict[str, Any]]:
    """Compare one graph on one probe; returns rows of COLUMNS.

    Args:
        inputs: Inputs of the graph.
        onnx_graph: The ONNX graph.
        pytorch: PyTorch's stored rows by tap point.
        mnn: MNN's values by name.
        graph: The bundle's graph.
        settings: The engine's settings.
        threads: Threads of ONNX Runtime.
    """
    names = [name for _, name in onnx_graph.points]
    exact = onnx_graph.run(inputs.onnx, names, {}, threads)
    # A value of another size was merged with another operator by the converter.
    mnn = {name: value.reshape(exact[name].shape) for name, value in mnn.items() if value.size == exact[name].size}
    replaced = {point: mnn[name] for point, name in onnx_graph.points if name in mnn and point == name}
    local = onnx_graph.run(inputs.onnx, names, replaced, threads)

    @cache
    def value(name: str) -> np.ndarray:
        if name in replaced:
            return replaced[name]
        return local[name] if name in local else onnx_graph.run(inputs.onnx, [name], replaced, threads)[name]

    producers = {output: node for node in onnx_graph.model.graph.node for output in node.output}
    bits = _bits(graph)
    fewest, rows = min(bits.values(), default=32), []
    for order, (point, name) in enumerate(onnx_graph.points):
        operator, reference, values = _operator(point, producers[name]), pytorch[point], as_matrix(exact[name])
        stored = evenly_spaced(len(values))
        linear = operator in ("linear layer", "convolution")
        row = {"probe": inputs.probe, "part": inputs.part, "order": order, "point": point, "operator": operator}
        row |= {"onnx_error": relative_error(reference, values[stored]), "onnx_tolerance": ONNX_TOLERANCE}
        row |= {"onnx_cosine": float(cosine(reference, values[stored]).mean()), "detail": ""}
        row["tolerance"] = tolerance(linear, bits.get(name, fewest), settings)
        if name in mnn:
            actual, expected = as_matrix(mnn[name]), as_matrix(local[name])
            row |= {"mnn_error": relative_error(reference, actual[stored])}
            row |= {"mnn_cosine": float(cosine(reference, actual[stored]).mean())}
            row |= {"local_error": relative_error(expected, actual)}
            if row["local_error"] > row["tolerance"]:
                last_axis = exact[name].shape[-1]
                deviation = Deviation(point, operator, actual, expected, row["tolerance"], last_axis)
                row["detail"] = recognize_pattern(deviation, onnx_graph.model, onnx_graph.source, value)
        rows.append(row)
    return rows


def compare_layers(
    golden: Golden,
    onnx_folder: Path,
    facts: dict[str, Any],
    bundle: Path,
    graphs: dict[str, Graph],
    threads: int,
    time_limit: float,
) -> pd.DataFrame:
    """Compare all tap points of all probes.

    Args:
        golden: The reference.
        onnx_folder: Folder of the export stage.
        facts: model.json.
        bundle: Folder of the bundle.
        graphs: The bundle's graphs by part.
        threads: Threads of the runtimes.
        time_limit: Seconds after which the engine is stopped.

    Returns:
        A table with COLUMNS, one row for each tap point of each probe, in the order of computation.

    Raises:
        EngineError: A graph of the bundle does not run.
    """
    probes = {probe.kind: probe for probe in golden.probes()}
    inputs = [run for probe in probes.values() for run in graph_inputs(probe, golden, facts)]
    onnx_graphs = {part: OnnxGraph.load(onnx_folder, part) for part in {run.part for run in inputs}}
    wanted = {
        part: [name for _, name in onnx_graph.points if name in graphs[part].values]
        for part, onnx_graph in onnx_graphs.items()
    }
    config, rows = json.loads((bundle / CONFIG).read_text()), []
    for run, values in zip(inputs, run_mnn(bundle, inputs, graphs, wanted, threads, time_limit), strict=True):
        settings = config["mllm"] if run.part == "vision" else config
        pytorch, graph = probes[run.probe].tap_points, graphs[run.part]
        rows += compare_graph(run, onnx_graphs[run.part], pytorch, values, graph, settings, threads)
    return pd.DataFrame(rows, columns=COLUMNS)
