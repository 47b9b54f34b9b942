"""Toolchain: a Python environment with other releases of the tools, to compare their results with the pinned ones.

The folder is a virtual environment. `toolchain.json` records the requested pins and the installed releases;
`bin/hf2mnn` runs the source of this package, to which the environment links, with these releases.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions, requires
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from hf2mnn.config.models import Toolchain, canonical
from hf2mnn.core.errors import Hf2mnnError, ToolchainError
from hf2mnn.core.files import atomic_folder

NAME = "toolchain.json"
PACKAGE = Path(__file__).parent.parent
ENVIRONMENT_MARKER = "pyvenv.cfg"  # file of every virtual environment
OUTSIDE = {"snakemake"}  # dependencies of this package that no stage imports
RUNNER = "__pip-runner__.py"
"""Program of pip 22.3 or newer for `pip --python`, which runs this pip with the packages of another environment."""
CONFLICT = "The conflict is caused by:"  # line of pip's output before the packages that do not fit each other
RUN_PIP = (
    "import os, sys; from hf2mnn.machine.child import die_with_parent; die_with_parent(int(sys.argv[1]));"
    " os.execv(sys.argv[2], sys.argv[2:])"
)
SCRIPT = """#!/bin/sh
exec "$(dirname "$0")/python" -P -c "import sys; from hf2mnn.cli import main; sys.argv[0] = 'hf2mnn'; main()" "$@"
"""


def needed_packages() -> list[str]:
    """Return the names of the packages that the stages import."""
    names = [re.match(r"[\w.-]+", line)[0] for line in requires("hf2mnn") or [] if "extra ==" not in line]
    return [name for name in names if canonical(name) not in OUTSIDE]


def read_pins(requirements: Path) -> dict[str, str]:
    """Return the release by canonical package name of the lines NAME==RELEASE in a requirements.txt."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonical(name): release.strip() for name, release in pins}


def pip_arguments(toolchain: Toolchain, needed: list[str], pinned: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return requirements and constraints for pip.

    The packages of the stages (`needed`) and the toolchain's own pins are installed; their dependencies have the
    release that requirements.txt pins, or one that pip chooses.
    """
    own = {canonical(name): release for name, release in toolchain.pins.items()}
    releases = (pinned if toolchain.others == "pinned" else {}) | own
    lines = {name: f"{name}=={release}" for name, release in releases.items()}
    installed = dict.fromkeys([*map(canonical, needed), *own])
    return [lines.get(name, name) for name in installed], [lines[name] for name in lines if name not in installed]


def _failure(output: list[str]) -> str:
    """Return the reason in pip's output: the packages that conflict, or the last error."""
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    if CONFLICT in output:
        conflict = output[output.index(CONFLICT) + 1 :]
        return ", ".join(line.strip() for line in takewhile(str.strip, conflict))
    return errors[-1] if errors else " ".join(output[-1:])


def _install(python: Path, toolchain: Toolchain, requirements: Path, name: str) -> None:
    """Install a toolchain's packages with this environment's pip; raise ToolchainError with pip's reason on failure."""
    pip = find_spec("pip")
    runner = Path(pip.origin).with_name(RUNNER) if pip else None
    if runner is None or not runner.is_file():
        raise ToolchainError(f"the toolchain {name} needs pip 22.3 or newer, which {sys.executable} lacks: upgrade it")
    packages, constraints = pip_arguments(toolchain, needed_packages(), read_pins(requirements))
    path = python.parent.parent / "constraints.txt"
    path.write_text("\n".join(constraints) + "\n")
    command = [sys.executable, "-c", RUN_PIP, str(os.getpid()), str(python), str(runner), "install"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--constraint", str(path)]
    output = []
    with subprocess.Popen(
        [*command, *packages], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            output.append(line.rstrip())
            print(output[-1], file=sys.stderr, flush=True)
    if process.returncode:
        raise ToolchainError(
            f"the toolchain {name} cannot be made: pip reports: {_failure(output)}; correct its pins in config.yaml"
        )


def make_toolchain(destination: Path, requirements: Path, toolchain: Toolchain) -> Path:
    """Create the environment of a toolchain in `destination`, which is replaced as a whole if it is an environment."""
    if destination.is_dir() and any(destination.iterdir()) and not (destination / ENVIRONMENT_MARKER).is_file():
        raise Hf2mnnError(f"{destination} holds files and is not an environment; give --out a new folder")
    with atomic_folder(destination) as folder:
        venv.create(folder, symlinks=True)
        _install(folder / "bin" / "python", toolchain, requirements, destination.name)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (site / "hf2mnn").symlink_to(PACKAGE.resolve())
        script = folder / "bin" / "hf2mnn"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        installed = {canonical(each.metadata["Name"]): each.version for each in distributions(path=[str(site)])}
        record = {"asked": toolchain.model_dump(), "installed": dict(sorted(installed.items()))}
        (folder / NAME).write_text(json.dumps(record, indent=1) + "\n")
    return destination
