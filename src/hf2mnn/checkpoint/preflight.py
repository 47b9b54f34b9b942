"""Check a checkpoint before any expensive stage runs: its JSON files, its headers, and at last its weights' values."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.checkpoint.architecture import load_settings
from hf2mnn.checkpoint.facts import (
    SETTINGS,
    asking_transformers,
    chat_template,
    image_settings,
    load_image_processor,
    read_object,
    stop_ids,
)
from hf2mnn.checkpoint.folder import ADAPTER_FILES, Checkpoint, check_no_pointer, checkpoint_files, path_in
from hf2mnn.checkpoint.tensors import EXPONENTS, is_finite
from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.progress import BYTES, progress
from hf2mnn.families.vision import BUILT_IN, VisionFamily
from hf2mnn.machine.hardware import cores

CODE = "auto_map"
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of config.json that make transformers load compiled code if they name a hub's repository."""
MISMATCH = "they are not of the same model"
MAX_MIN_PIXELS = 1 << 24  # an untrusted limit must not make each image fill the memory


def check_files(checkpoint: Checkpoint) -> None:
    """Check that files are regular ones and not Git LFS pointers, and that no link leads out of the folder.

    A link could make any file of the machine part of a bundle. A clone without LFS has pointers in place of weights.
    """
    for path in map(Path, checkpoint_files(checkpoint.folder)):
        path_in(checkpoint.folder, path.relative_to(checkpoint.folder).as_posix(), str(checkpoint.folder))
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; replace it by the checkpoint's file")
        check_no_pointer(path)
    if checkpoint.config and (checkpoint.folder / ADAPTER_FILES[0]).exists():
        raise CheckpointError(
            f"{checkpoint.folder} has {ADAPTER_FILES[0]}, whose adapter transformers applies where PEFT is installed;"
            " remove it if it is merged already, else give its folder as the adapter"
        )


def _json_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a JSON object and all objects within it."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _json_objects(part)


def check_code(checkpoint: Checkpoint) -> None:
    """Check that no file requests remote code: it never runs, and the model may differ without it."""
    for path in (checkpoint.folder / name for name in SETTINGS):
        for settings in _json_objects(read_object(path)):
            if settings.get(CODE):
                raise CheckpointError(
                    f"{path} requests remote code ({CODE}: {settings[CODE]!r}), which is never run; if the classes of"
                    f" transformers compute the same, remove {CODE} from the file"
                )
            for key in KERNELS:
                if "/" in str(settings.get(key)):
                    raise CheckpointError(
                        f"{path} requests compiled code of a hub ({key}: {settings[key]!r}), which is never run; remove"
                        f" {key} from the file"
                    )


def check_depth(checkpoint: Checkpoint) -> None:
    """Check that config.json has no more layers than there are tensors, before transformers makes a list of them."""
    for part in _json_objects(checkpoint.config):
        for key in ("num_hidden_layers", "depth"):
            layers = part.get(key)
            if type(layers) is int and layers > len(checkpoint.headers):
                raise CheckpointError(
                    f"config.json of {checkpoint.folder} has {layers} layers, and its safetensors have"
                    f" {len(checkpoint.headers)} tensors; {MISMATCH}"
                )


def check_features(checkpoint: Checkpoint) -> None:
    """Check that the model has no feature that would be converted wrongly."""
    checkpoint.family.check(*load_settings(checkpoint))


def check_images(checkpoint: Checkpoint) -> None:
    """Check that images are split into patches as in MNN's engine, which cannot be configured."""
    family = checkpoint.family
    if not isinstance(family, VisionFamily):
        return
    info, vision = image_settings(checkpoint.folder), load_settings(checkpoint)[0]["vision_config"]
    for key, value in {**BUILT_IN, "patch_size": family.patch_size}.items():
        if info[key] != value:
            raise CheckpointError(
                f"{checkpoint.folder} has {key} {info[key]}, but MNN's engine has {value} built in for"
                f" {family.model_type} and cannot run this vision tower; take another checkpoint"
            )
        config_key = "spatial_merge_size" if key == "merge_size" else key
        if vision.get(config_key, value) != value:
            raise CheckpointError(
                f"config.json of {checkpoint.folder} has {config_key} {vision[config_key]!r}, its"
                f" image processor {key} {value}; {MISMATCH}"
            )


def check_pixels(checkpoint: Checkpoint) -> None:
    """Check that an image of one colour gets the size and the pixels from transformers that model.json describes."""
    family = checkpoint.family
    if not isinstance(family, VisionFamily):
        return
    folder, width, height, colour = checkpoint.folder, 100, 61, np.array([10, 100, 250], np.uint8)
    info = image_settings(folder)
    if info["min_pixels"] > MAX_MIN_PIXELS:
        raise CheckpointError(f"{folder} enlarges images to {info['min_pixels']} pixels; choose another checkpoint")
    with asking_transformers(folder, "image processor"):
        image = np.broadcast_to(colour, (height, width, len(colour)))
        features = load_image_processor(folder)(images=[image], return_tensors="np")
        pixels = features["pixel_values"].reshape(len(features["pixel_values"]), len(colour), -1)
    grid = [1, *(side // info["patch_size"] for side in reversed(family.image_size(width, height, info)))]
    expected = ((colour / 255 - info["image_mean"]) / info["image_std"])[:, None]
    if features["image_grid_thw"].tolist() != [grid] or not np.allclose(pixels, expected, rtol=1e-4, atol=1e-4):
        raise CheckpointError(
            f"the image processor of {folder} changes images otherwise than by size, mean and deviation, which is not"
            " supported; choose another checkpoint"
        )


def check_weights(checkpoint: Checkpoint) -> None:
    """Check that transformers finds every parameter of the architecture, and drops no weight."""
    _ = checkpoint.names


def check_values(checkpoint: Checkpoint) -> None:
    """Check that no weight has NaN or infinite values; of prequantized layers, `Checkpoint.check` reads the scales."""
    used = {name: checkpoint.headers[name] for name in sorted(set(checkpoint.names.values()))}
    tensors = {name: tensor for name, tensor in used.items() if tensor.dtype in EXPONENTS}
    size = sum(tensor.size for tensor in tensors.values())
    with progress("checking weights", size, BYTES) as bar, ThreadPoolExecutor(cores()) as pool:
        for name, finite in zip(tensors, pool.map(is_finite, tensors.values()), strict=True):
            if not finite:
                raise CheckpointError(
                    f"{tensors[name].path} has NaN or infinite values in {name}, with which every answer is wrong;"
                    " download it again, or take another checkpoint"
                )
            bar.update(tensors[name].size)


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Check that token ids are rows of the embedding, that config.json names the right special tokens, and a template.

    A vocabulary larger than the tokenizer is common: rows of the embedding are padded.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    tokens = {number: text for text, number in tokenizer.get_vocab().items()}
    largest, (config, text) = max(tokens, default=0), load_settings(checkpoint)
    if largest >= text["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} has the token {tokens[largest]!r} with id {largest}, but the model's"
            f" vocabulary has {text['vocab_size']}; {MISMATCH}"
        )
    for key, token in checkpoint.family.special_tokens.items():
        number = config[key]
        if tokens.get(number) != token:
            actual = repr(tokens[number]) if number in tokens else "no token"
            raise CheckpointError(
                f"config.json of {checkpoint.folder} has {key} {number}, which is {actual} of the tokenizer, not"
                f" {token!r}; {MISMATCH}"
            )
    for number in stop_ids(checkpoint.folder, tokenizer):
        if number not in tokens:
            raise CheckpointError(
                f"{checkpoint.folder} has eos_token_id {number}, which the tokenizer does not have; {MISMATCH}"
            )
    chat_template(checkpoint.folder, tokenizer)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Check everything, cheap checks first; CheckpointError for the first fault."""
    cheap = (check_files, check_code, Checkpoint.check, check_depth, check_features, check_images, check_pixels)
    for check in (*cheap, check_tokenizer, check_weights, check_values):
        check(checkpoint)
