"""The pipeline: one file is one stage, one command, one rule and one folder of results.

`run` of a stage is its command: its parameters are the options, its docstring is the help. Stages only wire, and import
heavy packages inside functions, so that Snakemake and `--help` read the declarations (`STAGE`) quickly.
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
CONVERSION = ("fetch", "export", "convert", "quantize")  # the stages that make a bundle


@cache
def stage_named(name: str) -> Stage:
    """Return the declaration of a stage."""
    return import_module(f"hf2mnn.stages.{name}").STAGE


def conversion_memory_mb(weights: float) -> int:
    """Return the peak memory in MB of the conversion of a model with so many weights."""
    return max(stage_named(name).footprint.memory_mb(weights) for name in CONVERSION)
