"""Architecture: one-way imports, one module, command, rule file and rule per stage, and the sizes of modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from hf2mnn import cli
from hf2mnn.stages import ORDER, stage_named
from support import REPOSITORY

PACKAGE = REPOSITORY / "src" / "hf2mnn"
RULES = REPOSITORY / "workflow" / "rules"
LAYERS = (
    ("figures", "metrics"),
    ("machine",),
    ("core",),
    ("families",),
    ("config",),
    ("checkpoint",),
    ("reference",),
    ("onnx",),
    ("mnn",),
    ("quant",),
    ("evaluation",),
    ("report", "doctor"),
    ("stages",),
    ("cli",),
)
"""Packages and top-level modules from the lowest to the highest; each imports from lower ones only."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
STAGE_FILES = [PACKAGE / "stages" / f"{name}.py" for name in ORDER]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of every import of this package, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno} imports relatively"
            modules = [
                f"{node.module}.{alias.name}" if node.module == "hf2mnn" else node.module for alias in node.names
            ]
        else:
            continue
        yield from ((node.lineno, module) for module in dict.fromkeys(modules) if module.split(".")[0] == "hf2mnn")


def package_of(module: str) -> str:
    """Return the package, or the top-level module, of a module of hf2mnn; "" for hf2mnn itself."""
    return module.removeprefix("hf2mnn").strip(".").split(".")[0]


def test_every_package_has_a_layer() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == set(LEVEL)


@pytest.mark.parametrize("package", [name for names in LAYERS for name in names])
def test_imports_run_one_way(package: str) -> None:
    """A package imports from lower layers and from itself."""
    wrong = []
    for path in [PACKAGE / f"{package}.py", *(PACKAGE / package).rglob("*.py")]:
        for line, module in imports(path) if path.is_file() else []:
            other = package_of(module)
            if other in LEVEL and other != package and LEVEL[other] >= LEVEL[package]:
                wrong.append(f"{name_of(path)}:{line} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_has_at_most_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_few_modules_are_at_the_top() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 5


def test_few_modules_are_very_short() -> None:
    """A module under 30 lines belongs to its neighbour; a family is one file however small it is."""
    short = [
        name_of(path)
        for path in MODULES
        if path.name not in ("__init__.py", "__main__.py")
        and "families" not in path.parts
        and len(path.read_text(encoding="utf-8").splitlines()) < 30
    ]
    assert len(short) < 10, short


# Stages


def test_every_stage_has_a_module_a_command_and_a_rule_file() -> None:
    modules = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    assert set(ORDER) - set(typer.main.get_command(cli.app).commands) == set()
    assert set(ORDER) - {path.stem for path in RULES.glob("*.smk")} == set()


@pytest.mark.parametrize("name", ORDER)
def test_stage_is_declared_under_its_name(name: str) -> None:
    stage = stage_named(name)
    assert stage.name == name
    assert set(stage.inputs.values()) <= set(ORDER[: ORDER.index(name)]), "a stage reads folders of earlier stages"


@pytest.mark.parametrize("name", ORDER)
def test_rule_file_has_one_rule_that_runs_the_command_of_the_stage(name: str) -> None:
    text = (RULES / f"{name}.smk").read_text(encoding="utf-8")
    assert len(re.findall(r"^(?:rule|checkpoint) \w+:", text, re.MULTILINE)) == 1
    assert set(re.findall(r"\bhf2mnn (\w+)", text.split("shell:")[1])) == {name}


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: path.stem)
def test_stage_is_wiring_of_30_to_80_lines(path: Path) -> None:
    assert 30 <= len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: path.stem)
def test_stage_imports_no_other_stage(path: Path) -> None:
    others = {f"hf2mnn.stages.{name}" for name in ORDER}
    assert [f"line {line}: {module}" for line, module in imports(path) if module in others] == []


def test_common_rules_are_short() -> None:
    assert len((RULES / "common.smk").read_text(encoding="utf-8").splitlines()) < 150
