"""Fingerprint of a stage: the code that it runs and the releases of its tools.

Snakemake sees neither an edited module nor an upgraded package, so each rule has this among its params. Code is hashed
as its syntax tree without docstrings, so comments, docstrings and formatting do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hf2mnn.core.stage import Stage

PACKAGE = "hf2mnn"
ROOT = Path(__file__).parent.parent
STAGES = f"{PACKAGE}.stages"
REPORTING = ("core.errors", "core.progress", "core.shortage", "core.verify", "machine.usage", "machine.footprint")
"""Modules that change what is printed or recorded, and no result."""
TEMPLATES = {"report": "report/*.jinja"}
"""Files beside the code that a stage's result depends on."""


def _file(module: str) -> Path | None:
    path = ROOT.parent / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _counts(module: str) -> bool:
    """Return whether a module may change a result; another stage's declaration does not."""
    return module.removeprefix(f"{PACKAGE}.") not in REPORTING and not module.startswith(STAGES)


def _is_docstring(node: ast.AST) -> bool:
    """Return whether a statement is a bare string: a docstring, or one below a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _runs(node: ast.AST) -> bool:
    """Return whether a statement does anything when the program runs."""
    type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return not type_checking and not _is_docstring(node)


@cache
def _tree(module: str) -> ast.Module:
    """Return a module's syntax tree without docstrings and imports for type checkers."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, name, None), list):
                setattr(node, name, [statement for statement in statements if _runs(statement)])
    return tree


def _imports(module: str) -> Iterator[str]:
    """Yield modules that a module names: in imports, wherever they are, and in strings (programs that it starts)."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(f"{PACKAGE}.") and node.value.replace(".", "").replace("_", "").isalnum():
                yield node.value
            elif "import sys, _tools" in node.value:
                yield "_tools"


@cache
def reached(stage: str) -> tuple[list[str], list[str]]:
    """Return the modules of this package and the other top-level packages that a stage's program reaches, sorted."""
    ours, others, left = set(), set(), [f"{STAGES}.{stage}"]
    while left:
        module = left.pop()
        if module in ours or _file(module) is None:
            continue
        ours.add(module)
        left += filter(_counts, [module.rpartition(".")[0] or module, f"{module}.__main__"])
        for name in _imports(module):
            if name.split(".")[0] != PACKAGE:
                others.add(name.split(".")[0])
            elif _counts(name):
                left.append(name)
    return sorted(filter(_file, ours)), sorted(others)


@cache
def _code(module: str) -> bytes:
    return ast.dump(_tree(module)).encode()


def fingerprint(stage: Stage, release: Callable[[str], str | None] = lambda package: None) -> str:
    """Return 16 hex digits over the code of a stage and the releases of its tools.

    Args:
        stage: The stage.
        release: Release of a package that another environment has; None for the one that is installed here.
    """
    digest = hashlib.sha256()
    for module in reached(stage.name)[0]:
        digest.update(module.encode())
        digest.update(_code(module))
    for pattern in filter(None, [TEMPLATES.get(stage.name)]):
        for template in sorted(ROOT.glob(pattern)):
            digest.update(template.read_bytes())
    for package in stage.tools:
        try:
            digest.update(f"{package}=={release(package) or version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"{package} not installed".encode())
    return digest.hexdigest()[:16]
