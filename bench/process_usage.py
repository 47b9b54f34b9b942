"""Time, memory and written bytes of a command with all processes that it starts. Linux only."""

from __future__ import annotations

import ctypes
import re
import resource
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hf2mnn.core.errors import Hf2mnnError

SAMPLE_SECONDS = 0.1
"""Time between two samples of the memory."""
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_SECONDS = 10.0
"""Time for processes that outlive the command to end."""


@dataclass
class Usage:
    """Resources of a command.

    Attributes:
        wall_s: Wall time.
        cpu_s: CPU time of all processes.
        peak_rss_mb: Largest sum of VmRSS over processes that run at the same time, sampled every SAMPLE_SECONDS, or
            the largest VmHWM of one process if that is more (a short peak). Both count resident pages of mapped files,
            and a page shared by two processes twice. 1 MB is 1e6 bytes.
        bytes_written: `write_bytes` of /proc/PID/io: bytes written to a disk. Deleted files count; hard links and
            files on a tmpfs do not.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    bytes_written: int


class MemoryMonitor(threading.Thread):
    """Thread that samples the memory of all processes started by this one since."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.parent = psutil.Process()
        self.earlier = set(self.parent.children(recursive=True))
        self.peak, self.stopped = 0, threading.Event()

    def processes(self) -> set[psutil.Process]:
        """Return the running processes."""
        return set(self.parent.children(recursive=True)) - self.earlier

    def run(self) -> None:
        """Sample until `stopped` is set."""
        while True:
            # A set: between fork and exec, a child shares the memory of its parent.
            statuses = {memory_status(process.pid) for process in self.processes()}
            sizes = [[1024 * status.get(key, 0) for key in ("VmRSS", "VmHWM")] for status in map(dict, statuses)]
            self.peak = max([self.peak, sum(resident for resident, _ in sizes), *(highest for _, highest in sizes)])
            if self.stopped.wait(SAMPLE_SECONDS):
                return


def memory_status(pid: int) -> tuple[tuple[str, int], ...]:
    """Return the memory entries of /proc/PID/status in kB of 1024 bytes; empty for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ()
    return tuple((name, int(size)) for name, size in re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE))


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def _bytes_written() -> int:
    """Return the bytes written by this process and by all children that it has waited for."""
    return int(re.search(r"^write_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def run_measured(command: Sequence[str | Path], log: Path, **options: Any) -> Usage:
    """Run a command to its end and return its resources.

    The kernel adds time and bytes of a process to those of the process that waits for it. As a subreaper, this process
    waits for orphans too, e.g. the shell of an `os.popen`.

    Args:
        command: Program and arguments.
        log: File for its output.
        options: Options of `subprocess.Popen`.

    Raises:
        Hf2mnnError: The command failed.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    monitor, cpu, written = MemoryMonitor(), _cpu_seconds(), _bytes_written()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options
        )
        monitor.start()
        try:
            code = process.wait()
            wall = time.monotonic() - started
        finally:
            monitor.stopped.set()
            monitor.join()
            if process.poll() is None:
                process.kill()
                process.wait()
            _, orphans = psutil.wait_procs(monitor.processes(), ORPHAN_SECONDS if process.returncode == 0 else 0)
            for orphan in orphans:
                with suppress(psutil.NoSuchProcess):
                    orphan.kill()
            psutil.wait_procs(orphans, ORPHAN_SECONDS)
    if code != 0:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "(no output)")
        status = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise Hf2mnnError(f"{shlex.join(map(str, command[:3]))} ... failed ({status}); last line of {log}: {last}")
    return Usage(
        wall_s=round(wall, 2),
        cpu_s=round(_cpu_seconds() - cpu, 2),
        peak_rss_mb=round(monitor.peak / 1e6, 1),
        bytes_written=_bytes_written() - written,
    )
