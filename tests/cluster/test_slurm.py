"""The pipeline as SLURM jobs: same outputs as on a workstation, error messages, and recovery."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kills import same_outputs
from slurm import Site
from support import REPOSITORY, Workspace

LOCAL_RULES = {"fetch_checkpoint", "collect_examples", "summarize_models", "check_gates", "all"}
STAGES = (
    *("checkpoint", "reference/evaluation", "reference/calibration", "calibration", "onnx", "graphs"),
    *("bundles/int4-gptq", "evaluation/onnxruntime", "evaluation/int4-gptq", "diagnosis/int4-gptq"),
)
REFERENCE = "results/shapes-vl/reference/evaluation"


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition does not become true"
        time.sleep(0.1)


def unfinished(workspace: Workspace) -> list[Path]:
    return sorted((workspace.folder / "results").rglob(".*.partial"))


@pytest.mark.parametrize("stage", STAGES)
def test_same_outputs_as_on_a_workstation(
    stage: str, on_cluster: tuple[Workspace, str], on_workstation: Workspace
) -> None:
    folders = [workspace.folder / "results" / "shapes-vl" / stage for workspace in (on_cluster[0], on_workstation)]
    assert same_outputs(*folders)


def test_a_killed_cluster_does_not_disturb_the_next(site: Site, tmp_path: Path) -> None:
    start = "import sys; from pathlib import Path; import slurm"
    program = f"{start}\nwith slurm.one_node(Path(sys.argv[1])) as environment:\n    print('up', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY / "tests"}
    for name in ("killed", "next"):
        with subprocess.Popen([sys.executable, "-c", program, tmp_path / name], **pipes) as process:
            assert process.stdout.readline() == "up\n"
            process.kill()
    assert site.run("sinfo", "--noheader", "--format=%T").stdout.strip() in ("idle", "mixed", "allocated")


def test_rules_that_need_the_network_run_on_the_submitting_host(site: Site, on_cluster: tuple[Workspace, str]) -> None:
    """The node cannot reach the hub."""
    output = on_cluster[1]
    assert set(re.findall(r"^localrule (\w+):$", output, re.MULTILINE)) == LOCAL_RULES
    assert LOCAL_RULES.isdisjoint(re.findall(r"^rule (\w+):$", output, re.MULTILINE))
    assert site.hub.of("model.safetensors")
    requests = len(site.hub.requests)
    request = f"import urllib.request; urllib.request.urlopen({site.hub.endpoint!r}, timeout=5)"
    refused = site.run("srun", "--mem=200", "python3", "-c", request)
    assert refused.returncode != 0 and "urlopen error" in refused.stderr
    assert len(site.hub.requests) == requests


def test_a_second_run_has_nothing_to_do(site: Site, on_cluster: tuple[Workspace, str]) -> None:
    code, output = site.snakemake("-n", cwd=on_cluster[0].folder)
    assert code == 0 and "Nothing to be done" in output


def test_a_failed_job_and_its_log(site: Site, copy: Workspace) -> None:
    results = copy.folder / "results" / "shapes-vl"
    shutil.rmtree(results / "reference/evaluation")
    for image in (results / "examples" / "evaluation").rglob("*.png"):
        image.unlink()
    code, output = site.snakemake(REFERENCE, cwd=copy.folder)
    assert code == 1
    assert re.search(r"^error: there is no image ", output, re.MULTILINE), output
    assert "log: logs/run_reference/shapes-vl/evaluation.log" in output
    assert site.queue() == [] and unfinished(copy) == []


def test_a_job_over_its_memory_is_repeated_with_more(site: Site, copy: Workspace) -> None:
    shutil.rmtree(copy.folder / REFERENCE)
    little = ["--set-resources", "run_reference:mem_mb=400 * attempt ** 2"]
    code, output = site.snakemake(REFERENCE, *little, cwd=copy.folder)
    assert code == 0, output
    assert "exceeded memory limit" in output and "mem_mb=1600" in output
    assert unfinished(copy) == []
    code, output = site.snakemake(REFERENCE, "--forcerun", "run_reference", *little, "--retries=0", cwd=copy.folder)
    assert code == 1 and "exceeded memory limit" in output


def test_a_cancelled_run_continues(site: Site, copy: Workspace, on_workstation: Workspace) -> None:
    """Ctrl-C ends the run with its job, and the same command makes the missing folders."""
    results = copy.folder / "results" / "shapes-vl"
    for folder in ("onnx", "graphs"):
        shutil.rmtree(results / folder)
    target = "results/shapes-vl/graphs"
    process = site.start(target, cwd=copy.folder)
    wait_for(lambda: unfinished(copy))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    wait_for(lambda: not site.queue())
    assert unfinished(copy) == [] and not (results / "onnx").exists()
    code, output = site.snakemake(target, cwd=copy.folder)
    assert code == 0, output
    for stage in ("onnx", "graphs"):
        assert same_outputs(results / stage, on_workstation.folder / "results" / "shapes-vl" / stage)


def test_a_cancelled_job_is_repeated(site: Site, copy: Workspace, on_workstation: Workspace) -> None:
    shutil.rmtree(copy.folder / "results" / "shapes-vl" / "onnx")
    process = site.start("results/shapes-vl/onnx", cwd=copy.folder)
    wait_for(lambda: unfinished(copy))
    assert site.run("scancel", *site.queue()).returncode == 0
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "SLURM status is: 'CANCELLED'" in output and unfinished(copy) == []
    onnx = Path("results", "shapes-vl", "onnx")
    assert same_outputs(copy.folder / onnx, on_workstation.folder / onnx)


def test_another_working_directory_and_tmpdir(site: Site, copy: Workspace, tmp_path: Path) -> None:
    results, scratch, elsewhere = copy.folder / "results" / "shapes-vl", tmp_path / "scratch", tmp_path / "elsewhere"
    for folder in (scratch, elsewhere):
        folder.mkdir()
    shutil.rmtree(results / "reference/evaluation")
    code, output = site.snakemake("--directory", copy.folder, REFERENCE, cwd=elsewhere, TMPDIR=str(scratch))
    assert code == 0, output
    assert (results / "reference/evaluation" / "manifest.json").exists()
    assert list(elsewhere.iterdir()) == []
    # PyTorch creates an empty folder for compiled code.
    assert [path for path in scratch.rglob("*") if path.name != f"torchinductor_{getpass.getuser()}"] == []
