"""Time and memory of a stage are its own, whatever process started it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf2mnn.machine import usage
from hf2mnn.machine.usage import peak_mb

STAGE = """
import subprocess, sys
from pathlib import Path
from hf2mnn.core.manifest import Manifest, stage_folder
with stage_folder(Path(sys.argv[1]), Manifest("test")):
    subprocess.run([sys.executable, "-c", sys.argv[2]])
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def stage(folder: Path, child: str, ballast: int) -> dict:
    """Return the manifest of a stage that runs `child`; its own parent holds `ballast` bytes."""
    parent = "import subprocess, sys; ballast = b'x' * int(sys.argv[1]); subprocess.run(sys.argv[2:], check=True)"
    command = [sys.executable, "-c", parent, str(ballast), sys.executable, "-c", STAGE, str(folder), child]
    subprocess.run(command, check=True)
    return json.loads((folder / "manifest.json").read_text())


@linux
def test_peak_excludes_the_parent(tmp_path: Path) -> None:
    """Snakemake, or a stage with a model in memory, starts another stage."""
    assert 5 < stage(tmp_path / "made", "", 500_000_000)["peak_rss_mb"] < 150


@linux
def test_peak_and_time_include_children(tmp_path: Path) -> None:
    child = "import time\nblock = b'x' * 300_000_000\nwhile time.process_time() < 1: pass"
    made = stage(tmp_path / "made", child, 0)
    assert 300 < made["peak_rss_mb"] < 400
    assert made["cpu_seconds"] >= 1


def test_without_proc_the_peak_is_that_of_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "own_peak_mb", lambda: None)
    assert peak_mb() > 5
    assert usage.children_mb() is None


def test_resident_memory_is_at_most_the_peak() -> None:
    assert 5 < usage.resident_mb() <= peak_mb()
