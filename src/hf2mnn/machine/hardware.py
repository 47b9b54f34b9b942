"""The machine on which something was timed: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, memory in GB of 1e9 bytes, and operating system."""
    listed = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else None
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_gb": memory and round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
