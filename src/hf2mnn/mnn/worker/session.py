"""MNN's LLM engine with one bundle loaded, for use in a child process.

The engine counts the tokens of an image instead of its rows and columns (`QUIRKS` of `hf2mnn.mnn.engine_facts`). For
right positions, `ModelSession` feeds a prompt in segments, cut before each vision_start and each vision_end. Before
each segment it sets the position counter of the engine's context.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import MNN.expr
import MNN.llm
import numpy as np

from hf2mnn.core.errors import BundleFault
from hf2mnn.families import get_family
from hf2mnn.mnn.bundle_config import with_settings
from hf2mnn.mnn.engine_facts import GARBAGE_LOGIT, IMAGE_TAG
from hf2mnn.reference.golden import GoldenExample

Images = list[dict[str, Any]]  # as `engine_image` returns them


def overlay(bundle: Path, settings: dict[str, Any]) -> Path:
    """Return a folder in the working directory with links to the bundle's files, and config.json with `settings`.

    The engine resolves other files relative to config.json.
    """
    folder = Path(tempfile.mkdtemp(prefix="bundle-", dir=Path.cwd()))
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((bundle / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(with_settings(config, settings)))
    return folder


def engine_image(rgb: np.ndarray, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return an image, uint8 RGB [height, width, 3], as the engine takes it; `size` to resize to is (height, width)."""
    height, width = size or rgb.shape[:2]
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    data = MNN.expr.const(bgr, list(bgr.shape), MNN.expr.NHWC, MNN.expr.uint8)
    return {"data": data, "height": height, "width": width}


class EngineSession:
    """Any bundle, loaded; methods raise BundleFault where the engine fails on it.

    `folder` is that of the bundle, or an overlay with other settings; `native` is the C++ object behind the Python
    wrapper `llm`, which hides some of its functions and results.
    """

    def __init__(self, bundle: Path, threads: int = 0, settings: dict[str, Any] | None = None) -> None:
        """Load a bundle; `threads`, if not 0, and `settings` replace those of config.json."""
        changes = {**(settings or {}), **({"thread_num": threads} if threads else {})}
        # `set_config` does not change the settings of the vision tower.
        self.folder = overlay(bundle, changes) if changes else bundle
        self.llm = MNN.llm.create(str(self.folder / "config.json"))
        self.native = self.llm._c_obj
        # The wrapper's load() returns None in any case.
        if not self.native.load():
            raise BundleFault(
                f"MNN's engine does not load {bundle}: its files are incomplete or not for this engine", "load"
            )

    def forward(self, ids: list[int]) -> np.ndarray:
        """Append `ids` to the KV cache and return logits, float32 [1, vocabulary]; with "all_logits" one row an id."""
        logits = np.array(self.llm.forward(ids).read(), np.float32)
        if not np.isfinite(logits).all() or np.abs(logits).max() > GARBAGE_LOGIT or np.ptp(logits) == 0:
            raise BundleFault(
                "the bundle answers garbage (logits equal, huge or not finite): its weights are missing or of another"
                " model",
                "garbage",
            )
        return logits.reshape(-1, logits.shape[-1])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Append `ids` to the KV cache and return the logits after them, float32 [vocabulary]."""
        return self.forward(ids)[-1]

    def encode(self, prompt: str, images: Images) -> list[int]:
        """Return the ids of a prompt with the engine's own image processing."""
        return [int(token) for token in self.llm.tokenizer_encode({"text": prompt, "images": images})]

    def generate(self, prompt: str, images: Images, limit: int) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and its greedy answer by the engine's images and positions, as `response` does."""
        self.llm.reset()
        self.llm.generate_init()
        ids = self.encode(prompt, images)
        return ids, [int(token) for token in self.native.generate(ids, limit)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; the binding raises for a token that is a part of a character."""
        pieces = []
        for token in ids:
            try:
                pieces.append(self.llm.tokenizer_decode(token).encode())
            except UnicodeDecodeError as error:
                pieces.append(error.object)
        return b"".join(pieces).decode(errors="replace").strip()


class ModelSession(EngineSession):
    """Loaded bundle of hf2mnn with its model.json (`info`). Its position ids are those of transformers."""

    def __init__(self, bundle: Path, threads: int = 0, settings: dict[str, Any] | None = None) -> None:
        super().__init__(bundle, threads, settings)
        self.info = json.loads((bundle / "llm_config.json").read_text())["hf2mnn"]
        self.family = get_family(self.info["model_type"], bundle)

    def tagged(self, prompt: str) -> str:
        """Replace the template's placeholders of images by the engine's tags, numbered in order."""
        placeholder = self.family.image_placeholder
        first, *rest = prompt.split(placeholder) if placeholder else [prompt]
        return first + "".join(IMAGE_TAG.format(number) + part for number, part in enumerate(rest))

    def positions(self, ids: list[int], images: list[np.ndarray]) -> np.ndarray:
        """Return the positions of transformers for a prompt with uint8 RGB images of the right sizes."""
        grids = [np.array([1, *(side // self.info["patch_size"] for side in rgb.shape[:2])]) for rgb in images]
        return self.family.position_ids(np.array(ids), grids, self.info)

    def all_logits(self, ids: list[int], position: int) -> np.ndarray:
        """Append text to the KV cache at `position` and return the logits after each id, float32 [ids, vocabulary]."""
        self.llm.set_config({"all_logits": True})
        try:
            return self.prefill_text(ids, position)
        finally:
            self.llm.set_config({"all_logits": False})

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of the KV cache.

        The engine does so at its next forward; until then `get_current_history` returns the former length.
        """
        if length < self.native.get_current_history():
            self.native.erase_history(length, 0)

    def set_position(self, position: int) -> None:
        """Let the next forward be a prefill that starts at `position`."""
        # Not through `llm.context`: reading it ends the process once an answer was no valid UTF-8.
        self.native.set_context({"all_seq_len": position, "gen_seq_len": 0})

    def prefill_text(self, ids: list[int], position: int) -> np.ndarray:
        """Append text to the KV cache at `position` and return the logits of its forwards."""
        # After an empty prompt the engine counts positions from its context, not from an image.
        self.llm.tokenizer_encode("")
        # With deepstack, the engine adds the features of an image to the next text of two or more tokens, so the first
        # token gets a forward of its own.
        cut = 1 if self.family.deepstack_layers else 0
        rows = []
        for start, part in ((0, ids[:cut]), (cut, ids[cut:])):
            if part:
                self.set_position(position + start)
                rows.append(self.forward(part))
        return np.concatenate(rows)

    def prefill(self, ids: list[int], positions: np.ndarray, images: Images) -> np.ndarray:
        """Empty the KV cache, prefill a prompt at `positions`, int [rows, tokens], and return the logits after it."""
        start = self.prefill_images(ids, positions, images)
        return self.prefill_text(ids[start:], int(positions[0, start]))[-1]

    def prefill_images(self, ids: list[int], positions: np.ndarray, images: Images) -> int:
        """Empty the KV cache, prefill a prompt up to the end of its last image, and return the number of its tokens."""
        self.llm.reset()
        start, remaining = 0, iter(images)
        is_image = np.array(ids) == self.info.get("image_token_id")
        for begin, end in np.flatnonzero(np.diff(is_image, prepend=False, append=False)).reshape(-1, 2).tolist():
            # Text before vision_start, then vision_start with the image.
            if begin - 1 > start:
                self.prefill_text(ids[start : begin - 1], int(positions[0, start]))
            encoded = self.encode(IMAGE_TAG.format(0), [next(remaining)])
            if encoded != ids[begin - 1 : end + 1]:
                raise BundleFault(
                    f"the engine makes {len(encoded) - 2} image tokens where transformers makes {end - begin}:"
                    " patch size, merge size or vision ids of the bundle are not those of the checkpoint",
                    "image_tokens",
                )
            self.set_position(int(positions[0, begin - 1]))
            # A prompt that ends in an image repeats its last text tokens. So vision_end is fed too, at a wrong
            # position, and removed.
            self.logits(encoded)
            self.truncate(self.native.get_current_history() - 1)
            start = end
        return start

    def greedy(self, row: np.ndarray, limit: int) -> list[int]:
        """Return the greedy answer after logits `row` with the engine's KV cache, stop id included."""
        answer = [int(row.argmax())]
        while answer[-1] not in self.info["stop_ids"] and len(answer) < limit:
            answer.append(int(self.logits(answer[-1:]).argmax()))
        return answer

    def forced(self, ids: list[int], positions: np.ndarray, images: Images, answer: list[int]) -> np.ndarray:
        """Return the logits after a prompt and each token of `answer` but the last, float32 [answer, vocabulary]."""
        row = self.prefill(ids, positions, images)
        return np.stack([row, *(self.logits([token]) for token in answer[:-1])])

    def evaluate(self, example: GoldenExample, images: Images, limit: int) -> tuple[np.ndarray, list[int]]:
        """Return teacher-forced logits and the ids of the greedy answer of an example, by cached decoding."""
        rows = self.forced(example.input_ids.tolist(), example.position_ids, images, example.answer_ids.tolist())
        best = rows.argmax(axis=1)
        different = np.flatnonzero(best != example.answer_ids)
        if not len(different):
            return rows, best.tolist()
        # From the first different token on the answer is the engine's own: truncate the KV cache and decode on.
        common = int(different[0])
        self.truncate(len(example.input_ids) + common)
        self.native.set_context({"all_seq_len": int(example.position_ids.max()) + 1 + common})
        return rows, best[:common].tolist() + self.greedy(rows[common], limit - common)
