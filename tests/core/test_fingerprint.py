"""What makes a stage run again beside its inputs: the code that it reaches, and the releases of its tools.

A module that is missed here means results of old code that look new; one too many means hours of work done again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf2mnn.config.schema import Toolchain
from hf2mnn.core import fingerprint as fp
from hf2mnn.core.fingerprint import STAGES, fingerprint, modules_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, for this test the one that is fingerprinted."""
    folder = tmp_path / "src" / "hf2mnn"
    shutil.copytree(fp.ROOT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fp, "ROOT", folder)
    fp._imports.cache_clear()
    yield folder
    fp._imports.cache_clear()


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "# edited\n")
    fp._imports.cache_clear()


LOADED = """
import importlib, json, sys
loaded = {}
for stage, module in json.loads(sys.argv[1]).items():
    for name in [name for name in sys.modules if name.split(".")[0] == "hf2mnn"]:
        del sys.modules[name]
    importlib.import_module(module)
    loaded[stage] = [name for name in sys.modules if name.split(".")[0] == "hf2mnn"]
print(json.dumps(loaded))
"""


def test_every_module_that_is_loaded_is_covered() -> None:
    """Import each stage in a child and ask Python what it loaded: packages' own __init__ files run as well."""
    command = [sys.executable, "-c", LOADED, json.dumps(STAGES)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for stage, loaded in json.loads(printed.splitlines()[-1]).items():
        assert set(loaded) - set(modules_of(stage)[0]) == set(), stage


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("source", "hf2mnn.families.qwen2_vl"),
        ("source", "hf2mnn.core.files"),
        ("evaluation", "hf2mnn.reference.examples"),
        ("reference", "hf2mnn.reference.prompts"),
        ("onnx", "hf2mnn.onnx.deepstack"),
        ("onnx", "hf2mnn.core.manifest"),
        ("mnn", "hf2mnn.mnn.graph"),  # from hf2mnn.mnn import graph as proof
        ("evaluate", "hf2mnn.mnn.worker.__main__"),  # started by its name, imported by nobody
        ("evaluate", "hf2mnn.onnx.session"),
        ("diagnose", "hf2mnn.mnn.worker.layers"),
        ("diagnose", "hf2mnn.evaluation.causes"),
        ("speed", "hf2mnn.mnn.worker.speed"),
        ("report", "hf2mnn.report.page"),
    ],
)
def test_modules_reached_indirectly_are_found(stage: str, module: str) -> None:
    assert module in modules_of(stage)[0]


@pytest.mark.parametrize(
    ("stage", "prefix"),
    [
        ("onnx", "hf2mnn.report"),
        ("onnx", "hf2mnn.mnn"),
        ("onnx", "hf2mnn.cli"),
        ("mnn", "hf2mnn.report"),
        ("mnn", "hf2mnn.evaluate"),
        ("reference", "hf2mnn.onnx"),
        ("evaluation", "hf2mnn.reference.pytorch"),
        ("evaluate", "hf2mnn.report"),
        ("evaluate", "hf2mnn.onnx.export"),
        ("report", "hf2mnn.mnn"),  # a better converter changes the numbers in the table, not how the table is made
    ],
)
def test_stages_do_not_reach_what_is_not_theirs(stage: str, prefix: str) -> None:
    """An edited page must not export a 7B model again."""
    assert [module for module in modules_of(stage)[0] if module.startswith(prefix)] == []


@pytest.mark.parametrize(
    ("stage", "tools"),
    [
        ("evaluation", {"datasets", "pillow"}),
        ("reference", {"torch", "transformers", "tokenizers", "pillow"}),
        ("onnx", {"torch", "transformers", "onnx", "onnx-ir", "onnxscript"}),
        ("mnn", {"MNN", "onnx", "tokenizers"}),
        ("evaluate", {"MNN", "onnxruntime", "tokenizers"}),
    ],
)
def test_tools_whose_release_changes_results(stage: str, tools: set[str]) -> None:
    """MNN's converter is called in a child, by `_tools` in a program text; tokenizers comes in through transformers."""
    assert tools - set(modules_of(stage)[1]) == set()


def test_releases_that_a_toolchain_asks_for_count_in_place_of_those_here() -> None:
    """However they are spelt; the stages that another release does not touch are those that would run again."""
    other = Toolchain(pins={"mnn": "3.6.0", "ONNX_IR": "1.0.0"})
    changed = {stage for stage in STAGES if fingerprint(stage, other) != fingerprint(stage)}
    assert changed == {stage for stage in STAGES if {"MNN", "onnx-ir"} & set(modules_of(stage)[1])}
    newest = Toolchain(others="newest")
    assert all(fingerprint(stage, newest) != fingerprint(stage) for stage in STAGES if modules_of(stage)[1])


def test_onnx_does_not_depend_on_mnn() -> None:
    """An upgrade of the engine leaves the portable graphs alone."""
    assert not {"MNN", "onnxruntime"} & set(modules_of("onnx")[1])


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("mnn/graph.py", {"mnn", "sensitivity", "plan", "quantize", "evaluate", "diagnose", "speed", "compare"}),
        ("quant/rounding.py", {"sensitivity", "plan", "quantize", "diagnose"}),
        ("quant/plan.py", {"plan"}),
        ("onnx/export.py", {"onnx"}),
        ("onnx/session.py", {"evaluate", "diagnose"}),
        ("mnn/worker/session.py", {"evaluate", "diagnose", "speed", "compare"}),
        ("mnn/worker/layers.py", {"diagnose"}),
        ("evaluate/causes.py", {"diagnose"}),
        ("evaluate/score.py", {"evaluate"}),
        ("evaluate/speed.py", {"speed", "compare"}),
        ("evaluate/tune.py", set()),
        ("report/table.py", {"report", "compare"}),
        ("report/versions.py", {"compare"}),
        ("mnn/worker/speed.py", {"speed", "compare"}),
        ("report/page.html.jinja", {"report"}),
        ("errors.py", set(STAGES)),
        ("cli.py", set()),
    ],
)
def test_an_edit_changes_the_stages_that_reach_it_and_no_other(package: Path, edited: str, changed: set[str]) -> None:
    before = {stage: fingerprint(stage) for stage in STAGES}
    edit(package / edited)
    after = {stage: fingerprint(stage) for stage in STAGES}
    assert {stage for stage in STAGES if before[stage] != after[stage]} == changed


def test_fingerprint_is_that_of_the_contents(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the place: two checkouts, and the copy here, agree."""
    copied = {stage: fingerprint(stage) for stage in STAGES}
    monkeypatch.setattr(fp, "ROOT", Path(fp.__file__).parent)
    fp._imports.cache_clear()
    assert {stage: fingerprint(stage) for stage in STAGES} == copied


def test_an_upgraded_tool_changes_the_stages_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {stage: fingerprint(stage) for stage in STAGES}
    monkeypatch.setattr(fp, "version", lambda package: "999" if package == "onnxscript" else "1")
    ones = {stage: fingerprint(stage) for stage in STAGES}
    monkeypatch.setattr(fp, "version", lambda package: "1")
    assert {stage for stage in STAGES if fingerprint(stage) != ones[stage]} == {"onnx"}
    assert ones["onnx"] != before["onnx"]
