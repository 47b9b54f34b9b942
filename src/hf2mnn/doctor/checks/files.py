"""Checks whether graphs and weight files are complete and unchanged, and whether the installed engine supports them."""

from __future__ import annotations

import re
from contextlib import suppress

from hf2mnn.checkpoint.folder import is_lfs_pointer
from hf2mnn.core.errors import ConversionError, ExportError, Hf2mnnError
from hf2mnn.core.manifest import tool_versions
from hf2mnn.core.verify import file_damage
from hf2mnn.doctor.artifacts import Bundle, MnnModel, OnnxFile
from hf2mnn.doctor.findings import Finding, Findings, Severity
from hf2mnn.mnn.bundle_config import CONFIG, edited_settings
from hf2mnn.mnn.engine_facts import UNSUPPORTED_OPERATORS
from hf2mnn.mnn.graph import LINEAR

GARBAGE = "the engine loads the model without an error, and its logits are finite garbage (about -3.4e38)"
COPY_AGAIN = "copy or download the file again, or run 'hf2mnn quantize' again"
CONVERT_AGAIN = "run 'hf2mnn convert' and 'hf2mnn quantize' again, or download it again"
GIT_LFS_PULL = "run 'git lfs pull' in its folder, or download the file with the hub's own client"


def _unreadable(artifact: MnnModel | OnnxFile, kind: str, cure: str) -> Findings:
    try:
        _ = artifact.graph
    except (ConversionError, ExportError) as error:
        path = artifact.path
        pointer = path.is_file() and is_lfs_pointer(path)
        message = f"the file is a Git LFS pointer, not the {kind}" if pointer else f"the file is not a readable {kind}"
        evidence = f"{path.stat().st_size if path.is_file() else 0} bytes; {error}"
        yield Finding(path.name, message, evidence, "the model cannot be loaded", GIT_LFS_PULL if pointer else cure)


def unreadable_graph(model: MnnModel) -> Findings:
    """Report a .mnn file that is truncated, a Git LFS pointer, or of another format."""
    return _unreadable(model, "MNN model", CONVERT_AGAIN)


def unreadable_onnx(model: OnnxFile) -> Findings:
    """Report an .onnx file that is truncated, a Git LFS pointer, or of another format."""
    return _unreadable(model, "ONNX model", "run 'hf2mnn export' again")


def _versions(model: MnnModel) -> tuple[str, str]:
    """Return the releases of the converter that wrote the model ("" if unknown), and of the installed engine."""
    info = model.graph.content.get("extraInfo")
    return str(info.get("version", "")) if isinstance(info, dict) else "", tool_versions("MNN")["MNN"]


def unknown_operators(model: MnnModel) -> Findings:
    """Report operators that the installed engine lacks; the converter dumps a type without a name as a number."""
    unknown = [op for op in model.graph.ops if op["type"] in UNSUPPORTED_OPERATORS or op["type"].isdecimal()]
    if unknown:
        names = ", ".join(f"{op.get('name', '')} ({op['type']})" for op in unknown[:3])
        converter, engine = _versions(model)
        message = "the graph has operators that the installed engine does not implement"
        evidence = f"{len(unknown)}: {names}; engine {engine}, converter {converter or 'unknown'}"
        effect = 'the engine prints "Don\'t support type" and returns no answer or crashes'
        cure = "install the MNN release that the model was converted for, or convert it with the installed one"
        yield Finding(model.path.name, message, evidence, effect, cure)


def engine_too_old(model: MnnModel) -> Findings:
    """Report a model of a newer converter; the engine only logs the difference (`Module.cpp`)."""
    converter, engine = _versions(model)
    newer, installed = ([int(n) for n in re.findall(r"\d+", version)[:3]] for version in (converter, engine))
    if newer and installed and newer > installed:
        message = "the converter that wrote the model is newer than the installed engine"
        evidence = f"converter {converter}, engine {engine}"
        effect = "the engine loads it without an error and misinterprets newer operators and attributes"
        cure = f"run pip install 'MNN>={converter}', or convert the model with {engine}"
        yield Finding(model.path.name, message, evidence, effect, cure, severity=Severity.WARNING)


def weight_file_missing(model: MnnModel) -> Findings:
    """Report a missing weight file."""
    size = model.graph.external_size()
    if size and not model.weights.is_file():
        message = f"the weight file of {model.path.name} is missing"
        yield Finding(model.weights.name, message, f"the graph reads {size:,} bytes of it", GARBAGE, COPY_AGAIN)


def weight_file_pointer(model: MnnModel) -> Findings:
    """Report a Git LFS pointer in place of the weight file."""
    if model.graph.external_size() and model.weights.is_file() and is_lfs_pointer(model.weights):
        evidence = f"{model.weights.stat().st_size} bytes that begin with 'version https://git-lfs'"
        yield Finding(model.weights.name, "the weight file is a Git LFS pointer", evidence, GARBAGE, GIT_LFS_PULL)


def _truncated(model: MnnModel) -> bool:
    """Return whether the weight file is shorter than the graph reads; False where the graph cannot be read."""
    try:
        return model.weights.is_file() and model.weights.stat().st_size < model.graph.external_size()
    except Hf2mnnError:
        return False


def weight_file_truncated(model: MnnModel) -> Findings:
    """Report a weight file with fewer bytes than the graph reads."""
    if _truncated(model) and not is_lfs_pointer(model.weights):
        size, ends = model.weights.stat().st_size, model.graph.external_ends()
        beyond = [name.removesuffix(LINEAR) for name, end in sorted(ends.items(), key=lambda e: e[1]) if end > size]
        incomplete = f"{len(beyond)} operators are incomplete, first {beyond[0]}"
        evidence = f"{size:,} of {max(ends.values()):,} bytes; {incomplete}"
        yield Finding(model.weights.name, "the weight file is truncated", evidence, GARBAGE, COPY_AGAIN)


def weight_file_longer(model: MnnModel) -> Findings:
    """Report a weight file with more bytes than the graph reads: it was written for another graph."""
    size, read = model.weights.stat().st_size, model.graph.external_size()
    if read and size > read and not model.foreign:
        message = f"the weight file has more bytes than {model.path.name} reads: it may be another model's"
        evidence = f"{size:,} bytes, the graph reads {read:,}"
        effect = "if it is another model's, all output is wrong; floating-point weights have no header to tell"
        cure = "use graph and weight file of one conversion; with --checkpoint the weights are compared"
        yield Finding(model.weights.name, message, evidence, effect, cure, severity=Severity.WARNING)


def weights_absent(model: MnnModel) -> Findings:
    """Report a graph of the convert stage in a bundle."""
    linear = [op for op in model.graph.of_type("Convolution") if op["main"].get("external")]
    empty = [op for op in linear if not sum(op["main"]["external"][1:2] + op["main"]["external"][4:])]
    if model.complete and empty:
        evidence = f"{len(empty)} of {len(linear)}, the first is {empty[0]['name'].removesuffix(LINEAR)}"
        cure = "run 'hf2mnn quantize': the graph is that of the convert stage"
        yield Finding(model.path.name, "linear layers have no weights", evidence, GARBAGE, cure)


def file_changed(bundle: Bundle) -> Findings:
    """Compare every file with its sha256 in manifest.json, except weight files that other checks report."""
    if bundle.manifest is None:
        return
    reported = [m.weights for m in bundle.models.values() if not m.weights.is_file() or _truncated(m)]
    for name, expected in sorted(bundle.manifest.outputs.items()):
        path = bundle.folder / name
        if path not in reported and (damage := file_damage(path, expected)):
            if name == CONFIG and path.is_file():
                try:
                    edited_settings(bundle.manifest)
                    continue  # `settings_edited` reports them
                except ValueError as error:
                    damage = f"was changed: {error}"
            evidence = f"it {damage} (manifest.json)"
            severity, effect = Severity.ERROR, "from one wrong weight to wrong output throughout"
            if path.suffix in (".json", ".csv"):
                severity = Severity.WARNING
                effect = "measurements of the bundle may not hold for these settings, and hf2mnn refuses the bundle"
            yield Finding(name, "the file differs from the manifest", evidence, effect, COPY_AGAIN, severity=severity)


def settings_edited(bundle: Bundle) -> Findings:
    """Report run-time settings that were changed since the bundle was made; `file_changed` reports invalid changes."""
    edits = {}
    with suppress(ValueError):
        edits = edited_settings(bundle.manifest) if bundle.manifest else {}
    if edits:
        evidence = ", ".join(f"{key} {change}" for key, change in edits.items())
        effect = "the bundle stays valid; its figures were measured with the former settings"
        cure = "none if they are intended; 'hf2mnn evaluate' measures them"
        message = "run-time settings were edited"
        yield Finding(CONFIG, message, evidence, effect, cure, severity=Severity.ADVICE)


GRAPH_CHECKS = (unreadable_graph, unknown_operators, engine_too_old)
WEIGHT_CHECKS = (weight_file_missing, weight_file_pointer, weight_file_truncated, weight_file_longer, weights_absent)
