"""Convert conversations and images to model inputs with the checkpoint's own chat template and processors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from hf2mnn.checkpoint.model_info import has_vision
from hf2mnn.core.errors import CheckpointError, EvaluationSetError
from hf2mnn.core.untrusted import TEMPLATE_SECONDS, time_limited
from hf2mnn.reference.golden import ImageInput

if TYPE_CHECKING:
    from PIL import Image


class AnswerDecoder:
    """Decode answers with tokenizer.json of a folder and the tokenizers library, for PyTorch and every conversion."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text without special tokens and surrounding white space."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()


class Preprocessor:
    """Chat template, tokenizer and image processor of a checkpoint."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        """Load them from a folder of the `fetch` or the `export` stage; `info` is the contents of model.json."""
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if has_vision(info):
                self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # for invalid files these libraries raise exceptions of any type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"the tokenizer or image processor of {folder} cannot be loaded: {reason}; download it again"
            ) from None
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"{folder} has no chat template; add chat_template.jinja, or a chat_template to tokenizer_config.json"
            )
        self.folder, self.info, self.decode = folder, info, AnswerDecoder(folder)

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
                return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise any exception
            raise CheckpointError(
                f"the chat template of {self.folder} fails ({type(error).__name__}: {error}); correct the template or"
                " the messages"
            ) from None

    def input_ids(self, messages: list[dict[str, Any]], images: list[ImageInput]) -> np.ndarray:
        """Return the token ids of a prompt, int64 [tokens], with one image token for each merged patch."""
        ids = np.array(self.tokenizer(self.render(messages), add_special_tokens=False).input_ids, np.int64)
        if not has_vision(self.info):
            return ids
        is_image, merged = ids == self.info["image_token_id"], self.info["merge_size"] ** 2
        if (written := is_image.sum()) != len(images):
            raise EvaluationSetError(
                f"the chat template writes {written} images and the messages have {len(images)}; correct the messages"
            )
        counts = np.ones(len(ids), int)
        counts[is_image] = [image.grid_thw.prod() // merged for image in images]
        return np.repeat(ids, counts)
