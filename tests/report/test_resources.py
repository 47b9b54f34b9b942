"""What the stages took, as it is read at the end of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import Manifest
from hf2mnn.report.resources import print_stages

TOOK = {
    "bundles/int4": ("quantize", 700.0, 1300.0, 2000.0, 900_000_000),
    "source": ("source", 0.04, 0.02, 50.0, 10_000),
    "evaluation/int4": ("evaluate", 3600.0, 7000.0, 5000.0, 2_000_000),
    "graphs": ("mnn", 9.0, 8.0, 700.0, 100_000_000),
    "reference": ("reference", 90.0, 170.0, 15_000.0, 20_000_000),
    "mnn/a-name-from-later": ("polish", 1.0, 1.0, 1.0, 1),
}


def write(model: Path) -> Path:
    for place, (stage, seconds, cpu, peak, size) in TOOK.items():
        made = Manifest(stage, seconds=seconds, cpu_seconds=cpu, peak_rss_mb=peak)
        made.outputs = {"file": {"size": size, "sha256": ""}}
        (model / place).mkdir(parents=True)
        made.write(model / place)
    return model


def printed(results: Path) -> str:
    file = io.StringIO()
    print_stages(results, file)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    return text


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_stages_stand_in_the_order_of_the_chain_with_what_all_took(tmp_path: Path) -> None:
    write(tmp_path / "a-model")
    assert rows(printed(tmp_path)) == [
        ["source", "0.0 s", "0.0 s", "50.0 MB", "10.0 kB"],
        ["reference", "90 s", "2 min 50 s", "15.00 GB", "20.0 MB"],
        ["graphs", "9.0 s", "8.0 s", "700.0 MB", "100.0 MB"],
        ["bundles/int4", "12 min", "22 min", "2.00 GB", "900.0 MB"],
        ["evaluation/int4", "60 min", "117 min", "5.00 GB", "2.0 MB"],
        ["mnn/a-name-from-later", "1.0 s", "1.0 s", "1.0 MB", "1 B"],
        ["together", "73 min", "2 h 21 min", "15.00 GB", "1.02 GB"],
    ]


def test_each_model_has_a_table_and_what_is_no_model_none(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    write(tmp_path / "one" / ".mnn.partial")
    (tmp_path / "bench").mkdir()
    text = printed(tmp_path)
    assert [line.split(":")[0] for line in text.splitlines() if "what each stage took" in line] == ["one", "two"]
    assert len(rows(text)) == 2 * (len(TOOK) + 1)


def test_manifest_without_cpu_time_has_a_dash(tmp_path: Path) -> None:
    for path in write(tmp_path / "old").rglob("manifest.json"):
        stored = json.loads(path.read_text())
        del stored["cpu_seconds"]
        path.write_text(json.dumps(stored))
    assert {row[2] for row in rows(printed(tmp_path))} == {"-"}


def test_folder_without_stages_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no stage has finished"):
        print_stages(tmp_path)
