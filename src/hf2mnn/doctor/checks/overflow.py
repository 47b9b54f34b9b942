"""Check whether activations fit into float16, by the reference stage's records of PyTorch's activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hf2mnn.doctor.artifacts import Bundle
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.bundle_config import decoder_settings, vision_settings
from hf2mnn.reference.golden import ACTIVATIONS, Golden
from hf2mnn.reference.tap_points import MAX_ROWS

FLOAT16_MAX = float(np.finfo(np.float16).max)
MARGIN = 4
"""At most MAX_ROWS tokens of a prompt are recorded, and no sums inside operators: other prompts may exceed them."""
NAMED = 3


def _may_use_float16(precision: str, backend: str) -> bool:
    """Return True for "low", which uses float16 where the device can, and for "normal" on other devices than CPUs."""
    return precision == "low" or (precision == "normal" and backend != "cpu")


def largest_activations(reference: Path) -> dict[str, float]:
    """Return the maximum magnitude of each recorded tap point over the probes of a reference."""
    largest: dict[str, float] = {}
    for probe in Golden(reference).probes():
        for name, rows in {**probe.tap_points, "inputs_embeds": probe.inputs_embeds}.items():
            largest[name] = max(largest.get(name, 0.0), float(np.abs(rows).max()))
    return largest


def fp16_overflow(bundle: Bundle) -> Iterator[Finding]:
    """Report activations near or beyond the float16 range where the bundle may be computed in float16."""
    if bundle.reference is None or not (bundle.reference / ACTIVATIONS).is_file():
        return
    activations = largest_activations(bundle.reference)
    backend, mllm = str(bundle.model.get("backend_type", "cpu")), bundle.model.get("mllm")
    vision_backend = mllm.get("backend_type", "cpu") if isinstance(mllm, dict) else backend
    for part, settings, device in (
        ("decoder", decoder_settings(bundle.model), backend),
        ("vision", vision_settings(bundle.model), vision_backend),
    ):
        own = {k: v for k, v in activations.items() if k.startswith("model.visual.") == (part == "vision")}
        near = {name: value for name, value in own.items() if not value * MARGIN < FLOAT16_MAX}
        if not near or not _may_use_float16(settings["precision"], device):
            continue
        beyond = any(not value < FLOAT16_MAX for value in near.values())
        worst = sorted(near, key=near.get, reverse=True)[:NAMED]
        yield Finding(
            severity=Severity.ERROR if beyond else Severity.WARNING,
            where=bundle.locate("precision") if part == "decoder" else "config.json: mllm.precision",
            message=f"activations of the {part} {'exceed' if beyond else 'come near'} the range of float16",
            evidence=", ".join(f"{name} reaches {near[name]:.4g}" for name in worst)
            + f" of {FLOAT16_MAX:.0f}; {len(near)} of {len(own)} tap points, {MAX_ROWS} rows of each prompt recorded,"
            f" precision {settings['precision']!r}, backend {device!r}",
            effect="on an ARM CPU or a GPU the answer repeats one token; an x86 CPU computes in float32",
            cure='set "precision": "high" in config.json',
        )


CHECKS = (fp16_overflow,)
