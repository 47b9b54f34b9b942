"""Check a checkpoint's headers and JSON files before any expensive stage runs.

No weights are read, except the scales, zero points and biases of prequantized layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf2mnn.checkpoint.facts import SETTINGS, asking_transformers, chat_template, load_image_processor, read_object
from hf2mnn.checkpoint.folder import INDEX, Checkpoint, check_no_pointer, checkpoint_files, path_in, read_json
from hf2mnn.checkpoint.model_info import COUNTS, model_info
from hf2mnn.checkpoint.prequantized import QWEIGHT, WEIGHT
from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.vision import BUILT_IN, VisionFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    """Check that config.json has no more layers than there are tensors, before the architecture is built."""
    info = model_info(checkpoint)
    for key in ("num_hidden_layers", "vision_depth"):
        if info.get(key, 0) > len(checkpoint.shards):
            raise CheckpointError(
                f"config.json of {checkpoint.folder} has {info[key]} layers, and its safetensors have"
                f" {len(checkpoint.shards)} tensors; {MISMATCH}"
            )


def check_images(checkpoint: Checkpoint) -> None:
    """Check that images are split into patches as in MNN's engine, which cannot be configured."""
    family = checkpoint.family
    if not isinstance(family, VisionFamily):
        return
    info, vision = model_info(checkpoint), checkpoint.config["vision_config"]
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


def check_image_settings(checkpoint: Checkpoint) -> None:
    """Check that an image of one colour gets the size and the pixels from transformers that model.json describes."""
    family = checkpoint.family
    if not isinstance(family, VisionFamily):
        return
    info, folder, colour = model_info(checkpoint), checkpoint.folder, np.array([10, 100, 250], np.uint8)
    width, height = 100, 61
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


def check_index(checkpoint: Checkpoint) -> None:
    """Check that the index names exactly the tensors of the shards."""
    path = checkpoint.folder / INDEX
    if not path.exists():
        return
    shards, weight_map = checkpoint.shards, read_json(path)["weight_map"]  # `shards` has validated the index
    for name, file in sorted(weight_map.items()):
        if name not in shards:
            raise CheckpointError(f"{path} names {name} in {file}, which does not hold it; {MISMATCH}")
        if shards[name].name != file:
            raise CheckpointError(
                f"{path} names {name} in {file}, but {shards[name].name} holds it; download both again"
            )
    if unnamed := shards.keys() - weight_map.keys():
        name = min(unnamed)
        raise CheckpointError(f"{shards[name]} holds {name}, which {path} does not name; {MISMATCH}")


def check_defaults(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Check that values missing in config.json have the same default here and in `config`, loaded by transformers."""
    text, info = config.get_text_config(), model_info(checkpoint)
    loaded = {key: getattr(text, key, None) for key in COUNTS}
    loaded["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    for key, value in loaded.items():
        if value is not None and value != info[key]:
            raise CheckpointError(
                f"config.json of {checkpoint.folder} has no {key}: transformers uses {value}, and {info[key]} is usual;"
                " add it to the file"
            )
    if kinds := set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        raise CheckpointError(
            f"config.json of {checkpoint.folder} has no layer_types, and transformers uses {min(kinds)} for some"
            " layers, which is not supported; add layer_types to the file"
        )


def check_weights(checkpoint: Checkpoint) -> None:
    """Check that every parameter of the architecture is stored in its shape, and no unknown weight besides."""
    from hf2mnn.checkpoint.architecture import meta_model  # loads torch, which takes seconds

    model = meta_model(checkpoint)
    check_defaults(checkpoint, model.config)
    parameters = model.state_dict()
    for parameter, value in parameters.items():
        checkpoint.check_shape(parameter, value.shape)
    used = {checkpoint.find(parameter) for parameter in parameters}
    # Other tensors are harmless: biases that GPTQ writes for every layer, rotary tables, a tied lm_head.
    for name in sorted(checkpoint.shards.keys() - used):
        if name.endswith((WEIGHT, QWEIGHT)) and name != "lm_head.weight":
            raise CheckpointError(
                f"{checkpoint.folder} holds {name}, which the model of its config.json does not have; {MISMATCH}"
            )


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Check that token ids are rows of the embedding, and that config.json names the right special tokens.

    A vocabulary larger than the tokenizer is common: rows of the embedding are padded.
    """
    tokens = {number: text for text, number in load_tokenizer(checkpoint.folder).get_vocab().items()}
    largest = max(tokens, default=0)
    info = model_info(checkpoint)
    rows = info["vocab_size"]
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} has the token {tokens[largest]!r} with id {largest}, but the model's"
            f" vocabulary has {rows}; {MISMATCH}"
        )
    for key, text in checkpoint.family.special_tokens.items():
        number = checkpoint.config[key]
        if tokens.get(number) != text:
            token = repr(tokens[number]) if number in tokens else "no token"
            raise CheckpointError(
                f"config.json of {checkpoint.folder} has {key} {number}, which is {token} of the tokenizer,"
                f" not {text!r}; {MISMATCH}"
            )
    for number in info["stop_ids"]:
        if number not in tokens:
            raise CheckpointError(
                f"{checkpoint.folder} has eos_token_id {number}, which the tokenizer does not have; {MISMATCH}"
            )


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Check everything that does not need the weights; CheckpointError for the first fault."""
    cheap_checks = (check_files, check_code, Checkpoint.check, check_depth, check_images, check_index)
    # The last one builds the model, without its weights.
    for check in (*cheap_checks, check_image_settings, check_tokenizer, check_weights):
        check(checkpoint)
    chat_template(checkpoint.folder)
