"""The pipeline as Kubernetes pods that share only a bucket: same outputs as on a workstation, and error messages.

The Kubernetes and S3 plugins are real; the servers are in tests/pods.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from chain import few_examples
from hf2mnn.core.verify import verify_folder
from kills import same_outputs
from pods import BUCKET, Cluster, kubernetes, missing
from support import BIN, QUICK, REPOSITORY, SHAPES_VL, Workspace

CONFIG = f"""
models:
  shapes-vl: {{source: {{path: model}}, evaluation: few, calibration: others, max_new_tokens: 8}}
variants:
  int4-gptq: {{bits: 4, block: 64, method: gptq}}
  mixed: {{bits: auto, budget: 5}}
calibration: {{examples: 2, bits: [4]}}
{QUICK}
"""
STAGES = (
    *("checkpoint", "examples/evaluation", "examples/calibration", "reference/evaluation", "reference/calibration"),
    *("calibration", "sensitivity", "onnx", "graphs", "plans/mixed", "bundles/int4-gptq", "bundles/mixed"),
    *("evaluation/onnxruntime", "evaluation/int4-gptq", "diagnosis/mixed"),
)
LOCAL_RULES = {"fetch_checkpoint", "collect_examples", "summarize_models", "check_gates", "all"}


@dataclass(frozen=True)
class Run:
    """A folder in which Snakemake is started; its outputs are in the bucket, below the folder's name."""

    cluster: Cluster
    folder: Path

    def snakemake(self, *arguments: object) -> tuple[int, str]:
        """Return exit code and output."""
        options = ["--default-storage-prefix", f"s3://{BUCKET}/{self.folder.name}", "--container-image", "hf2mnn"]
        options += ["--storage-s3-endpoint-url", self.cluster.s3, "--kubernetes-omit-job-cleanup"]
        options += ["--precommand", self.precommand, "--seconds-between-status-checks", "1"]
        profile = ["--workflow-profile", "hf2mnn/profiles/kubernetes"]
        command = [BIN / "snakemake", "-s", "hf2mnn/Snakefile", *profile, *options, "--jobs", "2", *arguments]
        environment = {**os.environ, **self.cluster.environment()}
        process = subprocess.run(
            [*map(str, command)], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=1200
        )
        return process.returncode, process.stdout + process.stderr

    @property
    def precommand(self) -> str:
        """The profile's precommand, with the folder of wheels on this machine."""
        profile = yaml.safe_load((REPOSITORY / "profiles" / "kubernetes" / "profile.yaml").read_text())
        return f"{profile['precommand'].rpartition('=')[0]}={self.cluster.wheels}"

    def download(self, part: str, folder: Path) -> Path:
        """Download a folder of the run from the bucket to `folder`."""
        for item in self.cluster.bucket.objects.filter(Prefix=f"{self.folder.name}/{part}/"):
            path = folder / item.key.removeprefix(f"{self.folder.name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.cluster.bucket.download_file(item.key, str(path))
        return folder / part


def prepare(folder: Path) -> Path:
    """Create a folder to start runs in, with a copy of the workflow."""
    folder.mkdir(parents=True)
    for name in ("Snakefile", "workflow", "envs", "profiles", "requirements.txt"):
        source, target = REPOSITORY / name, folder / "hf2mnn" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "model").symlink_to(SHAPES_VL)
    few_examples(folder / "few", 3)
    few_examples(folder / "others", 3, "calibration")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with kubernetes(tmp_path_factory.getbasetemp()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """The pipeline as pods, and the output of the run. Tests only read it."""
    run = Run(cluster, prepare(tmp_path_factory.mktemp("pods") / "run"))
    code, output = run.snakemake()
    assert code == 0, output
    return run, output


@pytest.fixture(scope="module")
def in_pods(run: tuple[Run, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run[0].download("results", tmp_path_factory.mktemp("downloaded")) / "shapes-vl"


@pytest.fixture(scope="module")
def on_workstation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(prepare(tmp_path_factory.mktemp("workstation") / "run"))
    workspace.snakemake(check=True)
    return workspace.folder / "results" / "shapes-vl"


@pytest.mark.parametrize("stage", STAGES)
def test_same_outputs_as_on_a_workstation(stage: str, in_pods: Path, on_workstation: Path) -> None:
    assert same_outputs(in_pods / stage, on_workstation / stage)


def test_summary_and_report_are_in_the_bucket(in_pods: Path) -> None:
    assert "int4-gptq" in (in_pods / "report.html").read_text(encoding="utf-8")
    assert (in_pods.parent / "summary.csv").is_file() and (in_pods.parent / "gates.txt").is_file()


def test_the_output_names_the_location_of_the_results(run: tuple[Run, str]) -> None:
    assert f"results: s3://{BUCKET}/{run[0].folder.name}/results\n" in run[1]


def test_a_pod_has_only_declared_inputs(run: tuple[Run, str]) -> None:
    """Only rules that read files of the starting machine run there, and pods cannot read its folder."""
    started, output = run
    assert set(re.findall(r"^localrule (\w+):$", output, re.MULTILINE)) == LOCAL_RULES
    listing = started.cluster.run_in_pod(["ls", str(started.folder), "."])
    assert "No such file or directory" in listing and str(started.folder.name) in listing


def test_resource_requests(run: tuple[Run, str]) -> None:
    requests_of = {name: pod.container["resources"]["requests"] for name, pod in run[0].cluster.pods.items()}
    assert all(set(requests) == {"cpu", "memory", "ephemeral-storage"} for requests in requests_of.values())
    assert all(int(requests["memory"].removesuffix("M")) >= 400 for requests in requests_of.values())
    # The report reads all folders and writes little; the other stages of a small model get the minimum.
    (report,) = {requests["ephemeral-storage"] for requests in requests_of.values()} - {"2000M"}
    assert 1000 < int(report.removesuffix("M")) < 2000


def test_a_second_run_has_nothing_to_do(run: tuple[Run, str]) -> None:
    code, output = run[0].snakemake("-n")
    assert code == 0 and "Nothing to be done" in output, output


def test_a_changed_setting_reruns_its_variant(run: tuple[Run, str]) -> None:
    config = run[0].folder / "config.yaml"
    config.write_text(CONFIG.replace("block: 64", "block: 32"))
    try:
        code, output = run[0].snakemake("-n")
    finally:
        config.write_text(CONFIG)
    assert code == 0 and re.search(r"^quantize_variant +1$", output, re.MULTILINE), output
    assert "Params have changed" in output
    assert "convert_graphs" not in output and "fetch_checkpoint" not in output


def test_a_user_provided_plan_tracked_by_git(run: tuple[Run, str], tmp_path: Path) -> None:
    started, config = run[0], run[0].folder / "config.yaml"
    (started.folder / "mine.yaml").write_text("decoder: {lm_head: {bits: 8, block: 0}}\n")
    for arguments in (["init", "--quiet"], ["add", "mine.yaml"]):
        subprocess.run(["git", *arguments], cwd=started.folder, check=True)
    config.write_text(CONFIG.replace("variants:\n", "variants:\n  mine: {bits: 4, block: 64, plan: mine.yaml}\n"))
    try:
        code, output = started.snakemake("results/shapes-vl/bundles/mine")
    finally:
        config.write_text(CONFIG)
    assert code == 0, output
    bundle = started.download("results/shapes-vl/bundles/mine", tmp_path)
    table = pd.read_csv(bundle / "weights.csv").set_index("operator")
    assert verify_folder(bundle).intact and table.loc["lm_head", "bits"] == 8


def test_a_failed_pod_and_its_log(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, prepare(tmp_path / "failing"))
    (run.folder / "config.yaml").write_text(CONFIG.replace("budget: 5", "budget: 1KB"))
    code, output = run.snakemake("--retries", "0", "results/shapes-vl/plans/mixed")
    assert code == 1 and "Error in rule plan_bits" in output
    (log,) = re.findall(r"\S+/kubernetes-logs/\S+\.log", output)
    assert re.search(r"^error: the budget leaves ", Path(log).read_text(), re.MULTILINE)
    (kept,) = run.download("logs/plan_bits", tmp_path).rglob("*.log")
    assert "the budget leaves" in kept.read_text()


def test_toolchains_are_refused_before_any_pod_starts(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, prepare(tmp_path / "toolchains"))
    (run.folder / "config.yaml").write_text(f"{CONFIG}\ntoolchains: {{old: {{pins: {{MNN: 3.6.0}}}}}}\n")
    code, output = run.snakemake("-n")
    assert code == 1 and "object storage does not keep toolchains" in output
    assert "Traceback" not in output
