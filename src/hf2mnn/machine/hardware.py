"""The machine: cores and memory that this process may use, and a description for timings."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil


def cores() -> int:
    """Return the number of cores that this process may use."""
    # Not psutil.cpu_count(), which counts the cores of the machine, not those of a job scheduler's CPU set.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Return CPU model, architecture, cores, memory in GB of 1e9 bytes, and operating system."""
    # psutil has no name of the CPU.
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def available_memory(root: Path = Path("/")) -> int:
    """Return bytes that this process can allocate without swapping, within the limits of its control groups.

    File pages count as available, because the kernel can evict them. The address space limit (`ulimit -v`) is ignored:
    a mapped file takes as much of it as a file in memory. `root` has /proc and /sys.
    """
    return max(min([psutil.virtual_memory().available, *_cgroup_memory(root)]), 0)


def _cgroup_memory(root: Path) -> list[int]:
    """Return bytes left in each memory control group (version 1 or 2) of this process and in its parents.

    psutil does not know control groups, whose limit is the one that ends a job in a container or of a scheduler.
    """
    listing, available = root / "proc/self/cgroup", []
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, files = root / "sys/fs/cgroup", ("memory.max", "anon")
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "total_rss")
        else:
            continue
        # In a container the path may be the host's, of which only the mount itself is visible.
        group = mount / path.lstrip("/")
        available += [
            _group_memory(folder, *files) for folder in (group, *group.parents) if folder.is_relative_to(mount)
        ]
    return [size for size in available if size is not None]


def _group_memory(folder: Path, limit: str, used: str) -> int | None:
    """Return bytes left in a control group, if it has a limit; `used` is memory.stat's key of unevictable memory."""
    try:
        maximum = (folder / limit).read_text().strip()
        resident = int(re.search(rf"^{used} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)[1])
    except (OSError, TypeError):  # no such file, or no such key
        return None
    return int(maximum) - resident if maximum != "max" else None
