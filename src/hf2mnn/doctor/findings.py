"""Findings of an examination, as text, as JSON and as an exit code."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from hf2mnn.doctor.artifacts import Bundle


class Severity(StrEnum):
    """Severity of a finding."""

    ERROR = "error"  # the model does not run, or its output is wrong
    WARNING = "warning"  # it runs, with worse output or more slowly than necessary
    ADVICE = "advice"  # it is correct, and could be smaller or safer


PLURALS = {Severity.ERROR: "errors", Severity.WARNING: "warnings", Severity.ADVICE: "pieces of advice"}
EXIT = {Severity.ERROR: 4, Severity.WARNING: 3, Severity.ADVICE: 0}
"""Exit code by severity; 1 stands for a path that could not be examined."""


@dataclass(frozen=True)
class Finding:
    """A problem that a check reports.

    `where` is a file, and the operator or key if there is one. Programs may rely on `check`; `run_check` sets it.
    """

    check: str = field(default="", kw_only=True)
    severity: Severity = field(default=Severity.ERROR, kw_only=True)
    where: str
    message: str
    evidence: str
    effect: str
    cure: str


Findings = Iterator[Finding]


@dataclass
class Examination:
    """Result of an examination: the checks that ran, and their findings, most severe first, then by file."""

    path: Path
    kind: str  # of the path, e.g. "bundle" or "ONNX model"
    bundle: Bundle | None = None
    checks: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, check: str, findings: Iterable[Finding]) -> None:
        """Add a check that ran, and sort its findings into the list."""
        if check not in self.checks:
            self.checks.append(check)
        self.findings += findings
        self.findings.sort(key=lambda finding: (list(Severity).index(finding.severity), finding.where))

    @property
    def exit_code(self) -> int:
        """Exit code of the most severe finding."""
        return max((EXIT[finding.severity] for finding in self.findings), default=0)

    def to_json(self) -> str:
        """Return the examination as a JSON object with the keys path, kind, findings and checks."""
        findings = [asdict(finding) for finding in self.findings]
        content = {"path": str(self.path), "kind": self.kind, "findings": findings, "checks": self.checks}
        return json.dumps(content, indent=1, ensure_ascii=False)

    def to_text(self) -> str:
        """Return a block of lines for each finding, and a summary line."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.severity.upper()} {finding.where}: {finding.message} [{finding.check}]")
            lines += [f"  {name:<9}{getattr(finding, name)}" for name in ("evidence", "effect", "cure")]
            lines.append("")
        counts = Counter(finding.severity for finding in self.findings)
        parts = [f"{n} {s if n == 1 else PLURALS[s]}" for s in Severity if (n := counts[s])]
        lines.append(f"{', '.join(parts) or 'no findings'}: {self.path} ({self.kind}, {len(self.checks)} checks)")
        return "\n".join(lines)
