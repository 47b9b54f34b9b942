"""What holds the repository together: pins, environments, rules, and nothing of the machine on which it was written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import REPOSITORY

ENVIRONMENTS = sorted((REPOSITORY / "envs").glob("*.yaml"))
RULE_FILES = sorted((REPOSITORY / "workflow" / "rules").glob("*.smk"))


def pins(lines: list[str]) -> dict[str, str]:
    """Package to version; a line that is no exact pin fails."""
    found = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line.strip()).groups()
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


PINNED = pins((REPOSITORY / "requirements.txt").read_text().splitlines())


def environment_pins(path: Path) -> dict[str, str]:
    (listed,) = [entry["pip"] for entry in yaml.safe_load(path.read_text())["dependencies"] if isinstance(entry, dict)]
    return pins(listed)


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_carry_the_pins_that_are_tested(path: Path) -> None:
    """With --sdm conda the stages run in these; another release there would be another, untested converter."""
    found = environment_pins(path)
    assert found
    assert {name: PINNED.get(name) for name in found} == found


def test_dependencies_are_pinned_within_their_ranges() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras]]
    assert [str(need) for need in wanted if canonicalize_name(need.name) not in PINNED] == []
    assert [str(need) for need in wanted if PINNED[canonicalize_name(need.name)] not in need.specifier] == []


def closure(names: set[str]) -> set[str]:
    """These packages and all that they need, as they are installed here."""
    reached, left = set(), set(names)
    while left:
        name = left.pop()
        reached.add(name)
        try:
            needs = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        applying = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        left |= {canonicalize_name(need.name) for need in applying} - reached
    return reached


def test_pins_are_complete() -> None:
    """What pip would choose by itself on another day is a pin that is missing."""
    assert {name for name in closure(set(PINNED)) - set(PINNED) if name not in ("pip", "setuptools")} == set()


def rules() -> dict[str, str]:
    """Name to text of each rule."""
    found = {}
    for path in RULE_FILES:
        for match in re.finditer(r"^(?:rule|checkpoint) (\w+):\n((?:(?:[ \t].*)?\n)+)", path.read_text(), re.MULTILINE):
            found[match[1]] = match[2]
    return found


RULES = rules()


def test_there_are_rules() -> None:
    stages = {
        "fetch_checkpoint",
        "copy_set",
        "collect_examples",
        "run_reference",
        "export_onnx",
        "convert_graphs",
        "record_calibration",
        "measure_sensitivity",
        "plan_bits",
        "quantize_variant",
        "evaluate_variant",
        "diagnose_variant",
        "benchmark_variants",
        "report_model",
        "make_toolchain",
        "compare_versions",
    }
    assert stages <= set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_rules_say_what_a_cluster_needs_and_a_person_looks_for(rule: str) -> None:
    """Log, benchmark, threads, memory, time: without one of these a job is refused there, or cannot be looked into."""
    text = RULES[rule]
    for key in ("log:", "benchmark:", "conda:", "threads:", "resources:", "mem_mb=", "runtime="):
        assert re.search(rf"^\s+{key}", text, re.MULTILINE), key
    assert "{log:q}" in text


@pytest.mark.parametrize("rule", RULES)
def test_values_from_the_config_are_quoted(rule: str) -> None:
    """A path with a space, or with a semicolon, must stay one word of the shell."""
    shell = RULES[rule].split("shell:")[1]
    plain = {"threads", "params.max_new_tokens", "params.time_limit"}
    if "shlex.join" in (REPOSITORY / "workflow" / "rules" / "common.smk").read_text():
        plain.add("params.options")  # several words, quoted there one by one
    used = set(re.findall(r"(?<!{){([\w.]+(?::q)?)}", shell))
    assert {value for value in used if not value.endswith(":q")} - plain == set()


# The command of each rule with inputs that are not there: it loads its stage, and then says so in one line.
STARTS = {
    "source": ["--path", "nowhere", "--out", "x"],
    "evaluation": ["--dataset", "docvqa", "--path", "nowhere", "--out", "x"],
    "reference": ["nowhere", "--evaluation", "nowhere", "--out", "x"],
    "onnx": ["nowhere", "--out", "x"],
    "mnn": ["nowhere", "--out", "x"],
    "activations": ["nowhere", "--calibration", "nowhere", "--out", "x"],
    "sensitivity": ["nowhere", "--calibration", "nowhere", "--out", "x"],
    "plan": ["nowhere", "--onnx", "nowhere", "--base", "nowhere", "--budget", "4", "--out", "x"],
    "quantize": ["nowhere", "nowhere", "--out", "x", "--decoder", '{"bits": 8}'],
    "evaluate": ["--reference", "nowhere", "--onnx", "nowhere", "--out", "x"],
    "speed": ["--bundle", "x=nowhere", "--baseline", "x", "--out", "x"],
    "diagnose": ["--reference", "nowhere", "--onnx", "x", "--base", "x", "--bundle", "x", "--out", "x"],
    "report": ["m", "nowhere", "--variants", "[]"],
    "summarize": ["nowhere.csv", "--out", "x.csv"],
    "gates": ["nowhere.csv"],
    "compare": ["nowhere", "nowhere"],
    "toolchain": ["{", "--out", "x"],
}
START = """
import contextlib, io, json, sys
from hf2mnn.cli import main
failed = {}
for command, arguments in json.loads(sys.argv[1]).items():
    sys.argv, said = ["hf2mnn", command, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main()
    except SystemExit:
        pass
    except BaseException as error:
        failed[command] = repr(error)
    if command not in failed and not said.getvalue().startswith("hf2mnn: "):
        failed[command] = said.getvalue()
print(json.dumps(failed))
"""


def link_packages(names: set[str], folder: Path) -> None:
    """What these packages have installed here, and their metadata, as links in `folder`."""
    for name in names:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(metadata.distribution(name).locate_file(top))


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_have_what_their_stages_load(path: Path, tmp_path: Path) -> None:
    """Each command starts where only its environment's packages are installed."""
    commands = {re.search(r"hf2mnn (\w+)", text)[1] for text in RULES.values() if f"envs/{path.name}" in text}
    assert commands
    link_packages(closure(set(environment_pins(path))), tmp_path)
    made = subprocess.run(
        [sys.executable, "-S", "-c", START, json.dumps({command: STARTS[command] for command in sorted(commands)})],
        env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'src'}", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1]) == {}


def tracked() -> list[Path]:
    """Files that git has, or that it would take; without git, none."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.decode().split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_nothing_of_this_machine_is_in_the_repository() -> None:
    """No folder of a person's, no package index: it must run anywhere, and tell nobody where it was made."""
    homes = [f"/{first}/" for first in ("root", "home", "Users", "work", "workspace", "mnt")]
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted"), ("repo", "anaconda"))]
    options = ["-".join(parts) for parts in (("--index", "url"), ("--extra", "index", "url"), ("--find", "links"))]
    search = re.compile("|".join(re.escape(word) for word in (*homes, *hosts, *options)).encode())
    # A path counts where it begins one, not where it goes on: tests/workflow/ is none.
    found = [
        f"{path.relative_to(REPOSITORY)}: {match[0].decode()}"
        for path in tracked()
        if path.suffix not in (".png", ".safetensors")
        for match in search.finditer(path.read_bytes())
        if not re.search(rb"[\w.}*-]$", path.read_bytes()[: match.start()][-1:])
    ]
    assert found == []


def test_nothing_large_is_in_the_repository() -> None:
    """The embedded model is the only thing of any size."""
    large = {path.relative_to(REPOSITORY).as_posix() for path in tracked() if path.stat().st_size > 1_000_000}
    assert large <= {"models/shapes-vl/model.safetensors"}


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_begins_with_the_two_commands(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


def test_readme_links_lead_somewhere() -> None:
    for page in [*REPOSITORY.glob("README*.md"), *(REPOSITORY / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert re.match(r"https?:", target) or (page.parent / target).exists(), f"{page.name}: {target}"
