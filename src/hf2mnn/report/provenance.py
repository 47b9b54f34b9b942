"""What everything in the report was made of, by what, and by which commands, as the manifests tell."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf2mnn.core.manifest import Manifest
from hf2mnn.report.cells import Cell, Table
from hf2mnn.report.evidence import BENCHMARK, BUNDLES, DIAGNOSES, EVALUATIONS, PLANS, REFERENCE_FOLDER, Evidence

STORED = ("checkpoint", "onnx", "graphs", "bundles", "reference")
"""Folders whose files the report lists."""


@dataclass(frozen=True)
class Stage:
    """One folder of the model's results: its path there and its manifest."""

    path: str
    manifest: Manifest

    @property
    def line(self) -> str:
        """The command line that made the folder; absolute paths of its machine are cut to their names."""
        return shlex.join(map(_portable, self.manifest.command)) or f"(stage {self.manifest.stage}, run by a program)"


def _portable(path: str) -> str:
    """A path as it was given; of an absolute one the name, since the rest belongs to another machine."""
    name, equals, value = path.partition("=")
    if equals and PurePath(value).is_absolute():
        return f"{name}={PurePath(value).name}"
    return PurePath(path).name if PurePath(path).is_absolute() else path


def stages(evidence: Evidence) -> list[Stage]:
    """Stages in the order of the data."""
    known = evidence.manifests
    order = ["checkpoint", "examples/evaluation", "examples/calibration", REFERENCE_FOLDER, "onnx", "graphs"]
    order += ["reference/calibration", "calibration", "sensitivity"]
    found = [Stage(name, known[name]) for name in order if name in known]
    for row in evidence.rows:
        folders = {"plan": f"{PLANS}/{row.name}", "bundle": f"{BUNDLES}/{row.name}"}
        found += [Stage(path, row.manifests[name]) for name, path in folders.items() if name in row.manifests]
    for stage, folder in (("evaluate", EVALUATIONS), ("diagnose", DIAGNOSES)):
        rows = [row for row in evidence.rows if stage in row.manifests]
        found += [Stage(f"{folder}/{row.name}", row.manifests[stage]) for row in rows]
    return found + ([Stage(BENCHMARK, known[BENCHMARK])] if BENCHMARK in known else [])


def checkpoint(evidence: Evidence) -> str:
    """Where the checkpoint came from, in a sentence."""
    if "checkpoint" not in evidence.manifests:
        return "Where the checkpoint came from is not known: its manifest is not there."
    settings, places = evidence.manifests["checkpoint"].settings, evidence.manifests["checkpoint"].paths
    told = f"The checkpoint is {_origin(settings, places.get('path'))}."
    if "adapter" in settings or "adapter" in places:
        told += f" Merged into it is the adapter {_origin(settings.get('adapter', {}), places.get('adapter'))}."
    return told


def _origin(settings: dict[str, Any], path: str | None) -> str:
    if path:
        return f"the local folder {_portable(path)}"
    hub = "ModelScope" if settings.get("hub") == "modelscope" else "the Hugging Face hub"
    told = f"{settings['repository']} on {hub}, revision {settings['revision']}"
    return told + (f", commit {settings['commit']}" if "commit" in settings else "")


def _text(settings: Any) -> str:
    if isinstance(settings, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in settings.items())
    if isinstance(settings, list):
        return " ".join(map(str, settings))
    return _portable(settings) if isinstance(settings, str) else json.dumps(settings)


def _weights(manifest: Manifest, part: str) -> str:
    """How a part's weights are stored; a plan names each operator's own settings."""
    described = dict(manifest.settings.get(part, {}))
    if "plan" in manifest.paths:
        described = {"plan": manifest.paths["plan"], "method": described.get("method", "")}
    return _text(described)


def variants(evidence: Evidence) -> Table | None:
    """Settings of each bundle, and what they come to."""
    rows = []
    for row in evidence.rows:
        if (manifest := row.manifests.get("bundle")) is None:
            continue
        bits, embedding = (manifest.results.get(name) for name in ("bits_per_weight", "embedding_bytes"))
        cells = [Cell(_weights(manifest, part)) for part in ("decoder", "vision")]
        cells.append(Cell(_text(manifest.settings.get("engine", {}))))
        cells.append(Cell("32" if bits is None else f"{bits:.3f}"))
        cells.append(Cell("in lm_head" if embedding == 0 else f"{embedding / 1e6:.1f} MB" if embedding else ""))
        rows.append((row.name, cells))
    columns = ["variant", "decoder", "vision", "engine", "bits a weight", "embedding"]
    return Table("Settings of each variant", columns, rows, wraps=True) if rows else None


def resources(made: list[Stage]) -> Table:
    """What each stage took, and the tools that it ran with."""
    rows = []
    for stage in made:
        manifest = stage.manifest
        tools = ", ".join(
            f"{tool} {release}" for tool, release in {"hf2mnn": manifest.hf2mnn, **manifest.tools}.items()
        )
        took = [Cell(f"{manifest.seconds:.1f}"), Cell(f"{manifest.peak_rss_mb:.0f}")]
        rows.append((stage.path, [*took, Cell(manifest.digest()[:12]), Cell(tools)]))
    return Table("Stages", ["folder", "seconds", "peak MB", "digest", "tools"], rows, wraps=True)


def files(made: list[Stage]) -> Table:
    """sha256 and size of each file that a later stage or a device reads, and of what came from outside."""
    rows: list[tuple[str, list[Cell]]] = []
    for stage in made:
        outside = {name: digest for name, digest in stage.manifest.inputs.items() if "/" in name or name == "examples"}
        wanted = stage.manifest.outputs if stage.path.split("/")[0] in STORED else {}
        if not outside and not wanted:
            continue
        rows.append((stage.path, []))
        named = {"examples": "examples.jsonl (read)"}
        rows += [(named.get(name, f"{name} (read)"), [Cell(""), Cell(digest)]) for name, digest in outside.items()]
        rows += [(name, [Cell(f"{entry['size']:,}"), Cell(entry["sha256"])]) for name, entry in wanted.items()]
    return Table("Files", ["file", "bytes", "sha256"], rows)
