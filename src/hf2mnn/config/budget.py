"""How large a bundle of mixed precision may become: config.yaml and the planner mean the same by it."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """Either bits a weight, scales included, over decoder and vision tower; or bytes of the whole bundle."""

    bits_per_weight: float | None = None
    bundle_bytes: int | None = None


def parse_budget(text: str | float) -> Budget:
    """4.25 is bits a weight; "850MB" is bytes of the bundle. Raises ValueError for anything else."""
    found = BYTES.fullmatch(str(text))
    unit = found[2].upper() if found else None
    if unit not in UNITS:
        raise ValueError(f"{text!r} is no budget: give bits a weight (4.25) or the bundle's size (850MB)")
    if unit:
        return Budget(bundle_bytes=int(float(found[1]) * UNITS[unit]))
    if not 1 < float(found[1]) <= 16:
        raise ValueError(f"{text} bits a weight is no budget; for the size of the bundle give a unit, as in 850MB")
    return Budget(bits_per_weight=float(found[1]))
