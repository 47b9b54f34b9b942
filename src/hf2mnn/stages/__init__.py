"""The pipeline: one file is one stage, one command, one rule and one folder of results.

Modules here only wire: they open inputs, call the packages below, and write outputs. They import heavy packages inside
`run`, so that Snakemake and the command line can read the declarations (`STAGE`) quickly. The parameters of `run`
are the options of the command, which `hf2mnn.cli.stages` documents.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from hf2mnn.core.stage import Stage

ORDER = (
    *("fetch", "examples", "reference", "export", "convert", "calibrate", "sensitivity", "plan", "quantize"),
    *("baseline", "evaluate", "diagnose", "benchmark", "report", "compare"),
)
"""Names of the stages in the order of the data."""
CONVERSION = ("fetch", "export", "convert", "quantize")
"""Names of the stages that make a bundle."""


@cache
def stage_named(name: str) -> Stage:
    """Return the declaration of a stage."""
    return import_module(f"hf2mnn.stages.{name}").STAGE


def conversion_memory_mb(weights: float) -> int:
    """Return the peak memory in MB of the conversion of a model with so many weights."""
    return max(stage_named(name).footprint.memory_mb(weights) for name in CONVERSION)
