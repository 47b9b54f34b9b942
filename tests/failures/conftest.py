"""Fixtures: a finished chain of stages, and disks in memory that are small, full or read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chain import make_chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_chain`. Tests only read it."""
    return make_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Mounts a tmpfs by name and options, and remounts an existing one; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def make(name: str, options: str) -> Path:
        folder = tmp_path / name
        if folder in mounted:
            subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
            return folder
        folder.mkdir()
        process = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "hf2mnn-test", folder], capture_output=True)
        if process.returncode != 0:
            pytest.skip("mounting is not permitted: run as root, in a container with SYS_ADMIN")
        mounted.append(folder)
        return folder

    yield make
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)
