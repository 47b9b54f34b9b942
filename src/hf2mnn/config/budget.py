"""Budget of a mixed-precision bundle, as config.yaml and the planner read it."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """Limit on the size of a bundle; one of the two is set."""

    bits_per_weight: float | None = None  # mean of decoder and vision tower, scales included
    bundle_bytes: int | None = None  # size of the whole bundle


def parse_budget(text: str | float) -> Budget:
    """Parse bits per weight (4.25) or a bundle size with its unit (850MB); raise ValueError for another text."""
    match = BUDGET.fullmatch(str(text))
    unit = match[2].upper() if match else None
    if unit not in UNITS:
        raise ValueError(f"{text!r} is not a budget: give bits per weight (4.25) or the bundle's size (850MB)")
    if unit:
        return Budget(bundle_bytes=int(float(match[1]) * UNITS[unit]))
    if not 1 < float(match[1]) <= 16:
        raise ValueError(f"{text} is not a number of bits per weight; for the bundle's size give a unit (850MB)")
    return Budget(bits_per_weight=float(match[1]))
