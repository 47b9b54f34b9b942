"""No check cries about a bundle that is right: ours, and one that holds nothing of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from broken import broken, found
from hf2mnn.core.manifest import NAME
from hf2mnn.doctor.examine import BUNDLE_CHECKS
from support import SHAPES_VL


@pytest.mark.parametrize("variant", ["int4", "fp16"])
def test_a_sound_bundle_has_no_finding(variant: str, results: Path, tmp_path: Path) -> None:
    """With all that is known of it, so that no check has nothing to look at; and by itself."""
    folder = results / "bundles" / variant
    for name, changes in {
        "known": {"checkpoint": SHAPES_VL, "reference": results / "reference/evaluation"},
        "alone": {"model": {"hf2mnn": None}, "files": {NAME: None}},
    }.items():
        assert found(BUNDLE_CHECKS, broken(folder, tmp_path / name, **changes)) == []
