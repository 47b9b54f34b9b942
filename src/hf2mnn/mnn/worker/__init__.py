"""Tasks for a child process with MNN's native code; `hf2mnn.mnn.engine.run_worker` starts it.

A task is a module with `run(job)`. The job is a dictionary of paths and settings, and names the files to write. How the
task ended is in a status file, because the engine prints to stdout.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Status:
    """Status file of a task: "ok", "bundle_fault", "machine" (no disk space or memory) or "bug", and a message."""

    kind: str
    message: str = ""
    fault: str = ""  # kind of a BundleFault

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
