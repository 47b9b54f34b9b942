"""How much memory this process may still take."""

from __future__ import annotations

import os
import re
from pathlib import Path


def _of_group(folder: Path, limit: str, used: str) -> int | None:
    """Bytes left in a control group; None where it sets no limit. `used` is the key of what cannot be evicted."""
    try:
        allowed = (folder / limit).read_text().strip()
        held = int(re.search(rf"^{used} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)[1])
    except (OSError, TypeError):  # not there, or nothing that counts
        return None
    return int(allowed) - held if allowed != "max" else None


def _left_in_groups(root: Path) -> list[int]:
    """Bytes left in each control group that this process is in, version 2 or 1, and in those around it."""
    listed, found = root / "proc/self/cgroup", []
    for line in listed.read_text().splitlines() if listed.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounted, files = root / "sys/fs/cgroup", ("memory.max", "anon")
        elif "memory" in controllers.split(","):
            mounted, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "total_rss")
        else:
            continue
        # In a container the path may be the host's, of which only the top is seen here.
        own = mounted / path.lstrip("/")
        found += [_of_group(folder, *files) for folder in (own, *own.parents) if folder.is_relative_to(mounted)]
    return [left for left in found if left is not None]


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take without swapping and within the limits of its control groups (containers, job
    schedulers). File pages count as free, for they can be read again. Without a /proc in `root`, as on macOS, it is the
    machine's whole memory.

    'ulimit -v' is not asked: it limits addresses, of which a mapped file takes as many as one that is read.
    """
    listed = root / "proc/meminfo"
    if not listed.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = int(re.search(r"^MemAvailable:\s+(\d+) kB$", listed.read_text(), re.MULTILINE)[1]) * 1024
    return max(min([machine, *_left_in_groups(root)]), 0)
