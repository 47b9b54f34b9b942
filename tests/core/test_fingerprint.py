"""Fingerprints: an edit runs exactly the stages again that execute the edited code.

A missed module keeps results of old code; a module too many costs hours of repeated work.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf2mnn.config.models import Toolchain
from hf2mnn.core import fingerprint as fp
from hf2mnn.core import manifest
from hf2mnn.core.fingerprint import fingerprint, reached
from hf2mnn.stages import ORDER, stage_named


def fingerprints(**options: object) -> dict[str, str]:
    return {name: fingerprint(stage_named(name), **options) for name in ORDER}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that is fingerprinted in place of the original."""
    folder = tmp_path / "src" / "hf2mnn"
    shutil.copytree(fp.ROOT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fp, "ROOT", folder)
    return folder


def changed_by(path: Path, content: str) -> set[str]:
    """Return the stages whose fingerprint changes with the new content of a file."""
    before = fingerprints()
    path.write_text(content)
    after = fingerprints()
    return {name for name in ORDER if before[name] != after[name]}


def with_statement(path: Path) -> str:
    """Return the content of a file with an additional statement."""
    return path.read_text() + ("\nEDITED = 1\n" if path.suffix == ".py" else "<!-- edited -->\n")


LOADED = """
import importlib, json, sys
loaded = {}
for stage in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.split(".")[0] == "hf2mnn"]:
        del sys.modules[name]
    importlib.import_module("hf2mnn.stages." + stage)
    loaded[stage] = [name for name in sys.modules if name.split(".")[0] == "hf2mnn"]
print(json.dumps(loaded))
"""


def test_every_module_that_a_stage_loads_is_reached() -> None:
    """A child imports each stage and reports what Python loaded, the __init__ files of packages too."""
    command = [sys.executable, "-c", LOADED, json.dumps(ORDER)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for stage, loaded in json.loads(printed.splitlines()[-1]).items():
        modules = {module for module in loaded if fp._counts(module)}
        assert modules - set(reached(stage)[0]) == set(), stage


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("fetch", "hf2mnn.families.qwen2_vl"),
        ("fetch", "hf2mnn.core.files"),
        ("examples", "hf2mnn.reference.examples"),
        ("reference", "hf2mnn.reference.prompts"),
        ("export", "hf2mnn.onnx.deepstack"),
        ("export", "hf2mnn.core.manifest"),
        ("convert", "hf2mnn.mnn.graph"),
        ("evaluate", "hf2mnn.mnn.worker.__main__"),  # started by its name, imported by no module
        ("evaluate", "hf2mnn.onnx.session"),
        ("diagnose", "hf2mnn.mnn.worker.layers"),
        ("diagnose", "hf2mnn.evaluation.causes"),
        ("benchmark", "hf2mnn.mnn.worker.speed"),
        ("report", "hf2mnn.report.page"),
    ],
)
def test_modules_are_reached_indirectly(stage: str, module: str) -> None:
    assert module in reached(stage)[0]


@pytest.mark.parametrize(
    ("stage", "prefix"),
    [
        ("export", "hf2mnn.report"),
        ("export", "hf2mnn.mnn"),
        ("export", "hf2mnn.cli"),
        ("convert", "hf2mnn.report"),
        ("convert", "hf2mnn.evaluation"),
        ("reference", "hf2mnn.onnx"),
        ("examples", "hf2mnn.reference.pytorch"),
        ("evaluate", "hf2mnn.report"),
        ("evaluate", "hf2mnn.onnx.export"),
        ("report", "hf2mnn.mnn"),  # a better converter changes the figures in the table, not the table itself
    ],
)
def test_stages_reach_no_module_of_later_stages(stage: str, prefix: str) -> None:
    """An edited page must not export a 7B model again."""
    assert [module for module in reached(stage)[0] if module.startswith(prefix)] == []


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_never_reaches_the_declaration_of_another(stage: str) -> None:
    assert [module for module in reached(stage)[0] if module.startswith(fp.STAGES)] == [f"{fp.STAGES}.{stage}"]


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("quant/rounding.py", {"sensitivity", "plan", "quantize", "baseline"}),
        ("quant/plan.py", {"plan"}),
        ("onnx/export.py", {"export"}),
        ("onnx/session.py", {"evaluate", "diagnose", "baseline"}),
        ("mnn/worker/session.py", {"baseline", "evaluate", "diagnose", "benchmark", "compare"}),
        ("mnn/worker/layers.py", {"diagnose"}),
        ("evaluation/causes.py", {"diagnose"}),
        ("evaluation/benchmark.py", {"benchmark", "compare"}),
        ("evaluation/tune.py", set()),
        ("report/table.py", {"report", "compare"}),
        ("report/versions.py", {"compare"}),
        ("report/page.html.jinja", {"report"}),
        ("core/errors.py", set()),
        ("core/progress.py", set()),
        ("machine/usage.py", set()),
        ("machine/footprint.py", set()),
        ("stages/convert.py", {"convert"}),
        ("core/files.py", set(ORDER)),
        ("core/options.py", set()),
        ("config/variants.py", set()),
        ("report/console.py", {"report", "compare"}),
        ("cli/tools.py", set()),
    ],
)
def test_an_edit_changes_the_stages_that_reach_it_and_no_other(package: Path, edited: str, changed: set[str]) -> None:
    assert changed_by(package / edited, with_statement(package / edited)) == changed


def without_prose(path: Path) -> str:
    """Return the code of a module without comments and formatting, and with other docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if fp._is_docstring(statement):
                statement.value.value = "Another docstring."
    return ast.unparse(tree) + "\n# Another comment.\n"


def test_docstrings_comments_and_formatting_change_nothing(package: Path) -> None:
    """In any module: the whole copy is rewritten without its prose."""
    before = fingerprints()
    for path in package.rglob("*.py"):
        path.write_text(without_prose(path))
    assert fingerprints() == before


def test_another_help_of_an_option_changes_nothing(package: Path) -> None:
    path = package / "stages" / "convert.py"
    edited = path.read_text().replace("destination: Out", 'destination: Annotated[Path, typer.Option(help="One.")]')
    path.write_text(edited)
    assert changed_by(path, edited.replace("One.", "Another.")) == set()


def test_an_added_docstring_changes_nothing(package: Path) -> None:
    path = package / "quant" / "rounding.py"
    content = path.read_text().replace("\n\n\ndef ", '\n"""Another one below a constant."""\n\n\ndef ', 1)
    assert changed_by(path, content) == set()


def test_fingerprint_is_the_same_for_every_copy(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkouts, at any path, agree."""
    copy = fingerprints()
    monkeypatch.setattr(fp, "ROOT", Path(fp.__file__).parent.parent)
    assert fingerprints() == copy


# Tools

TOOLS = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "PIL": "pillow",
    "datasets": "datasets",
    "MNN": "MNN",
    "_tools": "MNN",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "numba": "numba",
    "scipy": "scipy",
}
"""Packages whose release can change a result, by the name of their module."""
SHARED = "a module that several stages share imports it, but this stage does not call that function"
RECORDED = "prompts and images are inputs that the reference stage recorded"
REFUSED = "it refuses a tokenizer that cannot be written, and writes none"
EXACT = "it decodes integers, which every release does alike"
NOT_DECLARED = {
    "convert": {"onnx-ir": SHARED, "torch": SHARED},
    "fetch": {"tokenizers": REFUSED},
    "calibrate": {"pillow": RECORDED},
    "sensitivity": {"onnx": SHARED, "pillow": RECORDED},
    "plan": dict.fromkeys(("MNN", "numba", "onnx", "onnx-ir", "tokenizers", "torch", "transformers"), SHARED),
    "quantize": dict.fromkeys(("onnx-ir", "tokenizers", "torch", "transformers"), SHARED),
    "baseline": dict.fromkeys(
        ("numba", "onnx-ir", "onnxruntime", "scipy", "tokenizers", "torch", "transformers"), SHARED
    ),
    "evaluate": {**dict.fromkeys(("onnx-ir", "torch"), SHARED), "transformers": RECORDED},
    "diagnose": {**dict.fromkeys(("onnx-ir", "tokenizers", "torch"), SHARED), "numba": EXACT},
    "benchmark": {"torch": SHARED},
    "compare": {"torch": SHARED},
}
"""Reachable tools that a stage does not declare, with the reason."""


@pytest.mark.parametrize("stage", ORDER)
def test_reachable_tools_are_declared_or_listed_with_a_reason(stage: str) -> None:
    tools = {TOOLS[package] for package in reached(stage)[1] if package in TOOLS}
    undeclared = tools - set(stage_named(stage).tools)
    assert undeclared == set(NOT_DECLARED.get(stage, {}))


def test_releases_of_a_toolchain_count_in_place_of_the_installed_ones() -> None:
    """However their names are spelt; exactly the stages that declare the tool run again."""
    toolchain = Toolchain(pins={"mnn": "3.6.0", "ONNX_IR": "1.0.0"})
    pinned, other = fingerprints(), fingerprints(release=toolchain.release)
    assert {stage for stage in ORDER if pinned[stage] != other[stage]} == {
        stage for stage in ORDER if {"MNN", "onnx-ir"} & set(stage_named(stage).tools)
    }
    newest = fingerprints(release=Toolchain(others="newest").release)
    assert all(pinned[stage] != newest[stage] for stage in ORDER if stage_named(stage).tools)


def test_the_export_does_not_depend_on_mnn() -> None:
    """An upgrade of the engine keeps the portable graphs."""
    assert not {"MNN", "_tools", "onnxruntime"} & set(reached("export")[1])


def test_an_upgraded_tool_changes_the_stages_that_declare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "version", lambda package: "1")
    before = fingerprints()
    monkeypatch.setattr(manifest, "version", lambda package: "2" if package == "onnxscript" else "1")
    after = fingerprints()
    assert {stage for stage in ORDER if before[stage] != after[stage]} == {"export"}
