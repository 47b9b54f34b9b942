"""Versions of a model in one run: revisions and toolchains, each with its own folder, and who is compared with whom."""

from __future__ import annotations

import re
import shlex

import pytest

from support import Workspace

SOURCE = "    source: {path: models/shapes-vl}\n"
REVISIONS = "    revisions: {v1: {path: models/shapes-vl}, v2: {path: models/shapes-vl}}\n    variants: [fp16]\n"
TOOLCHAINS = "toolchains:\n  old: {pins: {MNN: 3.6.0}}\n\nthreads:"


def commands(said: str) -> list[list[str]]:
    """Words of each command that a run would start, after its log."""
    return [shlex.split(line)[2:] for line in re.findall(r"^Shell command: (logged .*)$", said, re.MULTILINE)]


def test_each_version_is_made_by_its_own_tools_and_compared_with_the_one_before(workspace: Workspace) -> None:
    workspace.config(SOURCE, REVISIONS)
    workspace.config("threads:", TOOLCHAINS)
    planned = commands(workspace.snakemake("-n", "-p", check=True).stdout)
    versions = ["v1", "v2", "v1+old", "v2+old"]
    stages = [words for words in planned if "report" not in words and "compare" not in words]
    for version in versions:
        result = f"results/shapes-vl@{version}/"
        made = [words for words in stages if words[-1].startswith(result)]
        tools = {words[0] for words in made}
        assert len(made) == 10 and tools == {".toolchains/old/toolchain.json" if "+" in version else "hf2mnn"}
        assert set(re.findall(r"results/[^/ ]+/", " ".join(word for words in made for word in words))) == {result}
    compared = sorted(words[2:] for words in planned if "compare" in words)
    toolchain = ["--toolchain", ".toolchains/old"]
    assert compared == [
        [f"results/shapes-vl@{one}", f"results/shapes-vl@{two}", "--speed", *own, "--out", f"results/shapes-vl@{two}"]
        for one, two, own in (("v1", "v1+old", toolchain), ("v1", "v2", []), ("v2", "v2+old", toolchain))
    ]
    (make,) = [words for words in planned if "toolchain" in words]
    assert make[:3] == ["hf2mnn", "toolchain", '{"pins":{"MNN":"3.6.0"},"others":"pinned"}']


def test_a_release_that_does_not_exist_ends_in_one_sentence(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workspace.folder))
    workspace.config("threads:", TOOLCHAINS.replace("3.6.0", "99.9.9"))
    done = workspace.snakemake("results/shapes-vl+old/source")
    said = done.stdout + done.stderr
    assert done.returncode and "Error in rule make_toolchain" in said and "Traceback" not in said
    assert re.search(
        r"^hf2mnn: the toolchain old cannot be made: pip says: No matching .*; look at its pins", said, re.M
    )
    assert not (workspace.folder / ".toolchains" / "old").exists()
