"""LoRA adapter as PEFT saves it, and the change that it makes to each weight of its base model.

Files: adapter_config.json (PEFT's `LoraConfig`) and adapter_model.safetensors, with tensors named
base_model.model.MODULE.lora_A.weight and so on, MODULE as in the transformers release of the training. Settings and
tensors with an unknown effect are refused, because PEFT would compute another model.

Not PEFT's own `merge_and_unload`: it needs the whole model in memory and rounds the result to the weight's dtype.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.checkpoint.folder import ADAPTER_FILES, PICKLED, Checkpoint, is_lfs_pointer, read_json
from hf2mnn.checkpoint.tensors import StoredTensor, layout, stored_tensors
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import path_inside, time_limited

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = ADAPTER_FILES
HEAD = "lm_head.weight"

PREFIX, BASE = "base_model.model.", ".base_layer."
OTHER_MODEL = "give the adapter's base model"
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
FACTOR = re.compile(rf"(?P<module>.+)\.(?P<kind>{'|'.join(map(re.escape, (*LINEAR, *EMBEDDING, MAGNITUDE)))})")
USED_SETTINGS = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"),
    *("bias", "init_lora_weights", "base_model_name_or_path"),
}
TRAINING_SETTINGS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
"""Settings of the training that do not affect the merged model. Any other setting that is on is refused."""
BASE_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base model's weights unchanged."""
MAX_NUMBER = 1e9
"""Largest rank or alpha."""
PATTERN_SECONDS = 5.0
"""Time limit for the patterns of an adapter, which are untrusted regular expressions."""


@dataclass(frozen=True)
class Settings:
    """Contents of adapter_config.json. Keys of `ranks` and `alphas` are regular expressions for module names."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rank_stabilized: bool
    dora: bool
    saved_modules: list[str]
    base_model: str | None


def _pattern_values(patterns: dict[str, Any], module: str, default: Any) -> set[Any]:
    """Return the values of all patterns that match the end of a module's name, or else the default.

    PEFT takes the first match, but loses the order of the patterns when it saves.
    """
    values = {value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)}
    return values or {default}


@dataclass(frozen=True)
class Lora:
    """Low-rank change of a matrix, W + scaling * B A.

    Attributes:
        a: A [rank, inputs]; of an embedding [rank, tokens].
        b: B [outputs, rank]; of an embedding [hidden, rank].
        scaling: Factor of B A.
        embedding: True for an embedding, whose weight [tokens, hidden] changes by the transpose of B A.
        magnitude: Lengths of the rows of the changed matrix, [outputs] (DoRA).
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    embedding: bool = False
    magnitude: StoredTensor | None = None


@dataclass(frozen=True)
class Change:
    """Change of a parameter: a replacement, then a low-rank change; with neither, the parameter is copied."""

    replacement: StoredTensor | None = None
    lora: Lora | None = None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < MAX_NUMBER


def _are_patterns(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(_is_number(number) and type(number) in types for number in value.values())


@dataclass
class _Factors:
    """Low-rank tensors of a module by their names in the adapter, and the module's name there."""

    module: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Replacement:
    """Tensor that replaces a parameter, and its name in the adapter."""

    name: str
    tensor: StoredTensor

    @property
    def wrapped(self) -> bool:
        """Whether its module has low-rank factors as well."""
        return BASE in self.name

    @property
    def parameter(self) -> str:
        """Name without PEFT's wrapper."""
        return self.name.replace(BASE, ".")


class Adapter:
    """Folder of a LoRA adapter; `name` is its name in errors."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = Path(folder), name or str(folder)

    def _path(self, name: str) -> Path:
        """Raise CheckpointError where a file is missing or outside the folder."""
        try:
            path = path_inside(self.folder, name)
        except ValueError as error:
            raise CheckpointError(f"{self.name} is not read: {error}; copy the file itself there") from None
        if not path.is_file():
            pickled = sorted(other.name for other in self.folder.glob("adapter_model*") if other.suffix in PICKLED)
            if name == WEIGHTS and pickled:
                raise CheckpointError(
                    f"{self.name} has no {name}, only {pickled[0]}; pickled weights can run code and are never read, so"
                    " if you trust them, load the adapter with PEFT and save it again with save_pretrained"
                )
            raise CheckpointError(f"{self.name} has no {name}: give the folder of an adapter that PEFT has saved")
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder")
        return path

    def files(self) -> dict[str, Path]:
        """Return the adapter's files by name."""
        return {name: self._path(name) for name in ADAPTER_FILES}

    def _error(
        self, reason: str, advice: str = "merge it with PEFT (merge_and_unload) and convert the result"
    ) -> CheckpointError:
        return CheckpointError(f"the adapter {self.name} {reason}; {advice}")

    @cached_property
    def settings(self) -> Settings:
        """Validated contents of adapter_config.json.

        Raises:
            CheckpointError: Not a LoRA, or a setting is invalid or unsupported.
        """
        stored = read_json(self._path(CONFIG))
        if stored.get("peft_type") != "LORA":
            raise self._error(f"has peft_type {stored.get('peft_type')!r}, and only LORA is supported")
        for key in sorted(stored.keys() - USED_SETTINGS - TRAINING_SETTINGS):
            if stored[key]:
                raise self._error(f"has {key} {stored[key]!r}, which is not supported")
        if stored.get("init_lora_weights", True) not in BASE_UNCHANGED:
            raise self._error(
                f"has init_lora_weights {stored['init_lora_weights']!r}, which changes the base model as well",
                "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
            )
        settings = Settings(
            stored.get("r"),
            stored.get("lora_alpha"),
            stored.get("rank_pattern") or {},
            stored.get("alpha_pattern") or {},
            stored.get("use_rslora") or False,
            stored.get("use_dora") or False,
            stored.get("modules_to_save") or [],
            stored.get("base_model_name_or_path"),
        )
        saved = settings.saved_modules
        valid = {
            "r": type(settings.rank) is int and settings.rank > 0,
            "lora_alpha": _is_number(settings.alpha),
            "rank_pattern": _are_patterns(settings.ranks, (int,)),
            "alpha_pattern": _are_patterns(settings.alphas, (int, float)),
            "use_rslora": isinstance(settings.rank_stabilized, bool),
            "use_dora": isinstance(settings.dora, bool),
            "modules_to_save": isinstance(saved, list) and all(isinstance(name, str) for name in saved),
            "base_model_name_or_path": isinstance(settings.base_model, str | None),
            "bias": stored.get("bias", "none") in ("none", "all", "lora_only"),
        }
        for key, is_valid in valid.items():
            if not is_valid:
                raise self._error(f"has an invalid {key}: {stored.get(key)!r}", "download it again")
        return settings

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        """Tensors by name without the common prefix."""
        path = self._path(WEIGHTS)
        supported, tensors = stored_tensors(path), {}
        for name, tensor in layout(path).items():
            if name not in supported:
                raise self._error(
                    f"holds {name} with the unsupported dtype {tensor.dtype}", "save it as F32, F16 or BF16"
                )
            if not name.startswith(PREFIX):
                raise self._error(f"holds {name}, but names of PEFT begin with {PREFIX}", "save it with PEFT")
            tensors[name.removeprefix(PREFIX)] = supported[name]
        if not tensors:
            raise self._error("holds no tensors", "download it again")
        return tensors

    def changes(self, checkpoint: Checkpoint) -> dict[str, Change]:
        """Return the changes of the parameters of the transformers model, by name.

        Where the embedding of a tied model changes, lm_head is included: the two are no longer the same tensor.

        Raises:
            CheckpointError: The checkpoint is prequantized, or a tensor or a setting does not match its model.
        """
        if checkpoint.quantization:
            raise CheckpointError(
                f"{checkpoint.folder} is prequantized ({checkpoint.quantization.method}), and merging an adapter would"
                " round its weights again; give the floating-point base model"
            )
        settings, tensors = self.settings, self._tensors
        from hf2mnn.checkpoint.architecture import meta_model  # loads torch, which takes seconds

        model = meta_model(checkpoint)
        modules = dict(model.named_modules())
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        parameters = {old: name for name in shapes for old in reversed(checkpoint.family.tensor_names(name, False))}
        parameters |= {name: name for name in shapes}
        factors, replacements = self._by_parameter(tensors, parameters, checkpoint.folder)
        for parameter, replacement in replacements.items():
            self._check_shape(replacement.name, replacement.tensor, shapes[parameter])
            if replacement.wrapped != (f"{parameter.rpartition('.')[0]}.weight" in factors):
                raise self._error(f"replaces {parameter} by a tensor of a name under which PEFT would not load it")
        for module in settings.saved_modules:
            if not any(f".{module}." in f".{replacement.name}" for replacement in replacements.values()):
                raise self._error(f"names {module!r} in modules_to_save but holds no weights of it", "save it again")
        tied = {name for name in shapes if checkpoint.tied and checkpoint.find(name) == checkpoint.find(HEAD)}
        for parameter in sorted(tied & replacements.keys()):
            if replacements[parameter].wrapped:  # both wrapped modules share one tensor, and PEFT loads into that
                for other in tied:
                    replacements.setdefault(other, replacements[parameter])
        try:
            with time_limited(PATTERN_SECONDS):
                loras = {
                    parameter: self._lora(group, modules[parameter.removesuffix(".weight")], shapes[parameter])
                    for parameter, group in factors.items()
                }
        except (re.error, TimeoutError, RecursionError, OverflowError) as error:
            raise self._error(f"has a rank_pattern or alpha_pattern that cannot be matched ({error})") from None
        changed = replacements.keys() | loras.keys()
        return {
            parameter: Change(
                replacements[parameter].tensor if parameter in replacements else None, loras.get(parameter)
            )
            for parameter in shapes
            if parameter in changed or (parameter == HEAD and tied & changed)
        }

    def _by_parameter(
        self, tensors: dict[str, StoredTensor], parameters: dict[str, str], base: Path
    ) -> tuple[dict[str, _Factors], dict[str, _Replacement]]:
        """Return low-rank factors and replacements by parameter; `parameters` maps older names to current ones."""
        factors: dict[str, _Factors] = {}
        replacements: dict[str, _Replacement] = {}
        for name, tensor in tensors.items():
            match, replacement = FACTOR.fullmatch(name), _Replacement(name, tensor)
            parameter = parameters.get(f"{match['module']}.weight" if match else replacement.parameter)
            if parameter is None:
                raise self._error(f"holds {name}, which {base} has no parameter for", OTHER_MODEL)
            if match:
                group = factors.setdefault(parameter, _Factors(match["module"]))
                duplicate = group.module != match["module"] or match["kind"] in group.tensors
                group.tensors[match["kind"]] = tensor
            else:
                duplicate = replacements.setdefault(parameter, replacement) is not replacement
            if duplicate:
                raise self._error(f"holds {name} and another tensor for the same weight", "save it again with PEFT")
        return factors, replacements

    def _check_shape(self, name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            raise self._error(
                f"holds {name} of shape {list(tensor.shape)}, but the model requires {list(expected)}", OTHER_MODEL
            )

    def _lora(self, group: _Factors, module: torch.nn.Module, shape: tuple[int, ...]) -> Lora:
        """Raise CheckpointError where the factors do not match the module's weight."""
        from torch.nn import Embedding, Linear

        embedding = isinstance(module, Embedding)
        if not embedding and not isinstance(module, Linear):
            raise self._error(
                f"changes {group.module}, a {type(module).__name__}; only linear layers and embeddings are supported"
            )
        a, b = EMBEDDING if embedding else LINEAR
        expected = {a, b} | ({MAGNITUDE} if self.settings.dora else set())
        if group.tensors.keys() != expected:
            raise self._error(
                f"holds {', '.join(sorted(group.tensors))} of {group.module} instead of {', '.join(sorted(expected))}",
                "save it again with PEFT",
            )
        if embedding and self.settings.dora:
            raise self._error(f"changes {group.module}, an embedding, with use_dora, which is not supported")
        rank, scaling = self._scaling(group.module, group.tensors[a])
        rows, columns = shape
        inputs, outputs = (rows, columns) if embedding else (columns, rows)
        for name, factor_shape in ((a, (rank, inputs)), (b, (outputs, rank)), (MAGNITUDE, (outputs,))):
            if name in group.tensors:
                self._check_shape(f"{group.module}.{name}", group.tensors[name], factor_shape)
        return Lora(group.tensors[a], group.tensors[b], scaling, embedding, group.tensors.get(MAGNITUDE))

    def _scaling(self, module: str, a: StoredTensor) -> tuple[int, float]:
        """Return the rank and the factor of B A of a module, given its A."""
        settings = self.settings
        ranks = _pattern_values(settings.ranks, module, settings.rank)
        alphas = _pattern_values(settings.alphas, module, settings.alpha)
        if a.shape[:1] not in {(rank,) for rank in ranks}:
            raise self._error(
                f"holds an A of {module} of shape {list(a.shape)}, but its settings give the rank {min(ranks)}",
                "download it again",
            )
        if len(alphas) > 1:
            raise self._error(f"has several values in alpha_pattern for {module}, whose order PEFT did not save")
        [rank], [alpha] = a.shape[:1], alphas
        return rank, alpha / (math.sqrt(rank) if settings.rank_stabilized else rank)
