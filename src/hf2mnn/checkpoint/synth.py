"""Checkpoints of a real model's shape with random weights: scale can be tested where no weights can be downloaded.

They answer nonsense, but are as large as the model, laid out and named as its checkpoint is, and as hard to quantize
as trained weights are: tails heavier than a normal distribution's, and some input channels far larger than the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from hf2mnn.checkpoint.folder import FILES, Checkpoint
from hf2mnn.checkpoint.tensors import file_header
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.core.progress import progress
from hf2mnn.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INDEX = "model.safetensors.index.json"
# What goes with a tokenizer; config and weights are made here.
COPIED = tuple(name for name in FILES if name not in ("config.json", INDEX, "*.safetensors"))
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

CHUNK = 1 << 20
"""Values that a thread draws at a time, 2 MB of weights (and 8 MB of indices while they are looked up)."""
THREADS = min(8, os.cpu_count() or 1)
OUTLIERS, LARGER = 256, 8
"""One input channel of 256 is 8 times larger."""
NORM_SPREAD, BIAS_SPREAD = 0.1, 0.02
"""Standard deviations of the weights of norms, which are around 1, and of biases, around 0."""


@dataclass(frozen=True)
class Shape:
    """Settings of a model that make its tensors, by transformers' own names; what is left out is the family's default.
    `tied`: the embedding also serves as lm_head.
    """

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool

    def config(self) -> PreTrainedConfig:
        """Transformers' configuration, with the special token ids of the family."""
        from transformers import AutoConfig

        family, tied = FAMILIES[self.model_type], {"tie_word_embeddings": self.tied}
        text = {**self.text, **tied}
        parts = {"text_config": text, "vision_config": self.vision, **tied} if family.sees else text
        config = AutoConfig.for_model(self.model_type, **parts)
        config.architectures = [family.architecture]
        config.dtype = "bfloat16"
        return config


def _text(
    layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int, rope: dict[str, Any], **more: Any
) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp, "head_dim": head_dim}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 32768}
    return {
        "vocab_size": 151936,
        **sizes,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
        **more,
    }


QWEN_IDS = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}


def _qwen2_vl(hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool) -> Shape:
    """What the 2B and the 7B have in common: 28 layers, the vision tower but for its last width."""
    rope = {"mrope_section": [16, 24, 24]}
    own = {"vocab_size": vocabulary, "max_window_layers": 28, "rms_norm_eps": 1e-6, **QWEN_IDS}
    text = _text(28, hidden, mlp, heads, kv_heads, hidden // heads, rope, **own)
    del text["head_dim"]
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "hidden_size": hidden,
    }
    return Shape("qwen2_vl", text, vision, tied)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}

SHAPES = {
    "qwen2-vl-2b": _qwen2_vl(hidden=1536, heads=12, kv_heads=2, mlp=8960, vocabulary=151936, tied=True),
    "qwen2-vl-7b": _qwen2_vl(hidden=3584, heads=28, kv_heads=4, mlp=18944, vocabulary=152064, tied=False),
    "qwen2.5-vl-3b": Shape(
        "qwen2_5_vl",
        _text(36, 2048, 11008, 16, 2, 128, {"mrope_section": [16, 24, 24]}, rms_norm_eps=1e-6, **QWEN_IDS),
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tied=True,
    ),
    "qwen3-vl-2b": Shape(
        "qwen3_vl",
        _text(28, 2048, 6144, 16, 8, 128, {"rope_theta": 5e6, "mrope_section": [24, 20, 20]}, **QWEN_IDS),
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tied=True,
    ),
    "qwen3-0.6b": Shape("qwen3", _text(28, 1024, 3072, 16, 8, 128, {}, **QWEN_IDS), {}, tied=True),
    "llama-3.2-1b": Shape(
        "llama",
        _text(16, 2048, 8192, 32, 8, 64, LLAMA3, vocab_size=128256, bos_token_id=128000, eos_token_id=128009),
        {},
        tied=True,
    ),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of bfloat16 and where it begins, in bytes after the header of its file."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def rows(self) -> int:
        """Output channels of a matrix, 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Input channels of a matrix (of a convolution: times its kernel), the length of a vector."""
        return prod(self.shape) // self.rows

    @property
    def size(self) -> int:
        """Bytes."""
        return 2 * prod(self.shape)


@cache
def student_t() -> np.ndarray:
    """float64 [65536]: Student-t with 6 degrees of freedom at the middles of 65536 equal parts of probability, divided
    by its standard deviation.

    Looked up by 16 random bits it is the distribution but for the outermost 1/131072 on either side (excess kurtosis
    2.7 instead of 3, largest value 10.3), at a third of the time of a normal variable.
    """
    values = np.sinh(np.linspace(-6, 6, 1 << 17))
    sines = values / np.sqrt(6 + values**2)
    rest = 1 - sines**2
    # The distribution function is elementary for an even number of degrees (Abramowitz and Stegun 26.7.4).
    below = 0.5 + 0.5 * sines * (1 + rest / 2 + 3 * rest**2 / 8)
    return np.interp((np.arange(1 << 16) + 0.5) / (1 << 16), below, values) / np.sqrt(1.5)


def _generator(seed: int, *names: str | int) -> np.random.SFC64:
    """Random bits that depend on what they are for, not on what was drawn before."""
    key = "/".join(map(str, (seed, *names)))
    return np.random.SFC64(int.from_bytes(hashlib.sha256(key.encode()).digest()))


def outlier_channels(tensor: Tensor, seed: int) -> np.ndarray:
    """Input channels of a matrix that are larger, at least one; none of a vector."""
    if len(tensor.shape) == 1:
        return np.empty(0, np.int64)
    count = max(1, tensor.columns // OUTLIERS)
    return np.random.Generator(_generator(seed, tensor.name, "outliers")).permutation(tensor.columns)[:count]


def levels(tensor: Tensor) -> np.ndarray:
    """bfloat16 [65536]: what 16 random bits become, outliers apart.

    A matrix has variance 1 / inputs, so that activations keep their size through any number of layers; that is a
    deviation of 0.026 for 1536 inputs, about that of trained weights.
    """
    if len(tensor.shape) > 1:
        mean, spread = 0.0, tensor.columns**-0.5
    else:
        mean, spread = (0.0, BIAS_SPREAD) if tensor.name.endswith("bias") else (1.0, NORM_SPREAD)
    return (mean + spread * student_t()).astype(ml_dtypes.bfloat16)


def draw(tensor: Tensor, first: int, count: int, seed: int) -> np.ndarray:
    """bfloat16 [count, columns]: rows of a tensor from `first` on."""
    noise = _generator(seed, tensor.name, first).random_raw(-(-count * tensor.columns // 4)).astype("<u8", copy=False)
    drawn = levels(tensor).view(np.uint16)[noise.view("<u2")[: count * tensor.columns]]
    values = drawn.view(ml_dtypes.bfloat16).reshape(count, tensor.columns)
    values[:, outlier_channels(tensor, seed)] *= ml_dtypes.bfloat16(LARGER)
    return values


def tensors_of(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names, as transformers saves them, and shapes of a model's tensors; no weight is made."""
    import torch
    import transformers

    family = FAMILIES[config.model_type]
    tied = bool(config.tie_word_embeddings)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(config)
    # save_pretrained turns the names back into those of the hub's checkpoints, the oldest.
    return {family.tensor_names(name, tied)[-1]: tuple(value.shape) for name, value in model.state_dict().items()}


def split(shapes: dict[str, tuple[int, ...]], shards: int) -> list[list[Tensor]]:
    """Tensors in their order in at most `shards` files of about one size; no file is empty."""
    total, before = sum(map(prod, shapes.values())), 0
    files: list[list[Tensor]] = [[] for _ in range(shards)]
    for name, shape in shapes.items():
        file = files[(2 * before + prod(shape)) * shards // (2 * total)]
        file.append(Tensor(name, shape, file[-1].start + file[-1].size if file else 0))
        before += prod(shape)
    return [file for file in files if file]


def write_shard(path: Path, tensors: list[Tensor], seed: int) -> Iterator[int]:
    """Write a safetensors file chunk by chunk, in threads; yields the bytes of each chunk. The chunks in work are all
    that is in memory.
    """
    head = file_header((tensor.name, "BF16", tensor.shape, tensor.size) for tensor in tensors)
    with path.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(head)
        file.flush()

        def write(chunk: tuple[Tensor, int, int]) -> int:
            tensor, first, count = chunk
            place = len(head) + tensor.start + 2 * first * tensor.columns
            return os.pwrite(file.fileno(), draw(tensor, first, count, seed).view(np.uint8), place)

        chunks = []
        for tensor in tensors:
            step = max(1, CHUNK // tensor.columns)
            chunks += [(tensor, first, min(step, tensor.rows - first)) for first in range(0, tensor.rows, step)]
        yield from pool.map(write, chunks)


def copy_tokenizer(tokenizer: Path, folder: Path, config: PreTrainedConfig) -> None:
    """Copy the files around a tokenizer, and take its special token ids into `config`.

    Raises:
        CheckpointError: a file that the `source` stage asks for is missing, or an id is outside the vocabulary.
    """
    sees = FAMILIES[config.model_type].sees
    for name in ("config.json", "tokenizer.json", *(["preprocessor_config.json"] if sees else [])):
        if not (tokenizer / name).is_file():
            raise CheckpointError(
                f"{tokenizer} has no {name}: give the folder of a model that has the wanted tokenizer"
            )
    for name in COPIED:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    model, text = Checkpoint(tokenizer), config.get_text_config()
    for part, names, stored in ((config, IDS if sees else (), model.config), (text, TEXT_IDS, model.text_config)):
        for name in names:
            ids = stored.get(name)
            largest = max(ids) if isinstance(ids, list) else ids
            if largest is not None and largest >= text.vocab_size:
                raise CheckpointError(
                    f"{tokenizer} has {name} {largest}, outside this shape's vocabulary of {text.vocab_size}; give a"
                    " tokenizer of at most that many tokens"
                )
            setattr(part, name, ids)


def make_checkpoint_like(
    shape: str | Shape, destination: Path, seed: int = 0, shards: int = 2, tokenizer: Path | None = None
) -> Path:
    """Write a checkpoint folder with random bfloat16 weights; the same arguments give the same bytes.

    `tokenizer` is a folder of a model of the same family, whose tokenizer, chat template, image processor settings and
    special token ids are taken. Left out, config.json has the real model's ids and none of these files are there: add
    the real ones before the `source` stage.

    Raises:
        CheckpointError: an unknown shape, no shards, a tokenizer that does not fit, or too little space on the disk.
        Hf2mnnError: `destination` holds other files.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise CheckpointError(f"there is no shape {shape!r}; these are: {', '.join(SHAPES)}")
    if shards < 1:
        raise CheckpointError(f"weights cannot be split into {shards} shards; give 1 or more")
    made = SHAPES[shape] if isinstance(shape, str) else shape
    destination, config = Path(destination), made.config()
    files = split(tensors_of(config), shards)
    total = sum(tensor.size for file in files for tensor in file)
    settings = {"shape": shape if isinstance(shape, str) else asdict(shape), "seed": seed, "shards": shards}
    manifest = Manifest("synth", settings=settings, tools=tool_versions("numpy", "transformers"))
    with stage_folder(destination, manifest) as folder:
        free = shutil.disk_usage(folder).free
        if free < total:
            raise CheckpointError(
                f"{destination} would take {total / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; make space"
                " or give a folder on another disk"
            )
        if tokenizer:
            copy_tokenizer(Path(tokenizer), folder, config)
            manifest.inputs = {"tokenizer": sha256(folder / "tokenizer.json")}
        config.save_pretrained(folder)
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        places = {tensor.name: name for name, file in zip(names, files, strict=True) for tensor in file}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        with progress("weights", total, "B") as shown:
            for name, file in zip(names, files, strict=True):
                for written in write_shard(folder / name, file, seed):
                    shown.update(written)
    return destination
