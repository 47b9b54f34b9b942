"""Requests to a scheduler: more than the measured peaks, and not much more."""

from __future__ import annotations

import pytest

from hf2mnn.machine.footprint import Footprint, run_bytes
from hf2mnn.stages import CONVERSION, ORDER, conversion_memory_mb, stage_named

MEASURED = {  # peak in MB by stage, variant and number of weights; docs/benchmarks/scale.md
    ("fetch", None, 2.209e9): 411,
    ("fetch", None, 8.291e9): 411,
    ("export", None, 2.209e9): 643,
    ("convert", None, 2.209e9): 160,
    ("quantize", None, 2.209e9): 403,
    ("reference", None, 2.209e9): 9470,
    ("evaluate", "onnxruntime", 2.209e9): 13078,
    ("evaluate", "int4", 2.209e9): 9073,
}


def footprints() -> list[Footprint]:
    stages = map(stage_named, ORDER)
    return [footprint for stage in stages for footprint in (stage.footprint, *stage.exceptions.values())]


@pytest.mark.parametrize(("stage", "variant", "weights"), MEASURED)
def test_requested_memory_exceeds_the_measured_peak_by_a_margin(
    stage: str, variant: str | None, weights: float
) -> None:
    requested = stage_named(stage).footprint_of(variant).memory_mb(weights)
    assert MEASURED[stage, variant, weights] < requested < 1.3 * MEASURED[stage, variant, weights] + 1300


def test_larger_models_request_more() -> None:
    for footprint in footprints():
        for small, large in ((5e6, 2.2e9), (2.2e9, 8.3e9)):
            assert footprint.memory_mb(small) <= footprint.memory_mb(large)
            growing = footprint.per_billion > 0
            assert (footprint.runtime_min(small) < footprint.runtime_min(large)) == growing


def test_no_stage_of_the_conversion_holds_the_model() -> None:
    """A 2B model converts in 2.5 GB, and its checkpoint has 4.4 GB."""
    assert [name for name in CONVERSION if stage_named(name).footprint.memory_mb(2.2e9) >= 2500] == []
    assert conversion_memory_mb(2.2e9) < 2500


def test_disk_is_that_of_bundles_and_download() -> None:
    sizes = run_bytes(2e9, 0.2e9, [4.5, 8], fetched=True)
    assert sizes["checkpoint"] == 4e9
    assert sizes["bundles"] == int(0.4e9 + 2e9 * 12.5 / 8)  # variants share the embedding's file
    assert sum(run_bytes(2e9, 0.2e9, [4.5, 8], fetched=False).values()) == sum(sizes.values()) - 4e9
