"""What a stage's result depends on beside its inputs: the code that makes it, and the versions of the tools.

Snakemake sees neither an edited module nor an upgraded package, so each rule carries this among its params.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hf2mnn.config import Toolchain

PACKAGE = "hf2mnn"
ROOT = Path(__file__).parent
STAGES = {
    "source": "hf2mnn.source.fetch",
    "examples": "hf2mnn.reference.own",
    "evaluation": "hf2mnn.reference.labelled",
    "reference": "hf2mnn.reference.run",
    "onnx": "hf2mnn.onnx.export",
    "mnn": "hf2mnn.mnn.stages",
    "activations": "hf2mnn.reference.linear_inputs",
    "sensitivity": "hf2mnn.quant.sensitivity",
    "plan": "hf2mnn.quant.plan",
    "quantize": "hf2mnn.quant.stages",
    "evaluate": "hf2mnn.evaluate.run",
    "speed": "hf2mnn.evaluate.speed",
    "diagnose": "hf2mnn.evaluate.diagnose",
    "report": "hf2mnn.report.report",
    "compare": "hf2mnn.report.changes",
}
# Packages whose release changes results, by the name under which they are imported.
TOOLS = {
    "datasets": "datasets",
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "MNN": "MNN",
    "_tools": "MNN",
    "PIL": "pillow",
    "numba": "numba",
    "scipy": "scipy",
}


PINNED = Toolchain()


def _file(module: str) -> Path | None:
    path = ROOT.parent / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, but for what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _running(child)


@cache
def _imports(module: str) -> frozenset[str]:
    """Modules that a module names: in imports, wherever they stand, and in strings (a program that it starts)."""
    found = set()
    for node in _running(ast.parse(_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(f"{PACKAGE}.") and node.value.replace(".", "").replace("_", "").isalnum():
                found.add(node.value)
            elif "import sys, _tools" in node.value:
                found.add("_tools")
    return frozenset(found)


def modules_of(stage: str) -> tuple[list[str], list[str]]:
    """(our modules, tool packages) that a stage's program reaches, both sorted."""
    ours, tools, left = set(), set(), [STAGES[stage]]
    while left:
        module = left.pop()
        if module in ours or _file(module) is None:
            continue
        ours.add(module)
        left += [module.rpartition(".")[0] or module, f"{module}.__main__"]
        for name in _imports(module):
            if name.split(".")[0] in TOOLS:
                tools.add(TOOLS[name.split(".")[0]])
            elif name.split(".")[0] == PACKAGE:
                left.append(name)
    return sorted(ours), sorted(tools)


def fingerprint(stage: str, toolchain: Toolchain = PINNED) -> str:
    """16 hex digits over the code and the tool versions of a stage: those that `toolchain` asks for, else those that
    are installed here."""
    ours, tools = modules_of(stage)
    digest = hashlib.sha256()
    for module in ours:
        digest.update(module.encode())
        digest.update(_file(module).read_bytes())
    for template in sorted(ROOT.glob("report/*.jinja")) if stage == "report" else []:
        digest.update(template.read_bytes())
    for package in tools:
        try:
            digest.update(f"{package}=={toolchain.release(package) or version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"{package} not installed".encode())
    return digest.hexdigest()[:16]
