"""From messages and images to what the model is fed, by the checkpoint's own template, tokenizer and processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf2mnn.checkpoint.facts import sees
from hf2mnn.core.errors import CheckpointError, EvaluationSetError
from hf2mnn.core.untrusted import TEMPLATE_SECONDS, at_most
from hf2mnn.reference.text import AnswerDecoder

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageInput:
    """pixel_values float32 [patches, values], grid_thw int64 [3], resized uint8 RGB [height, width, 3]."""

    pixel_values: np.ndarray
    grid_thw: np.ndarray
    resized: np.ndarray


class Prompter:
    """Tokenizer and image processor of one checkpoint folder (the `source` or the `onnx` stage's)."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """`facts` is model.json, or what `hf2mnn.onnx.export.model_facts` gives."""
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if sees(facts):
                self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of a file that is not right these libraries raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"the tokenizer or image processor of {folder} does not load: {reason}") from None
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{folder} has no chat template (chat_template.jinja or in tokenizer_config.json)")
        self.folder, self.facts, self.decode = folder, facts, AnswerDecoder(folder)

    def image(self, image: Image.Image) -> ImageInput:
        """Raises EvaluationSetError where the processor refuses the image (over 200 times longer than wide)."""
        try:
            features = self.processor(images=[image], return_tensors="np")
        except ValueError as error:
            raise EvaluationSetError(
                f"the image processor refuses a {image.width} x {image.height} image: {error}"
            ) from None
        pixels = np.asarray(features["pixel_values"], np.float32)
        grid = np.asarray(features["image_grid_thw"], np.int64)[0]
        return ImageInput(pixels, grid, self.unpatch(pixels, grid))

    def unpatch(self, pixel_values: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
        """The resized image that the patches were cut from: uint8 RGB [height, width, 3]."""
        facts = self.facts
        frames, height, width = (int(side) for side in grid_thw)
        merge, patch, temporal = facts["merge_size"], facts["patch_size"], facts["temporal_patch_size"]
        shape = (frames, height // merge, width // merge, merge, merge, 3, temporal, patch, patch)
        cells = pixel_values.reshape(shape)[0, ..., 0, :, :]
        image = cells.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)
        values = (image * np.array(facts["image_std"]) + np.array(facts["image_mean"])) * 255
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)

    def text(self, messages: list[dict[str, Any]]) -> str:
        """The prompt as the chat template writes it, one image token an image. A template is a program of its owner's:
        transformers runs it in Jinja's sandbox, here for a bounded time.

        Raises:
            CheckpointError: it fails on these messages, or takes too long.
        """
        try:
            with at_most(TEMPLATE_SECONDS):
                return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # anything, like every program
            raise CheckpointError(
                f"the chat template of {self.folder} fails ({type(error).__name__}: {error}); correct it or them"
            ) from None

    def input_ids(self, messages: list[dict[str, Any]], images: list[ImageInput]) -> np.ndarray:
        """int64 [tokens], each image's token repeated for every merged patch.

        Raises:
            EvaluationSetError: the template wrote another number of images than there are.
        """
        ids = self.tokenizer(self.text(messages), add_special_tokens=False).input_ids
        if not sees(self.facts):
            return np.array(ids, np.int64)
        image_token, merged = self.facts["image_token_id"], self.facts["merge_size"] ** 2
        if ids.count(image_token) != len(images):
            raise EvaluationSetError(
                f"the chat template wrote {ids.count(image_token)} images for {len(images)} in the messages"
            )
        counts = iter(int(image.grid_thw.prod()) // merged for image in images)
        return np.array(
            [token for i in ids for token in ([image_token] * next(counts) if i == image_token else [i])], np.int64
        )
