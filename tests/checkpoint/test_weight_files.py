"""Files of the weights: those that transformers loads from the same folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import _get_resolved_checkpoint_files

from hf2mnn.checkpoint.weight_files import INDEX, SINGLE, used_files, weight_files
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families import FAMILIES

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OTHERS = ("consolidated.safetensors", "adapter_model.safetensors", "value_head.safetensors", f"v2.{INDEX}")


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@given(
    present=st.sets(st.sampled_from([SINGLE, INDEX, FIRST, SECOND, *OTHERS])),
    explicit=st.sampled_from([None, SINGLE, INDEX, FIRST, OTHERS[-1]]),
    shards=st.sets(st.sampled_from([FIRST, SECOND]), min_size=1),
)
def test_files_are_those_that_transformers_resolves(present: set[str], explicit: str | None, shards: set[str]) -> None:
    """Any folder; where transformers has no file, there is none here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in present:
            index = {"metadata": {}, "weight_map": {f"w{i}": shard for i, shard in enumerate(sorted(shards))}}
            (folder / file).write_text(json.dumps(index) if file.endswith(".json") else "")
        (folder / "config.json").write_text(json.dumps({"transformers_weights": explicit}))
        try:
            files, _ = _get_resolved_checkpoint_files(folder, None, None, True, None, False, explicit)
            expected = sorted(Path(file).name for file in files)
        except (OSError, ValueError):
            expected = None
        names = {path.name for path in folder.iterdir()}
        if explicit and explicit not in present:  # transformers fails later, when it opens the file
            expected = None
        try:
            index, actual = weight_files(names, lambda name: read(folder, name), folder)
        except CheckpointError:
            index, actual = None, None
        assert actual == expected
        if actual:
            used = set(used_files(names, lambda name: read(folder, name), folder))
            assert used == {"config.json", index, *actual} & names


def test_no_family_has_weights_in_extra_files() -> None:
    """Transformers reads `extra_files` of a configuration's class beside the weights."""
    import transformers

    for family in FAMILIES.values():
        assert getattr(transformers, family.architecture).config_class.extra_files == ()


@pytest.mark.parametrize("name", ["model.bin", "../model.safetensors", 3, {"a": 1}])
def test_an_explicit_file_is_a_safetensors_file_of_the_folder(name: object) -> None:
    with pytest.raises(CheckpointError, match="transformers_weights"):
        weight_files({"config.json", SINGLE}, lambda _: {"transformers_weights": name}, "the checkpoint")
