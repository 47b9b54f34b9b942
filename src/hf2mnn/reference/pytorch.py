"""Reference model: transformers in float32 answers an evaluation set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors.numpy import save_file
from transformers import GenerationConfig

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.model_info import model_info
from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.progress import steps
from hf2mnn.reference.examples import Example
from hf2mnn.reference.golden import ACTIVATIONS, EXAMPLES, PROBES, TENSORS, Golden, GoldenExample, ImageInput
from hf2mnn.reference.model import choose_weight_storage, load_model
from hf2mnn.reference.prompts import Preprocessor, check_markers
from hf2mnn.reference.proof import prove
from hf2mnn.reference.tap_recorder import record_tap_points
from hf2mnn.reference.tasks import score_answer


class ReferenceModel:
    """Model of transformers in float32 with its preprocessor; `decoder` is its decoder module without lm_head."""

    def __init__(self, checkpoint: Checkpoint, max_new_tokens: int, weights: str = "auto", reserved: int = 0) -> None:
        """Load a checkpoint; `choose_weight_storage` documents `weights` and `reserved`."""
        self.info = model_info(checkpoint)
        self.preprocessor = Preprocessor(checkpoint.folder, self.info)
        self.weights, reason = choose_weight_storage(checkpoint, weights, reserved)
        print(f"PyTorch weights: {self.weights} ({reason})", file=sys.stderr, flush=True)
        self.model = load_model(checkpoint, self.weights)
        self.family = checkpoint.family
        self.decoder = self.family.language_model(self.model)
        # Not the checkpoint's generation_config.json, which often enables sampling.
        self.generation = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.info["stop_ids"],
            pad_token_id=self.info["stop_ids"][0],
            return_dict_in_generate=True,
            output_logits=True,
        )

    def _inputs(self, ids: torch.Tensor, images: list[ImageInput]) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward for int64 ids [tokens]."""
        ids = ids[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            grids = torch.from_numpy(np.stack([image.grid_thw for image in images]))
            pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in images]))
            # 1 for the tokens of the images, 0 for text and for image tokens in an answer.
            types = (ids == self.info["image_token_id"]).int()
            types *= types.cumsum(dim=-1) <= int(grids.prod(dim=-1).sum()) // self.info["merge_size"] ** 2
            inputs |= {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}
        return inputs

    def _position_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the position ids of transformers, int64 [position_rows, tokens]."""
        ids = inputs["input_ids"]
        if not self.family.has_vision:
            return torch.arange(ids.shape[1])[None]
        types = inputs.get("mm_token_type_ids", torch.zeros_like(ids, dtype=torch.int))
        positions, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=inputs.get("image_grid_thw"))
        return positions[:, 0].contiguous()

    @torch.inference_mode()
    def generate(self, input_ids: np.ndarray, images: list[ImageInput]) -> dict[str, torch.Tensor]:
        """Decode greedily; return input_ids, position_ids, answer_ids and logits as in `GoldenExample`."""
        ids = torch.from_numpy(input_ids)
        inputs = self._inputs(ids, images)
        output = self.model.generate(**inputs, generation_config=self.generation)
        return {
            "input_ids": ids,
            "position_ids": self._position_ids(inputs),
            "answer_ids": output.sequences[0, len(ids) :].contiguous(),
            "logits": torch.cat(output.logits).float(),
        }

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, images: list[ImageInput], **options: Any) -> Any:
        """Return the model's output for int64 `ids` [tokens] in one call; `options` go to its forward."""
        return self.model(**self._inputs(ids, images), **options)

    @torch.inference_mode()
    def forward_with_taps(self, ids: torch.Tensor, images: list[ImageInput]) -> dict[str, torch.Tensor]:
        """Return the tensors of a `GoldenProbe` for int64 `ids` [tokens]: the decoder's inputs, and all tap points."""
        tensors = {"ids": ids, "position_ids": self._position_ids(self._inputs(ids, images))}

        def record_inputs(_: torch.nn.Module, __: tuple, arguments: dict) -> None:
            embeds = arguments.get("inputs_embeds")
            # A model without image input passes ids to its decoder.
            embeds = self.decoder.embed_tokens(arguments["input_ids"]) if embeds is None else embeds
            embeds = tensors["inputs_embeds"] = embeds[0].contiguous()
            if self.family.deepstack_layers:
                features = torch.zeros(self.family.deepstack_layers, *embeds.shape)
                if arguments.get("deepstack_visual_embeds") is not None:
                    features[:, arguments["visual_pos_masks"][0]] = torch.stack(arguments["deepstack_visual_embeds"])
                tensors["deepstack_embeds"] = features

        hook = self.decoder.register_forward_pre_hook(record_inputs, with_kwargs=True)
        with hook, record_tap_points(self.model) as tap_points:
            self.forward(ids, images)
        return tensors | {name: torch.from_numpy(value) for name, value in tap_points.items()}

    @torch.inference_mode()
    def embed_image(self, image: ImageInput) -> torch.Tensor:
        """Return the outputs of the vision tower, joined as by `VisionFamily.concat_outputs`."""
        grid = torch.from_numpy(image.grid_thw)[None]
        output = self.model.model.get_image_features(torch.from_numpy(image.pixel_values), grid)
        deepstack = [features[0] for features in output.deepstack_features] if self.family.deepstack_layers else []
        return torch.cat([output.pooler_output[0], *deepstack])


def prompt_and_answer(golden: Golden, example: GoldenExample) -> tuple[torch.Tensor, list[ImageInput]]:
    """Return the arguments of `ReferenceModel.forward` for a stored example, without the answer's last token."""
    ids = np.concatenate([example.input_ids, example.answer_ids[:-1]])
    return torch.from_numpy(ids), [golden.image(name) for name in example.images]


def usable_examples(examples: list[Example], checkpoint: Checkpoint, folder: Path) -> list[Example]:
    """Return the examples that the model accepts: without image input, those without images.

    Raise EvaluationSetError for the first one whose prompt `check_markers` refuses, before the model is loaded.
    """
    usable = [example for example in examples if checkpoint.family.has_vision or not example.images]
    if not usable:
        raise EvaluationSetError(
            f"every example of {folder} has images, and {checkpoint.family.model_type} models have no image input;"
            " choose a set with texts"
        )
    preprocessor = Preprocessor(checkpoint.folder, model_info(checkpoint))
    for example in usable:
        try:
            check_markers(preprocessor.render(example.messages), len(example.images), checkpoint.family)
        except EvaluationSetError as error:
            raise EvaluationSetError(f"example {example.id!r} of {folder}: {error}") from None
    if skipped := len(examples) - len(usable):
        print(f"skipping {skipped} of {len(examples)} examples: they have images, and the model has no image input")
    return usable


def set_torch_threads(threads: int) -> None:
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
    """Answer examples, write the files that `Golden` reads, and return the results; `originals` are images by name."""
    logits = 4 * len(examples) * max_new_tokens * model_info(checkpoint)["vocab_size"]
    reference = ReferenceModel(checkpoint, max_new_tokens, weights, reserved=logits)
    preprocessor, tensors, inputs, answered = reference.preprocessor, {}, {}, []
    for name, original in steps("PyTorch image embeddings", originals.items(), "images"):
        image = inputs[name] = preprocessor.process_image(original)
        arrays = {**vars(image), "original": np.array(original), "embeds": reference.embed_image(image).numpy()}
        tensors |= {f"images/{name}/{array}": values for array, values in arrays.items()}
    for example in steps("PyTorch answers", examples, "examples"):
        images = [inputs[name] for name in example.images]
        output = reference.generate(preprocessor.input_ids(example.messages, images), images)
        arrays = {name: values.numpy() for name, values in output.items()}
        tensors |= {f"examples/{example.id}/{name}": values for name, values in arrays.items()}
        labels = (example.id, example.category, example.language, example.answers, example.metric)
        answer, prompt = preprocessor.decode(arrays["answer_ids"]), preprocessor.render(example.messages)
        answered.append(GoldenExample(*labels, answer, example.messages, prompt, example.images, **arrays))
    save_file(tensors, folder / TENSORS)
    # The shortest example without images, and of those with the fewest images; the last of a kind is kept.
    ordered = sorted(answered, key=lambda e: (len(e.images), len(e.input_ids), e.id), reverse=True)
    probes, activations = {"image" if example.images else "text": example for example in ordered}, {}
    shortest = probes.get("image") or probes["text"]
    prompt = torch.from_numpy(shortest.input_ids), [inputs[name] for name in shortest.images]
    compared = prove(reference, checkpoint, *prompt)
    for kind, example in probes.items():
        # Without the last token, as in `prompt_and_answer`.
        ids = torch.from_numpy(np.concatenate([example.input_ids, example.answer_ids[:-1]]))
        recorded = reference.forward_with_taps(ids, [inputs[name] for name in example.images])
        activations |= {f"{kind}/{tensor}": values.numpy() for tensor, values in recorded.items()}
    # One metadata entry: safetensors writes several in random order.
    metadata = {PROBES: json.dumps({kind: example.id for kind, example in probes.items()}, sort_keys=True)}
    save_file(activations, folder / ACTIVATIONS, metadata=metadata)
    records = [{key: value for key, value in vars(e).items() if not isinstance(value, np.ndarray)} for e in answered]
    (folder / EXAMPLES).write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    labelled = [example for example in answered if example.expected is not None]
    return {
        "examples": len(answered),
        "labelled": len(labelled),
        "right": sum(score_answer(e.metric, e.answer, e.expected) for e in labelled),
        "weights": reference.weights,
        "equal_to_transformers": compared,
    }
