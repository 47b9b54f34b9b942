"""Files that the configuration of an untrusted bundle makes the engine open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf2mnn.core.errors import BundleError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import CONFIG, MODEL_CONFIG
from hf2mnn.mnn.engine import check_bundle


def bundle(folder: Path, config: Any, model: Any = None) -> Path:
    """Write a bundle with a valid manifest, which the author of an untrusted bundle can write too."""
    folder.mkdir()
    for name, content in ((CONFIG, config), (MODEL_CONFIG, model or {})):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "llm.mnn").write_bytes(b"x")
    Manifest("quantize").save(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"llm_model": "../llm.mnn"}, {}),
        ({"tokenizer_file": "/etc/passwd"}, {}),
        ({"llm_model": "llm.mnn"}, {"embedding_file": "a/../../secret"}),
        ({"mllm": {"visual_model": "../visual.mnn"}}, {}),
        ({"tmp_path": "/var/tmp", "use_mmap": True}, {}),
        ({"prefix_cache_path": "../../cache"}, {}),
        ({"base_dir": "/"}, {}),
        ({}, {"base_dir": "."}),
        ({"llm_model": 1}, {}),
        ({"llm_weight": "x" * 5000}, {}),
        ("[]", {}),
        ('{"llm_model": "llm.mnn", "llm_model": "other.mnn"}', {}),
    ],
)
def test_paths_outside_the_bundle_are_rejected(config: Any, model: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        check_bundle(bundle(tmp_path / "bundle", config, model))
    assert str(tmp_path / "bundle") in str(error.value)


def test_links_out_of_the_bundle_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    folder = bundle(tmp_path / "bundle", {"tokenizer_file": "tokenizer.txt"})
    (folder / "tokenizer.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(BundleError, match="is a link to"):
        check_bundle(folder)


def test_paths_inside_the_bundle_are_accepted(tmp_path: Path) -> None:
    config = {"llm_model": "llm.mnn", "tmp_path": "", "mllm": {"visual_model": "parts/visual.mnn"}}
    assert check_bundle(bundle(tmp_path / "bundle", config)) == (tmp_path / "bundle").resolve()
