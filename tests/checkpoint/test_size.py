"""How large a model is, before it is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf2mnn.checkpoint.hub.pin import load_pin
from hf2mnn.checkpoint.size import model_size
from hf2mnn.machine.footprint import TYPICAL
from support import SHAPES_VL


def test_a_local_checkpoint_is_counted_by_its_headers() -> None:
    size = model_size(str(SHAPES_VL), None)
    assert size.known
    assert size.weights == pytest.approx(5.2e6, rel=0.02)
    assert size.embedding == 640 * 256


def test_a_pinned_one_by_the_sizes_of_its_shards(tmp_path: Path) -> None:
    files = {
        "config.json": {"size": 10, "sha256": None, "blob_id": "1" * 40},
        "model-00001-of-00002.safetensors": {"size": 4_000_000_000, "sha256": "a" * 64, "blob_id": None},
        "model-00002-of-00002.safetensors": {"size": 400_000_000, "sha256": "b" * 64, "blob_id": None},
    }
    pin = {"hub": "huggingface", "repository": "a/b", "revision": "0" * 40, "branch": "main", "files": files}
    (tmp_path / "pin.json").write_text(json.dumps(pin))
    load_pin(tmp_path / "pin.json")  # it is one
    assert model_size(None, str(tmp_path / "pin.json")).weights == 2.2e9


@pytest.mark.parametrize("spoil", ["no folder", "no weights", "no pin", "cut weights"])
def test_what_cannot_be_seen_is_taken_for_a_typical_model(tmp_path: Path, spoil: str) -> None:
    """The source stage says what is wrong; a plan of the run must not fail for it."""
    folder = tmp_path / "model"
    if spoil != "no folder":
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    if spoil == "cut weights":
        (folder / "model.safetensors").write_bytes(b"\x10\x00")
    size = model_size(None, str(tmp_path / "pin.json")) if spoil == "no pin" else model_size(str(folder), None)
    assert size.weights == TYPICAL and not size.known
