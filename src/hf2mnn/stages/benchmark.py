"""benchmark: speed and memory of the bundles of a model, timed in interleaved runs.

Reads bundles.
Writes a row for each run and measure, their medians and ratios, and the gain of the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import ConfigError
from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint
from hf2mnn.machine.hardware import cores

STAGE = Stage("benchmark", tools=("MNN", "numpy"), footprint=Footprint(1500, 4.2, 60, 240))


def run(
    bundles: dict[str, Path],
    baseline: str,
    destination: Path,
    repeats: int = 5,
    prompt_tokens: int = 512,
    answer_tokens: int = 64,
    threads: int = 0,
    image_side: int = 224,
    lengths: Sequence[int] | None = None,
    time_limit: float = 7200,
) -> dict[str, Any]:
    """Time each bundle `repeats` times with equal threads, and return the summary.

    Raises:
        ConfigError: `baseline` is not a bundle.
        BundleError, EngineError: A bundle is incomplete, the engine was stopped, or it runs no bundle.
    """
    from hf2mnn.evaluation.benchmark import LENGTHS, check_bundles, write_benchmark

    if baseline not in bundles:
        raise ConfigError(f"--baseline: there is no bundle {baseline!r}; there are {', '.join(bundles)}")
    folders = check_bundles(bundles)
    options = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "image_side": image_side}
    options["lengths"] = list(LENGTHS if lengths is None else lengths)
    chosen = {"baseline": baseline, "repeats": repeats, "threads": threads or cores(), **options}
    with open_stage(STAGE, destination, folders, chosen) as stage:
        manifests = stage.inputs.items()
        sizes = {name: sum(entry["size"] for entry in manifest.outputs.values()) for name, manifest in manifests}
        summary = write_benchmark(folders, sizes, chosen, options, stage.folder, time_limit)
        stage.results["machine"] = summary["machine"]
    return summary
