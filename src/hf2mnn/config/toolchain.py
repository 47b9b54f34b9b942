"""A toolchain: a Python environment with other releases of the tools, in which stages run to be compared with ours.

The folder is a virtual environment. `toolchain.json` says what was asked for and which releases are installed;
`bin/hf2mnn` runs this package's own source, to which it links, with them.
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

from hf2mnn.config.schema import Toolchain, canonical
from hf2mnn.core.errors import Hf2mnnError, ToolchainError
from hf2mnn.core.files import whole_folder

NAME = "toolchain.json"
PACKAGE = Path(__file__).parent
CONFIGURATION = "pyvenv.cfg"
"""Every virtual environment has it."""
OUTSIDE = {"snakemake"}
"""What this package needs, and no stage: the rules are run from outside."""
RUNNER = "__pip-runner__.py"
"""By which `pip --python` runs itself in another environment, whose packages alone it then sees."""
CONFLICT = "The conflict is caused by:"
CALL = (
    "import os, sys; from hf2mnn.machine.child import end_with; end_with(int(sys.argv[1]));"
    " os.execv(sys.argv[2], sys.argv[2:])"
)
SCRIPT = """#!/bin/sh
exec "$(dirname "$0")/python" -P -c "import sys; from hf2mnn.cli import main; sys.argv[0] = 'hf2mnn'; main()" "$@"
"""


def needed_packages() -> list[str]:
    """Names of the packages that the stages import."""
    named = [re.match(r"[\w.-]+", line)[0] for line in requires("hf2mnn") or [] if "extra ==" not in line]
    return [name for name in named if canonical(name) not in OUTSIDE]


def read_pins(requirements: Path) -> dict[str, str]:
    """Release by package, spelt canonically, of the lines NAME==RELEASE of a requirements.txt."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonical(name): release.strip() for name, release in found}


def wanted(asked: Toolchain, needed: list[str], pinned: dict[str, str]) -> tuple[list[str], list[str]]:
    """(requirements, constraints) for pip. What the stages need and what is pinned for the toolchain is installed;
    everything else, where something needs it, in the pinned release, or in that which pip chooses.
    """
    own = {canonical(name): release for name, release in asked.pins.items()}
    releases = (pinned if asked.others == "pinned" else {}) | own
    lines = {name: f"{name}=={release}" for name, release in releases.items()}
    installed = dict.fromkeys([*map(canonical, needed), *own])
    return [lines.get(name, name) for name in installed], [lines[name] for name in lines if name not in installed]


def _reason(said: list[str]) -> str:
    """Why pip failed, of what it printed: which packages do not fit each other, or its last error."""
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    if CONFLICT in said:
        at = said.index(CONFLICT) + 1
        return ", ".join(line.strip() for line in takewhile(str.strip, said[at:]))
    return errors[-1] if errors else " ".join(said[-1:])


def _install(python: Path, asked: Toolchain, requirements: Path, name: str) -> None:
    """Raises ToolchainError with pip's own words where it finds no such set of packages, or cannot fetch it."""
    ours = find_spec("pip")
    runner = Path(ours.origin).with_name(RUNNER) if ours else None
    if runner is None or not runner.is_file():
        raise ToolchainError(f"the toolchain {name} needs pip 22.3 or newer, which {sys.executable} lacks: upgrade it")
    install, constraints = wanted(asked, needed_packages(), read_pins(requirements))
    path = python.parent.parent / "constraints.txt"
    path.write_text("\n".join(constraints) + "\n")
    # Our pip, run by the new environment's Python, ends with this process.
    pip = [sys.executable, "-c", CALL, str(os.getpid()), str(python), str(runner)]
    pip += ["install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--constraint", str(path)]
    said = []
    with subprocess.Popen(
        [*pip, *install], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as running:
        for line in running.stdout:
            said.append(line.rstrip())
            print(said[-1], file=sys.stderr, flush=True)
    if running.returncode:
        raise ToolchainError(
            f"the toolchain {name} cannot be made: pip says: {_reason(said)}; look at its pins in config.yaml"
        )


def installed_releases(site: Path) -> dict[str, str]:
    """Release by package of an environment, sorted."""
    found = {canonical(one.metadata["Name"]): one.version for one in distributions(path=[str(site)])}
    return dict(sorted(found.items()))


def make_toolchain(destination: Path, requirements: Path, asked: Toolchain) -> Path:
    """Make the environment `destination`, with `requirements` as the pins of what is not asked for.

    Raises:
        ToolchainError: pip cannot install it.
        Hf2mnnError: `destination` holds files and is no environment.
    """
    destination = Path(destination)
    if destination.is_dir() and any(destination.iterdir()) and not (destination / CONFIGURATION).is_file():
        raise Hf2mnnError(f"{destination} holds files and is no environment; give --out a folder of its own")
    with whole_folder(destination) as folder:
        venv.create(folder, symlinks=True)
        _install(folder / "bin" / "python", asked, requirements, destination.name)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (site / "hf2mnn").symlink_to(PACKAGE.resolve())
        script = folder / "bin" / "hf2mnn"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        made = {"asked": asked.model_dump(), "installed": installed_releases(site)}
        (folder / NAME).write_text(json.dumps(made, indent=1) + "\n")
    return destination
