"""The embedded model's bundle and checkpoint in place of random ones, which would have to be made first."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundle(results: Path) -> Path:
    """The float32 bundle. Tests only read it."""
    return results / "bundles" / "fp32"


@pytest.fixture(scope="session")
def checkpoint_folder(results: Path) -> Path:
    """The checkpoint of `bundle`."""
    return results / "checkpoint"
