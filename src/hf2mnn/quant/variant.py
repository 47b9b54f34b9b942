"""A bundle: what the `mnn` stage has made, and the weights in the formats that were asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import save_file

from hf2mnn.core.errors import ConversionError
from hf2mnn.core.files import link_or_copy
from hf2mnn.families import family_named
from hf2mnn.mnn import graph as proof
from hf2mnn.mnn.bundle import EMBEDDING, PARTS, TOKENIZER, EngineSettings, parts_in, write_configs
from hf2mnn.mnn.convert import WeightFormat, read_graph, write_graph
from hf2mnn.onnx.initializers import small_values, stored_initializers
from hf2mnn.quant.awq import search_scales
from hf2mnn.quant.embedding import check_tied, tied_settings
from hf2mnn.quant.folding import FOLDED, FoldedWeights, folded_points
from hf2mnn.quant.formats import check_format, choose_formats
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.names import LM_HEAD, module_names
from hf2mnn.quant.weights import ModelWeights, Operator, operators
from hf2mnn.quant.write import write_weights

TABLE = "weights.csv"
"""A row for each operator of a variant."""


@dataclass(frozen=True)
class Choice:
    """What a variant is to be. plan: settings that differ from the part's, by part and operator; embedding: "file", or
    "lm_head", where the decoder's last layer serves as the embedding too.
    """

    decoder: WeightFormat
    vision: WeightFormat
    engine: EngineSettings
    plan: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    embedding: str = "file"

    def base(self, part: str) -> WeightFormat:
        return {"decoder": self.decoder, "vision": self.vision}[part]


class Part:
    """One graph of a model, on its way into a bundle."""

    def __init__(self, name: str, onnx_folder: Path, base: Path) -> None:
        """`base` is the `mnn` stage's folder."""
        self.name = name
        self.file, source = PARTS[name]
        self.names = module_names(onnx_folder / source)
        self.graph = read_graph(base / self.file)
        # The dump that a graph is read from prints six decimals.
        self.graph.restore_constants(small_values(onnx_folder / source))
        self.operators = operators(self.graph, self.names)
        initializers = stored_initializers(onnx_folder / source)
        self.weights = ModelWeights(self.graph, base / f"{self.file}.weight", initializers)

    def formats(self, choice: Choice, methods: Methods) -> dict[str, WeightFormat]:
        """The format of each operator. Raises QuantizationError where one cannot have it."""
        chosen = choose_formats(self.operators, choice.base(self.name), choice.plan.get(self.name, {}), self.name)
        by_name = {operator.name: operator for operator in self.operators}
        return {name: check_format(by_name[name], methods.settle(by_name[name], form)) for name, form in chosen.items()}

    def write(
        self, folder: Path, formats: dict[str, WeightFormat], methods: Methods, model: dict[str, Any], threads: int
    ) -> tuple[pd.DataFrame, list[Operator]]:
        """Write the graph and its weights; gives a row for each operator, and the operators as they are now."""
        folds = family_named(model["model_type"], folder).folds(model)
        methods.scales = search_scales(folds, self.operators, self.weights, formats, methods.activations)
        if points := methods.scales.points(folds):
            save_file(folded_points(folder) | points, folder / FOLDED)
        weights = FoldedWeights(self.weights, methods.scales)
        path = folder / f"{self.file}.weight"
        written, table = write_weights(self.graph, self.operators, weights, path, formats, methods, threads, self.name)
        write_graph(written, folder / self.file)
        return table.assign(part=self.name), self._proved(folder / self.file, written)

    def _proved(self, path: Path, wanted: proof.Graph) -> list[Operator]:
        """Raises ConversionError where the graph that the converter has built does not read its weights as `wanted`."""
        found = read_graph(path)
        layers = operators(found, self.names)
        if layers != operators(wanted, self.names) or len(found.fused) != len(wanted.fused):
            raise ConversionError(
                f"MNN's converter built {path.name} with other weights than it was given; this is a bug, report it"
            )
        proof.prove_size(found, path.name, path.with_name(f"{path.name}.weight").stat().st_size)
        return layers


def make_variant(
    onnx_folder: Path, base: Path, folder: Path, choice: Choice, methods: Methods, threads: int
) -> dict[str, Any]:
    """Write a whole bundle into `folder`. Gives its figures.

    Raises:
        QuantizationError: an operator cannot be stored as chosen.
        ConversionError: what was written is not what it must be.
    """
    model = json.loads((onnx_folder / "model.json").read_text())
    shared, tables, tied = [TOKENIZER], [], None
    for name in parts_in(onnx_folder):
        part = Part(name, onnx_folder, base)
        formats = part.formats(choice, methods)
        if name == "decoder" and choice.embedding == LM_HEAD:
            check_tied(model, formats[LM_HEAD])
        table, layers = part.write(folder, formats, methods, model, threads)
        tables.append(table)
        if name == "decoder" and choice.embedding == LM_HEAD:
            tied = tied_settings(next(operator for operator in layers if operator.name == LM_HEAD))
    if tied is None:
        shared.append(EMBEDDING)
    for name in shared:
        link_or_copy(base / name, folder / name)
    write_configs(folder, model, choice.engine, tied)
    return _figures(tables, folder, 0 if tied else (base / EMBEDDING).stat().st_size)


def _figures(tables: list[pd.DataFrame], folder: Path, embedding: int) -> dict[str, Any]:
    """Write weights.csv; sums over all operators, and the bytes that the embedding takes beside lm_head."""
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "part", table.pop("part"))
    table.to_csv(folder / TABLE, index=False, float_format="%.6g")
    weights, size = int((table["outputs"] * table["inputs"]).sum()), int(table["bytes"].sum())
    figures = {"weights": weights, "weight_bytes": size, "bits_per_weight": round(8 * size / weights, 4)}
    return figures | {"embedding_bytes": embedding}
