"""Tests of the table of each stage's resources."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.console import print_stages

STAGES = ("fetch", "reference", "convert", "quantize", "evaluate")
RESOURCES = {
    "bundles/int4": ("quantize", 700.0, 1300.0, 2000.0, 900_000_000),
    "checkpoint": ("fetch", 0.04, 0.02, 50.0, 10_000),
    "evaluation/int4": ("evaluate", 3600.0, 7000.0, 5000.0, 2_000_000),
    "graphs": ("convert", 9.0, 8.0, 700.0, 100_000_000),
    "reference/evaluation": ("reference", 90.0, 170.0, 15_000.0, 20_000_000),
    "polished/int4": ("a stage of a later version", 1.0, 1.0, 1.0, 1),
}


def write(model: Path) -> Path:
    for path, (stage, seconds, cpu, peak, size) in RESOURCES.items():
        manifest = Manifest(stage, seconds=seconds, cpu_seconds=cpu, peak_rss_mb=peak)
        manifest.outputs = {"file": {"size": size, "sha256": ""}}
        (model / path).mkdir(parents=True)
        manifest.write(model / path)
    return model


def printed(results: Path) -> str:
    file = io.StringIO()
    print_stages(results, STAGES, file)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    return text


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_stages_are_in_the_order_of_the_pipeline_with_their_total(tmp_path: Path) -> None:
    write(tmp_path / "a-model")
    assert rows(printed(tmp_path)) == [
        ["checkpoint", "0.0 s", "0.0 s", "50.0 MB", "10.0 kB"],
        ["reference/evaluation", "90 s", "2 min 50 s", "15.00 GB", "20.0 MB"],
        ["graphs", "9.0 s", "8.0 s", "700.0 MB", "100.0 MB"],
        ["bundles/int4", "12 min", "22 min", "2.00 GB", "900.0 MB"],
        ["evaluation/int4", "60 min", "117 min", "5.00 GB", "2.0 MB"],
        ["polished/int4", "1.0 s", "1.0 s", "1.0 MB", "1 B"],
        ["total", "73 min", "2 h 21 min", "15.00 GB", "1.02 GB"],
    ]


def test_each_model_has_a_table(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    write(tmp_path / "one" / ".graphs.partial")
    (tmp_path / "bench").mkdir()
    text = printed(tmp_path)
    assert [line.split(":")[0] for line in text.splitlines() if "resources of each stage" in line] == ["one", "two"]
    assert len(rows(text)) == 2 * (len(RESOURCES) + 1)


def test_manifests_without_cpu_time_have_a_dash(tmp_path: Path) -> None:
    for path in write(tmp_path / "old").rglob("manifest.json"):
        stored = json.loads(path.read_text())
        del stored["cpu_seconds"]
        path.write_text(json.dumps(stored))
    assert {row[2] for row in rows(printed(tmp_path))} == {"-"}


def test_folder_without_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no stage has finished"):
        print_stages(tmp_path, STAGES)
