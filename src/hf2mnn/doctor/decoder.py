"""What a decoder's graph says that a bundle's other files have to fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf2mnn.doctor.patient import Bundle
from hf2mnn.mnn.graph import LINEAR, Graph

LAYER = re.compile(r"(?:^|[./])layers\.(\d+)[./]")
"""Of the names that transformers' modules have and that exporters keep."""


@dataclass(frozen=True)
class DecoderSizes:
    """hidden, vocabulary: values of an embedding and of the logits. layers: as names of its operators count them, 0
    where they do not. keys: values that a token leaves in the cache as its key, 0 where no operator has that name.
    mask: dtype of `attention_mask` in the graph, "" without that input. positions: rows of `position_ids`, 0 where the
    graph leaves them open.
    """

    hidden: int
    vocabulary: int
    layers: int
    keys: int
    mask: str
    positions: int


def _input(graph: Graph, name: str) -> dict:
    return next((op["main"] for op in graph.of_type("Input") if op["name"] == name), {})


def decoder_sizes(bundle: Bundle) -> DecoderSizes | None:
    """None without a decoder. Raises ConversionError where it is no MNN model."""
    if "decoder" not in bundle.models:
        return None
    graph = bundle.models["decoder"].graph
    weights = graph.weights()
    head = weights[-1] if weights else None
    names = [LAYER.search(weight.name) for weight in weights]
    keys = next((weight.outputs for weight in weights if "k_proj" in weight.name.removesuffix(LINEAR)), 0)
    rows = _input(graph, "position_ids").get("dims") or [0]
    embeds = _input(graph, "input_ids").get("dims") or [0]
    return DecoderSizes(
        hidden=max(embeds[-1], 0) or (head.inputs if head else 0),
        vocabulary=head.outputs if head else 0,
        layers=max((int(name[1]) + 1 for name in names if name), default=0),
        keys=keys,
        mask=_input(graph, "attention_mask").get("dtype", ""),
        positions=max(rows[0], 0) if len(rows) == 2 else 0,
    )
