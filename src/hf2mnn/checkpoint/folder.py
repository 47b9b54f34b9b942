"""Checkpoint folder in the layout of Hugging Face, read without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from hf2mnn.checkpoint.prequantized import QWEIGHT, WEIGHT, PrequantizedLayers, PrequantizedLinear, Quantization
from hf2mnn.checkpoint.tensors import Layout, StoredTensor, layout
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import path_inside
from hf2mnn.core.untrusted import read_json as read_untrusted
from hf2mnn.families import Family, get_family

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
"""Folder of chat templates by name, the only one that transformers reads inside a checkpoint."""
FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.json", "chat_template.jinja", f"{TEMPLATES}/*.jinja", INDEX, "*.safetensors"),
)
"""The only files that stages read. Nothing else is downloaded or linked, so no code of a repository arrives."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files of a LoRA adapter, in a folder of its own."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # suffixes of pickled weights: loading them runs code
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
    """Return the files of a local checkpoint that stages read; none for None or a missing folder."""
    root = Path(folder) if folder else None
    return sorted({str(path) for pattern in patterns for path in root.glob(pattern)}) if root else []


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
        """Architecture of the model, checked for unsupported features."""
        family = get_family(self.config.get("model_type"), self.folder / "config.json")
        family.check(self.config, self.text_config)
        return family

    @cached_property
    def tied(self) -> bool:
        """Whether lm_head shares the weight of the embedding."""
        return bool(self.config.get("tie_word_embeddings") or self.text_config.get("tie_word_embeddings"))

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Safetensors file of each tensor."""
        return {name: tensor.path for name, tensor in self.headers.items()}

    @cached_property
    def headers(self) -> dict[str, Layout]:
        """Header entries of all tensors, by name."""
        if (self.folder / INDEX).exists():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{self.folder}/{INDEX} has no weight_map; download it again")
            names = sorted(set(weight_map.values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{self.folder} has no *.safetensors: {self._convert_pickled()}")
        tensors: dict[str, Layout] = {}
        for name in names:
            path = self._shard(name)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but {INDEX} names it; download it again")
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

    def _convert_pickled(self) -> str:
        """Return the advice for a checkpoint without safetensors."""
        names = (path.name for path in self.folder.iterdir() if path.suffix in PICKLED)
        pickled = min(names, default="pytorch_model.bin")
        return (
            f"download them; pickled weights ({pickled}) can run code and are never read, so convert those that you"
            " trust with transformers'"
            " AutoModelForImageTextToText.from_pretrained(FOLDER, weights_only=True).save_pretrained(NEW)"
        )

    def _shard(self, name: str) -> Path:
        """Return the path of a file that the index names; CheckpointError unless it is one of this folder."""
        index = self.folder / INDEX
        if name.endswith(PICKLED):
            raise CheckpointError(f"{index} names {name}, not a safetensors file: {self._convert_pickled()}")
        try:
            path = path_inside(self.folder, name)
        except ValueError as error:
            raise CheckpointError(f"{index} names a file that is not read: {error}; download it again") from None
        if path.parent != self.folder or path.suffix != ".safetensors":
            raise CheckpointError(f"{index} names {name!r}, not a safetensors file of its folder; download it again")
        return path

    @cached_property
    def quantization(self) -> Quantization | None:
        """Format of the prequantized layers; None for a floating-point checkpoint."""
        key = "quantization_config"
        return Quantization.parse(self.config.get(key) or self.text_config.get(key), self.folder / "config.json")

    @cached_property
    def prequantized_layers(self) -> PrequantizedLayers:
        """Reader of the prequantized layers."""
        return PrequantizedLayers(self.folder, self.quantization, self.headers)

    def find(self, parameter: str) -> str:
        """Return the checkpoint's own name of a parameter of the transformers model: names differ between releases.

        For a prequantized layer, return the name of its qweight.
        """
        for name in self.family.tensor_names(parameter, self.tied):
            for stored in (name, name.removesuffix(WEIGHT) + QWEIGHT):
                if stored in self.shards:
                    return stored
        raise CheckpointError(
            f"{self.folder} has no weight for {parameter}; its safetensors and config.json are not of the same model"
        )

    def prequantized(self, parameter: str) -> PrequantizedLinear | None:
        """Read a prequantized weight as stored; return None for a floating-point one."""
        name = self.find(parameter)
        return self.prequantized_layers.read(name.removesuffix(QWEIGHT)) if name.endswith(QWEIGHT) else None

    def stored(self, parameter: str) -> StoredTensor | None:
        """Return where a floating-point weight is stored; None for a prequantized one or an unsupported dtype."""
        return self.headers[self.find(parameter)].stored()

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of a weight from the file's header."""
        name = self.find(parameter)
        if name.endswith(QWEIGHT):
            return self.prequantized_layers.shape(name.removesuffix(QWEIGHT))
        return self.headers[name].shape

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of all stored tensors from the files' headers; bit-packed tensors as stored."""
        return [tensor.shape for tensor in self.headers.values()]

    def check_shape(self, parameter: str, expected: Sequence[int]) -> None:
        """Raise CheckpointError where the checkpoint and the model have different shapes for a parameter."""
        if (shape := self.shape(parameter)) != tuple(expected):
            raise CheckpointError(
                f"{self.folder} has {self.find(parameter)} of shape {list(shape)}, but its config.json requires"
                f" {list(expected)}; config and weights are not of the same model"
            )

    def tensor(self, parameter: str) -> torch.Tensor:
        """Read one weight: a prequantized one dequantized exactly to float32, any other in its stored dtype."""
        if linear := self.prequantized(parameter):
            import torch

            return torch.from_numpy(linear.dequantize())
        name = self.find(parameter)
        with safe_open(self.shards[name], "pt") as tensors:
            return tensors.get_tensor(name)

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
