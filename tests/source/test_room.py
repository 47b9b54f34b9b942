"""Too little disk or memory for a model is said before anything heavy, in a sentence with figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hf2mnn.errors import SourceError
from hf2mnn.source import room
from hf2mnn.source.fetch import fetch_source
from support import SHAPES_VL


def test_too_little_memory_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 500_000_000)
    with pytest.raises(SourceError, match=r"takes 1\.2 GB of memory, and 0\.5 GB are free; close other programs"):
        fetch_source(tmp_path / "source", SHAPES_VL)
    assert not (tmp_path / "source").exists()


def test_too_little_disk_for_one_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(SourceError, match=r"a bundle of 4 bits of this model would take .* its disk has 0\.00 GB free"):
        fetch_source(tmp_path / "source", SHAPES_VL)


def test_a_model_that_fits_passes(tmp_path: Path) -> None:
    room.check_room(SHAPES_VL, tmp_path / "not" / "there" / "yet")
