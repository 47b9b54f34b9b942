"""Messages before a run: required disk and memory."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from hf2mnn.cli import run_messages
from hf2mnn.config.load import parse_config
from hf2mnn.config.schema import Config
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


def needs(config: Config, results: Path) -> str:
    out = io.StringIO()
    run_messages.print_needs(config, results, out)
    return out.getvalue()


def test_each_model_has_a_line_for_disk_and_one_for_memory(config: Config, tmp_path: Path) -> None:
    lines = needs(config, tmp_path).splitlines()
    assert lines[0].startswith("small: 0.0052 billion weights; disk: 3.3 MB bundles, 20.9 MB float32 baseline")
    assert "to convert" in lines[1] and "available" in lines[1]
    assert lines[2].startswith("hub: size not known yet") and "4.40 GB checkpoint" in lines[2]


def test_finished_model_has_no_line(config: Config, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "summary.csv").touch()
    assert "small" not in needs(config, tmp_path)


def test_small_disk_has_a_warning(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(run_messages.shutil, "disk_usage", lambda _: usage)
    assert "and the disk has 1.0 MB free" in needs(config, tmp_path)
