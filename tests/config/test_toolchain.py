"""Toolchains: real environments that pip installs from wheels written by the tests."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from hf2mnn.config import toolchain
from hf2mnn.config.models import Toolchain
from hf2mnn.config.toolchain import make_toolchain, needed_packages, pip_arguments, read_pins
from hf2mnn.core.errors import Hf2mnnError, ToolchainError
from support import REPOSITORY

PINNED = "# pins\nTool==1.0\nidna==1.0\n"


def write_wheel(folder: Path, name: str, release: str, needs: str = "") -> None:
    """Write a package with a module of the same name, which has its release."""
    info = f"{name}-{release}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
    metadata += f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"{name}-{release}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"release = '{release}'\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pins of two packages, of which the stages need `tool`; pip finds their wheels without network.

    `idna` is installed in this environment too, which must not count.
    """
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "tool", "1.0", "idna")
    write_wheel(wheels, "tool", "2.0", "idna>=1.5")
    write_wheel(wheels, "idna", "1.0")
    write_wheel(wheels, "idna", "1.5")
    write_wheel(wheels, "idna", "2.0")
    for key, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    monkeypatch.setattr(toolchain, "needed_packages", lambda: ["tool"])
    path = tmp_path / "requirements.txt"
    path.write_text(PINNED)
    return path


def releases(made: Path) -> dict[str, str]:
    """Return the releases that the environment's own Python imports."""
    code = "import json, tool, idna; print(json.dumps([tool.release, idna.release]))"
    printed = subprocess.run([made / "bin" / "python", "-P", "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(("tool", "idna"), json.loads(printed.stdout), strict=True))


@pytest.mark.parametrize(
    ("requested", "installed"),
    [
        (Toolchain(pins={"TOOL": "2.0", "idna": "1.5"}), {"tool": "2.0", "idna": "1.5"}),
        (Toolchain(others="newest", pins={"idna": "1.5"}), {"tool": "2.0", "idna": "1.5"}),
    ],
)
def test_environment_has_the_requested_releases_and_the_pinned_others(
    requested: Toolchain, installed: dict[str, str], requirements: Path, tmp_path: Path
) -> None:
    made = make_toolchain(tmp_path / "made", requirements, requested)
    assert releases(made) == installed
    record = json.loads((made / "toolchain.json").read_text())
    assert record == {"asked": requested.model_dump(), "installed": dict(sorted(installed.items()))}


def test_command_of_an_environment_runs_this_source_with_its_packages(requirements: Path, tmp_path: Path) -> None:
    """It does not depend on its first path, which was renamed, nor on a folder `hf2mnn` in the working directory."""
    make_toolchain(tmp_path / "made", requirements, Toolchain())
    (tmp_path / "hf2mnn").mkdir()
    (tmp_path / "hf2mnn" / "cli.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(["made/bin/hf2mnn"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert "No module named 'typer'" in done.stderr  # it has these wheels only
    source = "hf2mnn/cli/__init__.py"
    assert str(REPOSITORY / "src" / source) in done.stderr or f"site-packages/{source}" in done.stderr


@pytest.mark.parametrize(
    ("requested", "reason"),
    [
        (Toolchain(pins={"tool": "9.9"}), "No matching distribution found for tool==9.9"),
        (
            Toolchain(pins={"tool": "2.0"}),
            "tool 2.0 depends on idna>=1.5, The user requested (constraint) idna==1.0;",
        ),
    ],
)
def test_impossible_toolchain_has_the_reason_of_pip_and_leaves_nothing(
    requested: Toolchain, reason: str, requirements: Path, tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match="the toolchain made cannot be made: pip reports: ") as refused:
        make_toolchain(tmp_path / "made", requirements, requested)
    assert reason in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requirements.txt", "wheels"]


def test_toolchain_is_replaced_and_another_folder_is_not(requirements: Path, tmp_path: Path) -> None:
    made = make_toolchain(tmp_path / "made", requirements, Toolchain())
    assert releases(made) == {"tool": "1.0", "idna": "1.0"}
    (made / "toolchain.json").unlink()  # as Snakemake does before it runs a rule again
    assert releases(make_toolchain(made, requirements, Toolchain(pins={"idna": "1.5"})))["idna"] == "1.5"
    with pytest.raises(Hf2mnnError, match="is not an environment"):
        make_toolchain(tmp_path / "wheels", requirements, Toolchain())
    assert len(list((tmp_path / "wheels").iterdir())) == 5


def test_real_toolchain_has_every_tool_in_its_pinned_release() -> None:
    """Pip chooses no release of a package of the stages; Snakemake runs outside of the environment."""
    install, constraints = pip_arguments(
        Toolchain(pins={"MNN": "3.6.0"}), needed_packages(), read_pins(REPOSITORY / "requirements.txt")
    )
    assert {"mnn==3.6.0", "torch==2.13.0", "onnx-ir==1.1.0"} <= set(install)
    assert all("==" in line for line in install) and "protobuf" in {line.split("==")[0] for line in constraints}
    assert not any(line.startswith("snakemake==") for line in install)
    newest, bounds = pip_arguments(
        Toolchain(pins={"torch": "2.13.0"}, others="newest"), needed_packages(), {"mnn": "3.6.1"}
    )
    assert {"mnn", "torch==2.13.0", "transformers"} <= set(newest) and bounds == []
