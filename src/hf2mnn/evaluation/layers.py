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
from hf2mnn.evaluation.fault_patterns import LINEAR_LAYER, ROTATION, Deviation, recognize_pattern
from hf2mnn.families import get_family
from hf2mnn.metrics import cosine, relative_error
from hf2mnn.mnn.bundle import CONFIG, PARTS
from hf2mnn.mnn.bundle_config import decoder_settings, vision_settings
from hf2mnn.mnn.convert import write_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.onnx.deepstack import DEEPSTACK
from hf2mnn.onnx.initializers import load_graph, stored_initializers
from hf2mnn.onnx.session import causal_mask, open_session
from hf2mnn.onnx.tap_points import add_outputs, outputs_by_module, replace_with_inputs, select_tap_points
from hf2mnn.quant.folding import folded_tap_points
from hf2mnn.reference.golden import Golden, GoldenProbe, as_matrix, evenly_spaced

ERRORS = ["onnx_error", "onnx_cosine", "mnn_error", "mnn_cosine", "local_error"]
COLUMNS = ["probe", "part", "order", "point", "operator", *ERRORS, "tolerance", "onnx_tolerance", "detail"]
OPERATORS = {
    "MatMul": LINEAR_LAYER,
    "Gemm": LINEAR_LAYER,
    "Conv": "convolution",
    "Mul": "normalization",
    "LayerNormalization": "normalization",
    "Add": "sum",
}
"""Names of ONNX operators in the table; others keep their own."""
ONNX_TOLERANCE = 1e-3
"""Accumulated error of the ONNX graph: another order of float32 sums brings 1e-6, a wrong operator 0.1 and more."""


@dataclass(frozen=True)
class GraphInputs:
    """Inputs of one graph for one probe."""

    probe: str  # kind of the probe
    part: str  # vision or decoder
    onnx: dict[str, np.ndarray]  # inputs of the ONNX graph by name
    mnn: dict[str, np.ndarray]  # inputs of MNN's graph by name, in order


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

    `inputs` has one item for each run; `graphs` and `wanted`, the names of the values to return, are by part. Returns
    values by name for each run.
    """
    with tempfile.TemporaryDirectory(prefix="hf2mnn-layers-") as name:
        scratch, jobs, outputs = Path(name).resolve(), [], {}
        for part in sorted({run.part for run in inputs}):
            file = PARTS[part][0]
            graph, outputs[part] = graphs[part].with_outputs(wanted[part])
            write_graph(graph, scratch / file)
            link_or_copy(bundle / f"{file}.weight", scratch / f"{file}.weight")
        for index, run in enumerate(inputs):
            job = {"graph": str(scratch / PARTS[run.part][0]), "part": run.part}
            job |= {"inputs": list(run.mnn), "outputs": list(outputs[run.part].values())}
            job |= {"fed": str(scratch / f"{index}-fed.safetensors"), "result": str(scratch / f"{index}.safetensors")}
            save_file({name: np.ascontiguousarray(array) for name, array in run.mnn.items()}, job["fed"])
            jobs.append(job)
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
    """Return the allowed local error of an operator; `linear` if it is a linear layer or convolution with `bits`.

    `settings` have the engine's `precision` and `memory`. Activations rounded to 8 bits, with a few large ones, add up
    to 0.05 to the error of quantized weights.
    """
    allowed = 1e-2 if settings["precision"] == "low" else 1e-3 if bits < 32 else 1e-4
    if linear and bits < 16:
        allowed = max(allowed, rounding_error(bits)) + (0.1 if settings["memory"] == "low" else 0.0)
    return allowed


def _operator(point: str, node: onnx.NodeProto) -> str:
    last = point.rpartition(".")[2]
    if last in ("query", "key"):
        return ROTATION
    if last == "context":
        return "attention"
    if node.op_type == "Add" and f"{point}.bias" in node.input:
        return LINEAR_LAYER
    return OPERATORS.get(node.op_type, node.op_type)


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

    `pytorch` has PyTorch's stored rows by tap point, and `mnn` MNN's values by name; `graph` is the bundle's graph, and
    `settings` are the engine's.
    """
    names = [name for _, name in onnx_graph.points]
    exact = onnx_graph.run(inputs.onnx, names, {}, threads)
    # A value of another size was merged with another operator by the converter.
    mnn = {name: value.reshape(exact[name].shape) for name, value in mnn.items() if value.size == exact[name].size}
    replaced = {point: mnn[name] for point, name in onnx_graph.points if name in mnn and point == name}
    local = onnx_graph.run(inputs.onnx, names, replaced, threads)
    known = local | replaced

    @cache
    def value(name: str) -> np.ndarray:
        return known[name] if name in known else onnx_graph.run(inputs.onnx, [name], replaced, threads)[name]

    def accumulated(runtime: str, point: str, values: np.ndarray) -> dict[str, float]:
        reference, stored = pytorch[point], values[evenly_spaced(len(values))]
        cosines = cosine(reference, stored)
        return {f"{runtime}_error": relative_error(reference, stored), f"{runtime}_cosine": float(cosines.mean())}

    producers = {output: node for node in onnx_graph.model.graph.node for output in node.output}
    bits = {weight.name.removesuffix(LINEAR): weight.bits for weight in graph.weights()}
    fewest, rows = min(bits.values(), default=32), []
    for order, (point, name) in enumerate(onnx_graph.points):
        operator = _operator(point, producers[name])
        allowed = tolerance(operator in (LINEAR_LAYER, "convolution"), bits.get(name, fewest), settings)
        row = {"probe": inputs.probe, "part": inputs.part, "order": order, "point": point, "operator": operator}
        row |= {"tolerance": allowed, "onnx_tolerance": ONNX_TOLERANCE, "detail": ""}
        row |= accumulated("onnx", point, as_matrix(exact[name]))
        if name in mnn:
            actual, expected = as_matrix(mnn[name]), as_matrix(local[name])
            row |= accumulated("mnn", point, actual) | {"local_error": relative_error(expected, actual)}
            if row["local_error"] > allowed:
                deviation = Deviation(point, operator, actual, expected, allowed, exact[name].shape[-1])
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
    """Compare all tap points of all probes; raise EngineError if a graph of the bundle does not run.

    `facts` is model.json, and `graphs` are the bundle's graphs by part. Returns a table with COLUMNS, one row for each
    tap point of each probe, in the order of computation.
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
        settings = vision_settings(config) if run.part == "vision" else decoder_settings(config)
        pytorch, graph = probes[run.probe].tap_points, graphs[run.part]
        rows += compare_graph(run, onnx_graphs[run.part], pytorch, values, graph, settings, threads)
    return pd.DataFrame(rows, columns=COLUMNS)
