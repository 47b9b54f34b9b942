"""Checks for weight formats that are correct, but less accurate or larger than necessary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from hf2mnn.doctor.artifacts import Bundle, MnnModel
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.graph import LINEAR, WeightInfo
from hf2mnn.quant.weights import Operator

SMALL_TOWER = 100_000_000
"""Number of weights below which a vision tower counts as small."""


def _quantized(model: MnnModel) -> list[WeightInfo]:
    """Return the quantized linear layers whose weights are in the weight file."""
    return [weight for weight in model.graph.weights() if weight.size and weight.bits < 16 and weight.kernel == 1]


def block_per_channel(model: MnnModel) -> Iterator[Finding]:
    """Report layers with one scale per output channel.

    MNN's converter stores them without an error where the block does not divide the inputs or is not a multiple of
    16. Patch embeddings have no blocks.
    """
    layers = _quantized(model)
    blocks = Counter(layer.block for layer in layers if layer.block)
    usual = blocks.most_common(1)[0][0] if blocks else 0
    fallback = [
        layer for layer in layers if usual and not layer.block and layer.inputs > usual and layer.inputs % usual
    ]
    coarse = [layer for layer in layers if not layer.block and layer.bits < 8]
    if fallback:
        name, inputs = fallback[0].name.removesuffix(LINEAR), fallback[0].inputs
        yield Finding(
            severity=Severity.WARNING,
            where=f"{model.path.name}: {name}",
            message="layers fell back to one scale per output channel",
            evidence=f"{len(fallback)} of {len(layers)} layers; the first has {inputs} inputs; the block is {usual}",
            effect=f"a larger error than that of layers with a scale for every {usual} weights",
            cure="quantize with a block that is a multiple of 16 and divides the inputs of every layer",
        )
    elif not blocks and coarse and len({layer.bits for layer in layers}) == 1:
        yield Finding(
            severity=Severity.ADVICE,
            where=model.path.name,
            message="every layer has one scale per output channel",
            evidence=f"{len(coarse)} layers of {coarse[0].bits} bits (MNN's converter falls back to this, too)",
            effect="a larger error; a scale for every 64 weights costs half a bit per weight",
            cure="""run 'hf2mnn quantize' with "block": 64""",
        )


def _is_float16(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def _fits_float16(model: MnnModel, operator: Operator) -> bool:
    """Return whether float16 scales suffice.

    Scales that are float16 already, with zero points that are not, come from a prequantized checkpoint and are kept
    exactly.
    """
    alpha = model.weight_file.alpha(operator)
    in_range = np.abs(alpha).max(initial=0) <= np.finfo(np.float16).max
    prequantized = alpha.shape[2] == 2 and _is_float16(alpha[:, :, 1]) and not _is_float16(alpha[:, :, 0])
    return bool(in_range and not prequantized)


def scales_32_bit(model: MnnModel) -> Iterator[Finding]:
    """Report float32 scales and zero points; float16 costs no measurable accuracy."""
    if model.foreign:
        return
    wide = [o for o in model.quantized if o.stored["scaleStorage"] != "FP16" and _fits_float16(model, o)]
    if wide:
        saved, weights = sum(o.parts[1][1] for o in wide) // 2, sum(o.size for o in wide)
        yield Finding(
            severity=Severity.ADVICE,
            where=model.weights.name,
            message="scales are stored as float32, and float16 would suffice",
            evidence=f"{len(wide)} operators; float16 saves {saved:,} bytes, {8 * saved / weights:.2f} bits per weight",
            effect="correct output; the file is larger, and slower to read, than necessary",
            cure="""run 'hf2mnn quantize' with "scale_bits": 16, or the converter with --weightQuantScaleBit=16""",
        )


def vision_bits(bundle: Bundle) -> Iterator[Finding]:
    """Report a small vision tower of fewer than 8 bits, unless a plan chose them.

    Measured on small trained checkpoints: 4 bits in the tower cost far more accuracy than 4 bits in the decoder, and
    the tower of a small model is a small part of the bundle. llmexport uses 4 bits for towers of Qwen2-VL's size (665
    million weights). The size from which this is safe was not measured; SMALL_TOWER lies in between.
    """
    model = bundle.models.get("vision")
    layers = _quantized(model) if model else []
    weights = sum(layer.inputs * layer.outputs for layer in model.graph.weights()) if model else 0
    low = [layer for layer in layers if layer.bits < 8]
    planned = bundle.manifest is not None and "plan" in bundle.manifest.inputs
    if low and weights < SMALL_TOWER and not planned:
        extra = sum(layer.size * (8 - layer.bits) // layer.bits for layer in low)
        yield Finding(
            severity=Severity.WARNING,
            where=model.path.name,
            message=f"a small vision tower has weights of {min(layer.bits for layer in low)} bits",
            evidence=f"{len(low)} of {len(layers)} layers; {weights:,} weights in all",
            effect="image understanding degrades far more than text does with as many bits in the decoder",
            cure=f"""run 'hf2mnn quantize' with --vision '{{"bits": 8}}', for about {extra:,} more bytes""",
        )


MODEL_CHECKS = (block_per_channel, scales_32_bit)
