"""Versions of a model in one run: revisions and toolchains, their folders, and their comparisons."""

from __future__ import annotations

import re
import shlex

import pytest

from support import Workspace

SOURCE = "    source: {path: models/shapes-vl}\n"
REVISIONS = "    revisions: {v1: {path: models/shapes-vl}, v2: {path: models/shapes-vl}}\n    variants: [fp16]\n"
TOOLCHAINS = "toolchains:\n  old: {pins: {MNN: 3.6.0}}\n\nthreads:"


def commands(output: str) -> list[list[str]]:
    """Return the words of each command that a run would start, after its log."""
    return [shlex.split(line)[2:] for line in re.findall(r"^Shell command: (logged .*)$", output, re.MULTILINE)]


def test_each_version_has_its_own_tools_and_is_compared_with_the_one_before(workspace: Workspace) -> None:
    workspace.config(SOURCE, REVISIONS)
    workspace.config("threads:", TOOLCHAINS)
    planned = commands(workspace.snakemake("-n", "-p", check=True).stdout)
    versions = ["v1", "v2", "v1+old", "v2+old"]
    stages = [words for words in planned if "report" not in words and "compare" not in words]
    for version in versions:
        result = f"results/shapes-vl@{version}/"
        own_stages = [words for words in stages if words[-1].startswith(result)]
        tools = {words[0] for words in own_stages}
        assert len(own_stages) == 11 and tools == {".toolchains/old/toolchain.json" if "+" in version else "hf2mnn"}
        assert set(re.findall(r"results/[^/ ]+/", " ".join(word for words in own_stages for word in words))) == {result}
    compared = sorted(words[2:] for words in planned if "compare" in words)
    toolchain = ["--toolchain=.toolchains/old"]
    assert compared == [
        [
            f"results/shapes-vl@{one}",
            f"results/shapes-vl@{two}",
            "--benchmark",
            *own,
            "--out",
            f"results/shapes-vl@{two}",
        ]
        for one, two, own in (("v1", "v1+old", toolchain), ("v1", "v2", []), ("v2", "v2+old", toolchain))
    ]
    (make,) = [words for words in planned if "toolchain" in words]
    assert make[:3] == ["hf2mnn", "toolchain", '{"pins":{"MNN":"3.6.0"},"others":"pinned"}']


def test_unknown_release_gives_one_message(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workspace.folder))
    workspace.config("threads:", TOOLCHAINS.replace("3.6.0", "99.9.9"))
    done = workspace.snakemake("results/shapes-vl+old/checkpoint")
    output = done.stdout + done.stderr
    assert done.returncode and "Error in rule make_toolchain" in output and "Traceback" not in output
    assert re.search(r"^error: the toolchain old cannot be made: pip .*No matching .* pins", output, re.MULTILINE)
    assert not (workspace.folder / ".toolchains" / "old").exists()
