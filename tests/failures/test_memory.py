"""Too little memory: the kernel kills a process, and an error message says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chain import command
from kills import same_outputs
from support import BIN, make_workspace, run_cli

GROUPS = Path("/sys/fs/cgroup")
# MNN's converter needs little memory for a small model; this one needs more.
GREEDY = """
import sys
from hf2mnn import cli
from hf2mnn.mnn import convert
convert.CALL = "blocks = [bytes(range(256)) * 10**5 for _ in range(200)]"
sys.argv[0] = "hf2mnn"
cli.main()
"""


@pytest.fixture
def bounded() -> Iterator[Callable[[int], list[str]]]:
    """Returns a command prefix that limits the memory of a command and its children to a number of bytes."""
    version_1 = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if version_1 else GROUPS) / f"hf2mnn-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1 else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text("max" if not version_1 else "-1")
    except OSError:
        pytest.skip("control groups cannot be created: run as root, with the memory controller")

    def prefix(size: int) -> list[str]:
        (group / limit).write_text(str(size))
        return ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "bounded"]

    yield prefix
    group.rmdir()


def run(prefix: list[str], *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=600)


def test_a_killed_converter(chain: Path, bounded: Callable[[int], list[str]], tmp_path: Path) -> None:
    arguments = [*command(chain, "graphs"), "--out", tmp_path / "out"]
    process = run(bounded(1_000_000_000), sys.executable, "-c", GREEDY, *arguments)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "MNN's converter was killed (signal 9), with" in last and "in use" in last and "out of memory" in last
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())
    assert run_cli(*arguments).returncode == 0


def test_a_killed_stage_leaves_no_folder_and_runs_again(
    chain: Path, bounded: Callable[[int], list[str]], tmp_path: Path
) -> None:
    arguments = [*command(chain, "reference/evaluation"), "--out", tmp_path / "out"]
    assert run(bounded(250_000_000), BIN / "hf2mnn", *arguments).returncode == -9
    assert not (tmp_path / "out").exists()
    assert run_cli(*arguments).returncode == 0
    assert same_outputs(tmp_path / "out", chain / "reference/evaluation")


def test_snakemake_reports_a_killed_stage(bounded: Callable[[int], list[str]], tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    target = "results/shapes-vl/onnx"
    workspace.snakemake("results/shapes-vl/checkpoint", check=True)
    arguments = [BIN / "snakemake", "-s", Path(__file__).parents[2] / "Snakefile", "--cores", "1", target]
    process = run(bounded(350_000_000), *arguments, cwd=workspace.folder)
    assert process.returncode == 1
    assert "error: killed (signal 9), usually because the machine is out of memory" in process.stdout + process.stderr
    assert "resources of each stage" in process.stdout + process.stderr
    assert not (workspace.folder / "results" / "shapes-vl" / "onnx" / "manifest.json").exists()
    workspace.snakemake(target, check=True)
