"""A LoRA adapter as PEFT saves it, and what it makes of each weight of its base model. Nothing is merged here.

The format: adapter_config.json, PEFT's `LoraConfig`, and adapter_model.safetensors, whose tensors are named
base_model.model.MODULE.lora_A.weight and so on, MODULE as transformers called it when the adapter was trained. What
stands for a change of the model that is not known here is refused, for PEFT would compute something else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.checkpoint.folder import ADAPTER_FILES, LFS_POINTER, PICKLED, Checkpoint, read_json
from hf2mnn.checkpoint.tensors import StoredTensor, layout, stored_tensors
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import at_most, inside

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = ADAPTER_FILES
HEAD = "lm_head.weight"

PREFIX, BASE = "base_model.model.", ".base_layer."
ANOTHER = "give the model that it was trained on"
LINEAR, TABLE = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
PART = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, (*LINEAR, *TABLE, MAGNITUDE)))})")
READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"),
    *("bias", "init_lora_weights", "base_model_name_or_path"),
}
"""Settings that are read."""
TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
"""Settings that say how the tensors came about, and nothing of what they are for. Any other that is on is refused."""
BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""How A and B may have begun: ways that leave the base model's weights as they are."""
LARGEST = 1e9
"""Of a rank or an alpha."""
LONGEST_SEARCH = 5.0
"""Seconds for the patterns of an adapter, which are regular expressions of a stranger's."""


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says of the tensors. Patterns are regular expressions for names of modules."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rank_stabilized: bool
    dora: bool
    saved: list[str]
    base_model: str | None


def _fitting(patterns: dict[str, Any], module: str, default: Any) -> set[Any]:
    """The values of all patterns that fit the end of a module's name, else the default. PEFT takes the first, and loses
    their order when it saves.
    """
    found = {value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)}
    return found or {default}


@dataclass(frozen=True)
class Lora:
    """A low-rank change of a matrix: scaling * B A, A [rank, inputs], B [outputs, rank]; of an embedding its transpose,
    A [rank, tokens], B [hidden, rank]. With `magnitude` [outputs] (DoRA) the changed matrix's rows get that length.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    embedding: bool = False
    magnitude: StoredTensor | None = None


@dataclass(frozen=True)
class Change:
    """What becomes of a parameter: another takes its place, or it is changed, or first the one and then the other, or
    neither: then it is written as it is.
    """

    replaced: StoredTensor | None = None
    lora: Lora | None = None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < LARGEST


def _patterns(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(_number(number) and type(number) in kinds for number in value.values())


@dataclass
class _Parts:
    """The low-rank parts of a module, as the adapter calls both."""

    module: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Whole:
    """A tensor that takes the place of another, as the adapter calls it."""

    name: str
    tensor: StoredTensor

    @property
    def wrapped(self) -> bool:
        """Whether its module has low-rank parts as well."""
        return BASE in self.name

    @property
    def plain(self) -> str:
        return self.name.replace(BASE, ".")


class Adapter:
    """A folder with an adapter. `place` is what it is called in errors."""

    def __init__(self, folder: Path, place: str | None = None) -> None:
        self.folder, self.place = Path(folder), place or str(folder)

    def _path(self, name: str) -> Path:
        """Raises CheckpointError where a file is not there, or is none of the folder's."""
        try:
            path = inside(self.folder, name)
        except ValueError as error:
            raise CheckpointError(f"{self.place} is not read: {error}; put the file itself there") from None
        if not path.is_file():
            pickled = sorted(found.name for found in self.folder.glob("adapter_model*") if found.suffix in PICKLED)
            if name == WEIGHTS and pickled:
                raise CheckpointError(
                    f"{self.place} has no {name}, only {pickled[0]}; pickled weights can run code of whoever made them"
                    " and are never read, so convert those where you trust them: load the adapter with PEFT and save"
                    " it again with save_pretrained"
                )
            raise CheckpointError(f"{self.place} has no {name}: it is no adapter that PEFT has saved; give its folder")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder"
                )
        return path

    def files(self) -> dict[str, Path]:
        """The adapter's files by name."""
        return {name: self._path(name) for name in ADAPTER_FILES}

    def _refuse(
        self, what: str, cure: str = "merge it with PEFT (merge_and_unload) and convert the result"
    ) -> CheckpointError:
        return CheckpointError(f"the adapter {self.place} {what}; {cure}")

    @cached_property
    def settings(self) -> Settings:
        """Raises CheckpointError for settings that are not those of a LoRA, or ask for what is not known here."""
        stored = read_json(self._path(CONFIG))
        if stored.get("peft_type") != "LORA":
            raise self._refuse(f"is of type {stored.get('peft_type')!r}, and only LORA is merged here")
        for key in sorted(stored.keys() - READ - TRAINING):
            if stored[key]:
                raise self._refuse(f"has {key} {stored[key]!r}, which is not merged here")
        if stored.get("init_lora_weights", True) not in BASE_KEPT:
            raise self._refuse(
                f"began as {stored['init_lora_weights']!r} (init_lora_weights), which changes the base model as well",
                "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
            )
        found = Settings(
            stored.get("r"),
            stored.get("lora_alpha"),
            stored.get("rank_pattern") or {},
            stored.get("alpha_pattern") or {},
            stored.get("use_rslora") or False,
            stored.get("use_dora") or False,
            stored.get("modules_to_save") or [],
            stored.get("base_model_name_or_path"),
        )
        good = {
            "r": type(found.rank) is int and found.rank > 0,
            "lora_alpha": _number(found.alpha),
            "rank_pattern": _patterns(found.ranks, (int,)),
            "alpha_pattern": _patterns(found.alphas, (int, float)),
            "use_rslora": isinstance(found.rank_stabilized, bool),
            "use_dora": isinstance(found.dora, bool),
            "modules_to_save": isinstance(found.saved, list) and all(isinstance(name, str) for name in found.saved),
            "base_model_name_or_path": isinstance(found.base_model, str | None),
            "bias": stored.get("bias", "none") in ("none", "all", "lora_only"),
        }
        for key, is_good in good.items():
            if not is_good:
                raise self._refuse(f"says {key} {stored.get(key)!r}, which cannot be", "download it again")
        return found

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        """By name, without what all names begin with."""
        path = self._path(WEIGHTS)
        read, found = stored_tensors(path), {}
        for name, tensor in layout(path).items():
            if name not in read:
                raise self._refuse(f"holds {name} as {tensor.dtype}, which is not read", "save it as F32, F16 or BF16")
            if not name.startswith(PREFIX):
                raise self._refuse(f"holds {name}, and PEFT's names begin with {PREFIX}", "save it with PEFT")
            found[name.removeprefix(PREFIX)] = read[name]
        if not found:
            raise self._refuse("holds no tensors", "download it again")
        return found

    def changes(self, checkpoint: Checkpoint) -> dict[str, Change]:
        """What becomes of the parameters of the transformers model that the adapter changes, by name. Where it changes
        the embedding of a tied model, lm_head is named as well, for it is the embedding no longer.

        Raises:
            CheckpointError: the checkpoint is packed, or a tensor or a setting has no place in its model.
        """
        if checkpoint.quantization:
            raise CheckpointError(
                f"the layers of {checkpoint.folder} are packed ({checkpoint.quantization.method}), and an adapter would"
                " have to be rounded into them; give the model in floating point that was packed, and the adapter"
            )
        settings, tensors = self.settings, self._tensors
        from hf2mnn.reference.model import outline  # loads torch, and most faults are found without it

        model = outline(checkpoint)
        modules = dict(model.named_modules())
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        known = {old: name for name in shapes for old in reversed(checkpoint.family.tensor_names(name, False))}
        known |= {name: name for name in shapes}
        parts, whole = self._sorted(tensors, known, checkpoint.folder)
        for parameter, found in whole.items():
            self._check_shape(found.name, found.tensor, shapes[parameter])
            if found.wrapped != (f"{parameter.rpartition('.')[0]}.weight" in parts):
                raise self._refuse(f"replaces {parameter}, and PEFT would not find it under the name it has there")
        for module in settings.saved:
            if not any(f".{module}." in f".{found.name}" for found in whole.values()):
                raise self._refuse(f"names {module!r} in modules_to_save and holds no weights of it", "save it again")
        ends = {name for name in shapes if checkpoint.tied and checkpoint.find(name) == checkpoint.find(HEAD)}
        for end in sorted(ends & whole.keys()):
            if whole[end].wrapped:  # below its wrapper the two are still one tensor, and PEFT loads into that
                for other in ends:
                    whole.setdefault(other, whole[end])
        try:
            with at_most(LONGEST_SEARCH):
                loras = {
                    parameter: self._lora(held, modules[parameter.removesuffix(".weight")], shapes[parameter])
                    for parameter, held in parts.items()
                }
        except (re.error, TimeoutError, RecursionError, OverflowError) as error:
            raise self._refuse(f"has a rank_pattern or alpha_pattern that cannot be read ({error})") from None
        changed = whole.keys() | loras.keys()
        return {
            parameter: Change(whole[parameter].tensor if parameter in whole else None, loras.get(parameter))
            for parameter in shapes
            if parameter in changed or (parameter == HEAD and ends & changed)
        }

    def _sorted(
        self, tensors: dict[str, StoredTensor], known: dict[str, str], base: Path
    ) -> tuple[dict[str, _Parts], dict[str, _Whole]]:
        """Low-rank parts, and whole tensors that take another's place, by the parameter that each is for."""
        parts: dict[str, _Parts] = {}
        whole: dict[str, _Whole] = {}
        for name, tensor in tensors.items():
            match, found = PART.fullmatch(name), _Whole(name, tensor)
            parameter = known.get(f"{match['module']}.weight" if match else found.plain)
            if parameter is None:
                raise self._refuse(f"holds {name}, for which {base} has no place", ANOTHER)
            if match:
                held = parts.setdefault(parameter, _Parts(match["module"]))
                twice = held.module != match["module"] or match["part"] in held.tensors
                held.tensors[match["part"]] = tensor
            else:
                twice = whole.setdefault(parameter, found) is not found
            if twice:
                raise self._refuse(f"holds {name} and another tensor for the same weight", "save it again with PEFT")
        return parts, whole

    def _check_shape(self, name: str, tensor: StoredTensor, wanted: tuple[int, ...]) -> None:
        if tensor.shape != wanted:
            raise self._refuse(f"holds {name} as {list(tensor.shape)}, and the model asks for {list(wanted)}", ANOTHER)

    def _lora(self, held: _Parts, module: torch.nn.Module, shape: tuple[int, ...]) -> Lora:
        """Raises CheckpointError where the parts are not those of a low-rank change of such a module's weight."""
        from torch.nn import Embedding, Linear

        embedding = isinstance(module, Embedding)
        if not embedding and not isinstance(module, Linear):
            raise self._refuse(
                f"changes {held.module}, a {type(module).__name__}: only linear layers and embeddings are"
            )
        first, second = TABLE if embedding else LINEAR
        wanted = {first, second} | ({MAGNITUDE} if self.settings.dora else set())
        if held.tensors.keys() != wanted:
            raise self._refuse(
                f"holds {', '.join(sorted(held.tensors))} of {held.module}, and not {', '.join(sorted(wanted))}",
                "save it again with PEFT",
            )
        if embedding and self.settings.dora:
            raise self._refuse(f"changes {held.module}, an embedding, with use_dora, which is not merged here")
        rank, scaling = self._scaling(held.module, held.tensors[first])
        rows, columns = shape
        inputs, outputs = (rows, columns) if embedding else (columns, rows)
        for name, parts in ((first, (rank, inputs)), (second, (outputs, rank)), (MAGNITUDE, (outputs,))):
            if name in held.tensors:
                self._check_shape(f"{held.module}.{name}", held.tensors[name], parts)
        return Lora(held.tensors[first], held.tensors[second], scaling, embedding, held.tensors.get(MAGNITUDE))

    def _scaling(self, module: str, a: StoredTensor) -> tuple[int, float]:
        """(rank, factor of B A) of a module that is called so, by its A."""
        settings = self.settings
        ranks = _fitting(settings.ranks, module, settings.rank)
        alphas = _fitting(settings.alphas, module, settings.alpha)
        if a.shape[:1] not in {(rank,) for rank in ranks}:
            raise self._refuse(
                f"holds an A of {module} as {list(a.shape)}, and says that its rank is {min(ranks)}",
                "download it again",
            )
        if len(alphas) > 1:
            raise self._refuse(f"has several values in alpha_pattern for {module}, and only PEFT knew which came first")
        [rank], [alpha] = a.shape[:1], alphas
        return rank, alpha / (math.sqrt(rank) if settings.rank_stabilized else rank)
