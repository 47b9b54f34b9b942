"""Copy a traced layer in a graph, as torch.export takes a second for each, and layers differ in their weights alone.

Of three traced layers, the first stays the first, the second is the pattern to copy, and the third becomes the last.
"""

from __future__ import annotations

import copy

import onnx_ir as ir
import torch

TRACED = 3
PAST, PRESENT = "past_", "present_"  # prefixes of inputs and outputs of a traced decoder, one for each layer's cache


def _structure(layer: torch.nn.Module) -> tuple:
    """Return all properties of a layer that shape its graph: modules, settings and shapes of weights."""

    def settings(module: torch.nn.Module) -> dict[str, object]:
        values = {key: value for key, value in vars(module).items() if key != "layer_idx"}
        return {key: value for key, value in values.items() if isinstance(value, bool | int | float | str | None)}

    modules = [(name, type(module), settings(module)) for name, module in layer.named_modules()]
    return modules, [(name, weight.shape, weight.dtype) for name, weight in layer.named_parameters()]


def identical_layers(module: torch.nn.Module) -> tuple[str, torch.nn.ModuleList] | None:
    """Return the longest list of layers of a module and its name, or None if they differ or are too few to copy."""
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, torch.nn.ModuleList)]
    name, layers = max(lists, key=lambda entry: len(entry[1]), default=("", ()))
    identical = len(layers) > TRACED and all(_structure(layer) == _structure(layers[0]) for layer in layers)
    return (name, layers) if identical else None


def _dependent_nodes(graph: ir.Graph, values: list[ir.Value]) -> list[ir.Node]:
    """Return the nodes that depend on one of these values, in order."""
    reached, nodes = set(values), []
    for node in graph:
        if not reached.isdisjoint(node.inputs):
            nodes.append(node)
            reached.update(node.outputs)
    return nodes


def _uses(nodes: list[ir.Node], users: list[ir.Node]) -> dict[ir.Value, list[ir.Usage]]:
    """Return the uses by `users` of each output of `nodes` that has any, in the order of the outputs."""
    outputs, inside = [value for node in nodes for value in node.outputs], set(users)
    uses = {value: [use for use in value.uses() if use.node in inside] for value in outputs}
    return {value: own for value, own in uses.items() if own}


def _operators(values: dict[ir.Value, list[ir.Usage]]) -> list[tuple]:
    """Return for each value the operators that compute and use it, and the indices of the inputs."""
    users = {value: sorted((use.node.op_type, use.idx) for use in uses) for value, uses in values.items()}
    return [(value.producer().op_type, own) for value, own in users.items()]


class _Layers:
    """Traced layers; nodes that depend on no weight of the next one (half of its normalization) belong to a layer."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        first, second, third = (_dependent_nodes(graph, self.own_values(layer)) for layer in range(TRACED))
        before, after = set(second), set(third)
        # Nodes of the second layer, the pattern to copy.
        self.nodes = [node for node in second if node not in after]
        # Values of the first layer that they use, and values of theirs that the third layer uses, with the uses.
        self.entries = _uses([node for node in first if node not in before], self.nodes)
        self.exits = _uses(self.nodes, third)

    def own_values(self, layer: int) -> list[ir.Value]:
        """Return a layer's weights and graph input."""
        prefix = f"{self.prefix}{layer}."
        weights = [value for name, value in self.graph.initializers.items() if name.startswith(prefix)]
        return weights + [value for value in self.graph.inputs if value.name == f"{PAST}{layer}"]

    def renumber(self, name: str, old: int, new: int) -> str:
        """Return the name in layer `new` for a name in layer `old`."""
        for prefix in (self.prefix, PAST, PRESENT):
            if name == f"{prefix}{old}" or name.startswith(f"{prefix}{old}."):
                return f"{prefix}{new}{name.removeprefix(f'{prefix}{old}')}"
        return f"{name}/{new}"

    def move_last(self, index: int) -> None:
        """Give the third layer the number `index`."""
        old = TRACED - 1
        results = [value for value in self.graph.outputs if value.name == f"{PRESENT}{old}"]
        for value in self.own_values(old) + results:
            value.name = self.renumber(value.name, old, index)

    def copy(self, index: int, values: dict[ir.Value, ir.Value]) -> list[ir.Node]:
        """Add a copy of the second layer as layer `index`, but for its nodes, which are returned.

        `values` has the new layer's value for each entry of the second, and gets those for all its other values.
        """

        def renumbered(value: ir.Value) -> ir.Value:
            name = self.renumber(value.name, 1, index)
            values[value] = ir.val(name, shape=copy.deepcopy(value.shape), type=value.type)
            return values[value]

        for value in self.own_values(1):
            new = renumbered(value)
            if value.name in self.graph.initializers:
                self.graph.initializers.add(new)
            else:
                self.graph.inputs.append(new)
        nodes = []
        for node in self.nodes:
            inputs = [values.get(value, value) for value in node.inputs]
            outputs = [renumbered(value) for value in node.outputs]
            name = self.renumber(node.name or outputs[0].name, 1, index)
            attributes = list(node.attributes.values())
            nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name))
            self.graph.outputs.extend(values[value] for value in node.outputs if value in self.graph.outputs)
        return nodes


def repeat_layers(model: ir.Model, prefix: str, count: int) -> bool:
    """Extend the three traced layers of a graph to `count`; `prefix` of their weights is such as "model.layers.".

    Return False, with the graph unchanged, if the third layer does not use the second as the second uses the first.
    """
    layers = _Layers(model.graph, prefix)
    if not layers.nodes or _operators(layers.entries) != _operators(layers.exits):
        return False
    layers.move_last(count - 1)
    last, exits = layers.nodes[-1], list(layers.exits)
    for index in range(TRACED - 1, count - 1):
        values = dict(zip(layers.entries, exits, strict=True))
        nodes = layers.copy(index, values)
        model.graph.insert_after(last, nodes)
        last, exits = nodes[-1], [values[value] for value in layers.exits]
    for uses, value in zip(layers.exits.values(), exits, strict=True):
        for use in uses:
            use.node.replace_input_with(use.idx, value)
    return True
