"""Fingerprint of a stage: sha256 over the code that it runs and the releases of its tools.

Snakemake notices neither an edited module nor an upgraded package, so each rule has the fingerprint among its params.
Code is hashed as its syntax tree without docstrings: comments, docstrings and formatting do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hf2mnn.core.manifest import tool_versions
from hf2mnn.core.stage import Stage

PACKAGE = "hf2mnn"
ROOT = Path(__file__).parent.parent
STAGES = f"{PACKAGE}.stages"
UNCOUNTED = (
    *("core.errors", "core.progress", "core.machine_errors", "core.verify"),
    *("machine", "machine.usage", "machine.footprint", "report.console.print_speed"),
    # The values of options are params of the rules.
    *("core.options", "config", "config.load", "config.messages", "config.models", "config.plan"),
    *("config.schema", "config.variants"),
)
"""Modules and functions that change messages, measurements of the run or the reading of options, but no result."""
TEMPLATES = {"report": "report/*.jinja"}  # files beside the code that a stage's result depends on


def _counts(module: str) -> bool:
    """Return whether a module may change a result; another stage's declaration does not."""
    return module.removeprefix(f"{PACKAGE}.") not in UNCOUNTED and not module.startswith(STAGES)


def _is_docstring(node: ast.AST) -> bool:
    """Return whether a statement is a bare string: a docstring, or one below a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _runs(node: ast.AST) -> bool:
    """Return whether a statement has an effect at run time."""
    type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return not type_checking and not _is_docstring(node)


@cache
def _parse(source: str) -> tuple[bytes, tuple[str, ...]]:
    """Return the code of a module without docstrings and imports for type checkers, and the modules that it names."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, block, None), list):
                setattr(node, block, [statement for statement in statements if _runs(statement)])
    return ast.dump(tree).encode(), tuple(name for node in ast.walk(tree) for name in _names(node))


def _names(node: ast.AST) -> list[str]:
    """Return the modules in an import, inside functions too, or in a string (a program that is started)."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [name for alias in node.names if _counts(name := f"{node.module}.{alias.name}")]
        return [node.module, *names] if names else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if node.value.startswith(f"{PACKAGE}.") and node.value.replace(".", "").replace("_", "").isalnum():
            return [node.value]
        if "import sys, _tools" in node.value:
            return ["_tools"]
    return []


def reached(stage: str) -> tuple[dict[str, bytes], set[str]]:
    """Return the code by module of this package, and the other top-level packages, that a stage reaches."""
    modules, packages, pending = {}, set(), [f"{STAGES}.{stage}"]
    while pending:
        module = pending.pop()
        stem = ROOT.parent.joinpath(*module.split("."))
        path = next(filter(Path.is_file, (stem.with_suffix(".py"), stem / "__init__.py")), None)
        if module in modules or path is None:
            continue
        modules[module], names = _parse(path.read_text(encoding="utf-8"))
        pending += filter(_counts, [module.rpartition(".")[0] or module, f"{module}.__main__"])
        for name in names:
            if name.split(".")[0] != PACKAGE:
                packages.add(name.split(".")[0])
            elif _counts(name):
                pending.append(name)
    return modules, packages


def fingerprint(stage: Stage, release: Callable[[str], str | None] = lambda package: None) -> str:
    """Return 16 hex digits over the code of a stage and its tools' releases, those of `release` or the installed."""
    digest = hashlib.sha256()
    for module, code in sorted(reached(stage.name)[0].items()):
        digest.update(module.encode())
        digest.update(code)
    if stage.name in TEMPLATES:
        for template in sorted(ROOT.glob(TEMPLATES[stage.name])):
            digest.update(template.read_bytes())
    for package in stage.tools:
        installed = release(package) or tool_versions(package)[package]
        digest.update(f"{package}=={installed}".encode())
    return digest.hexdigest()[:16]
