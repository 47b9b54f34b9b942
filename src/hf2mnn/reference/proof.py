"""Prove that the reference is the model that `from_pretrained` of transformers loads, bit for bit.

A model that `from_pretrained` loaded is compared with the checkpoint as all other stages read it, weight by weight. Any
other, with mapped or dequantized weights, is compared with transformers' own: its loading code loads one block, or one
other layer, at a time. Each must have the same weights, and the same outputs for its inputs in a forward call of the
whole model. So all hidden states and the logits are those of transformers, with two blocks in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from hf2mnn.checkpoint.architecture import meta_model
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.loading import load_tensors
from hf2mnn.checkpoint.prequantized import QWEIGHT, WEIGHT
from hf2mnn.core.errors import CheckpointError
from hf2mnn.reference.golden import ImageInput

if TYPE_CHECKING:
    from hf2mnn.reference.pytorch import ReferenceModel


def _parts(module: torch.nn.Module, name: str = "") -> Iterator[str]:
    """Yield the names of blocks, and of layers outside of blocks: modules with weights and without lists of modules."""
    if any(isinstance(child, torch.nn.ModuleList) for child in module.modules()):
        for child_name, child in module.named_children():
            yield from _parts(child, f"{name}.{child_name}" if name else child_name)
    elif module.state_dict():
        yield name


def _weight(model: torch.nn.Module, parameter: str) -> torch.Tensor:
    """Return the float32 weight of a parameter, also of a mapped one."""
    module, _, name = parameter.rpartition(".")
    return getattr(model.get_submodule(module), name)


class Transformers:
    """The model of a checkpoint as transformers loads it, one part at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.model = checkpoint, meta_model(checkpoint).eval()
        self.parameters = list(self.model.state_dict())

    def load(self, part: str) -> torch.nn.Module:
        """Return a module with its weights in float32; those of the last one are dropped."""
        self.model.to("meta")
        parameters = [name for name in self.parameters if name.startswith(f"{part}.")]
        stored = {self.checkpoint.find(name) for name in parameters}
        tensors = {name.removesuffix(QWEIGHT) + WEIGHT * name.endswith(QWEIGHT): name for name in stored}
        report = load_tensors(self.model, {key: self.checkpoint.read(name) for key, name in tensors.items()}, "cpu")
        module = self.model.get_submodule(part)
        if any(value.is_meta for value in module.state_dict().values()):
            self.model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        return module


def _difference(reference: ReferenceModel, name: str, of: str) -> CheckpointError:
    return CheckpointError(
        f"{name} of the reference ({reference.weights} weights) has other {of} than in transformers' from_pretrained;"
        " this is a bug, report it with the name of the checkpoint"
    )


def prove(
    reference: ReferenceModel, checkpoint: Checkpoint, ids: torch.Tensor, images: list[ImageInput]
) -> dict[str, int]:
    """Compare a reference with `from_pretrained` on a prompt; return the numbers of compared weights and modules.

    `ids` are int64 [tokens]. No modules are compared where they are those of `from_pretrained`. Raise CheckpointError
    for the first difference.
    """
    model = reference.model
    if reference.weights == "resident" and not checkpoint.quantization:
        for parameter in model.state_dict():
            if not torch.equal(checkpoint.tensor(parameter).float(), _weight(model, parameter)):
                raise _difference(reference, parameter, "values")
        return {"weights": len(model.state_dict()), "modules": 0}
    transformers, compared = Transformers(checkpoint), set()

    def compare_weights(part: str) -> torch.nn.Module:
        module = transformers.load(part)
        for name, value in module.state_dict().items():
            if not torch.equal(value, _weight(model, f"{part}.{name}")):
                raise _difference(reference, f"{part}.{name}", "values")
        return module

    def compare_outputs(part: str, arguments: tuple, options: dict[str, Any], output: Any) -> None:
        pairs = zip(tree_leaves(compare_weights(part)(*arguments, **options)), tree_leaves(output), strict=True)
        if not all(torch.equal(*pair) for pair in pairs):
            raise _difference(reference, part, "outputs")
        compared.add(part)

    parts = list(_parts(transformers.model))
    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(
                model.get_submodule(part).register_forward_hook(
                    lambda _, *call, part=part: compare_outputs(part, *call), with_kwargs=True
                )
            )
        # Without a cache, which both calls of a block would extend.
        reference.forward(ids, images, use_cache=False)
    for part in parts:
        if part not in compared:
            compare_weights(part)
    return {"weights": len(transformers.parameters), "modules": len(compared)}
