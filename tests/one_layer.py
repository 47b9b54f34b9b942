"""Models of linear layers alone, side by side over one input, and their weights in the engine.

The engine's outputs for one-hot inputs are the weights that it computes with. `run` is a task of the engine's child
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import mnn_quantizer
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.graph import Graph
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.weights import Operator, WeightFile, operators
from hf2mnn.quant.write import write_weights


def write_onnx(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """Write layers by name, which all read "x": rows of inputs, or images.

    A weight is float32 [outputs, inputs], or [outputs, channels, height, width] of a patch embedding; the output of a
    layer has its name.
    """
    shape = next(iter(weights.values())).shape[1:]
    nodes, constants = [], []
    for name, weight in weights.items():
        if len(shape) == 1:
            nodes.append(helper.make_node("MatMul", ["x", f"{name}.weight"], [name]))
            constants.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"{name}.weight"))
        else:
            nodes.append(helper.make_node("Conv", ["x", f"{name}.weight"], [name], strides=list(shape[1:])))
            constants.append(numpy_helper.from_array(weight, f"{name}.weight"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", len(weight), *[1] * (len(shape) - 1)])
        for name, weight in weights.items()
    ]
    graph = helper.make_graph(nodes, "layers", [x], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@dataclass(frozen=True)
class Model:
    """A .mnn file with its weights."""

    path: Path
    graph: Graph
    layers: list[Operator]
    weights: WeightFile

    @property
    def by_name(self) -> dict[str, Operator]:
        return {operator.name: operator for operator in self.layers}

    def rows(self) -> dict[str, np.ndarray]:
        """Return every weight as the quantizer decodes it."""
        return {operator.name: self.weights.rows(operator) for operator in self.layers}


def read_model(path: Path) -> Model:
    graph = read_graph(path)
    return Model(path, graph, operators(graph), WeightFile(graph, path.with_name(f"{path.name}.weight")))


def convert(folder: Path, weights: dict[str, np.ndarray], form: WeightFormat | None = None) -> Model:
    """Convert layers by MNN's converter alone, to float32 by default."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.mnn"
    graph = mnn_quantizer.convert(write_onnx(folder / "model.onnx", weights), path, form)
    return Model(path, graph, operators(graph), WeightFile(graph, path.with_name(f"{path.name}.weight")))


def quantize(model: Model, folder: Path, formats: dict[str, WeightFormat], threads: int = 1) -> Model:
    """Quantize a float model by hf2mnn."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ours.mnn"
    weights = path.with_name(f"{path.name}.weight")
    graph, _ = write_weights(model.graph, model.layers, model.weights, weights, formats, Methods(), threads, "layers")
    write_graph(graph, path)
    return read_model(path)


def engine_outputs(
    models: dict[str, Model], folder: Path, memory: str = "high", inputs: np.ndarray | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Return by model and layer the engine's outputs, float32 [outputs, rows of inputs].

    Without `inputs`, these are one-hot, and the outputs the weights that the engine computes with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs, given, result = [], folder / "inputs.npy", folder / "outputs.npz"
    for name, model in models.items():
        dims = next(op["main"]["dims"] for op in model.graph.ops if op["type"] == "Input")
        names = [operator.name for operator in model.layers]
        jobs.append({"name": name, "graph": str(model.path.resolve()), "shape": dims[1:], "outputs": names})
    job = {"models": jobs, "settings": {"memory": memory, "precision": "high"}, "result": str(result.resolve())}
    if inputs is not None:
        np.save(given, inputs)
        job["inputs"] = str(given.resolve())
    run_worker("one_layer", job, time_limit=120)
    by_model: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    with np.load(result) as outputs:
        for key in outputs.files:
            model, layer = key.split("|")
            by_model[model][layer] = outputs[key].reshape(len(outputs[key]), -1).T
    return by_model


def run(job: dict[str, Any]) -> None:
    """Write the outputs of each layer to job["result"] (npz), by "model|layer".

    job: models (name, graph, shape of an input, outputs), settings of the engine, inputs (npy; one-hot if missing),
    result.
    """
    from hf2mnn.mnn.worker.module import Module

    results = {}
    for model in job["models"]:
        shape = model["shape"]
        inputs = np.load(job["inputs"]) if "inputs" in job else np.eye(int(np.prod(shape)), dtype=np.float32)
        module = Module(Path(model["graph"]), ["x"], model["outputs"], job["settings"], 1)
        outputs = module([np.ascontiguousarray(inputs.reshape(-1, *shape))])
        results |= {f"{model['name']}|{layer}": out for layer, out in zip(model["outputs"], outputs, strict=True)}
    np.savez(job["result"], **results)
