"""Names: of the files that the stages leave, and of operators, by their modules in the transformers model."""

from __future__ import annotations

import re
from pathlib import Path

from hf2mnn.mnn.adapt import FLAT
from hf2mnn.mnn.graph import LINEAR
from hf2mnn.onnx.initializers import load_graph
from hf2mnn.onnx.tap_points import outputs_by_module

MEASURED, CANDIDATES = "measured.csv", "candidates.csv"
"""Tables of the sensitivity stage."""
LM_HEAD = "lm_head"
EMBEDDING = "embedding"
"""The embedding among the operators of that stage: what it costs where it is read from lm_head."""
SLICE = re.compile(r"__\d+$")
"""The converter cuts a three-dimensional convolution (the patch embedding) into one a frame, and numbers them."""


def module_names(graph: Path) -> dict[str, str]:
    """Module by the name of a graph's output, where an operator computes that output itself: "logits" is "lm_head"."""
    model = load_graph(graph)
    named = {output: module for module, output in outputs_by_module(model).items()}
    return named | {f"{output}{FLAT}": module for output, module in named.items()}


def module_of(operator: str, outputs: dict[str, str]) -> str:
    """The module of an operator of the graph; `outputs` comes from `module_names`."""
    value = SLICE.sub("", operator.removesuffix(LINEAR))
    return outputs.get(value, value)
