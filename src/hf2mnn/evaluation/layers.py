"""Layer by layer: PyTorch against ONNX against MNN on the same input, to find where a conversion leaves the model.

Two errors are told of each point (`hf2mnn.reference.tap_points`), both relative: the norm of the difference over the norm of what is
right. The *accumulated* error compares with PyTorch and holds all that went wrong on the way. The *local* error
compares with what ONNX Runtime computes from MNN's own values of the points before (the ONNX graph, cut at every
point), so it holds the fault of this one operator alone, however deep it lies and however coarse the weights are.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from safetensors.numpy import load_file, save_file

from hf2mnn.core.files import link_or_copy
from hf2mnn.evaluation.fault_patterns import Sight, look
from hf2mnn.families import family_named
from hf2mnn.metrics import cosine, relative_error
from hf2mnn.mnn.bundle import CONFIG, PARTS
from hf2mnn.mnn.convert import write_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.graph import LINEAR, Graph
from hf2mnn.onnx.deepstack import DEEPSTACK
from hf2mnn.onnx.initializers import load_graph, stored_initializers
from hf2mnn.onnx.session import causal_mask, open_session
from hf2mnn.onnx.tap_points import cut, expose, outputs_by_module, points_of
from hf2mnn.quant.folding import folded_points
from hf2mnn.reference.golden import Golden, GoldenProbe
from hf2mnn.reference.tap_points import as_rows, kept_rows

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
    "mnn_local",
    "tolerance",
    "onnx_tolerance",
    "looks",
]
ONNX_TOLERANCE = 1e-3
"""Accumulated error of the ONNX graph: float32 sums in another order bring 1e-6, a wrong operator 0.1 and more."""


@dataclass(frozen=True)
class Part:
    """One graph of a probe: its inputs as the ONNX graph takes them and as MNN's does, by name and in order."""

    probe: str
    name: str
    onnx: dict[str, np.ndarray]
    mnn: dict[str, np.ndarray]


def parts_of(probe: GoldenProbe, golden: Golden, facts: dict[str, Any]) -> list[Part]:
    """The graphs that a probe goes through: the vision tower, where it has one image, and the decoder."""
    parts = []
    if len(probe.images) == 1:
        image, family = golden.image(probe.images[0]), family_named(facts["model_type"], golden.folder)
        inputs = family.vision_inputs(image.pixel_values, image.grid_thw, facts)
        parts.append(Part(probe.kind, "vision", inputs, inputs))
    added = {} if probe.deepstack_embeds is None else {DEEPSTACK: probe.deepstack_embeds}
    shared = added | {
        "attention_mask": causal_mask(0, len(probe.inputs_embeds)),
        "position_ids": probe.position_ids.astype(np.int32),
        "logits_index": np.array([0], np.int32),
    }
    past = (facts["num_hidden_layers"], 2, 1, 0, facts["num_key_value_heads"], facts["head_dim"])
    embeds = {"inputs_embeds": probe.inputs_embeds[None], "past_key_values": np.zeros(past, np.float32)}
    parts.append(Part(probe.kind, "decoder", embeds | shared, {"input_ids": probe.inputs_embeds[:, None]} | shared))
    return parts


def _run_onnx(
    model: onnx.ModelProto, source: Path, inputs: dict[str, np.ndarray], outputs: list[str], threads: int
) -> dict[str, np.ndarray]:
    """Values of `outputs` of a changed graph of the file `source`."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-layers-") as scratch:
        path = Path(scratch, "graph.onnx")
        onnx.save(model, path)
        for data in {stored.path for stored in stored_initializers(source).values()}:
            # ONNX Runtime takes no weights from outside the graph's own folder, not even through a link.
            link_or_copy(data.resolve(), Path(scratch, data.name))
        session = open_session(path, threads)
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))


def unfolded(value: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """A point's value as the checkpoint has it, where the bundle divides its channels by `scales`."""
    return value if scales is None else (value.reshape(-1, len(scales)) * scales).reshape(value.shape)


def _run_mnn(
    bundle: Path, parts: list[Part], graphs: dict[str, Graph], wanted: dict[str, list[str]], threads: int, limit: float
) -> list[dict[str, np.ndarray]]:
    """Values of `wanted[part]` of every part, in a child process."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-layers-") as scratch:
        jobs, given = [], {}
        for name in sorted({part.name for part in parts}):
            file = PARTS[name][0]
            watched, given[name] = graphs[name].watched(wanted[name])
            write_graph(watched, Path(scratch, file))
            link_or_copy(bundle / f"{file}.weight", Path(scratch, f"{file}.weight"))
        for index, part in enumerate(parts):
            fed, result = Path(scratch, f"{index}-fed.safetensors"), Path(scratch, f"{index}.safetensors")
            save_file({name: np.ascontiguousarray(array) for name, array in part.mnn.items()}, fed)
            described = {"graph": str(Path(scratch, PARTS[part.name][0]).resolve()), "part": part.name}
            described |= {"inputs": list(part.mnn), "outputs": list(given[part.name].values())}
            jobs.append(described | {"fed": str(fed.resolve()), "result": str(result.resolve())})
        job = {"bundle": str(bundle.resolve()), "graphs": jobs, "threads": threads}
        run_worker("hf2mnn.mnn.worker.layers", job, limit)
        results = [load_file(job["result"]) for job in jobs]
    scaled = folded_points(bundle)
    return [
        {name: unfolded(result[copied], scaled.get(name)) for name, copied in given[part.name].items()}
        for part, result in zip(parts, results, strict=True)
    ]


def rounding_error(bits: int) -> float:
    """Relative error that rounding to `bits` may leave. It is about 1.7 / 2^bits of a weight's size (uniform noise over
    a range of six deviations), of which three and a half times are let pass; what is altogether wrong has 0.7 and more.
    """
    return min(0.6, 6 / 2**bits)


def tolerance(linear: bool, bits: int, settings: dict[str, Any]) -> float:
    """Local error that an operator may have. Activations rounded to 8 bits add up to 0.05 to that of rounded weights,
    where a few are large.
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


@dataclass(frozen=True)
class Portable:
    """One ONNX graph with its points: (point, name of its value) in the order of computation."""

    model: onnx.ModelProto
    source: Path
    points: list[tuple[str, str]]

    @classmethod
    def load(cls, folder: Path, part: str) -> Portable:
        source = folder / PARTS[part][1]
        model = load_graph(source)
        inside = points_of([output for node in model.graph.node for output in node.output])
        return cls(model, source, [*zip(inside, inside, strict=True), *outputs_by_module(model).items()])

    def run(self, inputs: dict[str, np.ndarray], values: list[str], fed: dict[str, np.ndarray], threads: int) -> dict:
        """`values` by name; where `fed` has a value of a point, all that reads it reads that."""
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        expose(model, values)
        given = cut(model, list(fed))
        return _run_onnx(model, self.source, inputs | {name: fed[p] for p, name in given.items()}, values, threads)


def _bits(graph: Graph) -> dict[str, int]:
    """Bits of each linear layer's weight by the name of its value."""
    return {weight.name.removesuffix(LINEAR): weight.bits for weight in graph.weights()}


def compare_part(
    part: Part,
    portable: Portable,
    truth: dict[str, np.ndarray],
    seen: dict[str, np.ndarray],
    graph: Graph,
    settings: dict[str, Any],
    threads: int,
) -> list[dict[str, Any]]:
    """Rows of the table for one graph of one probe. `truth` holds PyTorch's kept rows by point, `seen` MNN's values."""
    names = [value for _, value in portable.points]
    right = portable.run(part.onnx, names, {}, threads)
    fits = [name for name, value in seen.items() if value.size == right[name].size]
    seen = {name: seen[name].reshape(right[name].shape) for name in fits}
    inside = {point: seen[value] for point, value in portable.points if value in seen and point == value}
    local = portable.run(part.onnx, names, inside, threads)

    def value(name: str) -> np.ndarray:
        return inside[name] if name in inside else portable.run(part.onnx, [name], inside, threads)[name]

    producers = {output: node for node in portable.model.graph.node for output in node.output}
    bits, fewest, rows = _bits(graph), min(_bits(graph).values(), default=32), []
    for order, (point, name) in enumerate(portable.points):
        operator = _operator(point, producers[name])
        values = as_rows(right[name])
        kept = kept_rows(len(values))
        linear = operator in ("linear layer", "convolution")
        row = {"probe": part.probe, "part": part.name, "order": order, "point": point, "operator": operator}
        row |= {"onnx_error": relative_error(truth[point], values[kept]), "onnx_tolerance": ONNX_TOLERANCE}
        row |= {"onnx_cosine": float(cosine(truth[point], values[kept]).mean()), "looks": ""}
        row["tolerance"] = tolerance(linear, bits.get(name, fewest), settings)
        if name in seen:
            values, alone = as_rows(seen[name]), as_rows(local[name])
            row |= {"mnn_error": relative_error(truth[point], values[kept])}
            row |= {"mnn_cosine": float(cosine(truth[point], values[kept]).mean())}
            row |= {"mnn_local": relative_error(alone, values)}
            if row["mnn_local"] > row["tolerance"]:
                sight = Sight(point, operator, values, alone, row["tolerance"], right[name].shape[-1])
                row["looks"] = look(sight, portable.model, portable.source, value)
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
    """A table with COLUMNS, one row a point of each probe, in the order of computation. `graphs` are the bundle's, by
    part.

    Raises:
        EngineError: a graph of the bundle does not run.
    """
    probes = {probe.kind: probe for probe in golden.probes()}
    parts = [part for probe in probes.values() for part in parts_of(probe, golden, facts)]
    portables = {name: Portable.load(onnx_folder, name) for name in {part.name for part in parts}}
    wanted = {
        name: [value for _, value in portable.points if value in graphs[name].values]
        for name, portable in portables.items()
    }
    config, rows = json.loads((bundle / CONFIG).read_text()), []
    for part, seen in zip(parts, _run_mnn(bundle, parts, graphs, wanted, threads, time_limit), strict=True):
        truth, graph = probes[part.probe].points, graphs[part.name]
        settings = config["mllm"] if part.name == "vision" else config
        rows += compare_part(part, portables[part.name], truth, seen, graph, settings, threads)
    return pd.DataFrame(rows, columns=COLUMNS)
