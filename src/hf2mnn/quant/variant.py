"""Bundles: graphs of the convert stage with the checkpoint's weights in the chosen formats."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import save_file

from hf2mnn.config.load import parse_option
from hf2mnn.config.variants import Engine, Weights
from hf2mnn.core.errors import ConversionError, QuantizationError
from hf2mnn.core.files import link_or_copy
from hf2mnn.families import get_family
from hf2mnn.mnn.bundle import EMBEDDING, GRAPHS, PARTS, TOKENIZER, EngineSettings, parts_in, write_configs
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.mnn.graph import check_size
from hf2mnn.onnx.initializers import stored_initializers
from hf2mnn.quant.embedding import check_tied, tied_settings
from hf2mnn.quant.folding import FOLDED, FoldedWeights, folded_tap_points
from hf2mnn.quant.formats import LM_HEAD, WeightFormat
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.weights import ModelWeights, Operator, module_names, operators
from hf2mnn.quant.write import write_weights

TABLE = "weights.csv"
"""Table of a bundle with a row for each operator."""


@dataclass(frozen=True)
class Choice:
    """Settings of a bundle."""

    decoder: WeightFormat
    vision: WeightFormat
    engine: EngineSettings
    plan: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # overrides, by part and operator
    embedding: str = "file"  # or "lm_head" if the engine reads the embedding from the decoder's last layer

    @classmethod
    def from_options(
        cls, decoder: str, vision: str, engine: str, plan: dict[str, dict[str, dict[str, Any]]], embedding: str
    ) -> Choice:
        """Parse the options --decoder, --vision and --engine of the command line, which are JSON."""
        forms = [
            WeightFormat(**parse_option(Weights, text, option))
            for text, option in ((decoder, "--decoder"), (vision, "--vision"))
        ]
        return cls(*forms, EngineSettings(**parse_option(Engine, engine, "--engine")), plan, embedding)

    def settings(self) -> dict[str, Any]:
        """Return the settings that a manifest records; the plan is an input of its own."""
        return {name: value for name, value in asdict(self).items() if name != "plan"}


def check_format(operator: Operator, form: WeightFormat) -> WeightFormat:
    """Return the format in which MNN stores an operator: a convolution has no blocks, but one scale per channel."""
    if form.bits >= 16:
        return form
    if form.method == "hqq" and form.symmetric:
        raise QuantizationError(
            f"{operator.name}: hqq searches a zero point, and a symmetric format has none; use method: mse"
        )
    if operator.kernel > 1 or form.block == operator.inputs:
        return replace(form, block=0)
    if form.block and operator.inputs % form.block:
        fitting = [str(block) for block in (128, 64, 32, 16) if operator.inputs % block == 0]
        raise QuantizationError(
            f"{operator.name}: block {form.block} does not divide its {operator.inputs} inputs; use"
            f" {', '.join(fitting) + ' or ' if fitting else ''}0 (one scale per channel)"
        )
    return form


def choose_formats(
    layers: list[Operator], base: WeightFormat, overrides: dict[str, dict[str, Any]], part: str
) -> dict[str, WeightFormat]:
    """Return the format of every operator of a part: `base`, with a plan's `overrides` by operator."""
    known = {operator.name: operator for operator in layers}
    if unknown := sorted(set(overrides) - set(known)):
        raise QuantizationError(
            f"{unknown[0]}: the plan names this operator, but the {part} does not have it; it has"
            f" {', '.join(list(known)[:3])}, ..."
        )
    return {name: check_format(known[name], replace(base, **overrides.get(name, {}))) for name in known}


class Part:
    """A graph of a model, "decoder" or "vision", with its operators and float weights."""

    def __init__(self, name: str, onnx_folder: Path, graphs: Path) -> None:
        """Read a graph from the folders of the export and convert stages."""
        self.name = name
        self.file, source = PARTS[name]
        graph_file, weight_file = GRAPHS[name]
        self.modules = module_names(onnx_folder / source)  # by output of the ONNX graph
        self.graph = read_graph(graphs / graph_file)
        self.operators = operators(self.graph, self.modules)
        self.weights = ModelWeights(self.graph, graphs / weight_file, stored_initializers(onnx_folder / source))

    def formats(self, choice: Choice, methods: Methods) -> dict[str, WeightFormat]:
        """Return the format of each operator by name. Raise QuantizationError if one cannot be stored in its format."""
        formats = choose_formats(self.operators, getattr(choice, self.name), choice.plan.get(self.name, {}), self.name)
        return {layer.name: methods.resolve(layer, formats[layer.name]) for layer in self.operators}

    def write(
        self, folder: Path, formats: dict[str, WeightFormat], methods: Methods, model: dict[str, Any], threads: int
    ) -> tuple[list[dict[str, Any]], list[Operator]]:
        """Write the .mnn file and its weight file; return a row for each operator, and the operators of the file."""
        folds = get_family(model["model_type"], folder).folds(model)
        scales = methods.awq.search(folds, self.operators, self.weights, formats)
        if factors := scales.tap_points(folds):
            save_file(folded_tap_points(folder) | factors, folder / FOLDED)
        weights = FoldedWeights(self.weights, scales)
        path = folder / f"{self.file}.weight"
        written, rows = write_weights(self.graph, self.operators, weights, path, formats, methods, threads, self.name)
        write_graph(written, folder / self.file)
        built = read_graph(folder / self.file)
        layers = operators(built, self.modules)
        if layers != operators(written, self.modules) or len(built.fused) != len(written.fused):
            raise ConversionError(
                f"MNN's converter built {self.file} with other weights than its input has; this is a bug, report it"
            )
        check_size(built, path.name, path.stat().st_size)
        return rows, layers


def make_variant(
    onnx_folder: Path, graphs: Path, folder: Path, choice: Choice, methods: Methods, threads: int
) -> dict[str, Any]:
    """Write a bundle to `folder`; its bytes do not depend on the number of threads.

    Return `weights`, `weight_bytes` and `bits_per_weight` of all operators, and `embedding_bytes` beside lm_head. Raise
    QuantizationError if an operator cannot have its format, ConversionError if the written file has other weights.
    """
    model = json.loads((onnx_folder / "model.json").read_text())
    rows, tied = [], None
    for name in parts_in(onnx_folder):
        part = Part(name, onnx_folder, graphs)
        formats = part.formats(choice, methods)
        is_embedding = name == "decoder" and choice.embedding == LM_HEAD
        if is_embedding:
            check_tied(model, formats[LM_HEAD])
        part_rows, layers = part.write(folder, formats, methods, model, threads)
        rows += part_rows
        if is_embedding:
            tied = tied_settings(next(operator for operator in layers if operator.name == LM_HEAD))
    for name in (TOKENIZER,) if tied else (TOKENIZER, EMBEDDING):
        link_or_copy(graphs / name, folder / name)
    write_configs(folder, model, choice.engine, tied)
    table = pd.DataFrame(rows)
    table.to_csv(folder / TABLE, index=False, float_format="%.6g")
    weights, size = int((table["outputs"] * table["inputs"]).sum()), int(table["bytes"].sum())
    results = {"weights": weights, "weight_bytes": size, "bits_per_weight": round(8 * size / weights, 4)}
    return results | {"embedding_bytes": 0 if tied else (graphs / EMBEDDING).stat().st_size}
