"""Time and memory of a stage must be its own, whoever has started it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf2mnn.core.manifest import Manifest, stage_folder
from hf2mnn.machine import usage
from hf2mnn.machine.usage import peak_mb

STAGE = """
import subprocess, sys
from pathlib import Path
from hf2mnn.core.manifest import Manifest, stage_folder
with stage_folder(Path(sys.argv[1]), Manifest("test")):
    subprocess.run([sys.executable, "-c", sys.argv[2]])
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts of /proc")


def stage(folder: Path, child: str, ballast: int) -> dict:
    """Manifest of a stage that starts `child`, started itself by a process that holds `ballast` bytes."""
    parent = "import subprocess, sys; held = b'x' * int(sys.argv[1]); subprocess.run(sys.argv[2:], check=True)"
    command = [sys.executable, "-c", parent, str(ballast), sys.executable, "-c", STAGE, str(folder), child]
    subprocess.run(command, check=True)
    return json.loads((folder / "manifest.json").read_text())


@linux
def test_peak_is_not_that_of_who_starts_the_stage(tmp_path: Path) -> None:
    """Snakemake, or a stage that holds a model, starts another."""
    assert 5 < stage(tmp_path / "made", "", 500_000_000)["peak_rss_mb"] < 150


@linux
def test_peak_and_time_have_what_a_child_took(tmp_path: Path) -> None:
    child = "import time\nheld = b'x' * 300_000_000\nwhile time.process_time() < 1: pass"
    made = stage(tmp_path / "made", child, 0)
    assert 300 < made["peak_rss_mb"] < 400
    assert 1 <= made["cpu_seconds"] < made["seconds"] + 1


def test_without_proc_the_peak_is_that_of_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "resident_mb", lambda entry: None)
    assert peak_mb() > 5
    assert usage.children_mb() is None


def test_old_manifest_has_no_cpu_time(tmp_path: Path) -> None:
    with stage_folder(tmp_path / "made", Manifest("test")):
        pass
    path = tmp_path / "made" / "manifest.json"
    stored = json.loads(path.read_text())
    del stored["cpu_seconds"]
    path.write_text(json.dumps(stored))
    assert Manifest.load(path.parent).cpu_seconds == 0
