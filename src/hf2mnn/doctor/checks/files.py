"""Checks of the weight file of a graph, and of the files in a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from hf2mnn.checkpoint.folder import is_lfs_pointer
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.verify import file_damage
from hf2mnn.doctor.artifacts import Bundle, MnnModel
from hf2mnn.doctor.checks.graph import GIT_LFS_PULL
from hf2mnn.doctor.findings import Finding, Severity
from hf2mnn.mnn.graph import LINEAR

GARBAGE = "the engine loads the model without an error, and its logits are finite garbage (about -3.4e38)"
COPY_AGAIN = "copy or download the file again, or run 'hf2mnn quantize' again"


def weight_file_missing(model: MnnModel) -> Iterator[Finding]:
    """Report a missing weight file."""
    size = model.graph.external_size()
    if size and not model.weights.is_file():
        message = f"the weight file of {model.path.name} is missing"
        evidence = f"the graph reads {size:,} bytes of it"
        yield Finding(where=model.weights.name, message=message, evidence=evidence, effect=GARBAGE, cure=COPY_AGAIN)


def weight_file_pointer(model: MnnModel) -> Iterator[Finding]:
    """Report a Git LFS pointer in place of the weight file."""
    if model.graph.external_size() and model.weights.is_file() and is_lfs_pointer(model.weights):
        message = "the weight file is a Git LFS pointer"
        evidence = f"{model.weights.stat().st_size} bytes that begin with 'version https://git-lfs'"
        yield Finding(where=model.weights.name, message=message, evidence=evidence, effect=GARBAGE, cure=GIT_LFS_PULL)


def _truncated(model: MnnModel) -> bool:
    return model.weights.is_file() and model.weights.stat().st_size < model.graph.external_size()


def weight_file_truncated(model: MnnModel) -> Iterator[Finding]:
    """Report a weight file with fewer bytes than the graph reads."""
    if _truncated(model) and not is_lfs_pointer(model.weights):
        size, ends = model.weights.stat().st_size, model.graph.external_ends()
        beyond = [name.removesuffix(LINEAR) for name, end in sorted(ends.items(), key=lambda e: e[1]) if end > size]
        message = "the weight file is truncated"
        evidence = (
            f"{size:,} of {max(ends.values()):,} bytes; {len(beyond)} operators are incomplete, first {beyond[0]}"
        )
        yield Finding(where=model.weights.name, message=message, evidence=evidence, effect=GARBAGE, cure=COPY_AGAIN)


def weight_file_longer(model: MnnModel) -> Iterator[Finding]:
    """Report a weight file with more bytes than the graph reads: it was written for another graph."""
    size, read = model.weights.stat().st_size, model.graph.external_size()
    if read and size > read and not model.foreign:
        yield Finding(
            severity=Severity.WARNING,
            where=model.weights.name,
            message=f"the weight file has more bytes than {model.path.name} reads: it may be another model's",
            evidence=f"{size:,} bytes, the graph reads {read:,}",
            effect="if it is another model's, all output is wrong; floating-point weights have no header to tell",
            cure="use graph and weight file of one conversion; with --checkpoint the weights are compared",
        )


def weights_absent(model: MnnModel) -> Iterator[Finding]:
    """Report a graph of the convert stage in a bundle."""
    linear = [op for op in model.graph.of_type("Convolution") if op["main"].get("external")]
    empty = [op for op in linear if not sum(op["main"]["external"][1:2] + op["main"]["external"][4:])]
    if model.complete and empty:
        message = "linear layers have no weights"
        evidence = f"{len(empty)} of {len(linear)}, the first is {empty[0]['name'].removesuffix(LINEAR)}"
        cure = "run 'hf2mnn quantize': the graph is that of the convert stage"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=GARBAGE, cure=cure)


def file_changed(bundle: Bundle) -> Iterator[Finding]:
    """Compare every file with its sha256 in manifest.json, except weight files that other checks report."""
    if bundle.manifest is None:
        return
    reported = [m.weights for m in bundle.models.values() if not m.weights.is_file() or _known_truncated(m)]
    for name, expected in sorted(bundle.manifest.outputs.items()):
        path = bundle.folder / name
        if path not in reported and (damage := file_damage(path, expected)):
            settings = PurePosixPath(name).suffix in (".json", ".csv")
            yield Finding(
                severity=Severity.WARNING if settings else Severity.ERROR,
                where=name,
                message="the file differs from the manifest",
                evidence=f"it {damage} (manifest.json)",
                effect="measurements of the bundle may not hold for these settings, and hf2mnn refuses the bundle"
                if settings
                else "from one wrong weight to wrong output throughout",
                cure=COPY_AGAIN,
            )


def _known_truncated(model: MnnModel) -> bool:
    """Return False where the graph cannot be read."""
    try:
        return _truncated(model)
    except Hf2mnnError:
        return False


MODEL_CHECKS = (weight_file_missing, weight_file_pointer, weight_file_truncated, weight_file_longer, weights_absent)
