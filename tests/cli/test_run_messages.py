"""What is said before a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from hf2mnn.config.schema import Config, parse_config
from hf2mnn.report import needs
from support import SHAPES_VL


@pytest.fixture
def config() -> Config:
    content = {
        "models": {
            "small": {"source": {"path": str(SHAPES_VL)}, "variants": ["int4"]},
            "hub": {"source": {"repository": "a/b"}},
        },
        "variants": {"int4": {"bits": 4, "block": 64}, "fp16": {"bits": 16}},
    }
    return parse_config(content)


def said(config: Config, results: Path) -> str:
    out = io.StringIO()
    needs.print_needs(config, results, out)
    return out.getvalue()


def test_each_model_with_its_disk_and_memory(config: Config, tmp_path: Path) -> None:
    lines = said(config, tmp_path).splitlines()
    assert lines[0].startswith("small: 0.0052 billion weights; disk: 3.3 MB bundles, 20.9 MB float32")
    assert "to convert" in lines[1] and "free" in lines[1]
    assert lines[2].startswith("hub: a size not known yet") and "4.40 GB checkpoint" in lines[2]


def test_nothing_of_a_model_that_is_done(config: Config, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "summary.csv").touch()
    assert "small" not in said(config, tmp_path)


def test_a_disk_that_may_not_do(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: usage)
    assert "and the disk has 1.0 MB free" in said(config, tmp_path)
