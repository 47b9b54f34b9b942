"""What config.yaml says of a source becomes the options of `hf2mnn source`, word for word."""

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
    "pin": ("{pin: 'a pin.json', files: by-hand}", ["--pin", "a pin.json", "--files", "by-hand"]),
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
    """The options but for --out of the source stage that a run would start."""
    workspace.config("source: {path: models/shapes-vl}", f"source: {source}")
    said = workspace.snakemake("-n", "-p", "results/shapes-vl/checkpoint", check=True).stdout
    return shlex.split(re.search(r"hf2mnn source (.*?) --out ", said)[1])


@pytest.mark.parametrize("kind", SOURCES)
def test_options_are_those_of_the_config(kind: str, workspace: Workspace) -> None:
    source, wanted = SOURCES[kind]
    (workspace.folder / "a pin.json").write_text("{}")
    found = planned(workspace, source)
    assert dict(zip(found[::2], found[1::2], strict=True)) == dict(zip(wanted[::2], wanted[1::2], strict=True))


def test_pin_that_is_not_there_is_said_before_anything_runs(workspace: Workspace) -> None:
    workspace.config("source: {path: models/shapes-vl}", "source: {pin: nowhere.json}")
    done = workspace.snakemake("-n", "results/shapes-vl/checkpoint")
    assert done.returncode
    assert "nowhere.json" in done.stdout + done.stderr


def test_changed_pin_is_noticed(workspace: Workspace) -> None:
    """It is an input, so that another commit in it makes the stage run again."""
    (workspace.folder / "pin.json").write_text(json.dumps({}))
    workspace.config("source: {path: models/shapes-vl}", "source: {pin: pin.json}")
    said = workspace.snakemake("-n", "results/shapes-vl/checkpoint", check=True).stdout
    assert re.search(r"input: .*pin\.json", said)


def test_changed_adapter_is_noticed(workspace: Workspace) -> None:
    """Its two files are inputs; what else PEFT has saved there is none."""
    (workspace.folder / "mine").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (workspace.folder / "mine" / name).touch()
    workspace.config("source: {path: models/shapes-vl}", "source: {path: models/shapes-vl, adapter: mine}")
    said = workspace.snakemake("-n", "results/shapes-vl/checkpoint", check=True).stdout
    assert re.search(r"input: .*mine/adapter_config\.json, mine/adapter_model\.safetensors", said)
    assert "mine/README.md" not in said
