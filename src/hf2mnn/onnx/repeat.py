"""Trace three layers of a model, and copy one in the graph as often as the model has layers.

The layers differ in their weights alone, and torch.export takes a second for each. The first traced layer stays the
first, the second is the pattern to copy, and the third becomes the last.
"""

from __future__ import annotations

import copy

import onnx_ir as ir
import torch

TRACED = 3


def _structure(layer: torch.nn.Module) -> tuple:
    """Return all properties of a layer that shape its graph: modules, settings and shapes of weights."""
    modules = [(name, type(module)) for name, module in layer.named_modules()]
    settings = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    ]
    return modules, settings, [(name, weight.shape, weight.dtype) for name, weight in layer.named_parameters()]


def identical_layers(module: torch.nn.Module) -> tuple[str, torch.nn.ModuleList] | None:
    """Return the longest list of layers of a module and its name, or None if they differ or are too few to copy."""
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, torch.nn.ModuleList)]
    name, layers = max(lists, key=lambda entry: len(entry[1]), default=("", ()))
    identical = len(layers) > TRACED and all(_structure(layer) == _structure(layers[0]) for layer in layers)
    return (name, layers) if identical else None


def keep_traced_layers(module: torch.nn.Module, name: str, layers: torch.nn.ModuleList) -> None:
    """Remove all but the traced layers from a module."""
    module.set_submodule(name, torch.nn.ModuleList(layers[:TRACED]))


def _dependent_nodes(graph: ir.Graph, values: list[ir.Value]) -> list[ir.Node]:
    """Return the nodes that depend on one of these values, in order."""
    reached, nodes = set(values), []
    for node in graph:
        if any(value in reached for value in node.inputs):
            nodes.append(node)
            reached.update(node.outputs)
    return nodes


class _Pattern:
    """Nodes of the second traced layer.

    Nodes that depend on no weight of the next layer, as the first half of its normalization, belong to this layer.

    Attributes:
        nodes: Nodes to copy.
        entries: Values of the layer before that they use.
        exits: Values of theirs that the next layer uses, in the order in which they are computed.
        entry_uses: Uses of each entry in this layer.
        exit_uses: Uses of each exit in the next layer.
    """

    def __init__(self, graph: ir.Graph, own: list[list[ir.Value]]) -> None:
        """Find the pattern; `own` are the weights and graph inputs of each of the traced layers."""
        first, second, third = (_dependent_nodes(graph, values) for values in own)
        after = set(third)
        self.nodes = [node for node in second if node not in after]
        inside = set(self.nodes)
        before = [value for node in first if node not in set(second) for value in node.outputs]
        outputs = [value for node in self.nodes for value in node.outputs]
        self.entries = [value for value in before if any(use.node in inside for use in value.uses())]
        self.exits = [value for value in outputs if any(use.node in after for use in value.uses())]
        self.exit_uses = [[use for use in value.uses() if use.node in after] for value in self.exits]
        self.entry_uses = [[use for use in value.uses() if use.node in inside] for value in self.entries]

    @property
    def repeatable(self) -> bool:
        """Whether the next layer uses the exits as this layer uses the entries."""
        entries, exits = (
            [
                (value.producer().op_type, sorted((use.node.op_type, use.idx) for use in uses))
                for value, uses in zip(values, all_uses, strict=True)
            ]
            for values, all_uses in ((self.entries, self.entry_uses), (self.exits, self.exit_uses))
        )
        return bool(self.nodes) and entries == exits


class _Names:
    """Names of a layer's values: weights by a prefix, and one input and one output of the graph."""

    def __init__(self, prefix: str, inputs: str, outputs: str) -> None:
        self.prefixes = (prefix, inputs, outputs)

    def renumber(self, name: str, old: int, new: int) -> str:
        """Return the name of layer `new` for a name of layer `old`."""
        for prefix in filter(None, self.prefixes):
            if name == f"{prefix}{old}" or name.startswith(f"{prefix}{old}."):
                return f"{prefix}{new}{name.removeprefix(f'{prefix}{old}')}"
        return f"{name}/{new}"

    def own_values(self, graph: ir.Graph, layer: int) -> list[ir.Value]:
        """Return a layer's weights and graph input."""
        prefix, inputs, _ = self.prefixes
        weights = [value for name, value in graph.initializers.items() if name.startswith(f"{prefix}{layer}.")]
        return weights + [value for value in graph.inputs if value.name == f"{inputs}{layer}"]


def _renumber_layer(graph: ir.Graph, names: _Names, old: int, new: int) -> None:
    for value in names.own_values(graph, old):
        if value.name in graph.initializers:
            graph.initializers.pop(value.name)
            value.name = names.renumber(value.name, old, new)
            graph.initializers[value.name] = value
        else:
            value.name = names.renumber(value.name, old, new)
    for value in graph.outputs:
        if value.name == f"{names.prefixes[2]}{old}":
            value.name = names.renumber(value.name, old, new)


def _value_like(original: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=copy.deepcopy(original.shape), type=original.type)


def _copy_layer(
    graph: ir.Graph, pattern: _Pattern, names: _Names, index: int, values: dict[ir.Value, ir.Value]
) -> list[ir.Node]:
    """Copy the pattern as layer `index`.

    Args:
        graph: Graph to add weights, inputs and outputs to.
        pattern: Pattern.
        names: Names of the layer's values.
        index: Number of the new layer.
        values: The new layer's values by those of the pattern; has the entries, and gets the others.

    Returns:
        The new nodes.
    """
    for value in names.own_values(graph, 1):
        new = values[value] = _value_like(value, names.renumber(value.name, 1, index))
        if value.name in graph.initializers:
            graph.initializers[new.name] = new
        else:
            graph.inputs.append(new)
    nodes = []
    for node in pattern.nodes:
        inputs = [values.get(value, value) for value in node.inputs]
        outputs = [_value_like(value, names.renumber(value.name, 1, index)) for value in node.outputs]
        name = names.renumber(node.name or outputs[0].name, 1, index)
        attributes = list(node.attributes.values())
        nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name))
        for original, new in zip(node.outputs, outputs, strict=True):
            values[original] = new
            if original in graph.outputs:
                graph.outputs.append(new)
    return nodes


def repeat_layers(model: ir.Model, prefix: str, count: int, inputs: str = "", outputs: str = "") -> bool:
    """Extend the three traced layers of a graph to `count` layers.

    Args:
        model: Graph.
        prefix: Prefix of the names of layers' weights, as "model.layers." in "model.layers.0.mlp.up_proj.weight".
        count: Number of layers.
        inputs: Prefix of graph inputs that each layer has for itself.
        outputs: Prefix of graph outputs that each layer has for itself.

    Returns:
        False, with the graph unchanged, if the third layer does not use the second as the second uses the first.
    """
    graph, names = model.graph, _Names(prefix, inputs, outputs)
    pattern = _Pattern(graph, [names.own_values(graph, layer) for layer in range(TRACED)])
    if not pattern.repeatable:
        return False
    _renumber_layer(graph, names, TRACED - 1, count - 1)
    last, exits = pattern.nodes[-1], pattern.exits
    for index in range(TRACED - 1, count - 1):
        values = dict(zip(pattern.entries, exits, strict=True))
        nodes = _copy_layer(graph, pattern, names, index, values)
        graph.insert_after(last, nodes)
        last, exits = nodes[-1], [values[value] for value in pattern.exits]
    for uses, value in zip(pattern.exit_uses, exits, strict=True):
        for use in uses:
            use.node.replace_input_with(use.idx, value)
    return True
