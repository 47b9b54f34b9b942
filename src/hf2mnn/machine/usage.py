"""Memory and CPU time of this process and of its child processes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


def resident_mb() -> float:
    """Return the resident memory of this process in MB of 1e6 bytes."""
    return psutil.Process().memory_info().rss / 1e6


def own_peak_mb() -> float | None:
    """Return the peak resident memory (VmHWM) of this process in MB of 1e6 bytes; None without /proc.

    psutil has no peak on Linux, and the peak of `getrusage` starts at that of the parent process, by fork and by
    posix_spawn alike: `true`, started by a Python process of 1 GB, has a ru_maxrss of 1 GB (Linux 6.18).
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def _maxrss_mb(who: int) -> float:
    # Linux counts in kB of 1024 bytes, macOS in bytes.
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def peak_mb() -> float:
    """Return the peak resident memory of this process or of a finished child, in MB of 1e6 bytes.

    Pages of mapped files count. The part of a child's peak that comes from its parent is at most this process's own
    peak, so the maximum of both is exact.
    """
    own = own_peak_mb()
    return max(_maxrss_mb(resource.RUSAGE_SELF) if own is None else own, _maxrss_mb(resource.RUSAGE_CHILDREN))


def children_mb() -> float | None:
    """Return the peak resident memory of finished children in MB; None if it may be inherited from this process."""
    peak = _maxrss_mb(resource.RUSAGE_CHILDREN)
    return peak if peak > (own_peak_mb() or peak) else None


def cpu_seconds() -> float:
    """Return user and system time of this process and of its finished children, over all cores."""
    times = psutil.Process().cpu_times()
    return times.user + times.system + times.children_user + times.children_system
