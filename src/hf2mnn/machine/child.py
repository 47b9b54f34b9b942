"""Child processes for native code: they find the packages that this process has, and end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def environment() -> dict[str, str]:
    """Of a child that imports what this process can import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def end_with(parent: int) -> None:
    """In a child: be killed by the kernel as soon as `parent`, which has started it, is gone.

    Who is killed cannot stop its children, and one that goes on works in a folder that the next run removes, with no
    time limit left. Linux only; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
