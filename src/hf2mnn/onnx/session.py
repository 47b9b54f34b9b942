"""Run the exported graphs with ONNX Runtime: images, prefill, cached decode, multi-turn conversations.

For users who deploy the ONNX graphs. It needs onnxruntime, numpy and the folder of the `export` stage, and no torch:

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

from hf2mnn.families import get_family
from hf2mnn.onnx.deepstack import DEEPSTACK

Image = tuple[np.ndarray, np.ndarray]  # pixel_values float32 [patches, patch values], grid_thw int64 [3]


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU; with 0 `threads` ONNX Runtime chooses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads take CPU time from other jobs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def causal_mask(past: int, tokens: int) -> np.ndarray:
    """Return a causal attention mask to add to the scores, float32 [1, 1, tokens, past + tokens]."""
    future = np.arange(past + tokens)[None, :] > past + np.arange(tokens)[:, None]
    return np.where(future, np.finfo(np.float32).min, np.float32(0))[None, None]


class KVCache:
    """Keys, values and positions of a conversation's tokens; may be truncated to continue from an earlier token."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, position_rows: int) -> None:
        self.past = np.zeros((layers, 2, 1, 0, kv_heads, head_dim), np.float32)
        self.positions = np.zeros((position_rows, 0), np.int64)

    def __len__(self) -> int:
        return self.past.shape[3]

    @property
    def next_position(self) -> int:
        """Position of the next text token: the largest so far plus 1. An image has fewer positions than tokens."""
        return int(self.positions.max()) + 1 if len(self) else 0

    def append(self, presents: np.ndarray, positions: np.ndarray) -> None:
        """Set the cache to a call's `presents`, with old and new tokens, and append the positions of the new ones."""
        tokens, added = presents.shape[3], positions.shape[1]
        if tokens != len(self) + added:
            raise ValueError(f"{tokens} cached tokens do not follow {len(self)} with {added} more")
        self.past = presents
        self.positions = np.concatenate([self.positions, positions], axis=1)

    def truncate(self, length: int) -> None:
        """Remove all but the first `length` tokens."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot keep {length} of {len(self)} cached tokens")
        self.past = self.past[:, :, :, :length]
        self.positions = self.positions[:, :length]


class OnnxModel:
    """Graphs of a model, with the contents of model.json as `info`."""

    def __init__(self, folder: Path | str, threads: int = 0, embedding: np.ndarray | None = None) -> None:
        """Open the graphs in the folder of `export`; `embedding` float32 [vocabulary, hidden] replaces the graph's."""
        self.folder = Path(folder)
        self.info = json.loads((self.folder / "model.json").read_text())
        self.family = get_family(self.info["model_type"], self.folder / "model.json")
        names = ["decoder", "embedding", "vision"] if self.family.has_vision else ["decoder", "embedding"]
        self._graphs = {name: open_session(self.folder / f"{name}.onnx", threads) for name in names}
        self._embedding = embedding

    def new_cache(self) -> KVCache:
        """Return an empty cache."""
        sizes = (self.info[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
        return KVCache(*sizes, self.family.position_rows)

    def embed_image(self, image: Image) -> list[np.ndarray]:
        """Return float32 image_embeds [image tokens, hidden], with deepstack also features [layers, tokens, hidden]."""
        return self._graphs["vision"].run(None, self.family.vision_inputs(*image, self.info))

    def embed(self, input_ids: np.ndarray, images: list[Image]) -> dict[str, np.ndarray]:
        """Return the decoder's inputs for int64 ids [tokens], with image tokens replaced by image embeddings."""
        ids = np.asarray(input_ids, np.int64)
        run = self._graphs["embedding"].run
        embeds = run(None, {"input_ids": ids[None]})[0] if self._embedding is None else self._embedding[ids][None]
        is_image = ids == self.info.get("image_token_id", -1)
        deepstack = np.zeros((self.family.deepstack_layers, *embeds.shape[1:]), np.float32)
        if images:
            outputs = [self.embed_image(image) for image in images]
            count = sum(len(output[0]) for output in outputs)
            if count != is_image.sum():
                raise ValueError(f"the prompt has {is_image.sum()} image tokens, and the images have {count}")
            embeds[0, is_image] = np.concatenate([output[0] for output in outputs])
            if self.family.deepstack_layers:
                deepstack[:, is_image] = np.concatenate([output[1] for output in outputs], axis=1)
        elif is_image.any() and len(ids) > 1:  # a wrong answer may have an image token, which is decoded alone
            raise ValueError(f"the prompt has {is_image.sum()} image tokens and no image")
        return {"inputs_embeds": embeds, **({DEEPSTACK: deepstack} if self.family.deepstack_layers else {})}

    def prefill(
        self, cache: KVCache, input_ids: np.ndarray, images: list[Image] | None = None, all_logits: bool = False
    ) -> np.ndarray:
        """Run int64 ids [tokens] after those in the cache, and append them; a decoding step is a call with one token.

        Return float32 logits [tokens, vocabulary] with `all_logits`, else [1, vocabulary] of the last token.
        """
        images, input_ids = images or [], np.asarray(input_ids, np.int64)
        positions = self.family.position_ids(input_ids, [grid for _, grid in images], self.info) + cache.next_position
        logits, presents = self._graphs["decoder"].run(
            ["logits", "presents"],
            {
                **self.embed(input_ids, images),
                "attention_mask": causal_mask(len(cache), len(input_ids)),
                "position_ids": positions.astype(np.int32),
                "logits_index": np.array([0 if all_logits else -1], np.int32),
                "past_key_values": cache.past,
            },
        )
        cache.append(presents, positions)
        return logits[0]

    def greedy(self, cache: KVCache, logits: np.ndarray, max_new_tokens: int) -> list[int]:
        """Decode greedily from the `logits` [vocabulary] after the prompt; return the ids with the stop id."""
        answer = []
        while len(answer) < max_new_tokens:
            answer.append(int(logits.argmax()))
            if answer[-1] in self.info["stop_ids"]:
                break
            logits = self.prefill(cache, np.array(answer[-1:]))[-1]
        return answer
