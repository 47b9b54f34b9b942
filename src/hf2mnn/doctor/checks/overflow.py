"""Whether the model's activations fit into half floats, by what the `reference` stage has recorded of PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hf2mnn.doctor.checks.config import place
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle
from hf2mnn.mnn.settings import engine_settings, vision_settings
from hf2mnn.reference.golden import ACTIVATIONS, Golden
from hf2mnn.reference.tap_points import ROWS

LARGEST = float(np.finfo(np.float16).max)
MARGIN = 4
"""Of the tokens of a prompt at most ROWS are recorded, and sums inside an operator are not: what comes this near can be
beyond with another prompt."""
NAMED = 3


def _half(precision: str, backend: str) -> bool:
    """Whether a device may compute in half floats: with "low" where it can, with "normal" everywhere but on a CPU."""
    return precision == "low" or (precision == "normal" and backend != "cpu")


def largest_activations(reference: Path) -> dict[str, float]:
    """The largest size of each recorded point (`hf2mnn.reference.tap_points`), over the probes of a reference."""
    found: dict[str, float] = {}
    for probe in Golden(reference).probes():
        for name, rows in {**probe.points, "inputs_embeds": probe.inputs_embeds}.items():
            found[name] = max(found.get(name, 0.0), float(np.abs(rows).max()))
    return found


def fp16_overflow(bundle: Bundle) -> Iterator[Finding]:
    if bundle.reference is None or not (bundle.reference / ACTIVATIONS).is_file():
        return
    points = largest_activations(bundle.reference)
    backend = str(bundle.model.get("backend_type", "cpu"))
    own = bundle.model.get("mllm")
    for part, settings, of in (
        ("decoder", engine_settings(bundle.model), backend),
        ("vision", vision_settings(bundle.model), own.get("backend_type", "cpu") if isinstance(own, dict) else backend),
    ):
        inside = {name: size for name, size in points.items() if name.startswith("model.visual.") == (part == "vision")}
        near = {name: size for name, size in inside.items() if not size * MARGIN < LARGEST}
        if not near or not _half(settings["precision"], of):
            continue
        beyond = any(not size < LARGEST for size in near.values())
        worst = sorted(near, key=near.get, reverse=True)[:NAMED]
        yield Finding(
            "fp16_overflow",
            Severity.ERROR if beyond else Severity.WARNING,
            place(bundle, "precision") if part == "decoder" else "config.json: mllm.precision",
            f"activations of the {part} {'do not fit' if beyond else 'come near to what fits'} into half floats, in"
            " which this bundle may be computed",
            ", ".join(f"{name} reaches {near[name]:.4g}" for name in worst)
            + f"; half floats end at {LARGEST:.0f}; {len(near)} of {len(inside)} points, {ROWS} rows of each prompt"
            f" recorded, precision {settings['precision']!r}, backend {of!r}",
            "on an ARM CPU or a GPU such values become infinite, and the answer is nothing but one token; an x86 CPU"
            " computes in float32 and does not show it",
            'write "precision": "high" into config.json',
        )


CHECKS = (fp16_overflow,)
