"""Run the exported graphs with ONNX Runtime: images, prefill, cached decode, several turns.

This is the route for whoever deploys ONNX; it needs onnxruntime, numpy and the folder of the `onnx` stage, no torch.

    model = OnnxModel("results/shapes-vl/onnx")
    cache = model.new_cache()
    logits = model.prefill(cache, input_ids, images=[(pixel_values, grid_thw)])
    answer = model.greedy(cache, logits[-1], max_new_tokens=64)
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime

from hf2mnn.families import family_named
from hf2mnn.onnx.deepstack import DEEPSTACK

Image = tuple[np.ndarray, np.ndarray]
"""pixel_values float32 [patches, patch values], grid_thw int64 [3]."""


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A graph on the CPU; `threads` 0 lets ONNX Runtime choose."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads steal the cores from jobs beside this one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def causal_mask(past: int, tokens: int) -> np.ndarray:
    """float32 [1, 1, tokens, past + tokens], added to the scores: no token sees what comes after it."""
    future = np.arange(past + tokens)[None, :] > past + np.arange(tokens)[:, None]
    return np.where(future, np.finfo(np.float32).min, np.float32(0))[None, None]


class KVCache:
    """Keys and values of the tokens seen so far, with their positions, so that a turn can be taken back or reused."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, rows: int) -> None:
        self.past = np.zeros((layers, 2, 1, 0, kv_heads, head_dim), np.float32)
        self.positions = np.zeros((rows, 0), np.int64)

    def __len__(self) -> int:
        return self.past.shape[3]

    @property
    def next_position(self) -> int:
        """Position of the next text token: one after the largest so far (an image takes fewer than its tokens)."""
        return int(self.positions.max()) + 1 if len(self) else 0

    def append(self, presents: np.ndarray, positions: np.ndarray) -> None:
        """Take over a call's `presents` (past and new together) and the positions of its new tokens."""
        if presents.shape[3] != len(self) + positions.shape[1]:
            raise ValueError(
                f"{presents.shape[3]} cached tokens do not follow {len(self)} with {positions.shape[1]} more"
            )
        self.past = presents
        self.positions = np.concatenate([self.positions, positions], axis=1)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, to answer again or to take another turn from there."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot keep {length} of {len(self)} cached tokens")
        self.past = self.past[:, :, :, :length]
        self.positions = self.positions[:, :length]


class OnnxModel:
    """The graphs of one model and what is needed to feed them."""

    def __init__(self, folder: Path | str, threads: int = 0, embedding: np.ndarray | None = None) -> None:
        """`threads` 0 lets ONNX Runtime choose; `embedding` (float32 [vocabulary, hidden]) replaces the graph's."""
        self.folder = Path(folder)
        self.facts = json.loads((self.folder / "model.json").read_text())
        self.family = family_named(self.facts["model_type"], self.folder / "model.json")
        names = ("decoder", "embedding", *(["vision"] if self.family.sees else []))
        self._graphs = {name: open_session(self.folder / f"{name}.onnx", threads) for name in names}
        self._table = embedding

    def new_cache(self) -> KVCache:
        facts = self.facts
        return KVCache(facts["num_hidden_layers"], facts["num_key_value_heads"], facts["head_dim"], self.family.rows)

    def see(self, image: Image) -> list[np.ndarray]:
        """Image embeddings float32 [image tokens, hidden] of one image, and with deepstack what is added to the first
        layers, [layers, image tokens, hidden].
        """
        return self._graphs["vision"].run(None, self.family.vision_inputs(*image, self.facts))

    def embed(self, input_ids: np.ndarray, images: list[Image]) -> dict[str, np.ndarray]:
        """The decoder's inputs for int64 ids, image tokens replaced by what the vision tower sees: `inputs_embeds`
        float32 [1, tokens, hidden], and with deepstack `deepstack_embeds`.
        """
        ids = np.asarray(input_ids, np.int64)
        run = self._graphs["embedding"].run
        embeds = run(None, {"input_ids": ids[None]})[0] if self._table is None else self._table[ids][None]
        places = ids == self.facts["image_token_id"] if self.family.sees else np.zeros(len(ids), bool)
        added = np.zeros((self.family.deepstack, *embeds.shape[1:]), np.float32)
        if images:
            seen = [self.see(image) for image in images]
            count = sum(len(output[0]) for output in seen)
            if count != places.sum():
                raise ValueError(f"the prompt has {places.sum()} image tokens, the images give {count}")
            embeds[0, places] = np.concatenate([output[0] for output in seen])
            if self.family.deepstack:
                added[:, places] = np.concatenate([output[1] for output in seen], axis=1)
        elif places.any() and len(places) > 1:  # alone, it is what a bad answer goes on with
            raise ValueError(f"the prompt has {places.sum()} image tokens and no image")
        return {"inputs_embeds": embeds, **({DEEPSTACK: added} if self.family.deepstack else {})}

    def prefill(
        self, cache: KVCache, input_ids: np.ndarray, images: list[Image] | None = None, all_logits: bool = False
    ) -> np.ndarray:
        """Run `input_ids` after what `cache` holds and add them to it. Decoding a token is the same call with one id.

        Returns:
            logits float32 [tokens, vocabulary] with `all_logits`, else [1, vocabulary] of the last token.
        """
        images = images or []
        input_ids, past = np.asarray(input_ids, np.int64), len(cache)
        grids = [grid for _, grid in images]
        positions = self.family.position_ids(input_ids, grids, self.facts)
        positions = positions + cache.next_position
        logits, presents = self._graphs["decoder"].run(
            ["logits", "presents"],
            {
                **self.embed(input_ids, images),
                "attention_mask": causal_mask(past, len(input_ids)),
                "position_ids": positions.astype(np.int32),
                "logits_index": np.array([0 if all_logits else -1], np.int32),
                "past_key_values": cache.past,
            },
        )
        cache.append(presents, positions)
        return logits[0]

    def greedy(self, cache: KVCache, logits: np.ndarray, max_new_tokens: int) -> list[int]:
        """Ids of the greedy answer, the stop id included, from the `logits` [vocabulary] after the prompt."""
        answer = []
        while len(answer) < max_new_tokens:
            answer.append(int(logits.argmax()))
            if answer[-1] in self.facts["stop_ids"]:
                break
            logits = self.prefill(cache, np.array(answer[-1:]))[-1]
        return answer
