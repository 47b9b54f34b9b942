"""Tasks for a child process with MNN's native code; `hf2mnn.mnn.engine.run_worker` starts it.

A task is a module with `run(job)`. The job is a dictionary of paths and settings, and names the files to write. How the
task ended is in a status file, because the engine prints to stdout.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Status:
    """Status file of a task.

    Attributes:
        kind: "ok", "bundle_fault" (an error of the bundle), "machine" (no disk space or memory) or "bug".
        message: Message for the user; empty if the task succeeded.
        data: For a bundle fault its `kind`.
    """

    kind: str
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the status as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Status | None:
        """Return the status of a task, or None if the task ended without one."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
