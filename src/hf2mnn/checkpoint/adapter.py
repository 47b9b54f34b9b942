"""LoRA adapter as PEFT saves it, and the change that it makes to each weight of its base model.

Files: adapter_config.json (PEFT's `LoraConfig`) and adapter_model.safetensors, with tensors named
base_model.model.MODULE.lora_A.weight and so on, MODULE as in the transformers release of the training. Settings and
tensors with an unknown effect are refused, because PEFT would compute another model.

Not PEFT's own `merge_and_unload`: it needs the whole model in memory and rounds the result to the weight's dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.checkpoint.folder import ADAPTER_FILES, HEAD, Checkpoint, check_no_pointer, path_in, read_json
from hf2mnn.checkpoint.tensors import StoredTensor, layout
from hf2mnn.checkpoint.weight_files import PICKLED
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import time_limited

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX, BASE = "base_model.model.", ".base_layer."
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
FACTOR = re.compile(rf"(?P<module>.+)\.(?P<kind>{'|'.join(map(re.escape, (*LINEAR, *EMBEDDING, MAGNITUDE)))})\Z")
MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload) and convert the result"
OTHER_MODEL = "give the adapter's base model"
MAX_NUMBER = 1e9  # largest rank or alpha
PATTERN_SECONDS = 5.0  # time limit for the patterns of an adapter, which are untrusted regular expressions


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < MAX_NUMBER


def _is_rank(value: Any) -> bool:
    return type(value) is int and _is_number(value)


REQUIRED_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "base_model_name_or_path": lambda name: isinstance(name, str | None),
    "bias": lambda bias: bias in ("none", "all", "lora_only"),
}
OPTIONAL_SETTINGS: dict[str, Callable[[Any], bool]] = {
    # By regular expressions for the names of modules.
    "rank_pattern": lambda ranks: isinstance(ranks, dict) and all(map(_is_rank, ranks.values())),
    "alpha_pattern": lambda alphas: isinstance(alphas, dict) and all(map(_is_number, alphas.values())),
    "use_rslora": lambda switch: switch is True,
    "use_dora": lambda switch: switch is True,
    "modules_to_save": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
}
"""Settings that change the merged model, and their checks; an optional one may be missing or empty."""
TRAINING_SETTINGS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
"""Settings of the training that do not affect the merged model. Any other setting that is on is refused."""
BASE_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base model's weights unchanged."""


@dataclass(frozen=True)
class Lora:
    """Low-rank change of a matrix, W + scaling * B A; of an embedding [tokens, hidden] by the transpose of B A."""

    a: StoredTensor  # [rank, inputs]; of an embedding [rank, tokens]
    b: StoredTensor  # [outputs, rank]; of an embedding [hidden, rank]
    scaling: float
    embedding: bool = False
    magnitude: StoredTensor | None = None  # lengths of the rows of the changed matrix, [outputs] (DoRA)


@dataclass(frozen=True)
class Change:
    """Change of a parameter: a replacement, then a low-rank change; with neither, the parameter is copied."""

    replacement: StoredTensor | None = None
    lora: Lora | None = None


class Adapter:
    """Folder of a LoRA adapter; `name` is its name in errors."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = Path(folder), name or str(folder)

    def _path(self, name: str) -> Path:
        """Raise CheckpointError where a file is missing or outside the folder."""
        path = path_in(self.folder, name, self.name)
        if not path.is_file():
            pickled = sorted(other.name for other in self.folder.glob("adapter_model*") if other.suffix in PICKLED)
            if name == WEIGHTS and pickled:
                raise CheckpointError(
                    f"{self.name} has no {name}, only {pickled[0]}; pickled weights can run code and are never read, so"
                    " if you trust them, load the adapter with PEFT and save it again with save_pretrained"
                )
            raise CheckpointError(f"{self.name} has no {name}: give the folder of an adapter that PEFT has saved")
        check_no_pointer(path)
        return path

    def _error(self, reason: str, advice: str = MERGE_WITH_PEFT) -> CheckpointError:
        return CheckpointError(f"the adapter {self.name} {reason}; {advice}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Validated contents of adapter_config.json; CheckpointError for an unsupported setting."""
        settings = {"bias": "none", "init_lora_weights": True, **read_json(self._path(CONFIG))}
        if settings.get("peft_type") != "LORA":
            raise self._error(f"has peft_type {settings.get('peft_type')!r}, and only LORA is supported")
        checks = REQUIRED_SETTINGS | OPTIONAL_SETTINGS
        for key in sorted(settings.keys() - checks.keys() - TRAINING_SETTINGS - {"peft_type", "init_lora_weights"}):
            if settings[key]:
                raise self._error(f"has {key} {settings[key]!r}, which is not supported")
        if settings["init_lora_weights"] not in BASE_UNCHANGED:
            raise self._error(
                f"has init_lora_weights {settings['init_lora_weights']!r}, which changes the base model as well",
                "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
            )
        for key, is_valid in checks.items():
            value = settings.get(key)
            if (value or key in REQUIRED_SETTINGS) and not is_valid(value):
                raise self._error(f"has an invalid {key}: {value!r}", "download it again")
        return settings

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        """Tensors by name without the common prefix."""
        tensors = {}
        for name, tensor in layout(self._path(WEIGHTS)).items():
            stored = tensor.stored()
            if stored is None:
                raise self._error(
                    f"holds {name} with the unsupported dtype {tensor.dtype}", "save it as F32, F16 or BF16"
                )
            if not name.startswith(PREFIX):
                raise self._error(f"holds {name}, but names of PEFT begin with {PREFIX}", "save it with PEFT")
            tensors[name.removeprefix(PREFIX)] = stored
        if not tensors:
            raise self._error("holds no tensors", "download it again")
        return tensors

    def changes(self, checkpoint: Checkpoint) -> dict[str, Change]:
        """Return the changes of the parameters of the transformers model, by name.

        Where the embedding of a tied model changes, lm_head is included: the two are no longer the same tensor. Raise
        CheckpointError if the checkpoint is prequantized, or a tensor or a setting does not match its model.
        """
        if checkpoint.quantization:
            raise CheckpointError(
                f"{checkpoint.folder} is prequantized ({checkpoint.quantization.method}), and merging an adapter would"
                " round its weights again; give the floating-point base model"
            )
        settings = self.settings
        from hf2mnn.checkpoint.architecture import meta_model  # loads torch, which takes seconds
        from hf2mnn.checkpoint.loading import parameter_names

        model = meta_model(checkpoint)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        weights = {name: FACTOR.sub(r"\g<module>.weight", name).replace(BASE, ".") for name in self._tensors}
        parameters = parameter_names(model, weights.values())
        for name, weight in weights.items():
            if parameters[weight] not in shapes:
                raise self._error(f"holds {name}, which {checkpoint.folder} has no parameter for", OTHER_MODEL)
        factors, replacements = self._by_parameter({name: parameters[weight] for name, weight in weights.items()})
        for parameter, (name, tensor) in replacements.items():
            self._check_shape(name, tensor, shapes[parameter])
            if (BASE in name) != (f"{parameter.rpartition('.')[0]}.weight" in factors):
                raise self._error(f"replaces {parameter} by a tensor of a name under which PEFT would not load it")
        for module in settings.get("modules_to_save") or []:
            if not any(f".{module}." in f".{name}" for name, _ in replacements.values()):
                raise self._error(f"names {module!r} in modules_to_save but holds no weights of it", "save it again")
        tied = {name for name in shapes if checkpoint.tied and checkpoint.find(name) == checkpoint.find(HEAD)}
        for parameter in sorted(tied & replacements.keys()):
            if BASE in replacements[parameter][0]:  # both wrapped modules share one tensor, and PEFT loads into that
                replacements = dict.fromkeys(tied, replacements[parameter]) | replacements
        try:
            with time_limited(PATTERN_SECONDS):
                loras = {
                    parameter: self._lora(*group, model.get_submodule(parameter.removesuffix(".weight")))
                    for parameter, group in factors.items()
                }
        except (re.error, TimeoutError, RecursionError, OverflowError) as error:
            raise self._error(f"has a rank_pattern or alpha_pattern that cannot be matched ({error})") from None
        changed = replacements.keys() | loras.keys()
        if tied & changed:
            changed |= {HEAD}
        tensors = {parameter: tensor for parameter, (_, tensor) in replacements.items()}
        return {name: Change(tensors.get(name), loras.get(name)) for name in shapes if name in changed}

    def _by_parameter(self, parameters: dict[str, str]) -> tuple[dict[str, tuple], dict[str, tuple]]:
        """Return low-rank factors (module, tensors by kind) and replacements (name, tensor) by parameter.

        `parameters` maps the adapter's tensors to parameters; modules and names are the adapter's.
        """
        factors, replacements = {}, {}
        for name, tensor in self._tensors.items():
            parameter = parameters[name]
            if match := FACTOR.fullmatch(name):
                module, tensors = factors.setdefault(parameter, (match["module"], {}))
                duplicate = module != match["module"] or match["kind"] in tensors
                tensors[match["kind"]] = tensor
            else:
                duplicate = replacements.setdefault(parameter, (name, tensor)) != (name, tensor)
            if duplicate:
                raise self._error(f"holds {name} and another tensor for the same weight", "save it again with PEFT")
        return factors, replacements

    def _check_shape(self, name: str, tensor: StoredTensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            raise self._error(
                f"holds {name} of shape {list(tensor.shape)}, but the model requires {list(expected)}", OTHER_MODEL
            )

    def _lora(self, name: str, tensors: dict[str, StoredTensor], module: torch.nn.Module) -> Lora:
        """Return the change of a module by its factors; CheckpointError where they do not match its weight."""
        from torch.nn import Embedding, Linear

        embedding, dora = isinstance(module, Embedding), self.settings.get("use_dora")
        if not embedding and not isinstance(module, Linear):
            raise self._error(
                f"changes {name}, a {type(module).__name__}; only linear layers and embeddings are supported"
            )
        a, b = EMBEDDING if embedding else LINEAR
        expected = {a, b, MAGNITUDE} if dora else {a, b}
        if tensors.keys() != expected:
            raise self._error(
                f"holds {', '.join(sorted(tensors))} of {name} instead of {', '.join(sorted(expected))}",
                "save it again with PEFT",
            )
        if embedding and dora:
            raise self._error(f"changes {name}, an embedding, with use_dora, which is not supported")
        rank, scaling = self._scaling(name, tensors[a])
        inputs, outputs = module.weight.shape if embedding else reversed(module.weight.shape)
        for kind, factor_shape in ((a, (rank, inputs)), (b, (outputs, rank)), (MAGNITUDE, (outputs,))):
            if kind in tensors:
                self._check_shape(f"{name}.{kind}", tensors[kind], factor_shape)
        return Lora(tensors[a], tensors[b], scaling, embedding, tensors.get(MAGNITUDE))

    def _pattern_values(self, patterns: str, default: str, module: str) -> set[Any]:
        """Return the values of all patterns that match the end of a module's name, or else the default.

        PEFT takes the first match, but loses the order of the patterns when it saves.
        """
        values = self.settings.get(patterns) or {}
        matching = {value for pattern, value in values.items() if re.match(rf"(.*\.)?({pattern})$", module)}
        return matching or {self.settings[default]}

    def _scaling(self, module: str, a: StoredTensor) -> tuple[int, float]:
        """Return the rank and the factor of B A of a module, given its A."""
        ranks = self._pattern_values("rank_pattern", "r", module)
        alphas = self._pattern_values("alpha_pattern", "lora_alpha", module)
        if a.shape[:1] not in {(rank,) for rank in ranks}:
            raise self._error(
                f"holds an A of {module} of shape {list(a.shape)}, but its settings give the rank {min(ranks)}",
                "download it again",
            )
        if len(alphas) > 1:
            raise self._error(f"has several values in alpha_pattern for {module}, whose order PEFT did not save")
        [rank], [alpha] = a.shape[:1], alphas
        return rank, alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
