"""Fixtures: a SLURM cluster of one node, a hub that only the submitting host reaches, and a finished run on both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chain import few_examples
from hub_server import serving
from slurm import Site, missing, one_node
from support import QUICK, SHAPES_VL, Workspace, make_workspace

CONFIG = f"""
models:
  shapes-vl: {{source: {{repository: owner/name}}, evaluation: few, calibration: others, max_new_tokens: 8}}
variants:
  int4-gptq: {{bits: 4, block: 64, method: gptq}}
{QUICK}
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    files = {path.name: path.read_bytes() for path in SHAPES_VL.iterdir() if path.is_file()}
    with one_node(folder / "slurm") as environment, serving(files) as hub:
        cache = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1"}
        # The submitting host must reach the hub.
        variables = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"}
        yield Site(variables | cache, hub)


def prepare(folder: Path) -> Workspace:
    workspace = make_workspace(folder)
    (folder / "config.yaml").write_text(CONFIG)
    few_examples(folder / "few", 3)
    few_examples(folder / "others", 3, "calibration")
    return workspace


@pytest.fixture(scope="session")
def on_cluster(site: Site, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """The pipeline as SLURM jobs, and the output of the run. Tests only read it."""
    workspace = prepare(tmp_path_factory.mktemp("cluster") / "workspace")
    code, output = site.snakemake(cwd=workspace.folder)
    assert code == 0, output
    return workspace, output


@pytest.fixture(scope="session")
def on_workstation(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The pipeline without a scheduler. Tests only read it."""
    workspace = prepare(tmp_path_factory.mktemp("workstation") / "workspace")
    code, output = site.snakemake("--cores", os.cpu_count() or 1, cwd=workspace.folder, profile=[])
    assert code == 0, output
    return workspace


@pytest.fixture
def copy(on_cluster: tuple[Workspace, str], tmp_path: Path) -> Workspace:
    """A copy of the cluster's workspace that tests may change."""
    return Workspace(shutil.copytree(on_cluster[0].folder, tmp_path / "copy", symlinks=True))
