"""The pipeline on a real SLURM: its jobs make what a workstation makes, and what goes wrong is told and mended."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kills import undisturbed
from slurm import Site
from support import Workspace

SUBMITTING_HOST = {"fetch_checkpoint", "copy_set", "join_tables", "check_gates", "all"}
STAGES = (
    *("source", "reference", "calibration", "activations", "onnx", "graphs", "bundles/int4-gptq"),
    *("evaluation/onnxruntime", "evaluation/int4-gptq", "diagnosis/int4-gptq"),
)
REFERENCE = "results/shapes-vl/reference"


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)


def half_made(workspace: Workspace) -> list[Path]:
    return sorted((workspace.folder / "results").rglob(".*.partial"))


@pytest.mark.parametrize("stage", STAGES)
def test_jobs_make_what_a_workstation_makes(stage: str, on_cluster: tuple[Workspace, str], at_home: Workspace) -> None:
    folders = [workspace.folder / "results" / "shapes-vl" / stage for workspace in (on_cluster[0], at_home)]
    assert undisturbed(*folders)


def test_what_needs_the_network_runs_on_the_submitting_host(site: Site, on_cluster: tuple[Workspace, str]) -> None:
    """The node cannot reach the hub, so what was fetched was fetched elsewhere, and nothing else has asked."""
    said = on_cluster[1]
    assert set(re.findall(r"^localrule (\w+):$", said, re.MULTILINE)) == SUBMITTING_HOST
    assert SUBMITTING_HOST.isdisjoint(re.findall(r"^rule (\w+):$", said, re.MULTILINE))
    assert site.hub.of("model.safetensors")
    asked = len(site.hub.asked)
    reach = f"import urllib.request; urllib.request.urlopen({site.hub.endpoint!r}, timeout=5)"
    refused = site.ask("srun", "--mem=200", "python3", "-c", reach)
    assert refused.returncode != 0 and "urlopen error" in refused.stderr
    assert len(site.hub.asked) == asked


def test_nothing_is_left_to_do(site: Site, on_cluster: tuple[Workspace, str]) -> None:
    code, said = site.snakemake("-n", cwd=on_cluster[0].folder)
    assert code == 0 and "Nothing to be done" in said


def test_failing_job_is_told_with_its_sentence_and_its_log(site: Site, copy: Workspace) -> None:
    results = copy.folder / "results" / "shapes-vl"
    shutil.rmtree(results / "reference/evaluation")
    for image in (results / "examples" / "evaluation").rglob("*.png"):
        image.unlink()
    code, said = site.snakemake(REFERENCE, cwd=copy.folder)
    assert code == 1
    assert re.search(r"^hf2mnn: there is no image ", said, re.MULTILINE), said
    assert "log: logs/run_reference/shapes-vl.log" in said
    assert site.queue() == [] and half_made(copy) == []


def test_job_over_its_memory_is_told_and_gets_more(site: Site, copy: Workspace) -> None:
    shutil.rmtree(copy.folder / "results" / "shapes-vl" / "reference")
    little = ["--set-resources", "run_reference:mem_mb=400 * attempt ** 2"]
    code, said = site.snakemake(REFERENCE, *little, cwd=copy.folder)
    assert code == 0, said
    assert "exceeded memory limit" in said and "mem_mb=1600" in said
    assert half_made(copy) == []
    code, said = site.snakemake(REFERENCE, "--forcerun", "run_reference", *little, "--retries=0", cwd=copy.folder)
    assert code == 1 and "exceeded memory limit" in said


def test_cancelled_run_leaves_nothing_and_goes_on(site: Site, copy: Workspace, at_home: Workspace) -> None:
    """Ctrl-C, while a job runs that needs a while: its job ends with it, and the same command makes the rest."""
    results = copy.folder / "results" / "shapes-vl"
    for folder in ("onnx", "mnn"):
        shutil.rmtree(results / folder)
    target = "results/shapes-vl/graphs"
    process = site.start(target, cwd=copy.folder)
    until(lambda: half_made(copy))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    until(lambda: not site.queue())
    assert half_made(copy) == [] and not (results / "onnx").exists()
    code, said = site.snakemake(target, cwd=copy.folder)
    assert code == 0, said
    for stage in ("onnx", "graphs"):
        assert undisturbed(results / stage, at_home.folder / "results" / "shapes-vl" / stage)


def test_job_that_somebody_cancels_is_tried_again(site: Site, copy: Workspace, at_home: Workspace) -> None:
    shutil.rmtree(copy.folder / "results" / "shapes-vl" / "onnx")
    process = site.start("results/shapes-vl/onnx", cwd=copy.folder)
    until(lambda: half_made(copy))
    assert site.ask("scancel", *site.queue()).returncode == 0
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "SLURM status is: 'CANCELLED'" in said and half_made(copy) == []
    made = Path("results", "shapes-vl", "onnx")
    assert undisturbed(copy.folder / made, at_home.folder / made)


def test_run_from_elsewhere_with_the_sites_temporary_folder(site: Site, copy: Workspace, tmp_path: Path) -> None:
    results, scratch, elsewhere = copy.folder / "results" / "shapes-vl", tmp_path / "scratch", tmp_path / "elsewhere"
    for folder in (scratch, elsewhere):
        folder.mkdir()
    shutil.rmtree(results / "reference/evaluation")
    code, said = site.snakemake("--directory", copy.folder, REFERENCE, cwd=elsewhere, TMPDIR=str(scratch))
    assert code == 0, said
    assert (results / "reference/evaluation" / "manifest.json").exists()
    assert list(elsewhere.iterdir()) == []
    # PyTorch makes an empty folder for what it would compile.
    assert [path for path in scratch.rglob("*") if path.name != f"torchinductor_{getpass.getuser()}"] == []
