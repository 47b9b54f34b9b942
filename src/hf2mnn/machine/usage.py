"""What this process and those that it has started took of the machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident_mb(entry: str) -> float | None:
    """VmRSS or VmHWM of this process in MB of 1e6 bytes; None where the system has no such count.

    Not `getrusage`: its peak of a process begins at that of the process that started it, by fork and by posix_spawn
    alike. `true`, started by a Python that holds 1 GB, has a ru_maxrss of 1 GB (Linux 6.18).
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{entry}:")]
    return int(line.split()[1]) * 1024 / 1e6


def _most_mb(who: int) -> float:
    # Linux counts in kB of 1024 bytes, macOS in bytes.
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def peak_mb() -> float:
    """The most memory that this process, or one that it has waited for, was resident with at a time, in MB of 1e6
    bytes; pages of mapped files count.

    What a child's count has from its parent is at most this process's own peak, so the larger of the two is true.
    """
    own = resident_mb("VmHWM")
    return max(_most_mb(resource.RUSAGE_SELF) if own is None else own, _most_mb(resource.RUSAGE_CHILDREN))


def children_mb() -> float | None:
    """The same of the processes that were waited for alone; None where it may be only what they have from here."""
    most = _most_mb(resource.RUSAGE_CHILDREN)
    return most if most > (resident_mb("VmHWM") or most) else None


def cpu_seconds() -> float:
    """Time on all cores of this process and of those that it has waited for, of the kernel for them included."""
    took = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in took)
