"""What is left of a machine's memory, and of the limits of the groups that a process is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf2mnn.machine.memory import available_memory

MEMINFO = "MemTotal:       20000 kB\nMemFree:          100 kB\nMemAvailable:   10000 kB\nCached:   1 kB\n"
MACHINE = 10000 * 1024


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def two(folder: str, limit: str, held: int) -> dict[str, str]:
    stat = f"anon {held}\nfile 888888\nanon_thp 77\n"
    return {f"sys/fs/cgroup/{folder}memory.max": f"{limit}\n", f"sys/fs/cgroup/{folder}memory.stat": stat}


def one(folder: str, limit: int, held: int) -> dict[str, str]:
    where = f"sys/fs/cgroup/memory/{folder}"
    stat = f"cache 9\nrss 1\ntotal_cache 888888\ntotal_rss {held}\n"
    return {f"{where}memory.limit_in_bytes": f"{limit}\n", f"{where}memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/job/step\n", two("job/step/", "max", 5) | two("job/", "max", 5), MACHINE),
        ("0::/job/step\n", two("job/step/", "5000", 700), 4300),
        ("0::/job/step\n", two("job/step/", "max", 700) | two("job/", "5000", 900), 4100),
        ("0::/host/docker\n", two("", "6000", 1000), 5000),
        ("0::/job\n", two("job/", "6000", 7000), 0),
        ("5:cpu:/\n4:memory:/job\n0::/\n", one("job/", 5000, 700) | one("", 2**63 - 4096, 0), 4300),
        ("4:cpu,memory:/host/docker\n", one("", 5000, 700), 4300),
    ],
    ids=["no group", "no limit", "own", "around", "container", "full", "version 1", "version 1 container"],
)
def test_the_least_of_what_is_left_counts(tmp_path: Path, groups: str, files: dict[str, str], left: int) -> None:
    assert available_memory(machine(tmp_path, groups, files)) == left


def test_this_machine_and_one_without_proc_have_some(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= available_memory(tmp_path) == whole
