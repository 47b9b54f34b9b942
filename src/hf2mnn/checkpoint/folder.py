"""Checkpoint folder in the layout of Hugging Face, read without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from hf2mnn.checkpoint.prequantized import QWEIGHT, PrequantizedLayers, PrequantizedLinear, Quantization
from hf2mnn.checkpoint.tensors import Layout, StoredTensor, layout
from hf2mnn.checkpoint.weight_files import INDICES, used_files, weight_files
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import path_inside
from hf2mnn.core.untrusted import read_json as read_untrusted
from hf2mnn.families import Family, get_family

if TYPE_CHECKING:
    import torch

TEMPLATES = "additional_chat_templates"
"""Folder of chat templates by name, the only one that transformers reads inside a checkpoint."""
FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.json", "chat_template.jinja", f"{TEMPLATES}/*.jinja", f"*{INDICES}"),
    "*.safetensors",
)
"""The only files that stages read; of weights, those of `weight_files`. Nothing else is downloaded or linked, so no
code of a repository arrives."""
HEAD = "lm_head.weight"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files of a LoRA adapter, in a folder of its own."""
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; CheckpointError for a missing file and for anything else."""
    try:
        value = read_untrusted(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: it is not a complete Hugging Face checkpoint; download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return value


def path_in(folder: Path, name: str, label: str) -> Path:
    """Return the path of a file; CheckpointError, with `label` for the folder, for a link that leads out of it."""
    try:
        return path_inside(folder, name)
    except ValueError as error:
        raise CheckpointError(f"{label} is not read: {error}; copy the file itself there") from None


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the pointer that a Git clone without LFS has in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def check_no_pointer(path: Path) -> None:
    """Raise CheckpointError for a Git LFS pointer."""
    if is_lfs_pointer(path):
        content = "the weights" if path.suffix == ".safetensors" else "the file itself"
        raise CheckpointError(f"{path} is a Git LFS pointer, not {content}; run 'git lfs pull' in its folder")


def checkpoint_files(folder: str | Path | None, patterns: Sequence[str] = FILES) -> list[str]:
    """Return the files of a local checkpoint that stages read; none for None or a missing folder.

    Where the files of the weights are unknown, all are returned: the fetch stage reports what is wrong.
    """
    root = Path(folder) if folder else None
    paths = {path for pattern in patterns for path in root.glob(pattern)} if root else set()
    names = {path.relative_to(root).as_posix() for path in paths}
    if patterns is FILES:
        with suppress(CheckpointError):
            names = used_files(names, lambda name: read_json(root / name), root)
    return sorted(str(root / name) for name in names)


class Checkpoint:
    """A folder with config, tokenizer, image processor settings and safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        if not self.folder.is_dir():
            raise CheckpointError(f"no checkpoint folder {self.folder}: give the folder that holds config.json")
        if not (self.folder / "config.json").exists() and (self.folder / ADAPTER_FILES[0]).exists():
            raise CheckpointError(
                f"{self.folder} holds an adapter, not a model: give its base model as the checkpoint, and the adapter"
                " separately (adapter in config.yaml, --adapter)"
            )
        return read_json(self.folder / "config.json")

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """Settings of the decoder: nested since transformers 5, flat in every earlier checkpoint."""
        nested = self.config.get("text_config")
        if nested is not None and not isinstance(nested, dict):
            raise CheckpointError(f"text_config in {self.folder}/config.json is not a JSON object; download it again")
        return nested or self.config

    @cached_property
    def family(self) -> Family:
        """Architecture of the model."""
        return get_family(self.config.get("model_type"), self.folder / "config.json")

    @cached_property
    def headers(self) -> dict[str, Layout]:
        """Header entries of all tensors in the files of the weights, by name."""
        names = {path.name for path in self.folder.iterdir()} if self.config else set()
        index, files = weight_files(names, lambda name: read_json(self.folder / name), self.folder)
        tensors: dict[str, Layout] = {}
        for name in files:
            path = path_in(self.folder, name, str(self.folder / index if index else self.folder))
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but {index} names it; download it again")
            check_no_pointer(path)
            stored = layout(path)
            if duplicates := tensors.keys() & stored:
                name = min(duplicates)
                raise CheckpointError(
                    f"{tensors[name].path} and {path.name} both hold {name}, and programs differ in which they load;"
                    " keep only the files of one model in the folder"
                )
            tensors |= stored
        return tensors

    @cached_property
    def quantization(self) -> Quantization | None:
        """Format of the prequantized layers; None for a floating-point checkpoint."""
        key = "quantization_config"
        return Quantization.parse(self.config.get(key) or self.text_config.get(key), self.folder / "config.json")

    @cached_property
    def prequantized_layers(self) -> PrequantizedLayers:
        """Reader of the prequantized layers."""
        return PrequantizedLayers(self.folder, self.quantization, self.headers)

    @cached_property
    def names(self) -> dict[str, str]:
        """Name of the stored tensor of each parameter of the transformers model; see `map_parameters`."""
        from hf2mnn.checkpoint.loading import map_parameters  # loads torch, which takes seconds

        return map_parameters(self)

    @property
    def tied(self) -> bool:
        """Whether lm_head shares the weight of the embedding."""
        return self.find(HEAD) == self.find(self.family.embedding)

    def find(self, parameter: str) -> str:
        """Return the name of the stored tensor of a parameter, of a prequantized layer that of its qweight."""
        if parameter not in self.names:
            raise CheckpointError(
                f"{self.folder} has no weight for {parameter}; its safetensors and config.json are not of the same"
                " model"
            )
        return self.names[parameter]

    def prequantized(self, parameter: str) -> PrequantizedLinear | None:
        """Read a prequantized weight as stored; return None for a floating-point one."""
        name = self.find(parameter)
        return self.prequantized_layers.read(name.removesuffix(QWEIGHT)) if name.endswith(QWEIGHT) else None

    def stored(self, parameter: str) -> StoredTensor | None:
        """Return where a floating-point weight is stored; None for a prequantized one or an unsupported dtype."""
        return self.headers[self.find(parameter)].stored()

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of all stored tensors from the files' headers; bit-packed tensors as stored."""
        return [tensor.shape for tensor in self.headers.values()]

    def read(self, name: str) -> torch.Tensor:
        """Read a stored tensor: a qweight as its layer's weight, exactly in float32, any other in its stored dtype."""
        if name.endswith(QWEIGHT):
            import torch

            return torch.from_numpy(self.prequantized_layers.read(name.removesuffix(QWEIGHT)).dequantize())
        with safe_open(self.headers[name].path, "pt") as tensors:
            return tensors.get_tensor(name)

    def tensor(self, parameter: str) -> torch.Tensor:
        """Read the weight of a parameter, as `read`."""
        return self.read(self.find(parameter))

    def check(self) -> None:
        """Raise CheckpointError for a missing, incomplete or unsupported file; the model is not built."""
        _ = self.family
        if not (self.folder / "tokenizer.json").exists():
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json: download it, or write it with"
                " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        read_json(self.folder / "tokenizer.json")
        self.prequantized_layers.check()
