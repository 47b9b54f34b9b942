"""Provenance: checkpoint, settings, tool versions, resources and command line of each stage, from the manifests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from hf2mnn.core.manifest import Manifest
from hf2mnn.report.cells import Cell, Table
from hf2mnn.report.evidence import BUNDLES, EVALUATION, Evidence

LISTED = ("checkpoint", "reference", "onnx", "graphs", "bundles")
"""Folders whose files the report lists: inputs of later stages and of devices."""


def _portable(word: str) -> str:
    """Shorten an absolute path, also as the value of --option=VALUE, to its name: other machines have other paths."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{PurePath(value).name}" if PurePath(value).is_absolute() else word


def command_line(manifest: Manifest) -> str:
    """Return the command line of a stage for a shell, with absolute paths shortened to their names."""
    return shlex.join(map(_portable, manifest.command)) or f"(the stage {manifest.stage} was called from Python)"


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
        engine, evaluated = settings.get("engine", {}), variant.manifests.get(EVALUATION)
        used = evaluated.settings.get("engine", {}) if evaluated else {}  # an edited bundle has others
        engine = {key: used.get(key, value) for key, value in engine.items()}
        texts = [_as_text(part) for part in (*weights, engine)]
        texts.append("32" if bits is None else f"{bits:.3f}")
        texts.append("in lm_head" if embedding == 0 else f"{embedding / 1e6:.1f} MB" if embedding else "")
        layout = Cell(results.get("decoder_layout", ""), results.get("layout_reason", ""))
        rows.append((variant.name, [*map(Cell, texts), layout]))
    columns = ["variant", "decoder", "vision", "engine", "bits per weight", "embedding", "decoder layout"]
    return Table("Settings of each variant", columns, rows, wraps=True) if rows else None


def tokenizer_differences(folders: Mapping[str, Manifest]) -> Table | None:
    """Return a table of the convert stage's texts that the engine and transformers encode differently."""
    rows = []
    for manifest in folders.values():
        for group in manifest.results.get("tokenizer_differences", ()):
            share = f"{group['different']} of {group['texts']} ({group['share']:.1%})"
            examples = ", ".join(map(ascii, group["examples"]))
            rows.append((" ".join(filter(None, (group["kind"], group["script"]))), [Cell(share), Cell(examples)]))
    return Table("Texts with other token ids", ["kind", "different", "examples"], rows, wraps=True) if rows else None


def stage_resources(folders: Mapping[str, Manifest]) -> Table:
    """Return a table of each stage's wall time, peak memory, digest and tool versions."""
    rows = []
    for path, manifest in folders.items():
        tools = ", ".join(map(" ".join, [("hf2mnn", manifest.hf2mnn), *manifest.tools.items()]))
        texts = (f"{manifest.seconds:.1f}", f"{manifest.peak_rss_mb:.0f}", manifest.digest()[:12], tools)
        rows.append((path, list(map(Cell, texts))))
    return Table("Stages", ["folder", "seconds", "peak MB", "digest", "tools"], rows, wraps=True)


def listed_files(folders: Mapping[str, Manifest]) -> Table:
    """Return a table of sha256 and size of the files in LISTED folders, and of user-provided inputs."""
    rows = []
    for path, manifest in folders.items():
        inputs = {name: digest for name, digest in manifest.inputs.items() if "/" in name or name == "examples"}
        outputs = manifest.outputs if path.split("/")[0] in LISTED else {}
        if inputs or outputs:
            rows.append((path, []))
        names = {"examples": "examples.jsonl"}
        rows += [(f"{names.get(name, name)} (input)", [Cell(""), Cell(digest)]) for name, digest in inputs.items()]
        rows += [(name, [Cell(f"{entry['size']:,}"), Cell(entry["sha256"])]) for name, entry in outputs.items()]
    return Table("Files", ["file", "bytes", "sha256"], rows)
