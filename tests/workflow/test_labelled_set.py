"""Labelled data sets in config.yaml: drawn before PyTorch answers them, and drawn again after a change only."""

from __future__ import annotations

import shutil

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from hf2mnn.reference.examples import read_examples
from support import Workspace

FEATURES = Features(
    {"question": Value("string"), "options": List(Value("string")), "answer": Value("string"), "image": Image()}
)


def output(workspace: Workspace, *arguments: str) -> str:
    done = workspace.snakemake(*arguments)
    return done.stdout + done.stderr


@pytest.fixture
def labelled(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The demo's model with questions of a local copy of AI2D, in a folder whose name needs quoting."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workspace.folder / "cache"))
    image = Pillow.new("RGB", (56, 56), "red")
    rows = [{"question": f"Which {n}?", "options": ["a", "b"], "answer": "1", "image": image} for n in range(5)]
    (workspace.folder / "my sets" / "data").mkdir(parents=True)
    Dataset.from_list(rows, FEATURES).to_parquet(workspace.folder / "my sets" / "data" / "test-0.parquet")
    workspace.config(
        "evaluation: models/shapes-vl/evaluation\n", "evaluation: {dataset: ai2d, samples: 3, path: my sets}\n"
    )
    return workspace


def test_set_is_drawn_again_after_a_change_only(labelled: Workspace) -> None:
    target = "results/shapes-vl/examples/evaluation"
    output(labelled, target)
    folder = labelled.folder / target
    assert [example.answers for example in read_examples(folder)] == [["B"]] * 3
    assert "Nothing to be done" in output(labelled, "-n", target)
    planned = output(labelled, "-n", "results/shapes-vl/reference/evaluation")
    assert "rule run_reference" in planned and "rule collect_examples" not in planned
    labelled.config("samples: 3", "samples: 4")
    assert "rule collect_examples" in output(labelled, "-n", target)


def test_missing_local_copy_gives_one_message(labelled: Workspace) -> None:
    shutil.rmtree(labelled.folder / "my sets")
    done = labelled.snakemake("results/shapes-vl/examples/evaluation")
    assert done.returncode != 0
    assert "error: there is no folder my sets" in done.stdout + done.stderr


def test_user_provided_set_is_copied(workspace: Workspace) -> None:
    planned = output(workspace, "-n", "-p", "results/shapes-vl/examples/evaluation")
    assert "hf2mnn examples --path models/shapes-vl/evaluation --out" in planned


def test_calibration_set_is_user_provided_beside_a_labelled_one(labelled: Workspace) -> None:
    planned = output(labelled, "-n", "-p", "results/shapes-vl/examples/calibration")
    assert "hf2mnn examples --path models/shapes-vl/calibration --out" in planned
