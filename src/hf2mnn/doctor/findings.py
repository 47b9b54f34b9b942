"""Findings of an examination, as text, as JSON and as an exit code."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from hf2mnn.doctor.artifacts import Bundle


class Severity(StrEnum):
    """Severity of a finding.

    Attributes:
        ERROR: The model does not run, or its output is wrong.
        WARNING: It runs, with worse output or more slowly than necessary.
        ADVICE: It is correct, and could be smaller or safer.
    """

    ERROR = "error"
    WARNING = "warning"
    ADVICE = "advice"


PLURALS = {Severity.ERROR: "errors", Severity.WARNING: "warnings", Severity.ADVICE: "pieces of advice"}
EXIT = {Severity.ERROR: 4, Severity.WARNING: 3, Severity.ADVICE: 0}
"""Exit code by severity; 1 stands for a path that could not be examined."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem that a check reports.

    Attributes:
        check: Name of the check; programs may rely on it. `run_check` sets it.
        severity: How much it matters.
        where: File, and the operator or key if there is one.
        message: What is wrong.
        evidence: Numbers or names that show it.
        effect: Effect on the output.
        cure: What to do, with a command where there is one.
    """

    check: str = ""
    severity: Severity = Severity.ERROR
    where: str
    message: str
    evidence: str
    effect: str
    cure: str


@dataclass
class Examination:
    """Result of an examination.

    Attributes:
        path: The examined path.
        kind: What it is, e.g. "bundle" or "ONNX model".
        bundle: The bundle, if it is one.
        checks: Names of the checks that ran.
        findings: Their findings, most severe first, then by file.
    """

    path: Path
    kind: str
    bundle: Bundle | None = None
    checks: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, checks: list[str], findings: list[Finding]) -> None:
        """Add checks that ran, and sort their findings into the list."""
        order = list(Severity)
        self.checks += [name for name in dict.fromkeys(checks) if name not in self.checks]
        self.findings += findings
        self.findings.sort(key=lambda finding: (order.index(finding.severity), finding.where))

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
        counts = Counter(finding.severity for finding in self.findings)
        parts = [f"{n} {s if n == 1 else PLURALS[s]}" for s in Severity if (n := counts[s])]
        summary = ", ".join(parts) or "no findings"
        blocks = map(_block, self.findings)
        return "\n".join([*blocks, f"{summary}: {self.path} ({self.kind}, {len(self.checks)} checks)"])


def _block(finding: Finding) -> str:
    lines = [f"{finding.severity.upper()} {finding.where}: {finding.message} [{finding.check}]"]
    lines += [f"  {name:<9}{getattr(finding, name)}" for name in ("evidence", "effect", "cure")]
    return "\n".join(lines) + "\n"
