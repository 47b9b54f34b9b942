"""Consistency of the repository: pins, environments, rules, links, and no path of the machine it was written on."""

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

from hf2mnn.stages import ORDER
from support import REPOSITORY

ENVIRONMENTS = sorted((REPOSITORY / "envs").glob("*.yaml"))
RULE_FILES = sorted((REPOSITORY / "workflow" / "rules").glob("*.smk"))


def pins(lines: list[str]) -> dict[str, str]:
    """Return version by package; a line that is not an exact pin fails."""
    versions = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line.strip()).groups()
            assert canonicalize_name(name) not in versions, f"{name} is pinned twice"
            versions[canonicalize_name(name)] = version
    return versions


PINNED = pins((REPOSITORY / "requirements.txt").read_text().splitlines())


def environment_pins(path: Path) -> dict[str, str]:
    (listed,) = [entry["pip"] for entry in yaml.safe_load(path.read_text())["dependencies"] if isinstance(entry, dict)]
    return pins(listed)


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_have_the_tested_pins(path: Path) -> None:
    """With --sdm conda the stages run in these environments; another release would be an untested converter."""
    versions = environment_pins(path)
    assert versions
    assert {name: PINNED.get(name) for name in versions} == versions


def test_dependencies_are_pinned_within_their_ranges() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras]]
    assert [str(need) for need in wanted if canonicalize_name(need.name) not in PINNED] == []
    assert [str(need) for need in wanted if PINNED[canonicalize_name(need.name)] not in need.specifier] == []


def closure(names: set[str]) -> set[str]:
    """Return these packages and their installed dependencies."""
    reached, pending = set(), set(names)
    while pending:
        name = pending.pop()
        reached.add(name)
        try:
            needs = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        applying = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        pending |= {canonicalize_name(need.name) for need in applying} - reached
    return reached


def test_pins_are_complete() -> None:
    """Pip would choose the release of an unpinned package, another one on another day."""
    assert {name for name in closure(set(PINNED)) - set(PINNED) if name not in ("pip", "setuptools")} == set()


def rules() -> dict[str, str]:
    """Return the text of each rule by name."""
    texts = {}
    for path in RULE_FILES:
        for match in re.finditer(r"^(?:rule|checkpoint) (\w+):\n((?:(?:[ \t].*)?\n)+)", path.read_text(), re.MULTILINE):
            texts[match[1]] = match[2]
    return texts


RULES = rules()


STAGE_RULES = {
    "fetch": "fetch_checkpoint",
    "examples": "collect_examples",
    "reference": "run_reference",
    "export": "export_onnx",
    "convert": "convert_graphs",
    "calibrate": "record_calibration",
    "sensitivity": "measure_sensitivity",
    "plan": "plan_bits",
    "quantize": "quantize_variant",
    "baseline": "run_baseline",
    "evaluate": "evaluate_variant",
    "diagnose": "diagnose_variant",
    "benchmark": "benchmark_variants",
    "report": "report_model",
    "compare": "compare_versions",
}
"""Rule of each stage."""


def test_every_stage_has_a_rule_that_runs_its_command() -> None:
    assert list(STAGE_RULES) == list(ORDER)
    assert [stage for stage, rule in STAGE_RULES.items() if f"hf2mnn {stage} " not in RULES[rule]] == []
    assert set(RULES) - set(STAGE_RULES.values()) == {"make_toolchain", "summarize_models", "check_gates"}


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_documented_with_inputs_and_outputs(rule: str) -> None:
    docstring = re.search(r'"""\n(.*?)"""', RULES[rule], re.DOTALL)[1]
    lines = [line.strip() for line in docstring.strip().splitlines()]
    assert [line.partition(":")[0] for line in lines] == ["Input", "Output"]
    assert all(line.partition(":")[2].strip() for line in lines)


@pytest.mark.parametrize("rule", RULES)
def test_rules_have_log_benchmark_and_resources(rule: str) -> None:
    """A cluster refuses a job without memory and time, and a failed job without a log cannot be examined."""
    text = RULES[rule]
    for key in ("log:", "benchmark:", "conda:", "threads:", "resources:", "mem_mb=", "runtime="):
        assert re.search(rf"^\s+{key}", text, re.MULTILINE), key
    assert "{log:q}" in text


@pytest.mark.parametrize("rule", RULES)
def test_values_from_the_config_are_quoted(rule: str) -> None:
    """A path with a space or a semicolon must stay one word of the shell."""
    shell = RULES[rule].split("shell:")[1]
    plain = {"threads", "params.max_new_tokens", "params.time_limit"}
    used = set(re.findall(r"(?<!{){([\w.]+(?::q)?)}", shell))
    assert {value for value in used if not value.endswith(":q")} - plain == set()


# Command of each rule with missing inputs: it loads its stage and then fails with one line.
STARTS = {
    "fetch": ["--path", "nowhere", "--out", "x"],
    "examples": ["--dataset", "docvqa", "--path", "nowhere", "--out", "x"],
    "reference": ["nowhere", "--examples", "nowhere", "--out", "x"],
    "export": ["nowhere", "--out", "x"],
    "convert": ["nowhere", "--out", "x"],
    "calibrate": ["nowhere", "--calibration", "nowhere", "--out", "x"],
    "sensitivity": ["nowhere", "--calibration", "nowhere", "--out", "x"],
    "plan": ["nowhere", "--onnx", "nowhere", "--graphs", "nowhere", "--budget", "4", "--out", "x"],
    "quantize": ["nowhere", "nowhere", "--out", "x", "--decoder", '{"bits": 8}'],
    "evaluate": ["--reference", "nowhere", "--onnx", "nowhere", "--out", "x"],
    "baseline": ["--reference", "nowhere", "--onnx", "x", "--graphs", "x", "--out", "x"],
    "benchmark": ["--bundle", "x=nowhere", "--baseline", "x", "--out", "x"],
    "diagnose": ["--reference", "nowhere", "--onnx", "x", "--baseline", "x", "--bundle", "x", "--out", "x"],
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
    sys.argv, stderr = ["hf2mnn", command, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as exited:
        if exited.code != 1:
            failed[command] = stderr.getvalue()
    except BaseException as error:
        failed[command] = repr(error)
    if command not in failed and not stderr.getvalue().startswith("error: "):
        failed[command] = stderr.getvalue()
print(json.dumps(failed))
"""


def link_packages(names: set[str], folder: Path) -> None:
    """Link the installed files and metadata of these packages into `folder`."""
    for name in names:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(metadata.distribution(name).locate_file(top))


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_environments_have_the_packages_of_their_stages(path: Path, tmp_path: Path) -> None:
    """Each command starts with the packages of its environment only."""
    commands = {re.search(r"hf2mnn (\w+)", text)[1] for text in RULES.values() if f"envs/{path.name}" in text}
    assert commands
    link_packages(closure(set(environment_pins(path))), tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "-c", START, json.dumps({command: STARTS[command] for command in sorted(commands)})],
        env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'src'}", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def tracked() -> list[Path]:
    """Return the files that git tracks or would add; skip the test without git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.decode().split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_no_path_or_index_of_a_machine_is_in_the_repository() -> None:
    """No home folder and no package index: the repository must run on any machine."""
    homes = [f"/{first}/" for first in ("root", "home", "Users", "work", "workspace", "mnt")]
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted"), ("repo", "anaconda"))]
    options = ["-".join(parts) for parts in (("--index", "url"), ("--extra", "index", "url"), ("--find", "links"))]
    search = re.compile("|".join(re.escape(word) for word in (*homes, *hosts, *options)).encode())
    # Only absolute paths count: tests/workflow/ is none.
    matches = [
        f"{path.relative_to(REPOSITORY)}: {match[0].decode()}"
        for path in tracked()
        if path.suffix not in (".png", ".safetensors")
        for match in search.finditer(path.read_bytes())
        if not re.search(rb"[\w.}*-]$", path.read_bytes()[: match.start()][-1:])
    ]
    assert matches == []


def test_nothing_large_is_in_the_repository() -> None:
    """The embedded model is the only large file."""
    large = {path.relative_to(REPOSITORY).as_posix() for path in tracked() if path.stat().st_size > 1_000_000}
    assert large <= {"models/shapes-vl/model.safetensors"}


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_begins_with_the_two_commands(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


def test_links_of_readme_and_docs_exist() -> None:
    for page in [*REPOSITORY.glob("README*.md"), *(REPOSITORY / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert re.match(r"https?:", target) or (page.parent / target).exists(), f"{page.name}: {target}"
