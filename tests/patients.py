"""Bundles to be broken, and what the doctor says of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hf2mnn.core.manifest import NAME, Manifest
from hf2mnn.doctor.examine import MODEL_CHECKS, ONNX_CHECKS, examine
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.mnn.bundle import DECODER
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.mnn.graph import Graph

OWN = {check.__name__ for check in (*MODEL_CHECKS, *ONNX_CHECKS)} | {"file_changed", "vision_bits"}
"""Checks of graphs and weight files; those of settings and tokenizers have tests of their own."""
LLMEXPORT = Path(__file__).parent / "doctor" / "data" / "llmexport"


def copied(bundle: Path, destination: Path) -> Path:
    """A copy of a bundle by hard links: a file that is changed must be written anew (`own`)."""
    return Path(shutil.copytree(bundle, destination, copy_function=os.link))


def own(path: Path) -> Path:
    """The file as one that no other bundle shares."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def vouched(bundle: Path) -> None:
    """Let the manifest vouch for the bundle as it is now."""
    own(bundle / NAME)
    Manifest.load(bundle).save(bundle)


def edited(bundle: Path, edit: Callable[[Graph], object], file: str = DECODER) -> None:
    """Change a graph of a bundle."""
    graph = read_graph(bundle / file)
    edit(graph)
    (bundle / file).unlink()
    write_graph(graph, bundle / file)


def found(path: Path, *severities: Severity, checkpoint: Path | None = None) -> dict[str, Finding]:
    """What the checks of graphs and weight files say, of these severities or all, by check."""
    findings = examine(path, checkpoint)
    return {
        f.check: f
        for f in findings
        if f.check in OWN | {"not_examined"} and (not severities or f.severity in severities)
    }


def errors(path: Path, checkpoint: Path | None = None) -> set[str]:
    return set(found(path, Severity.ERROR, checkpoint=checkpoint))
