"""Sensitivity: divergence of the answers when one operator alone is quantized.

PyTorch predicts the answers of the calibration set with one weight quantized, for a few numbers of bits. The measure is
the mean KL divergence from the predictions of the original model. Weight errors are computed for all possible formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.progress import steps
from hf2mnn.metrics import kl_divergence
from hf2mnn.quant.formats import CANDIDATES, EMBEDDING, LM_HEAD, MEASURED, WeightFormat
from hf2mnn.quant.rounding import round_rows
from hf2mnn.reference.golden import Golden, GoldenExample, evenly_spaced, sample_examples
from hf2mnn.reference.model import override_weight
from hf2mnn.reference.pytorch import ReferenceModel, prompt_and_answer

BITS = tuple(range(2, 9))
BLOCKS = (32, 64, 128, 0)
MEASURED_BLOCK = 64
"""Block of a measurement, if it divides the inputs."""
SAMPLED_ROWS = 128
"""Rows of a weight by which the error of a format is judged."""


@dataclass(frozen=True)
class Layer:
    """A weight that can be quantized, of a part of the model; `blocks` divide its inputs."""

    name: str
    part: str
    module: torch.nn.Module
    blocks: tuple[int, ...]

    @property
    def rows(self) -> np.ndarray:
        """The weight, float32 [outputs, inputs]."""
        weight = self.module.weight.detach().numpy()
        return weight.reshape(len(weight), -1)


def requantize(rows: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Return float32 rows after quantization."""
    return round_rows(rows, WeightFormat(bits, block, method="mse")).dequantize()


def layers_of(model: torch.nn.Module, decoder: torch.nn.Module, tied: bool) -> list[Layer]:
    """Return the linear layers, the patch embedding, and the embedding if it shares the weight of lm_head."""
    in_decoder, layers = {id(module) for module in decoder.modules()}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            part = "decoder" if id(module) in in_decoder or name == LM_HEAD else "vision"
            inputs = module.in_features if isinstance(module, torch.nn.Linear) else module.weight[0].numel()
            # MNN has no blocks in a convolution.
            blocks = BLOCKS if isinstance(module, torch.nn.Linear) else (0,)
            fitting = tuple(block for block in blocks if block < inputs and inputs % max(block, 1) == 0)
            layers.append(Layer(name, part, module, fitting))
        elif tied and isinstance(module, torch.nn.Embedding):
            layers.append(Layer(EMBEDDING, "decoder", module, ()))
    return layers


class SensitivityMeter:
    """The model, some examples of the calibration set, and its predictions of their answers."""

    def __init__(self, checkpoint_folder: Path, calibration: Path, examples: int, weights: str = "auto") -> None:
        checkpoint = Checkpoint(checkpoint_folder)
        # The largest matrix, its quantized form, their difference, and the work memory of quantization.
        reserved = 4 * 4 * max(map(prod, checkpoint.shapes()))
        self.reference = ReferenceModel(checkpoint, 1, weights, reserved=reserved)
        self.golden = Golden(calibration)
        chosen = set(sample_examples(self.golden.records, examples))
        self.examples = [example for example in self.golden.examples() if example.id in chosen]
        self.embeds = [self._embeds(example) for example in self.examples]
        self.predictions = [self.predict(index, whole=False) for index in range(len(self.examples))]
        tied = self.reference.info["tie_word_embeddings"]
        self.layers = layers_of(self.reference.model, self.reference.decoder, tied)

    def _embeds(self, example: GoldenExample) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs of the decoder: float32 [1, tokens, hidden] and position ids."""
        values = self.reference.forward_with_taps(*prompt_and_answer(self.golden, example))
        positions = values["position_ids"]
        return values["inputs_embeds"][None], positions[:, None] if len(positions) > 1 else positions

    @torch.inference_mode()
    def predict(self, index: int, whole: bool) -> np.ndarray:
        """Return logits float32 [answer tokens, vocabulary]; `whole` runs embedding and vision tower again."""
        example, kept = self.examples[index], len(self.examples[index].answer_ids)
        if whole or self.reference.family.deepstack_layers:  # the vision tower adds to layers as well
            output = self.reference.forward(*prompt_and_answer(self.golden, example), logits_to_keep=kept)
        else:
            embeds, positions = self.embeds[index]
            output = self.reference.model(inputs_embeds=embeds, position_ids=positions, logits_to_keep=kept)
        return output.logits[0].float().numpy()

    def divergence(self, layer: Layer, bits: int) -> tuple[float, float]:
        """Return mean KL divergence in nats and relative weight error with this layer alone quantized to `bits`."""
        block = MEASURED_BLOCK if MEASURED_BLOCK in layer.blocks or layer.name == EMBEDDING else 0
        rows = layer.rows
        quantized = requantize(rows, bits, block)
        error = float(np.linalg.norm(quantized - rows) / np.linalg.norm(rows))
        whole = layer.part == "vision" or layer.name == EMBEDDING
        with override_weight(layer.module, torch.from_numpy(quantized)):
            predictions = [self.predict(index, whole) for index in range(len(self.examples))]
        pairs = zip(self.predictions, predictions, strict=True)
        return float(np.concatenate([kl_divergence(p, q) for p, q in pairs]).mean()), error


def candidates(layer: Layer) -> list[dict[str, Any]]:
    """Return a row for every format that the layer can have, with its error on some rows of the weight."""
    rows, table = layer.rows, []
    rows = rows[evenly_spaced(len(rows), SAMPLED_ROWS)]
    norm = np.linalg.norm(rows)
    for bits, block in product(BITS, layer.blocks):
        error = float(np.linalg.norm(requantize(rows, bits, block) - rows) / norm) if norm else 0.0
        row = {"part": layer.part, "operator": layer.name, "bits": bits, "block": block}
        table.append(row | {"weight_error": error})
    return table


def measure_sensitivity(
    checkpoint: Path, calibration: Path, folder: Path, bits: list[int], examples: int, weights: str
) -> dict[str, Any]:
    """Write the tables of the sensitivity stage.

    measured.csv has columns part, operator, bits, weight_error, mean_kld; candidates.csv has part, operator, bits,
    block, weight_error. Return numbers of `operators` and of `positions`, and where the `weights` were.
    """
    meter, measured, formats = SensitivityMeter(checkpoint, calibration, examples, weights), [], []
    for layer, width in steps("sensitivity", list(product(meter.layers, bits)), "runs"):
        kld, error = meter.divergence(layer, width)
        row = {"part": layer.part, "operator": layer.name, "bits": width}
        measured.append(row | {"weight_error": error, "mean_kld": kld})
    for layer in steps("formats", meter.layers, "layers"):
        formats += candidates(layer)
    for name, rows in ((MEASURED, measured), (CANDIDATES, formats)):
        pd.DataFrame(rows).to_csv(folder / name, index=False, float_format="%.6g")
    positions = sum(map(len, meter.predictions))
    return {"operators": len(meter.layers), "positions": positions, "weights": meter.reference.weights}
