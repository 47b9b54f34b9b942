"""Checks of number formats: weights less accurate or larger than necessary, and activations beyond float16."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from hf2mnn.doctor.artifacts import Bundle, MnnModel
from hf2mnn.doctor.findings import Finding, Findings, Severity
from hf2mnn.mnn.bundle_config import decoder_settings, vision_settings
from hf2mnn.mnn.graph import LINEAR, WeightInfo
from hf2mnn.quant.weights import Operator
from hf2mnn.reference.golden import ACTIVATIONS, MAX_ROWS, Golden

SMALL_TOWER = 100_000_000  # number of weights below which a vision tower counts as small
FLOAT16_MAX = float(np.finfo(np.float16).max)
MARGIN = 4
"""At most MAX_ROWS tokens of a prompt are recorded, and no sums inside operators: other prompts may exceed them."""
NAMED = 3


def _quantized(model: MnnModel) -> list[WeightInfo]:
    """Return the quantized linear layers whose weights are in the weight file; patch embeddings have no blocks."""
    return [weight for weight in model.graph.weights() if weight.size and weight.bits < 16 and weight.kernel == 1]


def block_per_channel(model: MnnModel) -> Findings:
    """Report layers with one scale per output channel, to which MNN's converter falls back without an error."""
    layers = _quantized(model)
    coarse = [layer for layer in layers if not layer.block]
    blocks = Counter(layer.block for layer in layers if layer.block)
    usual = blocks.most_common(1)[0][0] if blocks else 0
    fallback = [layer for layer in coarse if usual and layer.inputs > usual and layer.inputs % usual]
    if fallback:
        first = fallback[0]
        where = f"{model.path.name}: {first.name.removesuffix(LINEAR)}"
        message = "layers fell back to one scale per output channel"
        evidence = f"{len(fallback)} of {len(layers)} layers; the first has {first.inputs} inputs; the block is {usual}"
        effect = f"a larger error than that of layers with a scale for every {usual} weights"
        cure = "quantize with a block that is a multiple of 16 and divides the inputs of every layer"
        yield Finding(where, message, evidence, effect, cure, severity=Severity.WARNING)
    elif not blocks and len(bits := {layer.bits for layer in coarse}) == 1 and max(bits) < 8:
        message = "every layer has one scale per output channel"
        evidence = f"{len(coarse)} layers of {max(bits)} bits (MNN's converter falls back to this, too)"
        effect = "a larger error; a scale for every 64 weights costs half a bit per weight"
        cure = """run 'hf2mnn quantize' with "block": 64"""
        yield Finding(model.path.name, message, evidence, effect, cure, severity=Severity.ADVICE)


def _fits_float16(model: MnnModel, operator: Operator) -> bool:
    """Return whether float16 suffices; scales of a prequantized checkpoint (wider zero points) are kept exactly."""
    alpha = model.weight_file.alpha(operator)
    with np.errstate(over="ignore"):
        exact = (alpha.astype(np.float16).astype(np.float32) == alpha).all(axis=(0, 1)).tolist()
    return bool(np.abs(alpha).max(initial=0) <= FLOAT16_MAX) and exact != [False, True]  # zero points, scales


def scales_32_bit(model: MnnModel) -> Findings:
    """Report float32 scales and zero points; float16 costs no measurable accuracy."""
    if model.foreign:
        return
    wide = [o for o in model.quantized if o.stored["scaleStorage"] != "FP16" and _fits_float16(model, o)]
    if wide:
        saved, weights = sum(o.parts[1][1] for o in wide) // 2, sum(o.size for o in wide)
        message = "scales are stored as float32, and float16 would suffice"
        evidence = f"{len(wide)} operators; float16 saves {saved:,} bytes, {8 * saved / weights:.2f} bits per weight"
        effect = "correct output; the file is larger, and slower to read, than necessary"
        cure = """run 'hf2mnn quantize' with "scale_bits": 16, or the converter with --weightQuantScaleBit=16"""
        yield Finding(model.weights.name, message, evidence, effect, cure, severity=Severity.ADVICE)


def vision_bits(bundle: Bundle) -> Findings:
    """Report a small vision tower of fewer than 8 bits, unless a plan chose them.

    Measured on small trained checkpoints: 4 bits in the tower cost far more accuracy than 4 bits in the decoder, and
    the tower of a small model is a small part of the bundle. llmexport uses 4 bits for towers of Qwen2-VL's size (665
    million weights). The size from which this is safe was not measured; SMALL_TOWER lies in between.
    """
    model = bundle.models.get("vision")
    if model is None or (bundle.manifest and "plan" in bundle.manifest.inputs):
        return
    layers, weights = _quantized(model), sum(layer.inputs * layer.outputs for layer in model.graph.weights())
    low = [layer for layer in layers if layer.bits < 8]
    if low and weights < SMALL_TOWER:
        extra = sum(layer.size * (8 - layer.bits) // layer.bits for layer in low)
        message = f"a small vision tower has weights of {min(layer.bits for layer in low)} bits"
        evidence = f"{len(low)} of {len(layers)} layers; {weights:,} weights in all"
        effect = "image understanding degrades far more than text does with as many bits in the decoder"
        cure = f"""run 'hf2mnn quantize' with --vision '{{"bits": 8}}', for about {extra:,} more bytes"""
        yield Finding(model.path.name, message, evidence, effect, cure, severity=Severity.WARNING)


def largest_activations(reference: Path) -> dict[str, float]:
    """Return the maximum magnitude of each recorded tap point over the probes of a reference."""
    largest: dict[str, float] = {}
    for probe in Golden(reference).probes():
        for name, rows in {**probe.tap_points, "inputs_embeds": probe.inputs_embeds}.items():
            largest[name] = max(largest.get(name, 0.0), float(np.abs(rows).max()))
    return largest


def fp16_overflow(bundle: Bundle) -> Findings:
    """Report recorded PyTorch activations near or beyond the float16 range where the engine may use float16.

    It does with precision "low" where the device can, and with "normal" on other devices than CPUs.
    """
    if bundle.reference is None or not (bundle.reference / ACTIVATIONS).is_file():
        return
    activations = largest_activations(bundle.reference)
    backend, mllm = str(bundle.model.get("backend_type", "cpu")), bundle.model.get("mllm")
    vision_backend = mllm.get("backend_type", "cpu") if isinstance(mllm, dict) else backend
    for part, settings, device, where in (
        ("decoder", decoder_settings(bundle.model), backend, bundle.locate("precision")),
        ("vision", vision_settings(bundle.model), vision_backend, "config.json: mllm.precision"),
    ):
        precision = settings["precision"]
        own = {k: v for k, v in activations.items() if k.startswith("model.visual.") == (part == "vision")}
        near = {name: value for name, value in own.items() if not value * MARGIN < FLOAT16_MAX}
        if not near or not (precision == "low" or (precision == "normal" and device != "cpu")):
            continue
        beyond = any(not value < FLOAT16_MAX for value in near.values())
        worst = [f"{name} reaches {near[name]:.4g}" for name in sorted(near, key=near.get, reverse=True)[:NAMED]]
        message = f"activations of the {part} {'exceed' if beyond else 'come near'} the range of float16"
        recorded = f"{len(near)} of {len(own)} tap points, {MAX_ROWS} rows of each prompt recorded"
        computed = f"precision {precision!r}, backend {device!r}"
        evidence = f"{', '.join(worst)} of {FLOAT16_MAX:.0f}; {recorded}, {computed}"
        effect = "on an ARM CPU or a GPU the answer repeats one token; an x86 CPU computes in float32"
        severity = Severity.ERROR if beyond else Severity.WARNING
        yield Finding(where, message, evidence, effect, 'set "precision": "high" in config.json', severity=severity)


MODEL_CHECKS = (block_per_channel, scales_32_bit)
