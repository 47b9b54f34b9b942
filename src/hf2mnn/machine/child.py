"""Child processes for native code: they import the packages of this process, and end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # option of prctl(2), from linux/prctl.h


def child_environment() -> dict[str, str]:
    """Return environment variables for a child that imports the packages of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends.

    A killed parent cannot stop its children. A child that goes on writes to a folder that the next run removes, and
    has no time limit. Linux only; elsewhere this does nothing.

    Args:
        parent: Process id of the parent; this process ends at once if the parent is already gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
