"""The examples in the docs do what they say, on what a run has made."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support import REPOSITORY, Workspace


def example(name: str) -> str:
    """The first Python block of a page."""
    return re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / name).read_text(), re.DOTALL)[1]


@pytest.mark.parametrize(("name", "said"), [("onnx.md", "top left: "), ("bundle.md", "\n7\n")])
def test_example(finished: Workspace, name: str, said: str) -> None:
    """The bundle's may end in the segmentation fault that its page warns of, but only after it has answered."""
    done = subprocess.run(
        [sys.executable, "-c", example(name)], cwd=finished.folder, capture_output=True, text=True, timeout=120
    )
    assert said in done.stdout, done.stderr
    assert done.returncode == 0 or name == "bundle.md"
