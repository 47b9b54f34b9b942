"""The command line as a person meets it: help with an example, and one line where something expected goes wrong.

Commands run in this process through `main`, which is what the installed program calls; one test starts that program.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from hf2mnn import __version__, cli
from hf2mnn.config import config_schema
from hf2mnn.report.compare import COLUMNS
from support import SHAPES_VL, run_cli

COMMANDS = sorted(typer.main.get_command(cli.app).commands)


class Run:
    """Exit code, standard output and standard error of `hf2mnn` with arguments."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd, self.monkeypatch = capfd, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["hf2mnn", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = self.capfd.readouterr()
        return left.value.code, said.out, said.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(capfd, monkeypatch)


def test_every_stage_is_a_command() -> None:
    assert {"source", "reference", "onnx", "mnn", "quantize", "evaluate", "compare", "ask", "table"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_names_only_options_there_are(command: str, run: Run) -> None:
    """An example that cannot be pasted is worse than none."""
    code, out, _ = run(command, "--help")
    assert code == 0
    words = " ".join(out.split())
    assert f"Example: hf2mnn {command} " in words
    described, shown = words.split("Example:")
    for option in (word for word in shown.split() if word.startswith("--")):
        assert option in described, f"{option} is no option of {command}"
    required = [
        parameter
        for parameter in typer.main.get_command(cli.app).commands[command].params
        if parameter.required and parameter.param_type_name == "option"
    ]
    assert [parameter.opts[0] for parameter in required if parameter.opts[0] not in shown] == []


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"hf2mnn {__version__}\n", "")


def test_installed_program_fails_in_one_line() -> None:
    made = run_cli("source", "--path", "nowhere", "--out", "x")
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr == "hf2mnn: there is no checkpoint folder nowhere: give the folder that holds config.json\n"


QUANTIZE = ("quantize", "nowhere", "nowhere", "--out", "x")
COMPARE = ("compare", "m", "nowhere", "--out", "x.csv", "--page", "x.html")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("source", "--out", "x"), "either a local folder or a hub repository"),
        (("source", "--repository", "qwen", "--out", "x"), "owner/name"),
        (("source", "--path", SHAPES_VL, "--out", "a-file"), "a-file"),
        (("source", "--path", SHAPES_VL, "--out", "a-file/below"), "a-file"),
        (("reference", "nowhere", "--evaluation", "nowhere", "--out", "x"), "nowhere has no manifest.json"),
        (("onnx", "nowhere", "--out", "x"), "nowhere has no manifest.json"),
        (("mnn", "nowhere", "--out", "x"), "nowhere has no manifest.json"),
        (("mnn", "a-file", "--out", "x"), "a-file"),
        ((*QUANTIZE, "--decoder", '{"bits": 4}'), "nowhere has no manifest.json"),
        ((*QUANTIZE, "--decoder", '{"bits": 4'), "--decoder: invalid JSON"),
        ((*QUANTIZE, "--decoder", "{}"), "--decoder: bits: this key is missing"),
        ((*QUANTIZE, "--decoder", '{"bits": 4, "blok": 64}'), "--decoder: blok: there is no such key"),
        ((*QUANTIZE, "--decoder", '{"bits": 4, "block": 24}'), "--decoder: block: "),
        ((*QUANTIZE, "--decoder", '{"bits": 4}', "--vision", "[8]"), "--vision: "),
        ((*QUANTIZE, "--decoder", '{"bits": 4}', "--engine", '{"threads": 0}'), "--engine: threads: "),
        (("evaluate", "--reference", "nowhere", "--onnx", "x", "--out", "x"), "nowhere has no manifest.json"),
        ((*COMPARE, "--rows", "[]"), "has no manifest.json"),
        ((*COMPARE, "--rows", "int4"), "--rows"),
        ((*COMPARE, "--rows", "{}"), "--rows"),
        ((*COMPARE, "--rows", '["int4"]'), "--rows"),
        ((*COMPARE, "--rows", '[{"name": "int4"}]'), "--rows"),
        ((*COMPARE, "--rows", '[{"name": "int4", "required": true, "gates": {"top5": 1}}]'), "top5"),
        (("summarize", "nowhere.csv", "--out", "x.csv"), "nowhere.csv"),
        (("table", "nowhere.csv"), "nowhere.csv"),
        (("gates", "a-file"), "a-file"),
        (("ask", "nowhere", "What is this?"), "there is no bundle"),
        (("ask", "a-file", "What is this?"), "there is no bundle"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)
def test_expected_failure_is_one_line(arguments: tuple[object, ...], says: str, run: Run, tmp_path: Path) -> None:
    """Exit code 1 and one line for a person; a traceback is for bugs. And nothing is left behind."""
    Path("a-file").write_text("words\n")
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("hf2mnn: ")
    assert err.count("\n") == 1
    assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_missed_gates_fail_and_name_the_rows(run: Run) -> None:
    """The line that a batch system shows must say which bundle failed, by how much."""
    head = ",".join(COLUMNS) + "\n"
    rows = "m,pytorch,1,0,1,1,1,,,,reference,False,\nm,fp32,1,1,1,1,1,1,1,9,FAIL,{},mean_kld 1 wanted\n"
    Path("summary.csv").write_text(head + rows.format("True"))
    code, _, err = run("gates", "summary.csv", "--out", "gates.txt")
    assert (code, err.count("\n"), "m/fp32: mean_kld 1 wanted" in err) == (1, 1, True)
    assert not Path("gates.txt").exists()
    Path("summary.csv").write_text(head + rows.format("False"))
    assert run("gates", "summary.csv", "--out", "gates.txt") == (0, "", "")
    assert Path("gates.txt").read_text() == "0 required rows keep their gates\n"


def test_schema_is_printed_as_yaml(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert yaml.safe_load(out) == config_schema()


def test_help_loads_nothing_heavy() -> None:
    """Help and a mistyped option must not take the seconds that torch takes to load."""
    program = (
        "import sys, json, runpy\n"
        "sys.argv = ['hf2mnn', '--help']\n"
        "try:\n    from hf2mnn.cli import main; main()\n"
        "except SystemExit:\n    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(made.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "onnx", "onnxruntime", "MNN", "pandas", "numpy", "huggingface_hub"}
