"""Too little disk or memory for a model is said before anything heavy, in a sentence with figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hf2mnn.checkpoint import room
from hf2mnn.core.errors import CheckpointError
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import SHAPES_VL


def test_too_little_memory_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 500_000_000)
    with pytest.raises(CheckpointError, match=r"takes 1\.2 GB of memory, and 0\.5 GB are free; close other programs"):
        fetch_checkpoint(tmp_path / "checkpoint", SHAPES_VL)
    assert not (tmp_path / "checkpoint").exists()


def test_too_little_disk_for_one_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        CheckpointError, match=r"a bundle of 4 bits of this model would take .* its disk has 0\.00 GB free"
    ):
        fetch_checkpoint(tmp_path / "checkpoint", SHAPES_VL)


def test_a_model_that_fits_passes(tmp_path: Path) -> None:
    room.check_room(SHAPES_VL, tmp_path / "not" / "there" / "yet")
