"""What a cluster is asked for, and the environment in which its jobs run. On a real SLURM: tests/cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hf2mnn.core.manifest import Manifest
from hf2mnn.machine.footprint import STAGES, TYPICAL
from support import BIN, REPOSITORY, SHAPES_VL, Workspace, make_workspace

WEIGHTS = 5217280
"""Of shapes-vl."""
RULES = "\n".join(path.read_text() for path in sorted((REPOSITORY / "workflow" / "rules").glob("*.smk")))
FOLDERS = {
    "source": ["source"],
    "onnx": ["onnx"],
    "mnn": ["graphs"],
    "plan": ["plans/mixed"],
    "quantize": ["bundles/fp32", "bundles/int4-gptq", "bundles/mixed"],
    "reference": ["reference", "calibration"],
    "activations": ["activations"],
    "sensitivity": ["sensitivity"],
    "onnxruntime": ["evaluation/onnxruntime"],
    "engine": ["evaluation/fp32", "evaluation/mixed", "speed"],
    "diagnose": ["diagnosis/fp32", "diagnosis/mixed"],
}


def asked(workspace: Workspace, *arguments: str) -> dict[str, dict[str, str]]:
    """Rule to resources of each job that a run would start."""
    said = workspace.snakemake("-n", *arguments, check=True).stdout
    jobs = re.findall(r"^(?:local)?rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", said, re.MULTILINE)
    return {rule: dict(word.split("=", 1) for word in line.split(", ")) for rule, line in jobs}


@pytest.fixture
def hub(tmp_path: Path) -> Workspace:
    """A model of a hub that has not been fetched."""
    workspace = make_workspace(tmp_path / "workspace")
    workspace.config("source: {path: models/shapes-vl}", "source: {repository: owner/name}")
    return workspace


def test_jobs_ask_for_what_the_model_takes_once_it_is_known(hub: Workspace) -> None:
    assert asked(hub)["run_reference"]["mem_mb"] == str(STAGES["reference"].memory_mb(TYPICAL))
    (hub.folder / "results" / "shapes-vl").mkdir(parents=True)
    shutil.copytree(SHAPES_VL, hub.folder / "results" / "shapes-vl" / "source")
    assert asked(hub)["run_reference"]["mem_mb"] == str(STAGES["reference"].memory_mb(WEIGHTS))


def test_job_that_is_tried_again_gets_more(workspace: Workspace) -> None:
    once, again = (asked(workspace, "--attempt", attempt)["measure_sensitivity"] for attempt in "12")
    for name in ("mem_mb", "runtime"):
        assert int(again[name]) == 2 * int(once[name])


ASKED_FOR = {"collect_examples", "make_toolchain", "compare_versions"}
"""Rules that run where config.yaml asks for what they are for."""


def test_profile_asks_for_memory_time_cores_and_no_gpu(workspace: Workspace) -> None:
    jobs = asked(workspace, "--workflow-profile", str(REPOSITORY / "profiles" / "slurm"))
    assert set(jobs) == {"all", *re.findall(r"^rule (\w+):", RULES, re.MULTILINE)} - ASKED_FOR
    for rule, resources in jobs.items():
        assert rule == "all" or {"mem_mb", "runtime"} <= set(resources), rule
        assert resources["gpu"] == "0", rule


def test_every_folder_of_a_stage_is_looked_at() -> None:
    assert set(FOLDERS) == set(STAGES) == set(re.findall(r'memory\("(\w+)"\)', RULES))


@pytest.mark.parametrize("stage", FOLDERS)
def test_stage_stays_within_what_it_asks_for(stage: str, results: Path) -> None:
    for folder in FOLDERS[stage]:
        assert 0 < Manifest.load(results / folder).peak_rss_mb < STAGES[stage].memory_mb(WEIGHTS), folder


def test_stage_runs_in_the_environment_that_is_active(tmp_path: Path) -> None:
    """As with --sdm conda, which puts an environment's programs first; the package is the repository's."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PYTHONPATH $*"\n')
    (tmp_path / "python").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY / "workflow"), os.environ["PATH"]])
    said = subprocess.run(["hf2mnn", "one", "two words"], env={"PATH": path}, capture_output=True, text=True).stdout
    source, *words = said.split()
    assert Path(source).resolve() == REPOSITORY / "src"
    assert words == ["-m", "hf2mnn.cli", "one", "two", "words"]


def image() -> list[list[str]]:
    text = (REPOSITORY / "container" / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_image_has_the_python_and_the_pins_that_are_tested() -> None:
    lines = image()
    (base,) = [words[1] for words in lines if words[0] == "FROM"]
    installed = [words[2:] for words in lines if words[:2] == ["RUN", "pip"]]
    assert installed == [["install", "--requirement", "requirements.txt"], ["install", "--no-deps", "--editable", "."]]
    for environment in (REPOSITORY / "envs").glob("*.yaml"):
        python = yaml.safe_load(environment.read_text())["dependencies"][0].removeprefix("python=")
        assert base.startswith(f"python:{python}-"), environment.name


def test_pods_find_in_the_image_what_snakemake_installs_in_them() -> None:
    lines = image()
    (made_in,) = {words[1] for words in lines if words[0] == "WORKDIR"} - {"/data"}
    (download,) = [" ".join(words) for words in lines if "download" in words]
    assert "grep ^snakemake-storage-plugin- requirements.txt > plugins.txt" in download and "--dest wheels" in download
    profile = yaml.safe_load((REPOSITORY / "profiles" / "kubernetes" / "profile.yaml").read_text())
    assert profile["precommand"].split()[-1] == f"PIP_FIND_LINKS={made_in}/wheels"
    assert "snakemake-storage-plugin-s3==" in (REPOSITORY / "requirements.txt").read_text()


def test_image_has_the_files_that_a_run_needs(workspace: Workspace, tmp_path: Path) -> None:
    """What it copies, where nothing else of the repository is, with a config.yaml in another folder."""
    inside = tmp_path / "image"
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for *sources, target in (words[1:] for words in image() if words[0] == "COPY"):
        for source in sources:
            assert f"!{source}" in ignored
            place = inside / source if target == "./" else inside / target
            place.parent.mkdir(exist_ok=True)
            (shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy)(REPOSITORY / source, place)
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
    assert (workspace.folder / "results" / "shapes-vl" / "source" / "manifest.json").exists()
