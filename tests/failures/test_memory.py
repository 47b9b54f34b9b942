"""Too little memory: the kernel ends a process without a word, and a person must still learn why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chain import command
from kills import undisturbed
from support import BIN, make_workspace, run_cli

GROUPS = Path("/sys/fs/cgroup")
# MNN's converter needs little for a small model, so a greedy one takes its place.
GREEDY = """
import sys
from hf2mnn import cli
from hf2mnn.mnn import convert
convert.CALL = "held = [bytes(range(256)) * 10**5 for _ in range(200)]"
sys.argv[0] = "hf2mnn"
cli.main()
"""


@pytest.fixture
def bounded() -> Iterator[Callable[[int], list[str]]]:
    """A command's first words that let it have so many bytes of memory, with all that it starts."""
    version_1 = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if version_1 else GROUPS) / f"hf2mnn-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1 else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text("max" if not version_1 else "-1")
    except OSError:
        pytest.skip("control groups cannot be made here: run as root, with the memory controller")

    def words(size: int) -> list[str]:
        (group / limit).write_text(str(size))
        return ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "bounded"]

    yield words
    group.rmdir()


def run(words: list[str], *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=600)


def test_converter_that_is_killed_is_told_with_what_it_held(
    chain: Path, bounded: Callable[[int], list[str]], tmp_path: Path
) -> None:
    arguments = [*command(chain, "graphs"), "--out", tmp_path / "made"]
    done = run(bounded(1_000_000_000), sys.executable, "-c", GREEDY, *arguments)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "MNN's converter was killed (signal 9), when it held" in last and "out of memory" in last
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert run_cli(*arguments).returncode == 0


def test_stage_that_is_killed_leaves_nothing_and_runs_again(
    chain: Path, bounded: Callable[[int], list[str]], tmp_path: Path
) -> None:
    arguments = [*command(chain, "reference"), "--out", tmp_path / "made"]
    assert run(bounded(250_000_000), BIN / "hf2mnn", *arguments).returncode == -9
    assert not (tmp_path / "made").exists()
    assert run_cli(*arguments).returncode == 0
    assert undisturbed(tmp_path / "made", chain / "reference")


def test_snakemake_says_why_a_killed_stage_ended(bounded: Callable[[int], list[str]], tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    target = "results/shapes-vl/onnx"
    workspace.snakemake("results/shapes-vl/checkpoint", check=True)
    starved = [BIN / "snakemake", "-s", Path(__file__).parents[2] / "Snakefile", "--cores", "1", target]
    done = run(bounded(350_000_000), *starved, cwd=workspace.folder)
    assert done.returncode == 1
    assert (
        "hf2mnn: killed (signal 9), most of the time because the machine is out of memory" in done.stdout + done.stderr
    )
    assert "what each stage took" in done.stdout + done.stderr
    assert not (workspace.folder / "results" / "shapes-vl" / "onnx" / "manifest.json").exists()
    workspace.snakemake(target, check=True)
