"""How weights are stored: right, but worse or larger than they need be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle, Model
from hf2mnn.mnn.graph import LINEAR, WeightInfo
from hf2mnn.quant.weights import LEVELS, Operator

SMALL_TOWER = 100_000_000
"""Weights of a vision tower that is small."""


def _stored(model: Model) -> list[WeightInfo]:
    """Quantized linear layers whose weights are in the weight file."""
    return [one for one in model.graph.weights() if one.size and one.bits < 16 and one.kernel == 1]


def block_per_channel(model: Model) -> Iterator[Finding]:
    """MNN's converter stores one scale a channel, without a word, where the block does not divide the inputs or is no
    multiple of 16. A patch embedding has no blocks.
    """
    stored = _stored(model)
    if not stored:
        return
    channel = [one for one in stored if not one.block]
    blocks = Counter(one.block for one in stored if one.block)
    usual = blocks.most_common(1)[0][0] if blocks else 0
    fell = [one for one in channel if usual and one.inputs > usual and one.inputs % usual]
    rough = [one for one in channel if one.bits < 8]
    if fell:
        first = fell[0]
        yield Finding(
            "block_per_channel",
            Severity.WARNING,
            f"{model.path.name}: {first.name.removesuffix(LINEAR)}",
            "layers fell back to one scale for a whole output channel",
            f"{len(fell)} of {len(stored)} layers, the first with {first.inputs} inputs, which blocks of {usual} do not"
            " divide",
            f"their error is larger than that of the layers with a scale for every {usual} weights",
            "quantize with a block that is a multiple of 16 and divides the inputs of every layer",
        )
    elif not blocks and rough and len({one.bits for one in stored}) == 1:
        yield Finding(
            "block_per_channel",
            Severity.ADVICE,
            model.path.name,
            "every layer has one scale for a whole output channel",
            f"{len(rough)} layers of {rough[0].bits} bits; a block that does not fit the layers ends like this, too",
            "with a scale for every 64 weights the error is smaller, for half a bit a weight",
            """'hf2mnn quantize' with "block": 64""",
        )


def _exact(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def _halves(model: Model, operator: Operator) -> bool:
    """Whether half floats would do. Scales that are half floats already, with zeros that are none, are those of a
    packed checkpoint taken over bit by bit: rounded, they would not be its weights any more.
    """
    alpha = model.file.alpha(operator)
    fits = np.abs(alpha).max(initial=0) <= np.finfo(np.float16).max
    taken = alpha.shape[2] == 2 and _exact(alpha[:, :, 1]) and not _exact(alpha[:, :, 0])
    return bool(fits and not taken)


def scales_32_bit(model: Model) -> Iterator[Finding]:
    """Scales and zeros as float32, where rounded to half floats they cost no accuracy that was measured."""
    if model.foreign:
        return
    wide = [
        operator
        for operator in model.operators
        if operator.stored and operator.stored["type"] == LEVELS and operator.stored["scaleStorage"] != "FP16"
    ]
    found = [operator for operator in wide if _halves(model, operator)]
    if found:
        saved, weights = sum(o.parts[1][1] for o in found) // 2, sum(o.size for o in found)
        yield Finding(
            "scales_32_bit",
            Severity.ADVICE,
            model.weights.name,
            "scales are stored as 32-bit floats, where half floats would do",
            f"{len(found)} of {len(model.operators)} operators; half floats would take {saved:,} bytes less"
            f" ({8 * saved / weights:.2f} bits a weight)",
            "none; it is larger, and slower to read, than it need be",
            """'hf2mnn quantize' with "scale_bits": 16, or the converter with --weightQuantScaleBit=16""",
        )


def vision_bits(bundle: Bundle) -> Iterator[Finding]:
    """A small vision tower below 8 bits.

    Measured on small trained checkpoints: 4 bits in the tower cost the answers far more than 4 bits in the decoder, and
    the tower of a small model is a small part of the bundle. Towers of the size of Qwen2-VL's (665 million weights) are
    shipped with 4 bits by llmexport. From which size on that is well was not measured; SMALL_TOWER lies between the
    two. Bits that a plan chose, by what they cost the answers, are not spoken of.
    """
    model = bundle.models.get("vision")
    stored = _stored(model) if model else []
    weights = sum(one.inputs * one.outputs for one in model.graph.weights()) if model else 0
    low = [one for one in stored if one.bits < 8]
    planned = bundle.manifest is not None and "plan" in bundle.manifest.inputs
    if low and weights < SMALL_TOWER and not planned:
        more = sum(one.size * (8 - one.bits) // one.bits for one in low)
        yield Finding(
            "vision_bits",
            Severity.WARNING,
            model.path.name,
            f"a small vision tower has weights of {min(one.bits for one in low)} bits",
            f"{len(low)} of {len(stored)} layers; {weights:,} weights in all",
            "what is seen in images suffers far more than text does from as many bits in the decoder",
            f"""'hf2mnn quantize' with --vision '{{"bits": 8}}', for about {more:,} bytes more""",
        )
