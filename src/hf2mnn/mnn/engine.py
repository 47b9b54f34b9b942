"""Run MNN's engine in a child process with a time limit and its own working directory.

The engine is native code. It ends its process on many errors, reports success for incomplete bundles, and crashes in
its destructors after a successful run. A crash becomes one `BundleFault`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import BundleError, BundleFault, EngineError, EngineStopped, MachineError, ManifestError
from hf2mnn.core.machine_errors import explain_kill
from hf2mnn.core.manifest import Manifest
from hf2mnn.machine.child import child_environment
from hf2mnn.mnn.bundle_config import CONFIG, MODEL_CONFIG, check_paths, edited_settings
from hf2mnn.mnn.engine_facts import INFORMATION

WORKER = "hf2mnn.mnn.worker"


def check_bundle(bundle: Path) -> Manifest:
    """Verify all files of a bundle against its manifest, and return it; its folder is absolute.

    The engine checks that three of the files exist. It loads weights that are truncated, of another model or no weights
    at all, and then produces wrong output. Raise BundleError if a file is missing or changed, apart from run-time
    settings, or a path in the configuration is outside the bundle.
    """
    bundle = Path(bundle).resolve()
    if not (bundle / CONFIG).is_file():
        raise BundleError(f"there is no bundle {bundle}: give the folder that holds {CONFIG} and llm.mnn")
    try:
        manifest = Manifest.load(bundle)
        edited_settings(manifest)
        manifest.accept_edits()
        manifest.verify()
    except ManifestError as error:
        raise BundleError(str(error)) from None
    except ValueError as error:
        raise BundleError(
            f"{bundle / CONFIG} was changed: {error}; correct this key (docs/bundle.md lists the settings), or copy the"
            " file again"
        ) from None
    check_paths(bundle, (CONFIG, MODEL_CONFIG))
    return manifest


def run_worker(task: str, arguments: dict[str, Any], time_limit: float, python: Path | None = None) -> None:
    """Run a task of `hf2mnn.mnn.worker`, a module, in a child process, for at most `time_limit` seconds.

    `arguments` are the job, with absolute paths also of results; `python` is the interpreter of another toolchain.
    Raise BundleFault if the engine rejected the bundle or crashed on it, MachineError if no disk space or memory is
    left, EngineStopped if the time limit is over or another process killed the engine (most often for lack of memory),
    and EngineError for a bug of this package.
    """
    name = task.rpartition(".")[2]
    with tempfile.TemporaryDirectory(prefix="hf2mnn-engine-") as folder:
        job, status_file, stdout = (Path(folder, file) for file in ("job.json", "status.json", "stdout.txt"))
        job.write_text(json.dumps(arguments))
        with stdout.open("wb") as output:
            try:
                # Progress goes to stderr; the engine's output is kept for the message of a crash.
                process = subprocess.run(
                    [python or sys.executable, "-m", WORKER, task, str(job), str(status_file), str(os.getpid())],
                    cwd=folder,
                    env=child_environment() if python is None else None,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    timeout=time_limit,
                )
            except subprocess.TimeoutExpired:
                raise EngineStopped(
                    f"MNN's engine was stopped after {time_limit:.0f} s ({name}); see --time-limit"
                ) from None
        try:
            status = json.loads(status_file.read_text())
        except (FileNotFoundError, ValueError):
            status = None
        lines = [line.strip() for line in stdout.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(INFORMATION)]
    if status is None:
        # Nothing in a bundle sends SIGKILL or SIGTERM.
        if message := explain_kill(f"MNN's engine ({name})", process.returncode):
            raise EngineStopped(message)
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        last = " / ".join(lines[-3:]) or "none"
        message = f"MNN's engine died ({ended}) during {name}; its last output: {last}"
        raise BundleFault(message, ended=ended, output=lines)
    if status["kind"] == "bundle_fault":
        raise BundleFault(status["message"], status["fault"], output=lines)
    if status["kind"] == "machine":
        raise MachineError(status["message"])
    if status["kind"] == "bug":
        raise EngineError(f"{name} failed in MNN's engine: {status['message']}; this is a bug, report it with the log")
