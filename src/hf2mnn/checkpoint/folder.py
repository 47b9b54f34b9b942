"""A checkpoint folder as Hugging Face lays it out, read without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hf2mnn.checkpoint.prequantized import (
    PACKED,
    PackedLayers,
    PackedLinear,
    Quantization,
    packed_name,
    parse_quantization,
)
from hf2mnn.checkpoint.tensors import StoredTensor, stored_tensors
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import inside
from hf2mnn.core.untrusted import read_json as read_untrusted
from hf2mnn.families import Family, family_named

if TYPE_CHECKING:
    import torch

# The only files that any stage reads; nothing else is fetched or linked, so no code of a stranger's ever arrives.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "*.safetensors",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Those of a LoRA adapter, in a folder of its own."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files of weights that are programs: to load one is to run it."""
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is missing or is not a JSON object."""
    try:
        value = read_untrusted(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: it is not a complete Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return value


def checkpoint_files(folder: str | Path | None, patterns: Sequence[str] = FILES) -> list[str]:
    """Files of a local checkpoint that a stage reads; none for a hub's, or for a folder that is not there."""
    where = Path(folder) if folder else None
    return sorted({str(path) for pattern in patterns for path in where.glob(pattern)}) if where else []


class Checkpoint:
    """One folder with config, tokenizer, image processor settings and safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        if not self.folder.is_dir():
            raise CheckpointError(
                f"there is no checkpoint folder {self.folder}: give the folder that holds config.json"
            )
        if not (self.folder / "config.json").exists() and (self.folder / ADAPTER_FILES[0]).exists():
            raise CheckpointError(
                f"{self.folder} holds an adapter, not a model: give the model that it was trained on as the source, and"
                " the adapter beside it (adapter in config.yaml, --adapter)"
            )
        return read_json(self.folder / "config.json")

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The decoder's settings: nested since transformers 5, flat in every checkpoint saved before."""
        nested = self.config.get("text_config")
        if nested is not None and not isinstance(nested, dict):
            raise CheckpointError(
                f"{self.folder}/config.json has a text_config that is no JSON object; download it again"
            )
        return nested or self.config

    @cached_property
    def family(self) -> Family:
        family = family_named(self.config.get("model_type"), self.folder / "config.json")
        family.check(self.config, self.text_config)
        return family

    @cached_property
    def image_settings(self) -> dict[str, Any]:
        """Settings of the image processor; none of a model that does not see."""
        if not self.family.sees:
            return {}
        return read_json(self.folder / "preprocessor_config.json")

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding also serves as lm_head."""
        return bool(self.config.get("tie_word_embeddings") or self.text_config.get("tie_word_embeddings"))

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the generation config's, else the text config's."""
        path = self.folder / "generation_config.json"
        eos = read_json(path).get("eos_token_id") if path.exists() else None
        eos = self.text_config.get("eos_token_id") if eos is None else eos
        if eos is None:
            raise CheckpointError(f"{self.folder} names no eos_token_id in generation_config.json or config.json")
        ids = eos if isinstance(eos, list) else [eos]
        if any(type(number) is not int for number in ids):
            raise CheckpointError(
                f"{self.folder} says eos_token_id {eos!r}, which are not ids of tokens; download it again"
            )
        return ids

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Tensor name to the safetensors file that holds it, from the files' own headers."""
        if (self.folder / "model.safetensors.index.json").exists():
            index = read_json(self.folder / "model.safetensors.index.json")
            places = index.get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise CheckpointError(
                    f"{self.folder}/model.safetensors.index.json has no weight_map; download it again"
                )
            names = sorted(set(places.values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{self.folder} has no *.safetensors: {self._unpickle()}")
        where: dict[str, Path] = {}
        for name in names:
            path = self._shard(name)
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing though model.safetensors.index.json names it; download it again"
                )
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise CheckpointError(
                        f"{path} is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder"
                    )
            try:
                with safe_open(path, "np") as tensors:
                    held = tensors.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from None
            if twice := where.keys() & held:
                name = min(twice)
                raise CheckpointError(
                    f"{where[name]} and {path.name} both hold {name}, and programs differ in which they take; leave"
                    " only the files of one model in the folder"
                )
            where.update(dict.fromkeys(held, path))
        return where

    def _unpickle(self) -> str:
        """What to do where there are no safetensors."""
        there = min(
            (path.name for path in self.folder.iterdir() if path.suffix in PICKLED), default="pytorch_model.bin"
        )
        return (
            f"download them; pickled weights ({there}) can run code of whoever made them and are never read, so convert"
            " those where you trust them, with transformers'"
            " AutoModelForImageTextToText.from_pretrained(FOLDER, weights_only=True).save_pretrained(NEW)"
        )

    def _shard(self, name: str) -> Path:
        """Raises CheckpointError for a file that the index names and that is none of the folder's safetensors."""
        index = self.folder / "model.safetensors.index.json"
        if name.endswith(PICKLED):
            raise CheckpointError(f"{index} names {name}, which is no safetensors file: {self._unpickle()}")
        try:
            path = inside(self.folder, name)
        except ValueError as error:
            raise CheckpointError(f"{index} names a file that is not read: {error}; download it again") from None
        if path.parent != self.folder or path.suffix != ".safetensors":
            raise CheckpointError(
                f"{index} names {name!r}, which is no safetensors file of its folder; download it again"
            )
        return path

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the packed layers are packed; None for a checkpoint in floating point."""
        key = "quantization_config"
        return parse_quantization(self.config.get(key) or self.text_config.get(key), self.folder / "config.json")

    @cached_property
    def packed_layers(self) -> PackedLayers:
        return PackedLayers(self.folder, self.quantization, self.shards)

    def find(self, parameter: str) -> str:
        """The checkpoint's own name for a parameter of the transformers model (names changed between releases); for a
        packed layer's weight that of its qweight.
        """
        for name in self.family.tensor_names(parameter, self.tied):
            for stored in (name, packed_name(name)):
                if stored in self.shards:
                    return stored
        raise CheckpointError(
            f"{self.folder} holds no weight for {parameter}: its safetensors do not fit its config.json"
        )

    def packed(self, parameter: str) -> PackedLinear | None:
        """A packed layer's weight as it is stored; None for one in floating point."""
        name = self.find(parameter)
        return self.packed_layers.read(name.removesuffix(PACKED)) if name.endswith(PACKED) else None

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        return {
            name: tensor for path in sorted(set(self.shards.values())) for name, tensor in stored_tensors(path).items()
        }

    def stored(self, parameter: str) -> StoredTensor | None:
        """Where a weight in floating point lies; None for a packed layer's, or of a type that is not read in rows."""
        return self._stored.get(self.find(parameter))

    def shape(self, parameter: str) -> tuple[int, ...]:
        name = self.find(parameter)
        if name.endswith(PACKED):
            return self.packed_layers.shape(name.removesuffix(PACKED))
        with safe_open(self.shards[name], "pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def check_shape(self, parameter: str, wanted: Sequence[int]) -> None:
        """Raises CheckpointError where the checkpoint holds the parameter in another shape than the model has it."""
        found = self.shape(parameter)
        if found != tuple(wanted):
            raise CheckpointError(
                f"{self.folder} holds {self.find(parameter)} as {list(found)}, its config.json asks for"
                f" {list(wanted)}: config and weights are not of one model"
            )

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all its tensors, by the files' headers; packed layers as they are packed."""
        found = []
        for path in sorted(set(self.shards.values())):
            with safe_open(path, "np") as tensors:
                names = tensors.keys()
                found += [tuple(tensors.get_slice(name).get_shape()) for name in names]
        return found

    def tensor(self, parameter: str) -> torch.Tensor:
        """The weight in its own dtype, a packed layer's in float32, exactly; only this one tensor is read."""
        packed = self.packed(parameter)
        if packed:
            import torch

            return torch.from_numpy(packed.dequantize())
        name = self.find(parameter)
        with safe_open(self.shards[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def check(self) -> None:
        """Everything that can be seen without running the model.

        Raises:
            CheckpointError: for the first thing that is missing, unknown, or not whole.
        """
        _ = self.family, self.stop_ids, self.image_settings
        if not (self.folder / "tokenizer.json").exists():
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json: download it, or write it with"
                " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        read_json(self.folder / "tokenizer.json")
        self.packed_layers.check()
