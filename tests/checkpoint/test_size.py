"""Size of a model before it is fetched, and checks of disk and memory."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf2mnn.checkpoint import size as checkpoint_size
from hf2mnn.checkpoint.hub.pin import load_pin
from hf2mnn.checkpoint.size import check_disk, check_resources, model_size
from hf2mnn.core.errors import CheckpointError
from hf2mnn.machine.footprint import TYPICAL_WEIGHTS
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import SHAPES_VL


def test_size_of_a_local_checkpoint_comes_from_its_headers() -> None:
    size = model_size(str(SHAPES_VL), None)
    assert size.known
    assert size.weights == pytest.approx(5.2e6, rel=0.02)
    assert size.embedding == 640 * 256


def test_size_of_a_pin_comes_from_its_shards(tmp_path: Path) -> None:
    files = {
        "config.json": {"size": 10, "sha256": None, "blob_id": "1" * 40},
        "model-00001-of-00002.safetensors": {"size": 4_000_000_000, "sha256": "a" * 64, "blob_id": None},
        "model-00002-of-00002.safetensors": {"size": 400_000_000, "sha256": "b" * 64, "blob_id": None},
    }
    pin = {"hub": "huggingface", "repository": "a/b", "revision": "0" * 40, "branch": "main", "files": files}
    (tmp_path / "pin.json").write_text(json.dumps(pin))
    load_pin(tmp_path / "pin.json")  # valid
    assert model_size(None, str(tmp_path / "pin.json")).weights == 2.2e9


@pytest.mark.parametrize("fault", ["no folder", "no weights", "no pin", "truncated weights"])
def test_invalid_checkpoint_has_the_typical_size(tmp_path: Path, fault: str) -> None:
    """The fetch stage reports the fault; the plan of a run must not fail on it."""
    folder = tmp_path / "model"
    if fault != "no folder":
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    if fault == "truncated weights":
        (folder / "model.safetensors").write_bytes(b"\x10\x00")
    size = model_size(None, str(tmp_path / "pin.json")) if fault == "no pin" else model_size(str(folder), None)
    assert size.weights == TYPICAL_WEIGHTS and not size.known


def test_fetch_refuses_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_size, "available_memory", lambda: 500_000_000)
    with pytest.raises(CheckpointError, match=r"needs 1\.2 GB of memory, and 0\.5 GB are free; close other programs"):
        fetch_checkpoint(tmp_path / "checkpoint", SHAPES_VL)
    assert not (tmp_path / "checkpoint").exists()


def test_fetch_refuses_too_little_disk_for_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_size.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"a 4-bit bundle of this model needs .* its disk has 0\.00 GB free"):
        fetch_checkpoint(tmp_path / "checkpoint", SHAPES_VL)


def test_sufficient_resources_pass(tmp_path: Path) -> None:
    check_resources(SHAPES_VL, tmp_path / "new" / "folder", lambda weights: int(weights / 1e6))


def test_disk_of_a_new_folder_is_checked_with_a_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, paths = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: paths.append(path) or usage(10**10, 9 * 10**9, 10**9))
    check_disk(tmp_path / "a" / "b", 990_000_000, "it")
    assert paths == [tmp_path]
    with pytest.raises(CheckpointError, match=r"it needs 1\.00 GB in .*/a/b, and its disk has 1\.00 GB free"):
        check_disk(tmp_path / "a" / "b", 991_000_000, "it")
