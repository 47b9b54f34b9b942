"""Child processes end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hf2mnn.machine.child import child_environment

CHILD = """
import sys, time
from hf2mnn.machine.child import die_with_parent
die_with_parent(int(sys.argv[1]))
print("running", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
from hf2mnn.machine.child import child_environment
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2] or str(os.getpid())], env=child_environment())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
def test_child_of_a_killed_parent_is_killed() -> None:
    """The pipe closes when both processes are gone."""
    command = [sys.executable, "-c", PARENT, CHILD, ""]
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "running\n"
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.stdout.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
def test_child_whose_parent_is_already_gone_ends() -> None:
    command = [sys.executable, "-c", CHILD, "1" if os.getpid() != 1 else "2"]
    assert subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE).stdout == b""
