"""Keys of `source` in config.yaml become options of `hf2mnn fetch`, word for word."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from support import Workspace

SOURCES = {
    "path": ("{path: models/shapes-vl}", ["--path", "models/shapes-vl"]),
    "branch": ("{repository: owner/name}", ["--repository", "owner/name"]),
    "commit": (
        "{repository: owner/name, revision: 0123abc}",
        ["--repository", "owner/name", "--revision", "0123abc"],
    ),
    "modelscope": (
        "{hub: modelscope, repository: owner/name, files: 'a folder; ls'}",
        ["--hub", "modelscope", "--repository", "owner/name", "--files", "a folder; ls"],
    ),
    "pin": ("{pin: 'a pin.json', files: mine}", ["--pin", "a pin.json", "--files", "mine"]),
    "adapter": (
        "{path: models/shapes-vl, adapter: 'my adapter'}",
        ["--path", "models/shapes-vl", "--adapter", "my adapter"],
    ),
    "adapter of a hub": (
        "{repository: a/b, adapter: {hub: modelscope, repository: c/d, revision: v1}}",
        [
            *("--repository", "a/b", "--adapter-hub", "modelscope"),
            *("--adapter-repository", "c/d", "--adapter-revision", "v1"),
        ],
    ),
}


def planned(workspace: Workspace, source: str) -> list[str]:
    """Return the options, except --out, of the fetch command that a run would start."""
    workspace.config("source: {path: models/shapes-vl}", f"source: {source}")
    planned_jobs = workspace.snakemake("-n", "-p", "results/shapes-vl/checkpoint", check=True).stdout
    return shlex.split(re.search(r"hf2mnn fetch (.*?) --out ", planned_jobs)[1])


@pytest.mark.parametrize("kind", SOURCES)
def test_options_are_those_of_the_config(kind: str, workspace: Workspace) -> None:
    source, wanted = SOURCES[kind]
    (workspace.folder / "a pin.json").write_text("{}")
    options = planned(workspace, source)
    assert dict(zip(options[::2], options[1::2], strict=True)) == dict(zip(wanted[::2], wanted[1::2], strict=True))


def test_missing_pin_is_reported_before_any_job(workspace: Workspace) -> None:
    workspace.config("source: {path: models/shapes-vl}", "source: {pin: nowhere.json}")
    done = workspace.snakemake("-n", "results/shapes-vl/checkpoint")
    assert done.returncode
    assert "nowhere.json" in done.stdout + done.stderr


def test_changed_pin_is_noticed(workspace: Workspace) -> None:
    """The pin is an input, so another commit in it repeats the stage."""
    (workspace.folder / "pin.json").write_text(json.dumps({}))
    workspace.config("source: {path: models/shapes-vl}", "source: {pin: pin.json}")
    planned_jobs = workspace.snakemake("-n", "results/shapes-vl/checkpoint", check=True).stdout
    assert re.search(r"input: .*pin\.json", planned_jobs)


def test_changed_adapter_is_noticed(workspace: Workspace) -> None:
    """The two files of an adapter are inputs; other files of PEFT are not."""
    (workspace.folder / "mine").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (workspace.folder / "mine" / name).touch()
    workspace.config("source: {path: models/shapes-vl}", "source: {path: models/shapes-vl, adapter: mine}")
    planned_jobs = workspace.snakemake("-n", "results/shapes-vl/checkpoint", check=True).stdout
    assert re.search(r"input: .*mine/adapter_config\.json, mine/adapter_model\.safetensors", planned_jobs)
    assert "mine/README.md" not in planned_jobs
