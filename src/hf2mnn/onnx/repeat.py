"""Trace a few layers, and repeat one in the graph as often as the model has it.

Layers of one kind differ in nothing but their weights, and torch.export takes a second for each: of 28 layers three are
enough. The first stays what it is, the second is the pattern, the third becomes the last.
"""

from __future__ import annotations

import copy

import onnx_ir as ir
import torch

TRACED = 3


def _described(layer: torch.nn.Module) -> tuple:
    """What of a layer shapes its graph: its modules, their settings, their weights' shapes; not its index."""
    kinds = [(name, type(module)) for name, module in layer.named_modules()]
    settings = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    ]
    return kinds, settings, [(name, weight.shape, weight.dtype) for name, weight in layer.named_parameters()]


def layers_of(part: torch.nn.Module) -> tuple[str, torch.nn.ModuleList] | None:
    """The list of a part's layers with its name, where all of them are alike and there are more than are traced."""
    lists = [(name, found) for name, found in part.named_modules() if isinstance(found, torch.nn.ModuleList)]
    name, layers = max(lists, key=lambda found: len(found[1]), default=("", ()))
    alike = len(layers) > TRACED and all(_described(layer) == _described(layers[0]) for layer in layers)
    return (name, layers) if alike else None


def shorten(part: torch.nn.Module, name: str, layers: torch.nn.ModuleList) -> None:
    """Leave a part only the layers that are traced."""
    part.set_submodule(name, torch.nn.ModuleList(layers[:TRACED]))


def _dependent(graph: ir.Graph, values: list[ir.Value]) -> list[ir.Node]:
    """The nodes that need one of these values, in order."""
    reached, found = set(values), []
    for node in graph:
        if any(value in reached for value in node.inputs):
            found.append(node)
            reached.update(node.outputs)
    return found


class _Pattern:
    """A layer's nodes, what they read of the layer before (`entries`), and what the next one reads of them (`exits`),
    in the order in which it is made. What needs no weight of the next layer, as the first half of its normalization,
    counts to this one.
    """

    def __init__(self, graph: ir.Graph, own: list[list[ir.Value]]) -> None:
        """`own` are the weights and inputs that each of the three traced layers has for itself."""
        first, second, third = (_dependent(graph, values) for values in own)
        after = set(third)
        self.nodes = [node for node in second if node not in after]
        inside = set(self.nodes)
        before = [value for node in first if node not in set(second) for value in node.outputs]
        made = [value for node in self.nodes for value in node.outputs]
        self.entries = [value for value in before if any(use.node in inside for use in value.uses())]
        self.exits = [value for value in made if any(use.node in after for use in value.uses())]
        self.behind = [[use for use in value.uses() if use.node in after] for value in self.exits]
        self.ahead = [[use for use in value.uses() if use.node in inside] for value in self.entries]

    @property
    def repeatable(self) -> bool:
        """Whether the next layer reads of this one what this one reads of the layer before."""
        sides = [
            [(value.producer().op_type, sorted((use.node.op_type, use.idx) for use in uses)) for value, uses in side]
            for side in (
                list(zip(self.entries, self.ahead, strict=True)),
                list(zip(self.exits, self.behind, strict=True)),
            )
        ]
        return bool(self.nodes) and sides[0] == sides[1]


class _Names:
    """Names of what belongs to a layer: weights by prefix, one input and one output of the graph."""

    def __init__(self, prefix: str, inputs: str, outputs: str) -> None:
        self.prefixes = (prefix, inputs, outputs)

    def of(self, name: str, old: int, new: int) -> str:
        for prefix in filter(None, self.prefixes):
            if name == f"{prefix}{old}" or name.startswith(f"{prefix}{old}."):
                return f"{prefix}{new}{name.removeprefix(f'{prefix}{old}')}"
        return f"{name}/{new}"

    def own(self, graph: ir.Graph, layer: int) -> list[ir.Value]:
        """A layer's weights and input."""
        prefix, inputs, _ = self.prefixes
        weights = [value for name, value in graph.initializers.items() if name.startswith(f"{prefix}{layer}.")]
        return weights + [value for value in graph.inputs if value.name == f"{inputs}{layer}"]


def _rename_layer(graph: ir.Graph, names: _Names, old: int, new: int) -> None:
    for value in names.own(graph, old):
        if value.name in graph.initializers:
            graph.initializers.pop(value.name)
            value.name = names.of(value.name, old, new)
            graph.initializers[value.name] = value
        else:
            value.name = names.of(value.name, old, new)
    for value in graph.outputs:
        if value.name == f"{names.prefixes[2]}{old}":
            value.name = names.of(value.name, old, new)


def _like(old: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=copy.deepcopy(old.shape), type=old.type)


def _copy_layer(graph: ir.Graph, pattern: _Pattern, names: _Names, index: int, known: dict) -> list[ir.Node]:
    """The pattern's nodes once more, as layer `index`; `known` says what they read in place of what the pattern reads,
    and is told what they make.
    """
    for value in names.own(graph, 1):
        made = known[value] = _like(value, names.of(value.name, 1, index))
        if value.name in graph.initializers:
            graph.initializers[made.name] = made
        else:
            graph.inputs.append(made)
    nodes = []
    for node in pattern.nodes:
        read = [known.get(value, value) for value in node.inputs]
        made = [_like(value, names.of(value.name, 1, index)) for value in node.outputs]
        name = names.of(node.name or made[0].name, 1, index)
        nodes.append(ir.Node(node.domain, node.op_type, read, list(node.attributes.values()), outputs=made, name=name))
        for old, new in zip(node.outputs, made, strict=True):
            known[old] = new
            if old in graph.outputs:
                graph.outputs.append(new)
    return nodes


def repeat_layers(model: ir.Model, prefix: str, count: int, inputs: str = "", outputs: str = "") -> bool:
    """Make `count` layers of the three that were traced; False, and nothing is changed, where the
    second does not read of the first what the third reads of the second.

    `prefix` begins the names of a layer's weights ("model.layers." before "0.mlp..."). Where each layer has an input
    and an output of the graph for itself, `inputs` and `outputs` begin their names.
    """
    graph, names = model.graph, _Names(prefix, inputs, outputs)
    pattern = _Pattern(graph, [names.own(graph, layer) for layer in range(TRACED)])
    if not pattern.repeatable:
        return False
    _rename_layer(graph, names, TRACED - 1, count - 1)
    place, current = pattern.nodes[-1], pattern.exits
    for index in range(TRACED - 1, count - 1):
        known = dict(zip(pattern.entries, current, strict=True))
        nodes = _copy_layer(graph, pattern, names, index, known)
        graph.insert_after(place, nodes)
        place, current = nodes[-1], [known[value] for value in pattern.exits]
    for uses, value in zip(pattern.behind, current, strict=True):
        for use in uses:
            use.node.replace_input_with(use.idx, value)
    return True
