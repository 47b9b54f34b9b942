"""Find out what a path is, and let every check that fits look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import Hf2mnnError, ManifestError
from hf2mnn.core.manifest import Manifest
from hf2mnn.doctor.checks import (
    attention,
    config,
    embedding,
    files,
    formats,
    graph,
    image,
    norms,
    origin,
    overflow,
    tokenizer,
    weights,
)
from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Bundle, Model, OnnxPatient
from hf2mnn.mnn.bundle import CONFIG, DECODER, MODEL_CONFIG, PARTS, VISION

BUNDLE_CHECKS: list[Callable[[Bundle], Iterator[Finding]]] = [
    files.file_changed,
    formats.vision_bits,
    *config.CHECKS,
    *image.CHECKS,
    *embedding.CHECKS,
    *tokenizer.CHECKS,
    *overflow.CHECKS,
]
MODEL_CHECKS: list[Callable[[Model], Iterator[Finding]]] = [
    graph.unreadable_graph,
    graph.unknown_operators,
    graph.engine_too_old,
    attention.past_key_values_input,
    attention.attention_not_fused,
    attention.past_branch_cut,
    attention.fused_count,
    files.weight_file_missing,
    files.weight_file_pointer,
    files.weight_file_truncated,
    files.weight_file_longer,
    files.weights_absent,
    norms.norm_stale,
    norms.norm_zero,
    norms.weights_overlap,
    weights.weights_of_another,
    weights.weights_constant,
    weights.weights_not_finite,
    weights.requantized,
    origin.not_the_checkpoint,
    formats.block_per_channel,
    formats.scales_32_bit,
]
ONNX_CHECKS: list[Callable[[OnnxPatient], Iterator[Finding]]] = [
    graph.unreadable_onnx,
    attention.onnx_without_past,
    attention.onnx_attention_chain,
]

ORDER = list(Severity)


@dataclass
class Examination:
    """What was looked at: kind of the path, the bundle if it is one, names of the checks that ran, what they found."""

    path: Path
    kind: str
    bundle: Bundle | None = None
    checks: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def _run(check: Callable[[Any], Iterator[Finding]], patient: Any, where: str) -> Iterator[Finding]:
    """A file that cannot be read at all has a check of its own, so such a failure says nothing here. What a stranger's
    file holds can be of any other type than it should, and a check that trips over it must not keep the others from
    looking.
    """
    try:
        yield from check(patient)
    except (Hf2mnnError, OSError):
        return
    except Exception as error:
        yield Finding(
            "not_examined",
            Severity.WARNING,
            where,
            f"the check {check.__name__} could not make sense of what is in these files",
            f"{type(error).__name__}: {error}",
            "what that check looks for may be there",
            "make the files again; if they are right, report this with the evidence",
        )


def _checkpoint(folder: Path | None) -> Checkpoint | None:
    """Raises CheckpointError where it is not whole."""
    if folder is None:
        return None
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    return checkpoint


def _stage(folder: Path) -> str:
    try:
        return Manifest.load(folder).stage
    except ManifestError:
        return ""


def _model(path: Path, part: str = "", **known: Any) -> Model:
    return Model(path, path.with_name(f"{path.name}.weight"), part, **known)


def _patients(path: Path, checkpoint: Checkpoint | None, reference: Path | None) -> tuple[str, list[Any]]:
    """The kind of a path, and what of it is examined.

    Raises:
        Hf2mnnError: there is nothing, or nothing that is known.
    """
    if path.is_file() and path.name in (CONFIG, MODEL_CONFIG):
        path = path.parent
    if path.is_file() and path.suffix == ".mnn":
        return "MNN model", [_model(path, whole=_stage(path.parent) != "mnn", checkpoint=checkpoint)]
    if path.is_file() and path.suffix == ".onnx":
        return "ONNX model", [OnnxPatient(path)]
    if not path.exists():
        raise Hf2mnnError(f"there is no {path}: give a bundle's folder, a .mnn or an .onnx file")
    graphs, mnn = (sorted(path.glob(pattern)) for pattern in ("*.onnx", "*.mnn"))
    if mnn and _stage(path) == "mnn":
        parts = {name: part for part, (name, _) in PARTS.items()}
        return "folder of the mnn stage", [_model(file, parts.get(file.name, ""), whole=False) for file in mnn]
    if any((path / name).is_file() for name in (DECODER, MODEL_CONFIG)) or (mnn and (path / CONFIG).is_file()):
        bundle = Bundle(path, checkpoint, reference)
        return "bundle", [bundle, *bundle.models.values()]
    if mnn:
        return "folder of MNN models", [_model(file, checkpoint=checkpoint) for file in mnn]
    if graphs:
        return "folder of ONNX models", [OnnxPatient(file, file.stem) for file in graphs]
    raise Hf2mnnError(
        f"{path} is nothing that can be examined: give the folder of a bundle (with {DECODER}, {VISION}, {CONFIG}), a"
        " .mnn or an .onnx file, or a folder of the onnx or mnn stage; 'hf2mnn source' checks a checkpoint"
    )


def _checks(patient: Any) -> Iterable[Callable[[Any], Iterator[Finding]]]:
    return {Bundle: BUNDLE_CHECKS, Model: MODEL_CHECKS, OnnxPatient: ONNX_CHECKS}[type(patient)]


def by_severity(findings: list[Finding]) -> list[Finding]:
    """The worst first, then by file."""
    return sorted(findings, key=lambda finding: (ORDER.index(finding.severity), finding.where))


def look_at(path: Path, checkpoint: Path | None = None, reference: Path | None = None) -> Examination:
    """Everything that can be seen in the files of `path`; findings by severity, then by file.

    Raises:
        Hf2mnnError: `path` is nothing that is known, or the checkpoint is not whole.
    """
    path = Path(path)
    kind, patients = _patients(path, _checkpoint(checkpoint), reference)
    bundles = [patient for patient in patients if isinstance(patient, Bundle)]
    seen = Examination(path, kind, *bundles)
    for patient in patients:
        where = str(patient.folder if isinstance(patient, Bundle) else patient.path)
        for check in _checks(patient):
            if check.__name__ not in seen.checks:
                seen.checks.append(check.__name__)
            seen.findings += _run(check, patient, where)
    seen.findings = by_severity(seen.findings)
    return seen


def examine(path: Path, checkpoint: Path | None = None, reference: Path | None = None) -> list[Finding]:
    """The findings of `look_at`."""
    return look_at(path, checkpoint, reference).findings
