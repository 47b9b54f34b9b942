"""sensitivity: divergence of the answers when one operator alone is quantized, for bits: auto.

Reads a checkpoint and its answers to the calibration set.
Writes measured.csv and candidates.csv.
"""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint

STAGE = Stage(
    "sensitivity",
    tools=("torch", "transformers", "numba"),
    footprint=Footprint(3000, 6.0, 120, 1200),
    inputs={"checkpoint": "fetch", "calibration": "reference"},
)


def run(
    checkpoint: Path,
    calibration: Path,
    destination: Path,
    bits: list[int],
    examples: int,
    threads: int,
    weights: str = "auto",
) -> Path:
    """Measure the divergence for each operator and each number of bits.

    Raises:
        ManifestError: An input differs from its manifest.
    """
    from hf2mnn.quant.sensitivity import measure_sensitivity
    from hf2mnn.reference.pytorch import set_torch_threads

    folders = {"checkpoint": checkpoint, "calibration": calibration}
    settings = {"bits": bits, "examples": examples, "threads": threads}
    with open_stage(STAGE, destination, folders, settings) as stage:
        set_torch_threads(threads)
        stage.results.update(measure_sensitivity(checkpoint, calibration, stage.folder, bits, examples, weights))
    return destination
