"""What a model will take: memory and time of each stage, and disk of a run, from the number of its weights.

Memory: measured peaks of checkpoints of true shape (5 million, 2.2 and 8.3 billion weights), and some tenths over
them; docs/benchmarks/scale.md has the measurements. Time: several times what 2 cores took, for a scheduler kills what
is late.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPICAL = 2.2e9
"""Weights taken for a model of which nothing is known before it is fetched: a 2B."""


@dataclass(frozen=True)
class Footprint:
    """`memory` in MB and `minutes`: what Python, its libraries and a small model take. `per_weight` in bytes, and
    `per_billion` in minutes for a billion weights, come on top.
    """

    memory: float
    per_weight: float
    minutes: float
    per_billion: float

    def memory_mb(self, weights: float) -> int:
        return int(self.memory + self.per_weight * weights / 1e6)

    def runtime_min(self, weights: float) -> int:
        return int(self.minutes + self.per_billion * weights / 1e9)


def bundle_bytes(weights: float, embedding: float, bits: float) -> int:
    """Size of a bundle whose weights have so many bits, scales included, with an embedding in bfloat16."""
    return int(weights * bits / 8 + 2 * embedding)


def run_bytes(weights: float, embedding: float, bits: list[float], fetched: bool) -> dict[str, int]:
    """Bytes that a run writes, by what they are for.

    weights, embedding: how many there are, in all and in the embedding. bits: a weight's in each bundle. fetched: the
    checkpoint is downloaded. The ONNX graphs share the checkpoint's files where one file system has both.
    """
    found = {"checkpoint": int(2 * weights)} if fetched else {}
    found["bundles"] = int(2 * embedding) + sum(bundle_bytes(weights, 0, each) for each in bits)
    found["float32 for a diagnosis, removed again"] = bundle_bytes(weights, 0, 32)
    return found
