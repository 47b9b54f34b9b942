"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """ERROR: it does not run, or its answers are wrong. WARNING: it runs, and answers worse or slower than it need.
    ADVICE: it is right, and could be smaller or safer.
    """

    ERROR = "error"
    WARNING = "warning"
    ADVICE = "advice"


@dataclass(frozen=True)
class Finding:
    """check: its name, snake_case, the same for all findings of a check and stable for machines; where: the file, with
    the operator or key if there is one; sentence: what is wrong; evidence: the figures or names that show it; effect:
    what it does to the answers; cure: what to do, a command where there is one.
    """

    check: str
    severity: Severity
    where: str
    sentence: str
    evidence: str
    effect: str
    cure: str
