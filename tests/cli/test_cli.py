"""The command line as a person meets it: help with an example, and one line where something expected goes wrong.

Commands run in this process through `main`, which is what the installed program calls; one test starts that program.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer
import yaml

from evidence import make_row, write_results
from hf2mnn import __version__, cli
from hf2mnn.config.schema import config_schema
from hf2mnn.report.table import COLUMNS, RowSpec, write_table
from hf2mnn.stages.report import run as make_report
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
    stages = {"source", "evaluation", "reference", "onnx", "mnn", "quantize", "evaluate", "diagnose", "speed", "report"}
    stages |= {"activations", "sensitivity", "plan"}
    others = {"compare", "tune", "ask", "doctor", "verify", "table", "summarize", "gates", "pin", "schema", "stages"}
    others |= {"synth", "toolchain"}
    assert stages | others == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_names_only_options_there_are(command: str, run: Run) -> None:
    """An example that cannot be pasted is worse than none."""
    code, out, _ = run(command, "--help")
    assert code == 0
    words = " ".join(out.split())
    assert f"Example: hf2mnn {command} " in words
    described, *examples = words.split("Example:")
    shown = " ".join(examples)
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
DIAGNOSE = ("diagnose", "--reference", "nowhere", "--onnx", "x", "--base", "x", "--bundle", "x", "--out", "x")
SPEED = ("speed", "--out", "x", "--baseline", "int4")
REPORT = ("report", "m", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("source", "--out", "x"), "either a local folder or a hub repository"),
        (("source", "--repository", "qwen", "--out", "x"), "owner/name"),
        (("source", "--pin", "nowhere.json", "--out", "x"), "there is no pin nowhere.json"),
        (("source", "--pin", "a-file", "--out", "x"), "a-file is not a pin"),
        (("pin", "qwen"), "owner/name"),
        (("source", "--path", SHAPES_VL, "--out", "a-file"), "a-file"),
        (("source", "--path", SHAPES_VL, "--out", "a-file/below"), "a-file"),
        (("reference", "nowhere", "--evaluation", "nowhere", "--out", "x"), "nowhere has no manifest.json"),
        (("evaluation", "--dataset", "gqa", "--out", "x"), "no loader for 'gqa'"),
        (("evaluation", "--dataset", "docvqa", "--path", "nowhere", "--out", "x"), "no folder nowhere"),
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
        (DIAGNOSE, "nowhere has no manifest.json"),
        ((*SPEED, "--bundle", "int4=nowhere"), "nowhere"),
        ((*SPEED, "--bundle", "nowhere"), "give NAME=FOLDER"),
        ((*SPEED, "--bundle", "int4=a", "--bundle", "int4=b"), "'int4' is given twice"),
        ((*SPEED, "--bundle", "fp16=nowhere"), "there are fp16"),
        (("tune", "nowhere"), "nowhere"),
        ((*REPORT, "--rows", "[]"), "has no manifest.json"),
        ((*REPORT, "--rows", "int4"), "--rows"),
        ((*REPORT, "--rows", "{}"), "--rows"),
        ((*REPORT, "--rows", '["int4"]'), "--rows"),
        ((*REPORT, "--rows", '[{"name": "int4"}]'), "--rows"),
        ((*REPORT, "--rows", '[{"name": "int4", "required": true, "gates": {"top5": 1}}]'), "top5"),
        (("compare", "nowhere"), "run 'hf2mnn report' first"),
        (("compare", "--layers", "a-file"), "a-file"),
        (("summarize", "nowhere.csv", "--out", "x.csv"), "nowhere.csv"),
        (("table", "nowhere.csv"), "nowhere.csv"),
        (("gates", "a-file"), "a-file"),
        (("ask", "nowhere", "What is this?"), "there is no bundle"),
        (("ask", "a-file", "What is this?"), "there is no bundle"),
        (("ask", "a-file"), "either a prompt or --conversation"),
        (("ask", "a-file", "What is this?", "--conversation", "a-file"), "either a prompt or --conversation"),
        (("ask", "a-file", "--conversation", "a-file", "--system", "Be brief."), "leave out --image and --system"),
        (("ask", "a-file", "--conversation", "a-file"), "a-file is not a conversation"),
        (("ask", "a-file", "--conversation", "nowhere.json"), "there is no conversation nowhere.json"),
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
    row = {"model": "m", "variant": "fp32", "verdict": "FAIL", "reason": "mean_kld 1 wanted", "cause": "norm is zero"}
    frame = pd.DataFrame([row | {"required": True}], columns=COLUMNS)
    write_table(frame, Path("summary.csv"))
    code, _, err = run("gates", "summary.csv", "--out", "gates.txt")
    assert (code, err.count("\n"), "m/fp32: mean_kld 1 wanted (cause: norm is zero)" in err) == (1, 1, True)
    assert not Path("gates.txt").exists()
    write_table(frame.assign(required=False), Path("summary.csv"))
    assert run("gates", "summary.csv", "--out", "gates.txt") == (0, "", "")
    assert Path("gates.txt").read_text() == "0 required rows keep their gates\n"


def test_compare_takes_the_variants_that_there_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf2mnn.report.report.render_page", lambda *_: "")
    folder = write_results(Path("results/m"), make_row("fp16"), make_row("int4", ("norm is zero",)))
    make_report("m", folder, [RowSpec("fp16", True, {}), RowSpec("int4", True, {})])
    code, out, err = run("compare", folder, "--variant", "int3")
    assert (code, out, err) == (1, "", "hf2mnn: results/m has no int3; it has fp16, int4\n")
    code, out, _ = run("compare", folder, folder, "--layers", "--variant", "int4")
    assert code == 0
    assert "int4, cause: norm is zero" in out and "int4: every operator stays within its tolerance" in out
    assert "what changed beyond its uncertainty: nothing" in out
    assert "fp16" not in out


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


FREEING = """
import signal, sys, time
from hf2mnn import cli

class Slow:
    def __del__(self):
        print("freeing", flush=True)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            pass

def work():
    Slow()
    time.sleep(60)

cli.app = work
cli.main()
"""


def test_a_signal_stops_a_stage_even_while_an_object_is_freed() -> None:
    """Python only prints what is raised there, and goes on: seen once in fifty kills of the onnx stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", FREEING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "freeing\n"
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.startswith("hf2mnn: stopped (SIGTERM)")
    assert said.count("\n") == 1
