"""Convert conversations and images to model inputs with the checkpoint's own chat template and processors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf2mnn.checkpoint.facts import chat_template, load_image_processor
from hf2mnn.checkpoint.model_info import has_vision
from hf2mnn.checkpoint.tokenizer import load_tokenizer
from hf2mnn.core.errors import CheckpointError, EvaluationSetError
from hf2mnn.core.untrusted import TEMPLATE_SECONDS, time_limited
from hf2mnn.families import Family, get_family
from hf2mnn.families.engine_limits import MEDIA_TAGS
from hf2mnn.reference.golden import ImageInput

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast


class AnswerDecoder:
    """Decode answers with the checkpoint's tokenizer, for PyTorch and every conversion."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text without special tokens and surrounding white space."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()


def check_markers(prompt: str, images: int, family: Family) -> None:
    """Check that a prompt has the marker of each image, and no other mark of a file; else raise EvaluationSetError.

    A template writes one marker for each image. Others are in the texts of messages and tools: transformers would look
    for their image or video and fails, and the engine opens what stands between its tags. For a model without image
    input they are text.
    """
    if not family.has_vision:
        return
    if tag := re.search(MEDIA_TAGS, prompt):
        raise EvaluationSetError(f"the engine takes {tag[0][:80]!r} in a message for a file; change this text")
    markers = {family.image_token: images, family.image_placeholder: images, family.video_token: 0}
    for marker, expected in markers.items():
        if (count := prompt.count(marker)) != expected:
            raise EvaluationSetError(
                f"the prompt has the marker {marker} {count} times, for {expected} images or videos in the messages;"
                " remove it from their texts"
            )


class Preprocessor:
    """Chat template, tokenizer and image processor of a checkpoint."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        """Load them from a folder of the `fetch` or the `export` stage; `info` is the contents of model.json."""
        self.folder, self.info, self.family = folder, info, get_family(info["model_type"], folder)
        self.tokenizer = load_tokenizer(folder)
        self.template, self.decode = chat_template(folder, self.tokenizer), AnswerDecoder(self.tokenizer)
        if self.family.has_vision:
            self.processor = load_image_processor(folder)

    def process_image(self, image: Image.Image) -> ImageInput:
        """Resize and normalize an image and cut it into patches; an aspect ratio over 200 is an EvaluationSetError."""
        try:
            features = self.processor(images=[image], return_tensors="np")
        except ValueError as error:
            raise EvaluationSetError(
                f"the image processor refuses an image of {image.width} x {image.height} pixels: {error}"
            ) from None
        pixels = np.asarray(features["pixel_values"], np.float32)
        grid = np.asarray(features["image_grid_thw"], np.int64)[0]
        return ImageInput(pixels, grid, self._resized(pixels, *grid.tolist()))

    def _resized(self, pixels: np.ndarray, frames: int, height: int, width: int) -> np.ndarray:
        """Reconstruct the resized image, uint8 RGB [height, width, 3], from its patches."""
        merge, patch, temporal = (self.info[key] for key in ("merge_size", "patch_size", "temporal_patch_size"))
        shape = (frames, height // merge, width // merge, merge, merge, 3, temporal, patch, patch)
        cells = pixels.reshape(shape)[0, ..., 0, :, :]
        image = cells.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)
        values = (image * np.array(self.info["image_std"]) + np.array(self.info["image_mean"])) * 255
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Render the chat template, with one image token for each image; CheckpointError if it fails.

        A template is untrusted code: transformers runs it in Jinja's sandbox, and here for a limited time.
        """
        try:
            with time_limited(TEMPLATE_SECONDS):
                return self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template + "\n", tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # a template may raise any exception
            raise CheckpointError(
                f"the chat template of {self.folder} fails ({type(error).__name__}: {error}); correct the template or"
                " the messages"
            ) from None

    def input_ids(self, messages: list[dict[str, Any]], images: list[ImageInput]) -> np.ndarray:
        """Return the token ids of a prompt, int64 [tokens], with one image token for each merged patch.

        Raise EvaluationSetError as `check_markers`.
        """
        prompt = self.render(messages)
        check_markers(prompt, len(images), self.family)
        ids = np.array(self.tokenizer(prompt, add_special_tokens=False).input_ids, np.int64)
        if not has_vision(self.info):
            return ids
        is_image, merged = ids == self.info["image_token_id"], self.info["merge_size"] ** 2
        counts = np.ones(len(ids), int)
        counts[is_image] = [image.grid_thw.prod() // merged for image in images]
        return np.repeat(ids, counts)
