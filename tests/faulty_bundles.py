"""Copies of bundles with one fault, and the findings of the doctor about them."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.manifest import NAME, Manifest
from hf2mnn.doctor.artifacts import Bundle, MnnModel, OnnxFile
from hf2mnn.doctor.checks import CHECKS, Check
from hf2mnn.doctor.examine import examine, run_check
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.bundle import ADAPT, CONFIG, DECODER, MODEL_CONFIG, PARTS
from hf2mnn.mnn.convert import FUSE, convert_onnx, read_graph, write_graph
from hf2mnn.mnn.graph import Graph

FILE_CHECKS = {check.__name__ for check in (*CHECKS[MnnModel], *CHECKS[OnnxFile])} | {
    "file_changed",
    "settings_edited",
    "vision_bits",
    "not_examined",
}
"""Checks of graphs and weight files; those of configurations and tokenizers have tests of their own."""
LLMEXPORT = Path(__file__).parent / "doctor" / "data" / "llmexport"


def link_copy(bundle: Path, destination: Path) -> Path:
    """Copy a bundle by hard links; `unlink_copy` a file before it is written to."""
    return Path(shutil.copytree(bundle, destination, copy_function=os.link))


def unlink_copy(path: Path) -> Path:
    """Replace a hard link by a copy of the file."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def update_manifest(bundle: Path) -> None:
    """Write the present files to the manifest."""
    unlink_copy(bundle / NAME)
    Manifest.load(bundle).save(bundle)


def edit_graph(bundle: Path, edit: Callable[[Graph], object], file: str = DECODER) -> None:
    """Change a graph of a bundle."""
    graph = read_graph(bundle / file)
    edit(graph)
    (bundle / file).unlink()
    write_graph(graph, bundle / file)


def convert_part(
    model: onnx.ModelProto, part: str, onnx_folder: Path, bundle: Path, options: Sequence[str] = (FUSE,)
) -> None:
    """Replace the decoder or vision tower of a bundle by a model that MNN's converter alone has written.

    Args:
        model: The part's ONNX graph, or a changed one.
        part: "decoder" or "vision".
        onnx_folder: Folder of the export stage, with the weights.
        bundle: Folder of the bundle.
        options: Options of the converter.
    """
    name, source = PARTS[part]
    for path in (bundle / name, bundle / f"{name}.weight"):
        path.unlink(missing_ok=True)
    ADAPT[part](model)
    write_graph(convert_onnx(onnx_folder / source, bundle / f"{name}.weight", options, model), bundle / name)


def file_findings(path: Path, *severities: Severity, checkpoint: Path | None = None) -> dict[str, Finding]:
    """Return the findings of FILE_CHECKS by check, of these severities or of all."""
    return {
        finding.check: finding
        for finding in examine(path, checkpoint).findings
        if finding.check in FILE_CHECKS and (not severities or finding.severity in severities)
    }


def errors(path: Path, checkpoint: Path | None = None) -> set[str]:
    """Return the names of FILE_CHECKS that report an error."""
    return set(file_findings(path, Severity.ERROR, checkpoint=checkpoint))


_read_graph = functools.cache(read_graph)


def changed_bundle(
    original: Path,
    folder: Path,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    files: dict[str, bytes | None] | None = None,
    checkpoint: Path | None = None,
    reference: Path | None = None,
) -> Bundle:
    """Copy a bundle by symbolic links, with some changes.

    Args:
        original: The bundle.
        folder: Folder to create.
        config: Other values of keys in config.json; None removes the key.
        model: Other values of keys in llm_config.json; None removes the key.
        files: Other contents of files; None removes the file.
        checkpoint: Checkpoint to compare with.
        reference: Folder of the reference stage.
    """
    folder.mkdir()
    contents = dict(files or {})
    for name, changes in ((CONFIG, config), (MODEL_CONFIG, model)):
        if changes:
            merged = json.loads((original / name).read_text()) | changes
            contents[name] = json.dumps({k: v for k, v in merged.items() if v is not None}).encode()
    for path in original.iterdir():
        if path.name not in contents:
            (folder / path.name).symlink_to(path.resolve())
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    bundle = Bundle(folder, Checkpoint(checkpoint) if checkpoint else None, reference)
    for part in bundle.models.values():
        if part.path.is_symlink():
            # Dump each shared graph once.
            part.__dict__["_read"] = _read_graph(part.path.resolve())
    return bundle


def run_checks(checks: Iterable[Check], bundle: Bundle) -> list[Finding]:
    """Return the findings of some checks."""
    return [finding for check in checks for finding in run_check(check, bundle)]
