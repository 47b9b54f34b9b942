"""Memory and time of a stage, and disk of a run, as functions of the number of weights.

Memory: measured peaks of checkpoints of real shapes (5 million, 2.2 and 8.3 billion weights) plus a margin; the
measurements are in docs/benchmarks/scale.md. Time: several times the time on 2 cores, because a scheduler kills jobs
that exceed their limit.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPICAL_WEIGHTS = 2.2e9  # assumed for a model that is not fetched yet: a 2B model


@dataclass(frozen=True)
class Footprint:
    """Memory and time of a stage: a constant and a part for each weight."""

    memory: float  # MB of Python, its libraries and a small model
    per_weight: float  # bytes for each weight
    minutes: float  # minutes for a small model
    per_billion: float  # minutes for each billion weights

    def memory_mb(self, weights: float) -> int:
        """Return the memory in MB for a model with so many weights."""
        return int(self.memory + self.per_weight * weights / 1e6)

    def runtime_min(self, weights: float) -> int:
        """Return the time limit in minutes for a model with so many weights."""
        return int(self.minutes + self.per_billion * weights / 1e9)


def bundle_bytes(weights: float, embedding: float, bits: float) -> int:
    """Return the size of a bundle with `bits` for each weight, scales included, and an embedding in bfloat16."""
    return int(weights * bits / 8 + 2 * embedding)


def run_bytes(weights: float, embedding: float, bits: list[float], fetched: bool) -> dict[str, int]:
    """Return the bytes that a run writes, by purpose; `bits` has those per weight of each bundle."""
    # The ONNX graphs share the checkpoint's files where one file system holds both.
    sizes = {"checkpoint": int(2 * weights)} if fetched else {}
    sizes["bundles"] = int(2 * embedding) + sum(bundle_bytes(weights, 0, each) for each in bits)
    sizes["float32 baseline"] = bundle_bytes(weights, 0, 32)
    return sizes
