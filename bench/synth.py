"""Synthetic checkpoints: random weights in the shape of a real model, for tests of scale without a download.

Their answers are meaningless. Sizes, names and layout are those of the model's checkpoint, and the weights are as hard
to quantize as trained ones: heavier tails than a normal distribution, and some much larger input channels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
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
from hf2mnn.checkpoint.size import check_disk
from hf2mnn.checkpoint.tensors import file_header
from hf2mnn.checkpoint.weight_files import INDEX
from hf2mnn.core.errors import CheckpointError, Hf2mnnError
from hf2mnn.core.files import sha256
from hf2mnn.core.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.core.progress import BYTES, progress
from hf2mnn.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

CHUNK = 1 << 20
"""Values that a thread draws at a time: 2 MB of weights, and 8 MB of indices."""
THREADS = min(8, os.cpu_count() or 1)
OUTLIER_INTERVAL, OUTLIER_FACTOR = 256, 8
"""One input channel of 256 is 8 times larger."""
NORM_STD, BIAS_STD = 0.1, 0.02
"""Standard deviations of the weights of norms (mean 1) and of biases (mean 0)."""


@dataclass(frozen=True)
class Shape:
    """Settings that determine a model's tensors, with the keys of transformers; missing ones have the family's default.

    `tied`: lm_head shares the weight of the embedding.
    """

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool

    def config(self) -> PreTrainedConfig:
        """Return transformers' configuration, with the special token ids of the family."""
        from transformers import AutoConfig

        family, tied = FAMILIES[self.model_type], {"tie_word_embeddings": self.tied}
        text = {**self.text, **tied}
        parts = {"text_config": text, "vision_config": self.vision, **tied} if family.has_vision else text
        config = AutoConfig.for_model(self.model_type, **parts)
        config.architectures = [family.architecture]
        config.dtype = "bfloat16"
        return config


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
QWEN = {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def _text(*sizes: int, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the settings of a decoder from the values of `SIZES`, in this order."""
    rope = {"rope_type": "default", "rope_theta": 1e6, **rope}
    return dict(zip(SIZES, sizes, strict=True), max_position_embeddings=32768, rope_parameters=rope, **more)


def _qwen2_vl(*sizes: int, vocabulary: int, tied: bool) -> Shape:
    """Return the shape of the 2B or 7B, whose vision towers have the family's defaults but for the output width."""
    own = {**QWEN, "vocab_size": vocabulary, "max_window_layers": 28, "rms_norm_eps": 1e-6}
    text = _text(28, *sizes, rope={"mrope_section": [16, 24, 24]}, **own)
    return Shape("qwen2_vl", text, {"hidden_size": text["hidden_size"]}, tied)


def _vision(depth: int, hidden: int, mlp: int, **more: Any) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": hidden, "intermediate_size": mlp, "num_heads": 16, "out_hidden_size": 2048}
    return {**sizes, **more}


SHAPES = {
    "qwen2-vl-2b": _qwen2_vl(1536, 8960, 12, 2, vocabulary=151936, tied=True),
    "qwen2-vl-7b": _qwen2_vl(3584, 18944, 28, 4, vocabulary=152064, tied=False),
    "qwen2.5-vl-3b": Shape(
        "qwen2_5_vl",
        _text(36, 2048, 11008, 16, 2, rope={"mrope_section": [16, 24, 24]}, head_dim=128, rms_norm_eps=1e-6, **QWEN),
        _vision(32, 1280, 3420, fullatt_block_indexes=[7, 15, 23, 31]),
        tied=True,
    ),
    "qwen3-vl-2b": Shape(
        "qwen3_vl",
        _text(28, 2048, 6144, 16, 8, rope={"rope_theta": 5e6, "mrope_section": [24, 20, 20]}, head_dim=128, **QWEN),
        _vision(24, 1024, 4096, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]),
        tied=True,
    ),
    "qwen3-0.6b": Shape("qwen3", _text(28, 1024, 3072, 16, 8, rope={}, head_dim=128, **QWEN), {}, tied=True),
    "llama-3.2-1b": Shape(
        "llama",
        _text(16, 2048, 8192, 32, 8, rope=LLAMA3, vocab_size=128256, bos_token_id=128000, eos_token_id=128009),
        {},
        tied=True,
    ),
}


@dataclass(frozen=True)
class Tensor:
    """A bfloat16 tensor; `start` in bytes counts from the end of the file's header."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def rows(self) -> int:
        """Output channels of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Input channels of a matrix (of a convolution, times its kernel size); length of a vector."""
        return prod(self.shape) // self.rows

    @property
    def size(self) -> int:
        """Size in bytes."""
        return 2 * prod(self.shape)


@cache
def student_t_quantiles() -> np.ndarray:
    """Return quantiles of Student's t with 6 degrees of freedom and unit variance, float64 [65536].

    Indexed by 16 random bits they have that distribution except for the outer 1/131072 on either side (excess kurtosis
    2.7 instead of 3, largest value 10.3), in a third of the time of a normal variable.
    """
    from scipy.special import stdtrit  # slow to load, and only needed here

    return stdtrit(6, (np.arange(1 << 16) + 0.5) / (1 << 16)) / np.sqrt(1.5)


def _generator(key: str) -> np.random.SFC64:
    """Return a generator whose bits depend on the key only, not on earlier draws."""
    return np.random.SFC64(int.from_bytes(hashlib.sha256(key.encode()).digest()))


def outlier_channels(tensor: Tensor, seed: int) -> np.ndarray:
    """Return the larger input channels of a matrix, at least one; none of a vector."""
    if len(tensor.shape) == 1:
        return np.empty(0, np.int64)
    order = np.random.Generator(_generator(f"{seed}/{tensor.name}/outliers")).permutation(tensor.columns)
    return order[: max(1, tensor.columns // OUTLIER_INTERVAL)]


def quantiles(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor by 16 random bits, outliers aside, bfloat16 [65536].

    A matrix has variance 1 / inputs, which keeps the size of activations, and is about that of trained weights.
    """
    if len(tensor.shape) > 1:
        mean, std = 0.0, tensor.columns**-0.5
    else:
        mean, std = (0.0, BIAS_STD) if tensor.name.endswith("bias") else (1.0, NORM_STD)
    return (mean + std * student_t_quantiles()).astype(ml_dtypes.bfloat16)


def draw(tensor: Tensor, first: int, count: int, seed: int) -> np.ndarray:
    """Return `count` rows of a tensor from row `first` on, bfloat16 [count, columns]."""
    noise = (
        _generator(f"{seed}/{tensor.name}/{first}")
        .random_raw(-(-count * tensor.columns // 4))
        .astype("<u8", copy=False)
    )
    drawn = quantiles(tensor).view(np.uint16)[noise.view("<u2")[: count * tensor.columns]]
    values = drawn.view(ml_dtypes.bfloat16).reshape(count, tensor.columns)
    values[:, outlier_channels(tensor, seed)] *= ml_dtypes.bfloat16(OUTLIER_FACTOR)
    return values


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by the names that transformers saves; no weights are allocated."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[config.model_type].architecture)(config)
    stored = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    # save_pretrained writes the oldest names, those of the hub's checkpoints; all at once, it would sort them.
    names = {name: next(iter(revert_weight_conversion(model, {name: value}))) for name, value in stored.items()}
    return {names[name]: tuple(value.shape) for name, value in stored.items()}


def split(shapes: dict[str, tuple[int, ...]], shards: int) -> list[list[Tensor]]:
    """Split tensors, in order, into at most `shards` files of about the same size; no file is empty."""
    total, before = sum(map(prod, shapes.values())), 0
    files: list[list[Tensor]] = [[] for _ in range(shards)]
    for name, shape in shapes.items():
        file = files[(2 * before + prod(shape)) * shards // (2 * total)]
        file.append(Tensor(name, shape, file[-1].start + file[-1].size if file else 0))
        before += prod(shape)
    return [file for file in files if file]


def write_shard(path: Path, tensors: list[Tensor], seed: int) -> Iterator[int]:
    """Write a safetensors file in chunks and threads; yield the bytes of each chunk.

    Only the current chunks are in memory: the writers of the safetensors library need whole tensors.
    """
    header = file_header((tensor.name, "BF16", tensor.shape, tensor.size) for tensor in tensors)
    chunks = []
    for tensor in tensors:
        step = max(1, CHUNK // tensor.columns)
        chunks += [(tensor, first, min(step, tensor.rows - first)) for first in range(0, tensor.rows, step)]
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(header)

        def write(chunk: tuple[Tensor, int, int]) -> int:
            tensor, first, count = chunk
            offset = len(header) + tensor.start + 2 * first * tensor.columns
            return os.pwrite(file.fileno(), draw(tensor, first, count, seed).view(np.uint8), offset)

        yield from pool.map(write, chunks)


def copy_tokenizer(tokenizer: Path, folder: Path, config: PreTrainedConfig) -> None:
    """Copy a tokenizer and its settings into `folder`, and set its special token ids in `config`."""
    vision = FAMILIES[config.model_type].has_vision
    for name in ("config.json", "tokenizer.json", *(["preprocessor_config.json"] if vision else [])):
        if not (tokenizer / name).is_file():
            raise CheckpointError(f"{tokenizer} has no {name}: give the folder of a model with the tokenizer to copy")
    for name in FILES:
        if name != "config.json" and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    model, text = Checkpoint(tokenizer), config.get_text_config()
    ids_by_config = ((config, VISION_IDS if vision else (), model.config), (text, TEXT_IDS, model.text_config))
    for part, names, stored in ids_by_config:
        for name in names:
            ids = stored.get(name)
            largest = max(ids) if isinstance(ids, list) else ids
            if largest is not None and largest >= text.vocab_size:
                raise CheckpointError(
                    f"{tokenizer} has {name} {largest}, outside this shape's vocabulary of {text.vocab_size}; give a"
                    " smaller tokenizer"
                )
            setattr(part, name, ids)


def make_checkpoint_like(
    shape: str | Shape, destination: Path, seed: int = 0, shards: int = 2, tokenizer: Path | None = None
) -> Path:
    """Write a checkpoint folder with random bfloat16 weights; equal arguments give equal bytes.

    `shape` may be a name in `SHAPES`, and `shards` is the largest number of safetensors files. `tokenizer` is a folder
    of a model of the same family, to copy tokenizer, chat template, image processor settings and token ids from;
    without it, config.json has the real model's ids, and these files have to be added before the fetch stage.
    """
    model = SHAPES.get(shape) if isinstance(shape, str) else shape
    if model is None:
        raise CheckpointError(f"unknown shape {shape!r}; choose one of: {', '.join(SHAPES)}")
    if shards < 1:
        raise CheckpointError(f"cannot split weights into {shards} shards; give 1 or more")
    config = model.config()
    files = split(tensor_shapes(config), shards)
    total = sum(tensor.size for file in files for tensor in file)
    settings = {"shape": shape if isinstance(shape, str) else asdict(shape), "seed": seed, "shards": shards}
    manifest = Manifest("synth", settings=settings, tools=tool_versions("numpy", "scipy", "transformers"))
    with stage_folder(Path(destination), manifest) as folder:
        check_disk(destination, total, "the checkpoint")
        if tokenizer:
            copy_tokenizer(Path(tokenizer), folder, config)
            manifest.inputs = {"tokenizer": sha256(folder / "tokenizer.json")}
        config.save_pretrained(folder)
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        weight_map = {tensor.name: name for name, file in zip(names, files, strict=True) for tensor in file}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        with progress("weights", total, BYTES) as bar:
            for name, file in zip(names, files, strict=True):
                for size in write_shard(folder / name, file, seed):
                    bar.update(size)
    return Path(destination)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python bench/synth.py --like qwen2-vl-2b --tokenizer models/shapes-vl --out /data/synthetic-2b""",
    )
    parser.add_argument("--like", required=True, metavar="SHAPE", help=f"shape of a real model: {', '.join(SHAPES)}")
    parser.add_argument(
        "--out", type=Path, required=True, help="output folder; replaced as a whole when the checkpoint is complete"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder to take tokenizer, template and processor settings from")
    parser.add_argument("--shards", type=int, default=2, help="number of safetensors files; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights; default: 0")
    args = parser.parse_args(arguments)
    try:
        make_checkpoint_like(args.like, args.out, args.seed, args.shards, args.tokenizer)
    except (Hf2mnnError, OSError) as error:
        sys.exit(f"bench/synth.py: {error}")


if __name__ == "__main__":
    main()
