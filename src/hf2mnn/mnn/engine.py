"""MNN's engine, kept at arm's length: a child process with a time limit and a working directory of its own.

The engine is native code that ends the process on many mistakes, answers "loaded" for bundles that are not whole,
and leaves by a segmentation fault even after all went well. A crash becomes one `EngineError`.
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
from hf2mnn.core.manifest import Manifest
from hf2mnn.core.shortage import ended_by_others
from hf2mnn.machine.child import environment
from hf2mnn.mnn.bundle import CONFIG, MODEL_CONFIG
from hf2mnn.mnn.paths import check_files

WORKER = "hf2mnn.mnn.worker"
NOISE = ("The device supports", "Warning: module need new clone")


def check_bundle(bundle: Path) -> Path:
    """The folder as an absolute path, once every file is the one that was made.

    The engine looks for three of them, loads what it finds, and talks plausible nonsense from weights that were cut
    short, swapped, or are no weights at all.

    Raises:
        BundleError: naming the file; also for one out of the folder that its configuration names.
    """
    bundle = Path(bundle).resolve()
    if not (bundle / CONFIG).is_file():
        raise BundleError(f"there is no bundle {bundle}: give the folder that holds {CONFIG} and llm.mnn")
    try:
        whole = Manifest.load(bundle).verify()
    except ManifestError as error:
        raise BundleError(str(error)) from None
    check_files(whole, (CONFIG, MODEL_CONFIG))
    return whole


def run_worker(task: str, arguments: dict[str, Any], time_limit: float, python: Path | None = None) -> None:
    """Run the module `task` of `hf2mnn.mnn.worker` with `arguments` (paths absolute); it writes its results where
    they say. `python` is that of a toolchain, whose engine it then is.

    Raises:
        BundleFault: it crashed, or said what is wrong; with the engine's last words.
        MachineError: the machine has no room or no memory left.
        EngineStopped: it took too long, or was killed (by a machine short of memory, most of the time).
        EngineError: a bug of ours.
    """
    name = task.rpartition(".")[2]
    with tempfile.TemporaryDirectory(prefix="hf2mnn-engine-") as folder:
        job, said = Path(folder, "job.json"), Path(folder, "said.txt")
        job.write_text(json.dumps(arguments))
        with said.open("wb") as output:
            try:
                # Progress goes to our own stderr; what the engine prints is kept for the case that it dies.
                done = subprocess.run(
                    [python or sys.executable, "-m", WORKER, task, str(job), str(os.getpid())],
                    cwd=folder,
                    env=environment() if python is None else None,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    timeout=time_limit,
                )
            except subprocess.TimeoutExpired:
                raise EngineStopped(
                    f"MNN's engine was stopped after {time_limit:.0f} s ({name}); see --time-limit"
                ) from None
        lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith(NOISE)]
    if done.returncode != 0:
        refused = [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
        if refused:
            raise BundleFault(refused[-1], lines)
        short = [line.removeprefix("machine: ") for line in lines if line.startswith("machine: ")]
        if short:
            raise MachineError(short[-1])
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        bug = [line.removeprefix("bug: ") for line in lines if line.startswith("bug: ")]
        if bug:
            raise EngineError(f"{name} failed in MNN's engine: {bug[-1]}; this is a bug, report it with the log")
        # No verdict on the bundle: nothing in it sends such a signal.
        if ended := ended_by_others(f"MNN's engine ({name})", done.returncode):
            raise EngineStopped(ended)
        last = " / ".join(lines[-3:]) or "none"
        raise BundleFault(f"MNN's engine died ({how}) during {name}; its last words: {last}", lines)
