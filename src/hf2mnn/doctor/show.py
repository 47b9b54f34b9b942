"""What an examination found, for a person, for a machine, and as an exit code."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from hf2mnn.doctor.examine import Examination
from hf2mnn.doctor.finding import Finding, Severity

EXIT = {Severity.ERROR: 4, Severity.WARNING: 3, Severity.ADVICE: 0}
"""Exit codes; 1 stays for what could not be examined."""


def exit_code(findings: list[Finding]) -> int:
    """That of the worst finding."""
    return max((EXIT[finding.severity] for finding in findings), default=0)


def as_json(seen: Examination) -> str:
    findings = [asdict(finding) for finding in seen.findings]
    shown = {"path": str(seen.path), "kind": seen.kind, "findings": findings, "checks": seen.checks}
    return json.dumps(shown, indent=1, ensure_ascii=False)


def _block(finding: Finding) -> str:
    lines = [f"{finding.severity.upper()} {finding.where}: {finding.sentence} [{finding.check}]"]
    lines += [f"  {name:<9}{getattr(finding, name)}" for name in ("evidence", "effect", "cure")]
    return "\n".join(lines) + "\n"


def as_text(seen: Examination) -> str:
    """A block for each finding, the worst first, and what was looked at."""
    counts = Counter(finding.severity for finding in seen.findings)
    plural = {Severity.ERROR: "errors", Severity.WARNING: "warnings", Severity.ADVICE: "pieces of advice"}
    said = ", ".join(
        f"{n} {severity if n == 1 else plural[severity]}" for severity in Severity if (n := counts[severity])
    )
    said = said or "no findings"
    return "\n".join([*map(_block, seen.findings), f"{said}: {seen.path} ({seen.kind}, {len(seen.checks)} checks)"])
