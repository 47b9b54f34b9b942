"""Models of linear layers alone, side by side over one input: what the engine makes of their weights is read off its
answers to one-hot inputs. `run` is what the engine's child process calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hf2mnn.mnn.convert import WeightFormat, convert_onnx, read_graph, write_graph
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.graph import Graph
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.weights import Operator, WeightFile, operators
from hf2mnn.quant.write import write_weights


def write_onnx(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """Layers by name, each float32 [outputs, inputs], or [outputs, channels, height, width] of a patch embedding. All
    read "x": rows of inputs, or images; of that name is the output of each.
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
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", len(weight), *[1] * (len(shape) - 1)])
        for name, weight in weights.items()
    ]
    graph = helper.make_graph(nodes, "layers", [given], made, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@dataclass(frozen=True)
class Model:
    """A .mnn file, read back."""

    path: Path
    graph: Graph
    layers: list[Operator]
    weights: WeightFile

    @property
    def by_name(self) -> dict[str, Operator]:
        return {operator.name: operator for operator in self.layers}

    def rows(self) -> dict[str, np.ndarray]:
        """Every weight as our decoder reads it."""
        return {operator.name: self.weights.rows(operator) for operator in self.layers}


def read_model(path: Path) -> Model:
    graph = read_graph(path)
    return Model(path, graph, operators(graph), WeightFile(graph, path.with_name(f"{path.name}.weight")))


def convert(folder: Path, weights: dict[str, np.ndarray], form: WeightFormat | None = None) -> Model:
    """The converter's own model, float32 where no format is given."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.mnn"
    convert_onnx(write_onnx(folder / "model.onnx", weights), path, form or WeightFormat())
    return read_model(path)


def quantize(model: Model, folder: Path, formats: dict[str, WeightFormat], threads: int = 1) -> Model:
    """Ours, of a float model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ours.mnn"
    weights = path.with_name(f"{path.name}.weight")
    graph, _ = write_weights(model.graph, model.layers, model.weights, weights, formats, Methods(), threads, "layers")
    write_graph(graph, path)
    return read_model(path)


def engine_outputs(
    models: dict[str, Model], folder: Path, memory: str = "high", inputs: np.ndarray | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """By model and layer the engine's outputs float32 [outputs, rows of inputs]: for one-hot inputs, where none are
    given, the weights that it computes with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs, given, made = [], folder / "given.npy", folder / "made.npz"
    for name, model in models.items():
        dims = next(op["main"]["dims"] for op in model.graph.ops if op["type"] == "Input")
        names = [operator.name for operator in model.layers]
        jobs.append({"name": name, "graph": str(model.path.resolve()), "shape": dims[1:], "outputs": names})
    job = {"models": jobs, "settings": {"memory": memory, "precision": "high"}, "made": str(made.resolve())}
    if inputs is not None:
        np.save(given, inputs)
        job["given"] = str(given.resolve())
    run_worker("one_layer", job, time_limit=120)
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    with np.load(made) as outputs:
        for key in outputs.files:
            model, layer = key.split("|")
            found[model][layer] = outputs[key].reshape(len(outputs[key]), -1).T
    return found


def run(job: dict[str, Any]) -> None:
    """Outputs of each layer into job["made"] (npz), by "model|layer".

    job: models (name, graph, shape of an input, outputs), settings of the engine, given (npy, one-hot where it is not
    there), made.
    """
    from hf2mnn.mnn.worker.module import Module

    found = {}
    for model in job["models"]:
        shape = model["shape"]
        inputs = np.load(job["given"]) if "given" in job else np.eye(int(np.prod(shape)), dtype=np.float32)
        module = Module(Path(model["graph"]), ["x"], model["outputs"], job["settings"], 1)
        outputs = module([np.ascontiguousarray(inputs.reshape(-1, *shape))])
        found |= {f"{model['name']}|{layer}": output for layer, output in zip(model["outputs"], outputs, strict=True)}
    np.savez(job["made"], **found)
