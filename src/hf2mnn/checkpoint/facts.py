"""Facts that several files of a checkpoint may hold: chat template, stop ids, and settings of images.

Which file counts, and how old keys are read, differs between releases of transformers. So transformers is asked, and
reference, graphs, bundle and doctor use its answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf2mnn.checkpoint.folder import read_json
from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import CheckpointError, first_line
from hf2mnn.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from transformers.image_processing_utils import BaseImageProcessor

IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
SETTINGS = (*IMAGE_FILES, "config.json", "generation_config.json", "tokenizer_config.json", "chat_template.json")
"""Files of settings that transformers reads without bounds."""
SUPPORTED = {"image_processor_type": "Qwen2VLImageProcessor", "do_resize": True, "resample": 3}
"""Settings that an image processor must have; 3 is PIL's bicubic filter."""
PATCH_SIZES = ("patch_size", "temporal_patch_size", "merge_size")
INT32_MAX = (1 << 31) - 1
"""MNN stores sizes and ids as 32-bit integers."""
DEFAULT = "default"  # name of the chat template that is rendered without tools


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint, empty if there is no file."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def asking_transformers(folder: Path, what: str) -> Iterator[None]:
    """Check the files of settings, and raise CheckpointError where transformers fails to read `what` from them."""
    for name in SETTINGS:
        read_object(folder / name)
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # for invalid files transformers raises exceptions of any type
        raise CheckpointError(
            f"the {what} of {folder} cannot be loaded by transformers: {first_line(error)}; correct the file, or"
            " download it again"
        ) from None


def load_image_processor(folder: Path) -> BaseImageProcessor:
    """Load the image processor of a checkpoint."""
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in IMAGE_FILES):
        raise CheckpointError(f"{folder} has no {' or '.join(IMAGE_FILES)}: download it, or save the processor again")
    with asking_transformers(folder, "image processor"):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def image_settings(folder: Path) -> dict[str, Any]:
    """Return the image processor's entries of model.json; CheckpointError for a setting that cannot be followed.

    `min_pixels` and `max_pixels` limit the size of a resized image. A pixel p from 0 to 255 becomes
    (p / 255 - image_mean) / image_std, by channel: `do_rescale`, `rescale_factor` and `do_normalize` are included.
    `do_convert_rgb` has no effect, because images are read as RGB.
    """
    processor = load_image_processor(folder)
    stored = processor.to_dict()
    for key, supported in SUPPORTED.items():
        if (value := stored.get(key)) != supported:
            raise CheckpointError(
                f"the image processor of {folder} has {key} {value!r}, and only {supported!r} is supported; choose"
                " another checkpoint"
            )
    with asking_transformers(folder, "image processor"):
        scale = 255 * processor.rescale_factor if processor.do_rescale else 255
        channels = {"image_mean": 0.0, "image_std": 1.0}
        channels = {key: stored[key] for key in channels} if processor.do_normalize else channels
        settings = {
            **{key: stored[key] for key in PATCH_SIZES},
            **{key: [v / scale for v in np.broadcast_to(values, 3).tolist()] for key, values in channels.items()},
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
        }
    check_image_settings(settings, f"the configuration in {folder}")
    return settings


def is_number(value: Any, minimum: float) -> bool:
    """Return whether a value of a file is a finite number that MNN can store, and at least `minimum`."""
    return type(value) in (int, float) and math.isfinite(value) and minimum <= value <= INT32_MAX


def check_image_settings(settings: dict[str, Any], source: object) -> None:
    """Check types and ranges of entries as `image_settings` returns them; `source` names their file in errors."""

    def check(key: str, valid: bool) -> None:
        if not valid:
            raise CheckpointError(f"{source} has an invalid {key}: {settings.get(key)!r}; download it again")

    for key in PATCH_SIZES:
        check(key, type(settings.get(key)) is int and is_number(settings[key], 1))
    for key in ("min_pixels", "max_pixels"):
        check(key, is_number(settings.get(key), 1))
    for key, minimum in (("image_mean", -INT32_MAX), ("image_std", 1e-6)):
        values = settings.get(key)
        check(key, isinstance(values, list) and len(values) == 3 and all(is_number(v, minimum) for v in values))


def chat_templates(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> dict[str, str]:
    """Return the chat templates of a checkpoint by name; one of several may be for tools (`tool_use`).

    With image input they are those of the processor, or of the tokenizer where the processor has none. A folder without
    config.json holds a tokenizer alone. `tokenizer` is that of the folder, if it is loaded already.
    """
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import AUDIO_TOKENIZER_NAME

    family = FAMILIES.get(str(read_object(folder / "config.json").get("model_type")))
    templates = None
    if family and family.has_vision:
        # transformers would fetch the model that either names.
        if "audio_tokenizer" in read_object(folder / IMAGE_FILES[0]) or (folder / AUDIO_TOKENIZER_NAME).exists():
            raise CheckpointError(f"{folder} has an audio_tokenizer, which {family.model_type} has not; remove it")
        with asking_transformers(folder, "chat template"):
            # AutoProcessor needs torchvision; this is its reading of the files.
            templates = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template")
    if templates is None:
        templates = (load_tokenizer(folder) if tokenizer is None else tokenizer).chat_template
    templates = templates if isinstance(templates, dict) else {DEFAULT: templates} if templates else {}
    with asking_transformers(folder, "chat template"):
        # As Jinja reads it, but not the engine: newlines normalized, the last one removed.
        return {name: re.sub(r"\r\n|\r", "\n", text).removesuffix("\n") for name, text in templates.items()}


def chat_template(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Return the chat template of a checkpoint, with newlines as Jinja normalizes them; see `chat_templates`."""
    return default_template(chat_templates(folder, tokenizer), folder)


def default_template(templates: dict[str, str], folder: Path) -> str:
    """Return the chat template that is rendered without tools; CheckpointError if `templates` of `folder` lack it."""
    if not templates.get(DEFAULT):
        fault = f"has the chat templates {', '.join(sorted(templates))} but none of the name {DEFAULT}"
        raise CheckpointError(
            f"{folder} {fault if templates else 'has no chat template'}; add one as chat_template.jinja or in"
            " tokenizer_config.json"
        )
    try:
        templates[DEFAULT].encode()
    except UnicodeError as error:
        raise CheckpointError(f"the chat template of {folder} is not text ({error}); save it again") from None
    return templates[DEFAULT]


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    """Return the ids at which transformers' `generate` stops; the tokenizer's end of text where it stops at none.

    `tokenizer` is that of the folder, if it is loaded already.
    """
    from transformers import GenerationConfig

    with asking_transformers(folder, "generation settings"):
        eos = None
        if (folder / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(folder).eos_token_id
        elif (folder / "config.json").is_file():
            # So does `from_pretrained` of a model; the decoder's settings count where the outer ones have none.
            settings = {"config_file_name": "config.json", "_from_model_config": True}
            eos = GenerationConfig.from_pretrained(folder, **settings).eos_token_id
    if eos is None or eos == []:
        eos = (load_tokenizer(folder) if tokenizer is None else tokenizer).eos_token_id
    if eos is None:
        raise CheckpointError(
            f"{folder} names no end-of-text token, so answers would never stop; set eos_token_id in"
            " generation_config.json or eos_token in tokenizer_config.json"
        )
    ids = eos if isinstance(eos, list) else [eos]
    if any(type(number) is not int or not 0 <= number <= INT32_MAX for number in ids):
        raise CheckpointError(f"{folder} has an invalid eos_token_id {eos!r}; download it again")
    return ids
