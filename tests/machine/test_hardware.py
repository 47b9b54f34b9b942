"""Memory that a process can allocate: free memory of the machine, and limits of control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hf2mnn.machine.hardware import available_memory, cores, describe_machine

MACHINE = 10_000_000
"""Bytes that psutil reports as available."""


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * MACHINE, available=MACHINE))


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def version_2(folder: str, limit: str, used: int) -> dict[str, str]:
    stat = f"anon {used}\nfile 888888\nanon_thp 77\n"
    return {f"sys/fs/cgroup/{folder}memory.max": f"{limit}\n", f"sys/fs/cgroup/{folder}memory.stat": stat}


def version_1(folder: str, limit: int, used: int) -> dict[str, str]:
    group = f"sys/fs/cgroup/memory/{folder}"
    stat = f"cache 9\nrss 1\ntotal_cache 888888\ntotal_rss {used}\n"
    return {f"{group}memory.limit_in_bytes": f"{limit}\n", f"{group}memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/job/step\n", version_2("job/step/", "max", 5) | version_2("job/", "max", 5), MACHINE),
        ("0::/job/step\n", version_2("job/step/", "5000", 700), 4300),
        ("0::/job/step\n", version_2("job/step/", "max", 700) | version_2("job/", "5000", 900), 4100),
        ("0::/host/docker\n", version_2("", "6000", 1000), 5000),
        ("0::/job\n", version_2("job/", "6000", 7000), 0),
        ("5:cpu:/\n4:memory:/job\n0::/\n", version_1("job/", 5000, 700) | version_1("", 2**63 - 4096, 0), 4300),
        ("4:cpu,memory:/host/docker\n", version_1("", 5000, 700), 4300),
    ],
    ids=["no group", "no limit", "own", "around", "container", "full", "version 1", "version 1 container"],
)
def test_the_smallest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], left: int) -> None:
    assert available_memory(machine(tmp_path, groups, files)) == left


def test_without_control_groups_the_memory_of_the_machine_counts(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == MACHINE


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cores"] == cores() >= 1
    assert machine["memory_gb"] == round(2 * MACHINE / 1e9, 1)
    assert all(machine[key] for key in ("cpu", "architecture", "system"))
