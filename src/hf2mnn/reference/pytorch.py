"""PyTorch reference: transformers' model in float32 answers an evaluation set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import save_file
from transformers import GenerationConfig

from hf2mnn.checkpoint.facts import model_facts
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.progress import steps
from hf2mnn.reference.examples import Example
from hf2mnn.reference.golden import ACTIVATIONS, EXAMPLES, PROBES, TENSORS, Golden, GoldenExample
from hf2mnn.reference.model import load_model, place_weights
from hf2mnn.reference.prompts import ImageInput, Prompter
from hf2mnn.reference.tap_recorder import recorded
from hf2mnn.reference.tasks import score_answer


class Reference:
    """The model with its prompter.

    `weights` is "auto", "resident" or "mapped", and `kept` what the stage will hold (`source.model.place_weights`); the
    attribute `weights` says which of the last two it became.
    """

    def __init__(self, checkpoint: Checkpoint, max_new_tokens: int, weights: str = "auto", kept: int = 0) -> None:
        self.facts = model_facts(checkpoint)
        self.prompter = Prompter(checkpoint.folder, self.facts)
        self.weights, why = place_weights(checkpoint, weights, kept)
        print(f"PyTorch's weights are {self.weights}: {why}", file=sys.stderr, flush=True)
        self.model = load_model(checkpoint, self.weights)
        self.family = checkpoint.family
        self.decoder = self.family.language_model(self.model)
        stop = self.facts["stop_ids"]
        # A config of our own: checkpoints often ship one that samples.
        self.generation = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop,
            pad_token_id=stop[0],
            return_dict_in_generate=True,
            output_logits=True,
        )

    def _inputs(self, ids: torch.Tensor, images: list[ImageInput]) -> dict[str, torch.Tensor]:
        """What transformers' forward takes for int64 ids [1, tokens]."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            grids = torch.from_numpy(np.stack([image.grid_thw for image in images]))
            pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in images]))
            inputs |= {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": self._kinds(ids, grids)}
        return inputs

    def _kinds(self, ids: torch.Tensor, grids: torch.Tensor | None) -> torch.Tensor:
        """1 for image tokens of images, 0 for text, an image token in an answer among it."""
        count = 0 if grids is None else int(grids.prod(dim=-1).sum()) // self.facts["merge_size"] ** 2
        images = (ids == self.facts["image_token_id"]).int()
        return images * (images.cumsum(dim=-1) <= count)

    def _positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """int64 [rows, tokens], as transformers counts them."""
        ids = inputs["input_ids"]
        if not self.family.sees:
            return torch.arange(ids.shape[1])[None]
        grids = inputs.get("image_grid_thw")
        positions, _ = self.model.model.get_rope_index(ids, self._kinds(ids, grids), image_grid_thw=grids)
        return positions[:, 0].contiguous()

    @torch.inference_mode()
    def answer(self, input_ids: np.ndarray, images: list[ImageInput]) -> dict[str, torch.Tensor]:
        """Greedy answer, the logits behind it, and the positions that transformers gives the prompt."""
        ids = torch.from_numpy(input_ids)[None]
        inputs = self._inputs(ids, images)
        made = self.model.generate(**inputs, generation_config=self.generation)
        return {
            "input_ids": ids[0],
            "position_ids": self._positions(inputs),
            "answer_ids": made.sequences[0, ids.shape[1] :].contiguous(),
            "logits": torch.cat(made.logits).float(),
        }

    @torch.inference_mode()
    def read(self, ids: torch.Tensor, images: list[ImageInput], **options: Any) -> Any:
        """The model's output for int64 `ids` [tokens] read at once; `options` are those of its forward."""
        return self.model(**self._inputs(ids[None], images), **options)

    @torch.inference_mode()
    def inside(self, ids: torch.Tensor, images: list[ImageInput]) -> dict[str, torch.Tensor]:
        """What the decoder is fed and every point (`hf2mnn.reference.tap_points`) while `ids` [tokens] are read at once."""
        fed = {}

        def note(_: torch.nn.Module, __: tuple, given: dict) -> None:
            embeds = given.get("inputs_embeds")
            # A model that does not see leaves it to its decoder.
            embeds = self.decoder.embed_tokens(given["input_ids"]) if embeds is None else embeds
            embeds = fed["inputs_embeds"] = embeds[0].contiguous()
            if self.family.deepstack:
                fed["deepstack_embeds"] = added = torch.zeros(self.family.deepstack, *embeds.shape)
                if given.get("deepstack_visual_embeds") is not None:
                    added[:, given["visual_pos_masks"][0]] = torch.stack(given["deepstack_visual_embeds"])

        hook = self.decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with recorded(self.model) as points:
                self.read(ids, images)
        finally:
            hook.remove()
        fed |= {"ids": ids, "position_ids": self._positions(self._inputs(ids[None], images))}
        return fed | {name: torch.from_numpy(value) for name, value in points.items()}

    @torch.inference_mode()
    def see(self, image: ImageInput) -> torch.Tensor:
        """float32 [rows, hidden] (`VisionFamily.as_rows`)."""
        grid = torch.from_numpy(image.grid_thw)[None]
        seen = self.model.model.get_image_features(torch.from_numpy(image.pixel_values), grid)
        added = [features[0] for features in seen.deepstack_features] if self.family.deepstack else []
        return torch.cat([seen.pooler_output[0], *added])


def prompt_and_answer(golden: Golden, example: GoldenExample) -> tuple[torch.Tensor, list[ImageInput]]:
    """What `Reference.read` takes for a stored example: int64 ids [tokens] and its images. The answer is read along,
    but for its last token: nothing follows from that one.
    """
    stored = [golden.image(name) for name in example.images]
    ids = np.concatenate([example.input_ids, example.answer_ids[:-1]])
    return torch.from_numpy(ids), [ImageInput(p.pixel_values, p.grid_thw, p.resized) for p in stored]


def _say(example: Example, prompter: Prompter, answer_ids: torch.Tensor) -> dict:
    return {
        "id": example.id,
        "category": example.category,
        "language": example.language,
        "expected": example.answers,
        "metric": example.metric,
        "answer": prompter.decode(answer_ids),
        "messages": example.messages,
        "prompt": prompter.text(example.messages),
        "images": example.images,
    }


def _probes(records: list[dict], lengths: dict[str, int]) -> dict[str, str]:
    """The shortest example without and with images (as few as may be), by kind: looked at layer by layer."""
    kinds = {"text": [r for r in records if not r["images"]], "image": [r for r in records if r["images"]]}
    short = {
        kind: min(found, key=lambda r: (len(r["images"]), lengths[r["id"]], r["id"]))
        for kind, found in kinds.items()
        if found
    }
    return {kind: record["id"] for kind, record in short.items()}


def answerable(examples: list[Example], checkpoint: Checkpoint, evaluation: Path) -> list[Example]:
    """The examples that a model can be asked: those without images, where it does not see.

    Raises:
        EvaluationSetError: there are none.
    """
    found = [example for example in examples if checkpoint.family.sees or not example.images]
    if not found:
        raise EvaluationSetError(
            f"every example of {evaluation} has images, and this {checkpoint.family.model_type} does not see; give it"
            " texts"
        )
    if left := len(examples) - len(found):
        print(f"{left} of {len(examples)} examples have images and are left out: this model does not see")
    return found


def use_threads(threads: int) -> None:
    """Set PyTorch's threads and seed."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def write_reference(
    checkpoint: Checkpoint,
    examples: list[Example],
    originals: dict[str, Image],
    folder: Path,
    max_new_tokens: int,
    weights: str,
) -> dict[str, Any]:
    """Answer `examples`, whose images (`originals`) are given by name, and write the files that `Golden` reads to `folder`.

    Returns:
        Numbers of `examples`, of `labelled` ones and of their `right` answers; where the `weights` were.
    """
    logits = 4 * len(examples) * max_new_tokens * checkpoint.text_config["vocab_size"]
    reference = Reference(checkpoint, max_new_tokens, weights, kept=logits)
    tensors, records, images = {}, [], {}
    for name, original in steps("PyTorch vision", originals.items(), "images"):
        image = images[name] = reference.prompter.image(original)
        tensors |= {
            f"images/{name}/pixel_values": torch.from_numpy(image.pixel_values),
            f"images/{name}/grid_thw": torch.from_numpy(image.grid_thw),
            f"images/{name}/embeds": reference.see(image).contiguous(),
            f"images/{name}/original": torch.from_numpy(np.array(original)),
            f"images/{name}/resized": torch.from_numpy(image.resized),
        }
    for example in steps("PyTorch answers", examples, "examples"):
        seen = [images[name] for name in example.images]
        made = reference.answer(reference.prompter.input_ids(example.messages, seen), seen)
        tensors |= {f"examples/{example.id}/{name}": tensor for name, tensor in made.items()}
        records.append(_say(example, reference.prompter, made["answer_ids"]))
    save_file(tensors, folder / TENSORS)
    probes = _probes(records, {record["id"]: len(tensors[f"examples/{record['id']}/input_ids"]) for record in records})
    inside, named = {}, {record["id"]: record["images"] for record in records}
    for kind, name in probes.items():
        # The answer is read along, but for its last token: nothing follows from that one.
        ids = [tensors[f"examples/{name}/input_ids"], tensors[f"examples/{name}/answer_ids"][:-1]]
        made = reference.inside(torch.cat(ids), [images[file] for file in named[name]])
        inside |= {f"{kind}/{point}": value for point, value in made.items()}
    # One entry: safetensors writes several in random order.
    save_file(inside, folder / ACTIVATIONS, metadata={PROBES: json.dumps(probes, sort_keys=True)})
    (folder / EXAMPLES).write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    labelled = [record for record in records if record["expected"] is not None]
    return {
        "examples": len(records),
        "labelled": len(labelled),
        "right": sum(score_answer(r["metric"], r["answer"], r["expected"]) for r in labelled),
        "weights": reference.weights,
    }
