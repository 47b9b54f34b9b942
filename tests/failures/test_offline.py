"""After the checkpoint is fetched, the pipeline needs no network and installs no packages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from chain import few_examples
from support import BIN, QUICK, REPOSITORY, make_workspace

CONFIG = f"""
models:
  shapes-vl: {{source: {{path: models/shapes-vl}}, evaluation: few, max_new_tokens: 8}}
variants:
  int4: {{bits: 4, block: 64}}
{QUICK}
"""
TRAP = """
from pathlib import Path
Path({called!r}).touch()
raise SystemExit("pip was called")
"""


@pytest.fixture
def without_network() -> list[str]:
    """Command prefix for a namespace without a network."""
    prefix = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces cannot be created")
    return prefix


def test_the_pipeline_after_fetch_needs_no_network(without_network: list[str], tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    (workspace.folder / "config.yaml").write_text(CONFIG)
    few_examples(workspace.folder / "few", 3)
    workspace.snakemake("results/shapes-vl/checkpoint", check=True)
    # `pip` and `python -m pip` import this module.
    (tmp_path / "trap" / "pip").mkdir(parents=True)
    (tmp_path / "trap" / "pip" / "__init__.py").write_text(TRAP.format(called=str(tmp_path / "called")))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "trap")}
    assert subprocess.run([BIN / "pip"], env=environment, capture_output=True).returncode == 1
    (tmp_path / "called").unlink()

    command = [*without_network, BIN / "snakemake", "-s", REPOSITORY / "Snakefile", "--cores", "2"]
    process = subprocess.run(
        command, cwd=workspace.folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert not (tmp_path / "called").exists()
    assert (workspace.folder / "results" / "gates.txt").exists()
