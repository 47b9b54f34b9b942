"""Requests to a scheduler, and the environment of its jobs. tests/cluster has a real SLURM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hf2mnn.core.manifest import Manifest
from hf2mnn.machine.footprint import TYPICAL_WEIGHTS
from hf2mnn.stages import ORDER, stage_named
from support import BIN, REPOSITORY, SHAPES_VL, Workspace, make_workspace

WEIGHTS = 5217280
"""Of shapes-vl."""
RULES = "\n".join(path.read_text() for path in sorted((REPOSITORY / "workflow" / "rules").glob("*.smk")))
FOLDERS = {
    "fetch": ["checkpoint"],
    "examples": ["examples/evaluation", "examples/calibration"],
    "reference": ["reference/evaluation", "reference/calibration"],
    "export": ["onnx"],
    "convert": ["graphs"],
    "calibrate": ["calibration"],
    "sensitivity": ["sensitivity"],
    "plan": ["plans/mixed"],
    "quantize": ["bundles/fp32", "bundles/int4-gptq", "bundles/mixed"],
    "evaluate": ["evaluation/onnxruntime", "evaluation/fp32", "evaluation/mixed"],
    "diagnose": ["diagnosis/fp32", "diagnosis/mixed"],
    "baseline": ["baseline"],
    "benchmark": ["benchmark"],
}
"""Folders of the stages that leave a manifest; report and compare have none."""


def asked(workspace: Workspace, *arguments: str) -> dict[str, dict[str, str]]:
    """Return the resources of each job that a run would start, by rule."""
    output = workspace.snakemake("-n", *arguments, check=True).stdout
    jobs = re.findall(r"^(?:local)?rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", output, re.MULTILINE)
    return {rule: dict(word.split("=", 1) for word in line.split(", ")) for rule, line in jobs}


@pytest.fixture
def hub(tmp_path: Path) -> Workspace:
    """Return a workspace with a model of a hub that is not fetched yet."""
    workspace = make_workspace(tmp_path / "workspace")
    workspace.config("source: {path: models/shapes-vl}", "source: {repository: owner/name}")
    return workspace


def test_jobs_request_memory_by_the_size_of_the_model_once_it_is_known(hub: Workspace) -> None:
    footprint = stage_named("reference").footprint
    assert asked(hub)["run_reference"]["mem_mb"] == str(footprint.memory_mb(TYPICAL_WEIGHTS))
    (hub.folder / "results" / "shapes-vl").mkdir(parents=True)
    shutil.copytree(SHAPES_VL, hub.folder / "results" / "shapes-vl" / "checkpoint")
    assert asked(hub)["run_reference"]["mem_mb"] == str(footprint.memory_mb(WEIGHTS))


def test_repeated_job_requests_more(workspace: Workspace) -> None:
    once, again = (asked(workspace, "--attempt", attempt)["measure_sensitivity"] for attempt in "12")
    for name in ("mem_mb", "runtime"):
        assert int(again[name]) == 2 * int(once[name])


OPTIONAL = {"make_toolchain", "compare_versions"}
"""Rules that run for some configurations only."""


def test_profile_requests_memory_time_and_no_gpu(workspace: Workspace) -> None:
    jobs = asked(workspace, "--workflow-profile", str(REPOSITORY / "profiles" / "slurm"))
    assert set(jobs) == {"all", *re.findall(r"^rule (\w+):", RULES, re.MULTILINE)} - OPTIONAL
    for rule, resources in jobs.items():
        assert rule == "all" or {"mem_mb", "runtime"} <= set(resources), rule
        assert resources["gpu"] == "0", rule


def test_every_stage_with_a_folder_is_measured() -> None:
    assert set(FOLDERS) == set(ORDER) - {"report", "compare"}
    assert set(re.findall(r'memory\("(\w+)"\)', RULES)) == set(ORDER)


@pytest.mark.parametrize("stage", FOLDERS)
def test_stage_stays_within_its_request(stage: str, results: Path) -> None:
    for folder in FOLDERS[stage]:
        footprint = stage_named(stage).footprint_of(Path(folder).name)
        assert 0 < Manifest.load(results / folder).peak_rss_mb < footprint.memory_mb(WEIGHTS), folder


def test_stage_runs_in_the_environment_that_is_active(tmp_path: Path) -> None:
    """As with --sdm conda, which puts an environment first on PATH; the package is the repository's."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PYTHONPATH $*"\n')
    (tmp_path / "python").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY / "workflow"), os.environ["PATH"]])
    output = subprocess.run(["hf2mnn", "one", "two words"], env={"PATH": path}, capture_output=True, text=True).stdout
    source, *words = output.split()
    assert Path(source).resolve() == REPOSITORY / "src"
    assert words == ["-m", "hf2mnn.cli", "one", "two", "words"]


def image() -> list[list[str]]:
    text = (REPOSITORY / "container" / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_image_has_the_tested_python_and_pins() -> None:
    lines = image()
    (base,) = [words[1] for words in lines if words[0] == "FROM"]
    installed = [words[2:] for words in lines if words[:2] == ["RUN", "pip"]]
    assert installed == [["install", "--requirement", "requirements.txt"], ["install", "--no-deps", "--editable", "."]]
    for environment in (REPOSITORY / "envs").glob("*.yaml"):
        python = yaml.safe_load(environment.read_text())["dependencies"][0].removeprefix("python=")
        assert base.startswith(f"python:{python}-"), environment.name


def test_image_has_the_plugins_that_snakemake_installs_in_pods() -> None:
    lines = image()
    (workdir,) = {words[1] for words in lines if words[0] == "WORKDIR"} - {"/data"}
    (download,) = [" ".join(words) for words in lines if "download" in words]
    assert "grep ^snakemake-storage-plugin- requirements.txt > plugins.txt" in download and "--dest wheels" in download
    profile = yaml.safe_load((REPOSITORY / "profiles" / "kubernetes" / "profile.yaml").read_text())
    assert profile["precommand"].split()[-1] == f"PIP_FIND_LINKS={workdir}/wheels"
    assert "snakemake-storage-plugin-s3==" in (REPOSITORY / "requirements.txt").read_text()


def test_image_has_the_files_that_a_run_needs(workspace: Workspace, tmp_path: Path) -> None:
    """Run a stage with the copied files alone, with a config.yaml in another folder."""
    inside = tmp_path / "image"
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for *sources, target in (words[1:] for words in image() if words[0] == "COPY"):
        for source in sources:
            assert f"!{source}" in ignored
            copy = inside / source if target == "./" else inside / target
            copy.parent.mkdir(exist_ok=True)
            (shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy)(REPOSITORY / source, copy)
    target = "results/shapes-vl/checkpoint"
    command = [BIN / "snakemake", "--snakefile", inside / "Snakefile", "--cores", "1", target]
    done = subprocess.run(
        command,
        cwd=workspace.folder,
        env={**os.environ, "PYTHONPATH": str(inside / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workspace.folder / "results" / "shapes-vl" / "checkpoint" / "manifest.json").exists()
