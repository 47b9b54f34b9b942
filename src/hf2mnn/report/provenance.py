"""Provenance: checkpoint, settings, tool versions, resources and command line of each stage, from the manifests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf2mnn.core.manifest import Manifest
from hf2mnn.report.cells import Cell, Table
from hf2mnn.report.evidence import BENCHMARK, BUNDLES, MODEL_FOLDERS, VARIANT_FOLDERS, Evidence

LISTED = ("checkpoint", "reference", "onnx", "graphs", "bundles")
"""Folders whose files the report lists: inputs of later stages and of devices."""


@dataclass(frozen=True)
class StageFolder:
    """A stage folder of the model."""

    path: str  # Below results/<model>.
    manifest: Manifest

    @property
    def command(self) -> str:
        """Command line that wrote the folder, for a shell, with absolute paths shortened to their names."""
        words = shlex.join(map(_portable, self.manifest.command))
        return words or f"(the stage {self.manifest.stage} was called from Python)"


def _portable(word: str) -> str:
    """Shorten an absolute path, also as the value of --option=VALUE, to its name: other machines have other paths."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{PurePath(value).name}" if PurePath(value).is_absolute() else word


def stage_folders(evidence: Evidence) -> list[StageFolder]:
    """Return the stage folders of a model in the order of the pipeline."""
    manifests = {path: evidence.manifests.get(path) for path in MODEL_FOLDERS}
    for folder in VARIANT_FOLDERS:
        manifests |= {f"{folder}/{variant.name}": variant.manifests.get(folder) for variant in evidence.variants}
    manifests[BENCHMARK] = evidence.manifests.get(BENCHMARK)
    return [StageFolder(path, manifest) for path, manifest in manifests.items() if manifest is not None]


def checkpoint_origin(evidence: Evidence) -> str:
    """Describe the origin of the checkpoint, and of an adapter merged into it."""
    manifest = evidence.manifests.get("checkpoint")
    if manifest is None:
        return "The origin of the checkpoint is unknown: results have no checkpoint/manifest.json."
    settings, paths = manifest.settings, manifest.paths
    text = f"Checkpoint: {_origin(settings, paths.get('path'))}."
    if "adapter" in settings or "adapter" in paths:
        text += f" Merged adapter: {_origin(settings.get('adapter', {}), paths.get('adapter'))}."
    return text


def _origin(settings: dict[str, Any], path: str | None) -> str:
    if path:
        return f"local folder {_portable(path)}"
    hub = "ModelScope" if settings.get("hub") == "modelscope" else "the Hugging Face hub"
    text = f"{settings['repository']} on {hub}, revision {settings['revision']}"
    return text + (f", commit {settings['commit']}" if "commit" in settings else "")


def _as_text(settings: Any) -> str:
    if isinstance(settings, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_as_text(value)}" for key, value in settings.items())
    if isinstance(settings, list):
        return " ".join(map(str, settings))
    return _portable(settings) if isinstance(settings, str) else json.dumps(settings)


def variant_settings(evidence: Evidence) -> Table | None:
    """Return a table of each variant's settings, bits per weight, storage of the embedding and decoder layout."""
    rows = []
    for variant in evidence.variants:
        if (manifest := variant.manifests.get(BUNDLES)) is None:
            continue
        settings, results = manifest.settings, manifest.results
        weights = [settings.get(part, {}) for part in ("decoder", "vision")]
        if "plan" in manifest.paths:
            weights = [{"plan": manifest.paths["plan"], "method": part.get("method", "")} for part in weights]
        bits, embedding = results.get("bits_per_weight"), results.get("embedding_bytes")
        cells = [Cell(_as_text(part)) for part in (*weights, settings.get("engine", {}))]
        cells.append(Cell("32" if bits is None else f"{bits:.3f}"))
        cells.append(Cell("in lm_head" if embedding == 0 else f"{embedding / 1e6:.1f} MB" if embedding else ""))
        cells.append(Cell(results.get("decoder_layout", ""), results.get("layout_reason", "")))
        rows.append((variant.name, cells))
    columns = ["variant", "decoder", "vision", "engine", "bits per weight", "embedding", "decoder layout"]
    return Table("Settings of each variant", columns, rows, wraps=True) if rows else None


def stage_resources(folders: Sequence[StageFolder]) -> Table:
    """Return a table of each stage's wall time, peak memory, digest and tool versions."""
    rows = []
    for folder in folders:
        manifest = folder.manifest
        tools = {"hf2mnn": manifest.hf2mnn, **manifest.tools}
        texts = [f"{manifest.seconds:.1f}", f"{manifest.peak_rss_mb:.0f}", manifest.digest()[:12]]
        texts.append(", ".join(f"{name} {release}" for name, release in tools.items()))
        rows.append((folder.path, [Cell(text) for text in texts]))
    return Table("Stages", ["folder", "seconds", "peak MB", "digest", "tools"], rows, wraps=True)


def listed_files(folders: Sequence[StageFolder]) -> Table:
    """Return a table of sha256 and size of the files in LISTED folders, and of user-provided inputs."""
    rows: list[tuple[str, list[Cell]]] = []
    for folder in folders:
        inputs = {name: digest for name, digest in folder.manifest.inputs.items() if "/" in name or name == "examples"}
        outputs = folder.manifest.outputs if folder.path.split("/")[0] in LISTED else {}
        if not inputs and not outputs:
            continue
        rows.append((folder.path, []))
        names = {"examples": "examples.jsonl (input)"}
        rows += [(names.get(name, f"{name} (input)"), [Cell(""), Cell(digest)]) for name, digest in inputs.items()]
        rows += [(name, [Cell(f"{entry['size']:,}"), Cell(entry["sha256"])]) for name, entry in outputs.items()]
    return Table("Files", ["file", "bytes", "sha256"], rows)
