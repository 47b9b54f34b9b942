"""MNN's LLM engine with one bundle loaded, for the child processes that may hold it.

Right positions: engine 3.6.1 counts an image's tokens instead of its rows and columns when it goes on after one
(facts: Omni::gen_position_ids and MropeInfo). So the prompt is fed in segments, cut before each vision_start and
before each vision_end, and before each the position counter of the engine's context is set to what it must be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import MNN.expr
import MNN.llm
import numpy as np

from hf2mnn.families import family_named
from hf2mnn.mnn.worker.module import Refused
from hf2mnn.mnn.worker.overlay import overlay
from hf2mnn.reference.golden import GoldenExample

# A missing or foreign weight file gives finite garbage of about -3.4e38, which no NaN check sees.
GARBAGE = 1e30


def image_input(rgb: np.ndarray, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """An image (uint8 RGB [height, width, 3]) as the engine takes it: BGR, with the height and width it is to be seen
    at, its own where `size` does not say otherwise.
    """
    height, width = size or rgb.shape[:2]
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    data = MNN.expr.const(bgr, list(bgr.shape), MNN.expr.NHWC, MNN.expr.uint8)
    return {"data": data, "height": height, "width": width}


def image_grid(rgb: np.ndarray, model: dict[str, Any]) -> np.ndarray:
    """grid_thw int64 [3] of an image that has its right size; `model` is model.json."""
    return np.array([1, *(side // model["patch_size"] for side in rgb.shape[:2])])


class Loaded:
    """One loaded bundle, whoever made it."""

    def __init__(self, bundle: Path, threads: int = 0, settings: dict[str, Any] | None = None) -> None:
        """`settings` go over those of config.json; `threads` 0 keeps the bundle's own number.

        Raises:
            Refused: the engine does not load it.
        """
        changed = {**(settings or {}), **({"thread_num": threads} if threads else {})}
        # What `set_config` changes does not reach the vision tower.
        self.folder = overlay(bundle, changed) if changed else bundle
        self.llm = MNN.llm.create(str(self.folder / "config.json"))
        self.native = self.llm._c_obj
        # The wrapper's own load() gives None whatever happened.
        if not self.native.load():
            raise Refused(f"MNN's engine does not load {bundle}: its files are not whole or not for this engine")

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [vocabulary] after `ids`, which join the engine's cache."""
        return self._checked(self.llm.forward(ids).read()).reshape(-1)

    @staticmethod
    def _checked(logits: Any) -> np.ndarray:
        values = np.array(logits, np.float32)
        if not np.isfinite(values).all() or np.abs(values).max() > GARBAGE or np.ptp(values) == 0:
            raise Refused("the bundle answers garbage (logits equal, huge or not finite): its weights are not its own")
        return values

    def encode(self, prompt: str, images: list[dict[str, Any]]) -> list[int]:
        """The prompt's tokens, those of its images by the engine's own image processing among them."""
        return [int(token) for token in self.llm.tokenizer_encode({"text": prompt, "images": images})]

    def as_called(self, prompt: str, images: list[dict[str, Any]], limit: int) -> tuple[list[int], list[int]]:
        """The prompt's tokens, and the greedy answer, by the engine's own image processing and positions: what
        `response` gives a caller.
        """
        self.llm.reset()
        self.llm.generate_init()
        ids = self.encode(prompt, images)
        return ids, [int(token) for token in self.native.generate(ids, limit)]

    def decode(self, ids: list[int]) -> str:
        """Text of an answer; the engine's binding raises on a token that is only a part of a character."""
        pieces = []
        for token in ids:
            try:
                pieces.append(self.llm.tokenizer_decode(token).encode())
            except UnicodeDecodeError as error:
                pieces.append(error.object)
        return b"".join(pieces).decode(errors="replace").strip()


class Engine(Loaded):
    """A loaded bundle that says which model it is."""

    def __init__(self, bundle: Path, threads: int = 0, settings: dict[str, Any] | None = None) -> None:
        super().__init__(bundle, threads, settings)
        self.model = json.loads((bundle / "llm_config.json").read_text())["hf2mnn"]
        self.family = family_named(self.model["model_type"], bundle)

    def all_logits(self, ids: list[int], position: int) -> np.ndarray:
        """float32 [len(ids), vocabulary] after each of `ids`, text that joins the engine's cache at `position`."""
        self.llm.set_config({"all_logits": True})
        try:
            self._leave_images()
            rows, read = [], 0
            for part in self._parts(ids):
                self.move(position + read)
                rows.append(self._checked(self.llm.forward(part).read()).reshape(len(part), -1))
                read += len(part)
            return np.concatenate(rows)
        finally:
            self.llm.set_config({"all_logits": False})

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of the cache; the engine does so with its next forward, and until then counts
        as before.
        """
        if length < self.native.get_current_history():
            self.native.erase_history(length, 0)

    def move(self, position: int) -> None:
        """The next forward is a prefill that starts at `position`."""
        # Not through `llm.context`: reading it ends the process once an answer was no whole UTF-8.
        self.native.set_context({"all_seq_len": position, "gen_seq_len": 0})

    def _leave_images(self) -> None:
        """Encoding an empty prompt makes the engine forget an image's positions; then it counts from the context."""
        self.llm.tokenizer_encode("")

    def _parts(self, ids: list[int]) -> list[list[int]]:
        """A text as it must be read: of a model with deepstack the first token by itself, for the engine adds what it
        has seen of an image to whatever longer text comes next (`Omni::embedding`).
        """
        return [ids[:1], ids[1:]] if self.family.deepstack and len(ids) > 1 else [ids]

    def text(self, ids: list[int], position: int) -> np.ndarray:
        """Logits [vocabulary] after a text that joins the cache at `position`."""
        self._leave_images()
        read = 0
        for part in self._parts(ids):
            self.move(position + read)
            row = self.logits(part)
            read += len(part)
        return row

    def prefill(self, ids: list[int], positions: np.ndarray, images: list[dict[str, Any]]) -> np.ndarray:
        """Logits [vocabulary] after a prompt, every token at its right position [rows, tokens].

        `images` come from `image_input`.
        """
        start = self.read_images(ids, positions, images)
        return self.text(ids[start:], int(positions[0, start]))

    def read_images(self, ids: list[int], positions: np.ndarray, images: list[dict[str, Any]]) -> int:
        """Empty the cache and read a prompt up to the end of its last image; gives how many tokens those are."""
        self.llm.reset()
        start, left = 0, iter(images)
        for begin, end in image_runs(ids, self.model.get("image_token_id")):
            # Text up to the token before the image (vision_start), then that token with the image.
            if begin - 1 > start:
                self.text(ids[start : begin - 1], int(positions[0, start]))
            coded = self.llm.tokenizer_encode({"text": "<img>image_0</img>", "images": [next(left)]})
            if coded != ids[begin - 1 : end + 1]:
                raise Refused(
                    f"the engine makes {len(coded) - 2} image tokens where transformers makes {end - begin}:"
                    " patch size, merge size or vision ids of the bundle are not the checkpoint's"
                )
            self.move(int(positions[0, begin - 1]))
            # A prompt may not end in an image (Omni::embedding then repeats the tokens before it), so vision_end goes
            # along, at a wrong position, and is taken back.
            self.logits(coded)
            self.truncate(self.native.get_current_history() - 1)
            start = end
        return start

    def greedy(self, row: np.ndarray, limit: int) -> list[int]:
        """The answer that begins with the best token of `row`, decoded with the engine's cache, stop id included."""
        answer = [int(row.argmax())]
        while answer[-1] not in self.model["stop_ids"] and len(answer) < limit:
            answer.append(int(self.logits(answer[-1:]).argmax()))
        return answer

    def judge(self, example: GoldenExample, images: list[dict[str, Any]], limit: int) -> tuple[np.ndarray, list[int]]:
        """Teacher-forced logits [m, vocabulary] and the greedy answer, both by cached decode with right positions."""
        wanted = example.answer_ids.tolist()
        rows = [self.prefill(example.input_ids.tolist(), example.position_ids, images)]
        rows += [self.logits([token]) for token in wanted[:-1]]
        chosen = [int(row.argmax()) for row in rows]
        same = next((i for i, (ours, theirs) in enumerate(zip(chosen, wanted, strict=True)) if ours != theirs), None)
        if same is None:
            return np.stack(rows), chosen
        # From the first other token on the answer is the engine's own: take the cache back to there and decode on.
        kept = len(example.input_ids) + same
        self.truncate(kept)
        self.native.set_context({"all_seq_len": int(example.position_ids.max()) + 1 + same})
        return np.stack(rows), chosen[:same] + self.greedy(rows[same], limit - same)


def image_runs(ids: list[int], image: int | None) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of image tokens."""
    begin = None
    for index, token in enumerate([*ids, -1]):
        if token == image and begin is None:
            begin = index
        elif token != image and begin is not None:
            yield begin, index
            begin = None


def tag_images(prompt: str, image_text: str) -> str:
    """The template's image (start, pad, end) as the tag that the engine looks for, numbered in order."""
    parts = prompt.split(image_text) if image_text else [prompt]
    return parts[0] + "".join(f"<img>image_{i}</img>{part}" for i, part in enumerate(parts[1:]))
