"""Sensitivity: divergence of the answers when one operator alone is quantized.

PyTorch reads prompts and answers of the calibration set with one weight replaced by its rounded self, and the mean KL
divergence of its predictions from the untouched model's is noted, for a few numbers of bits. Beside it stands, for
every format that the operator could have, how far that is from the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.progress import progress, steps
from hf2mnn.metrics import kl_divergence
from hf2mnn.quant.names import CANDIDATES, EMBEDDING, LM_HEAD, MEASURED
from hf2mnn.quant.rounding import round_rows
from hf2mnn.reference.golden import Golden, GoldenExample, spread_examples
from hf2mnn.reference.mapped import replaced
from hf2mnn.reference.pytorch import Reference, prompt_and_answer
from hf2mnn.reference.tap_points import kept_rows

BITS = tuple(range(2, 9))
BLOCKS = (32, 64, 128, 0)
TYPICAL = 64
"""Block with which a measurement is made, where it divides the inputs."""
ROWS = 128
"""Rows of a weight by which a format's error is judged."""


@dataclass(frozen=True)
class Layer:
    """A weight that can be quantized. `blocks` are the sizes that divide its inputs; `part` as in a bundle."""

    name: str
    part: str
    module: torch.nn.Module
    blocks: tuple[int, ...]

    @property
    def rows(self) -> np.ndarray:
        """float32 [outputs, inputs]."""
        weight = self.module.weight.detach().numpy()
        return weight.reshape(len(weight), -1)

    def rounded(self, rows: np.ndarray, bits: int, block: int) -> np.ndarray:
        return round_rows(rows, bits, block, False, 16, "mse").dequantize()


def layers_of(model: torch.nn.Module, decoder: torch.nn.Module, tied: bool) -> list[Layer]:
    """Linear layers, the patch embedding, and the embedding where it is lm_head's weight."""
    inside, found = {id(module) for module in decoder.modules()}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            part = "decoder" if id(module) in inside or name == LM_HEAD else "vision"
            inputs = module.in_features if isinstance(module, torch.nn.Linear) else module.weight[0].numel()
            # MNN has no blocks in a convolution.
            blocks = BLOCKS if isinstance(module, torch.nn.Linear) else (0,)
            found.append(Layer(name, part, module, tuple(b for b in blocks if b < inputs and inputs % max(b, 1) == 0)))
        elif tied and isinstance(module, torch.nn.Embedding):
            found.append(Layer(EMBEDDING, "decoder", module, ()))
    return found


class Bench:
    """The model, some examples of the calibration set, and its own predictions for their answers."""

    def __init__(self, source: Path, calibration: Path, examples: int, weights: str = "auto") -> None:
        checkpoint = Checkpoint(source)
        # The largest matrix, its rounded self, their difference, and one for what rounding takes.
        rounding = 4 * 4 * max(map(prod, checkpoint.shapes()))
        self.reference = Reference(checkpoint, 1, weights, kept=rounding)
        model = self.reference.model
        golden = Golden(calibration)
        chosen = set(spread_examples(golden.records, examples))
        self.examples = [example for example in golden.examples() if example.id in chosen]
        self.golden = golden
        self.embeds = [self._embeds(example) for example in self.examples]
        self.right = [self._predict(index, whole=False) for index in range(len(self.examples))]
        self.layers = layers_of(model, self.reference.decoder, self.reference.facts["tie_word_embeddings"])

    def _embeds(self, example: GoldenExample) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder is fed, float32 [1, tokens, hidden], and its positions."""
        inside = self.reference.inside(*prompt_and_answer(self.golden, example))
        positions = inside["position_ids"]
        return inside["inputs_embeds"][None], positions[:, None] if len(positions) > 1 else positions

    @torch.inference_mode()
    def _predict(self, index: int, whole: bool) -> np.ndarray:
        """Logits [answer tokens, vocabulary]; `whole` goes through embedding and vision tower again."""
        example, kept = self.examples[index], len(self.examples[index].answer_ids)
        if whole or self.reference.family.deepstack:  # which adds to more than the embeddings
            made = self.reference.read(*prompt_and_answer(self.golden, example), logits_to_keep=kept)
        else:
            embeds, positions = self.embeds[index]
            made = self.reference.model(inputs_embeds=embeds, position_ids=positions, logits_to_keep=kept)
        return made.logits[0].float().numpy()

    def divergence(self, layer: Layer, bits: int) -> tuple[float, float]:
        """(mean KL divergence in nats, relative weight error) with this layer alone in `bits`."""
        block = TYPICAL if TYPICAL in layer.blocks or layer.name == EMBEDDING else 0
        rows = layer.rows
        made = layer.rounded(rows, bits, block)
        error = float(np.linalg.norm(made - rows) / np.linalg.norm(rows))
        whole = layer.part == "vision" or layer.name == EMBEDDING
        with replaced(layer.module, torch.from_numpy(made)):
            found = [self._predict(index, whole) for index in range(len(self.examples))]
        pairs = zip(self.right, found, strict=True)
        return float(np.concatenate([kl_divergence(right, other) for right, other in pairs]).mean()), error


def candidates(layer: Layer) -> list[dict]:
    """A row for every format that the layer can have, with its error by some of the rows."""
    rows, found = layer.rows, []
    sampled = rows[kept_rows(len(rows), ROWS)]
    norm = np.linalg.norm(sampled)
    for bits in BITS:
        for block in layer.blocks:
            error = float(np.linalg.norm(layer.rounded(sampled, bits, block) - sampled) / norm) if norm else 0.0
            row = {"part": layer.part, "operator": layer.name, "bits": bits, "block": block}
            found.append(row | {"weight_error": error})
    return found


def measure_sensitivity(
    checkpoint: Path, calibration: Path, folder: Path, bits: list[int], examples: int, weights: str
) -> dict[str, Any]:
    """Write measured.csv (part, operator, bits, weight_error, mean_kld) and candidates.csv (part, operator, bits,
    block, weight_error) to `folder`.

    Returns:
        Numbers of `operators` and of `positions`; where the `weights` were.
    """
    bench, rows = Bench(checkpoint, calibration, examples, weights), []
    with progress("sensitivity", len(bench.layers) * len(bits), "runs") as shown:
        for layer in bench.layers:
            for width in bits:
                kld, error = bench.divergence(layer, width)
                row = {"part": layer.part, "operator": layer.name, "bits": width}
                rows.append(row | {"weight_error": error, "mean_kld": kld})
                shown.update()
    pd.DataFrame(rows).to_csv(folder / MEASURED, index=False, float_format="%.6g")
    could = [row for layer in steps("formats", bench.layers, "layers") for row in candidates(layer)]
    pd.DataFrame(could).to_csv(folder / CANDIDATES, index=False, float_format="%.6g")
    return {
        "operators": len(bench.layers),
        "positions": sum(map(len, bench.right)),
        "weights": bench.reference.weights,
    }
