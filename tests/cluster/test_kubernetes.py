"""The pipeline as pods that share nothing but a bucket: they make what a workstation makes, and what goes wrong is
told. The plugins are the real ones, of Kubernetes and of S3; whom they talk to is in tests/pods.py.
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
from kills import undisturbed
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
    *("source", "examples/evaluation", "examples/calibration", "reference", "calibration", "activations"),
    *("sensitivity", "onnx", "graphs", "plans/mixed", "bundles/int4-gptq", "bundles/mixed"),
    *("evaluation/onnxruntime", "evaluation/int4-gptq", "diagnosis/mixed"),
)
WHERE_STARTED = {"fetch_checkpoint", "copy_set", "join_tables", "check_gates", "all"}


@dataclass(frozen=True)
class Run:
    """A folder where Snakemake is started; what it makes lies in the bucket, below the folder's name."""

    cluster: Cluster
    folder: Path

    def snakemake(self, *arguments: object) -> tuple[int, str]:
        """(exit code, what it said)."""
        options = ["--default-storage-prefix", f"s3://{BUCKET}/{self.folder.name}", "--container-image", "hf2mnn"]
        options += ["--storage-s3-endpoint-url", self.cluster.s3, "--kubernetes-omit-job-cleanup"]
        options += ["--precommand", self.precommand, "--seconds-between-status-checks", "1"]
        profile = ["--workflow-profile", "hf2mnn/profiles/kubernetes"]
        command = [BIN / "snakemake", "-s", "hf2mnn/Snakefile", *profile, *options, "--jobs", "2", *arguments]
        environment = {**os.environ, **self.cluster.environment()}
        done = subprocess.run(
            [*map(str, command)], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=1200
        )
        return done.returncode, done.stdout + done.stderr

    @property
    def precommand(self) -> str:
        """The profile's, with the folder in which wheels lie here."""
        profile = yaml.safe_load((REPOSITORY / "profiles" / "kubernetes" / "profile.yaml").read_text())
        return f"{profile['precommand'].rpartition('=')[0]}={self.cluster.wheels}"

    def download(self, part: str, folder: Path) -> Path:
        """A part of what the run has in the bucket, below `folder`."""
        for item in self.cluster.bucket.objects.filter(Prefix=f"{self.folder.name}/{part}/"):
            path = folder / item.key.removeprefix(f"{self.folder.name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.cluster.bucket.download_file(item.key, str(path))
        return folder / part


def made(folder: Path) -> Path:
    """A folder to start runs in, with a copy of the Snakefile and what it names below it."""
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
    """The whole pipeline as pods, and what the run said. Tests only read it."""
    run = Run(cluster, made(tmp_path_factory.mktemp("pods") / "run"))
    code, said = run.snakemake()
    assert code == 0, said
    return run, said


@pytest.fixture(scope="module")
def in_pods(run: tuple[Run, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run[0].download("results", tmp_path_factory.mktemp("downloaded")) / "shapes-vl"


@pytest.fixture(scope="module")
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(made(tmp_path_factory.mktemp("home") / "run"))
    workspace.snakemake(check=True)
    return workspace.folder / "results" / "shapes-vl"


@pytest.mark.parametrize("stage", STAGES)
def test_pods_make_what_a_workstation_makes(stage: str, in_pods: Path, at_home: Path) -> None:
    assert undisturbed(in_pods / stage, at_home / stage)


def test_table_and_page_are_in_the_bucket(in_pods: Path) -> None:
    assert "int4-gptq" in (in_pods / "report.html").read_text(encoding="utf-8")
    assert (in_pods.parent / "summary.csv").is_file() and (in_pods.parent / "gates.txt").is_file()


def test_run_ends_with_where_the_results_lie(run: tuple[Run, str]) -> None:
    assert f"results: s3://{BUCKET}/{run[0].folder.name}/results\n" in run[1]


def test_nothing_but_declared_folders_is_in_a_pod(run: tuple[Run, str]) -> None:
    """All stages but those that read what lies where the run was started are pods, and nothing of that is there."""
    started, said = run
    assert set(re.findall(r"^localrule (\w+):$", said, re.MULTILINE)) == WHERE_STARTED
    here = started.cluster.see(["ls", str(started.folder), "."])
    assert "No such file or directory" in here and str(started.folder.name) in here


def test_pods_ask_for_what_their_stages_take(run: tuple[Run, str]) -> None:
    asked = {name: pod.asked["resources"]["requests"] for name, pod in run[0].cluster.pods.items()}
    assert all(set(requests) == {"cpu", "memory", "ephemeral-storage"} for requests in asked.values())
    assert all(int(requests["memory"].removesuffix("M")) >= 400 for requests in asked.values())
    # The report reads everything and writes little; the others of so small a model get the least there is.
    (report,) = {requests["ephemeral-storage"] for requests in asked.values()} - {"2000M"}
    assert 1000 < int(report.removesuffix("M")) < 2000


def test_nothing_is_left_to_do(run: tuple[Run, str]) -> None:
    code, said = run[0].snakemake("-n")
    assert code == 0 and "Nothing to be done" in said, said


def test_changed_setting_makes_that_variant_again(run: tuple[Run, str]) -> None:
    config = run[0].folder / "config.yaml"
    config.write_text(CONFIG.replace("block: 64", "block: 32"))
    try:
        code, said = run[0].snakemake("-n")
    finally:
        config.write_text(CONFIG)
    assert code == 0 and re.search(r"^quantize_variant +1$", said, re.MULTILINE), said
    assert "Params have changed" in said and "convert_graphs" not in said and "fetch_checkpoint" not in said


def test_plan_of_ones_own_reaches_the_pod_where_git_tracks_it(run: tuple[Run, str], tmp_path: Path) -> None:
    started, config = run[0], run[0].folder / "config.yaml"
    (started.folder / "mine.yaml").write_text("decoder: {lm_head: {bits: 8, block: 0}}\n")
    for words in (["init", "--quiet"], ["add", "mine.yaml"]):
        subprocess.run(["git", *words], cwd=started.folder, check=True)
    config.write_text(CONFIG.replace("variants:\n", "variants:\n  mine: {bits: 4, block: 64, plan: mine.yaml}\n"))
    try:
        code, said = started.snakemake("results/shapes-vl/bundles/mine")
    finally:
        config.write_text(CONFIG)
    assert code == 0, said
    made = started.download("results/shapes-vl/bundles/mine", tmp_path)
    table = pd.read_csv(made / "weights.csv").set_index("operator")
    assert verify_folder(made).whole and table.loc["lm_head", "bits"] == 8


def test_failing_pod_is_told_with_the_file_that_has_its_sentence(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, made(tmp_path / "failing"))
    (run.folder / "config.yaml").write_text(CONFIG.replace("budget: 5", "budget: 1KB"))
    code, said = run.snakemake("--retries", "0", "results/shapes-vl/plans/mixed")
    assert code == 1 and "Error in rule plan_bits" in said
    (log,) = re.findall(r"\S+/kubernetes-logs/\S+\.log", said)
    assert re.search(r"^hf2mnn: the budget leaves ", Path(log).read_text(), re.MULTILINE)
    (kept,) = run.download("logs/plan_bits", tmp_path).rglob("*.log")
    assert "the budget leaves" in kept.read_text()


def test_toolchains_are_refused_at_once(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, made(tmp_path / "toolchains"))
    (run.folder / "config.yaml").write_text(f"{CONFIG}\ntoolchains: {{old: {{pins: {{MNN: 3.6.0}}}}}}\n")
    code, said = run.snakemake("-n")
    assert code == 1 and "toolchains are environments, which object storage does not keep" in said
    assert "Traceback" not in said
