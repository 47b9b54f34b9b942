"""Environments with other releases of the tools: real ones, that pip makes of wheels which are written here."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from hf2mnn.config.schema import Toolchain, toolchain
from hf2mnn.config.toolchain import make_toolchain, needed_packages, read_pins, wanted
from hf2mnn.core.errors import Hf2mnnError, ToolchainError
from support import REPOSITORY

PINNED = "# pins\nTool==1.0\nidna==1.0\n"


def write_wheel(folder: Path, name: str, release: str, needs: str = "") -> None:
    """A package with a module of its name that knows its release."""
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
    """Pins of two packages, of which `tool` is what the stages need; pip sees their wheels, and no network. The other
    is named like one that is installed here, and must not be taken for that.
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
    """What an environment's own Python imports."""
    code = "import json, tool, idna; print(json.dumps([tool.release, idna.release]))"
    printed = subprocess.run([made / "bin" / "python", "-P", "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(("tool", "idna"), json.loads(printed.stdout), strict=True))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (Toolchain(pins={"TOOL": "2.0", "idna": "1.5"}), {"tool": "2.0", "idna": "1.5"}),
        (Toolchain(others="newest", pins={"idna": "1.5"}), {"tool": "2.0", "idna": "1.5"}),
    ],
)
def test_an_environment_has_what_was_asked_for_and_else_what_is_pinned(
    asked: Toolchain, found: dict[str, str], requirements: Path, tmp_path: Path
) -> None:
    made = make_toolchain(tmp_path / "made", requirements, asked)
    assert releases(made) == found
    noted = json.loads((made / "toolchain.json").read_text())
    assert noted == {"asked": asked.model_dump(), "installed": dict(sorted(found.items()))}


def test_its_command_runs_our_source_with_its_packages_from_anywhere(requirements: Path, tmp_path: Path) -> None:
    """It was made beside its place, so nothing in it may hold the path at which it was made; and a folder that is
    named like a package, in which it is started, is none.
    """
    make_toolchain(tmp_path / "made", requirements, Toolchain())
    (tmp_path / "hf2mnn").mkdir()
    (tmp_path / "hf2mnn" / "cli.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(["made/bin/hf2mnn"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert "No module named 'typer'" in done.stderr  # it has no more than these wheels
    assert str(REPOSITORY / "src" / "hf2mnn" / "cli.py") in done.stderr or "site-packages/hf2mnn/cli.py" in done.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Toolchain(pins={"tool": "9.9"}), "No matching distribution found for tool==9.9"),
        (
            Toolchain(pins={"tool": "2.0"}),
            "tool 2.0 depends on idna>=1.5, The user requested (constraint) idna==1.0;",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_with_pips_words_and_leaves_nothing(
    asked: Toolchain, said: str, requirements: Path, tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match="the toolchain made cannot be made: pip says: ") as refused:
        make_toolchain(tmp_path / "made", requirements, asked)
    assert said in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requirements.txt", "wheels"]


def test_a_toolchain_is_replaced_as_a_whole_and_nothing_else_is(requirements: Path, tmp_path: Path) -> None:
    made = make_toolchain(tmp_path / "made", requirements, Toolchain())
    assert releases(made) == {"tool": "1.0", "idna": "1.0"}
    (made / "toolchain.json").unlink()  # as Snakemake does before it runs a rule again
    assert releases(make_toolchain(made, requirements, Toolchain(pins={"idna": "1.5"})))["idna"] == "1.5"
    with pytest.raises(Hf2mnnError, match="is no environment"):
        make_toolchain(tmp_path / "wheels", requirements, Toolchain())
    assert len(list((tmp_path / "wheels").iterdir())) == 5


def test_a_real_toolchain_is_every_tool_in_its_pinned_release() -> None:
    """Of what the stages need nothing is left to pip's choice; Snakemake runs from outside."""
    install, constraints = wanted(
        Toolchain(pins={"MNN": "3.6.0"}), needed_packages(), read_pins(REPOSITORY / "requirements.txt")
    )
    assert {"mnn==3.6.0", "torch==2.13.0", "onnx-ir==1.1.0"} <= set(install)
    assert all("==" in line for line in install) and "protobuf" in {line.split("==")[0] for line in constraints}
    assert not any(line.startswith("snakemake==") for line in install)
    newest, bounds = wanted(Toolchain(pins={"torch": "2.13.0"}, others="newest"), needed_packages(), {"mnn": "3.6.1"})
    assert {"mnn", "torch==2.13.0", "transformers"} <= set(newest) and bounds == []
