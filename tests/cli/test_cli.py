"""Command line: help with an example, and one line for an expected failure.

Commands run in this process through `main`, which the installed program calls; one test starts that program.
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

from evidence import make_variant, write_results
from hf2mnn import __version__, cli
from hf2mnn.config.schema import Config
from hf2mnn.report.table import COLUMNS, VariantSpec, write_table
from hf2mnn.stages import ORDER
from hf2mnn.stages.report import make_report
from support import SHAPES_VL, run_cli

COMMANDS = sorted(typer.main.get_command(cli.app).commands)


class Run:
    """Run `hf2mnn` with arguments and return exit code, standard output and standard error."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd, self.monkeypatch = capfd, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["hf2mnn", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main()
        printed = self.capfd.readouterr()
        return exited.value.code or 0, printed.out, printed.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(capfd, monkeypatch)


def test_commands_are_the_stages_and_the_tools() -> None:
    tools = {"ask", "doctor", "gates", "pin", "resources", "schema", "summarize", "table", "toolchain"}
    assert {*ORDER, *tools, "tune", "verify"} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_with_existing_options(command: str, run: Run) -> None:
    """An example must run as it is, with all required options."""
    code, out, _ = run(command, "--help")
    assert code == 0
    words = " ".join(out.split())
    assert f"Example: hf2mnn {command} " in words
    described, *examples = words.split("Example:")
    example = " ".join(examples)
    for option in (word for word in example.split() if word.startswith("--")):
        assert option in described, f"{option} is no option of {command}"
    required = [
        parameter
        for parameter in typer.main.get_command(cli.app).commands[command].params
        if parameter.required and parameter.param_type_name == "option"
    ]
    assert [parameter.opts[0] for parameter in required if parameter.opts[0] not in example] == []


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"hf2mnn {__version__}\n", "")


def test_installed_program_fails_in_one_line() -> None:
    done = run_cli("fetch", "--path", "nowhere", "--out", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no checkpoint folder nowhere: give the folder that holds config.json\n"


QUANTIZE = ("quantize", "nowhere", "nowhere", "--out", "x")
DIAGNOSE = ("diagnose", "--reference", "nowhere", "--onnx", "x", "--baseline", "x", "--bundle", "x", "--out", "x")
BENCHMARK = ("benchmark", "--out", "x", "--baseline", "int4")
REPORT = ("report", "m", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fetch", "--out", "x"), "exactly one of --path"),
        (("fetch", "--repository", "qwen", "--out", "x"), "owner/name"),
        (("fetch", "--pin", "nowhere.json", "--out", "x"), "no pin nowhere.json"),
        (("fetch", "--pin", "a-file", "--out", "x"), "a-file is not a pin"),
        (("pin", "qwen"), "owner/name"),
        (("fetch", "--path", SHAPES_VL, "--out", "a-file"), "a-file"),
        (("fetch", "--path", SHAPES_VL, "--out", "a-file/below"), "a-file"),
        (("reference", "nowhere", "--examples", "nowhere", "--out", "x"), "nowhere is not an evaluation set"),
        (("examples", "--out", "x"), "give --path FOLDER, --dataset NAME, or both"),
        (("examples", "--dataset", "docvqa", "--path", "nowhere", "--out", "x"), "no folder nowhere"),
        (("export", "nowhere", "--out", "x"), "nowhere has no manifest.json"),
        (("convert", "nowhere", "--out", "x"), "nowhere has no manifest.json"),
        (("convert", "a-file", "--out", "x"), "a-file"),
        ((*QUANTIZE, "--decoder", '{"bits": 4}'), "nowhere has no manifest.json"),
        ((*QUANTIZE, "--decoder", '{"bits": 4'), "--decoder: invalid JSON"),
        ((*QUANTIZE, "--decoder", "{}"), "--decoder: bits: this key is missing"),
        (
            (*QUANTIZE, "--decoder", '{"bits": 4, "blok": 64}'),
            "--decoder: blok: there is no such key; did you mean 'block'?",
        ),
        ((*QUANTIZE, "--decoder", '{"bits": 4, "block": 24}'), "--decoder: block: "),
        ((*QUANTIZE, "--decoder", '{"bits": 4}', "--vision", "[8]"), "--vision: "),
        ((*QUANTIZE, "--decoder", '{"bits": 4}', "--engine", '{"threads": 0}'), "--engine: threads: "),
        (("evaluate", "--reference", "nowhere", "--onnx", "x", "--out", "x"), "nowhere has no manifest.json"),
        (DIAGNOSE, "there is no bundle"),
        ((*BENCHMARK, "--bundle", "int4=nowhere"), "nowhere"),
        ((*BENCHMARK, "--bundle", "nowhere"), "give NAME=FOLDER"),
        ((*BENCHMARK, "--bundle", "int4=a", "--bundle", "int4=b"), "'int4' is given twice"),
        ((*BENCHMARK, "--bundle", "fp16=nowhere"), "there are fp16"),
        (("tune", "nowhere"), "nowhere"),
        ((*REPORT, "--variants", "[]"), "has no manifest.json"),
        ((*REPORT, "--variants", "int4"), "--variants"),
        ((*REPORT, "--variants", "{}"), "--variants"),
        ((*REPORT, "--variants", '["int4"]'), "--variants"),
        ((*REPORT, "--variants", '[{"name": "int4"}]'), "--variants"),
        ((*REPORT, "--variants", '[{"name": "int4", "required": true, "gates": {"top5": 1}}]'), "top5"),
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
def test_expected_failure_is_one_line(arguments: tuple[object, ...], message: str, run: Run, tmp_path: Path) -> None:
    """Exit code 1, one line without a traceback, and no file left."""
    Path("a-file").write_text("words\n")
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fetchh",), "there is no command 'fetchh'; did you mean 'fetch'?"),
        (("quant",), "there is no command 'quant'; did you mean 'quantize'?"),
        (("xyz",), "there is no command 'xyz'; valid are fetch, examples, reference"),
        (("fetch", "--outt", "x"), "there is no option --outt; did you mean '--out'?"),
        (("fetch", "--hub", "hugingface", "--out", "x"), "'modelscope'; did you mean 'huggingface'?"),
        (("examples", "--dataset", "docqva", "--out", "x"), "did you mean 'docvqa'?"),
        (("reference", "x", "--examples", "x", "--out", "x", "--weights", "mappd"), "did you mean 'mapped'?"),
        (("export", "x"), "missing option '--out'"),
        (("reference", "x", "--examples", "x", "--out", "x", "--threads", "many"), "invalid value for '--threads'"),
        (("source", "--path", "x", "--out", "x"), "there is no command 'source'; it is called 'fetch' now"),
        (("evaluation",), "it is called 'examples' now"),
        (("onnx",), "it is called 'export' now"),
        (("mnn",), "it is called 'convert' now"),
        (("activations",), "it is called 'calibrate' now"),
        (("speed",), "it is called 'benchmark' now"),
        (("stages",), "it is called 'resources' now"),
        (("bad\n\x1b[2J",), "there is no command 'bad\\n\\x1b[2J'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_with_the_nearest_name(arguments: tuple[str, ...], message: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and err.endswith(" --help)\n")
    assert message in err


def test_no_command_prints_the_help(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and not out and err.startswith("Usage: hf2mnn ") and "Commands:" in err


def test_missed_gates_fail_with_the_variants(run: Run) -> None:
    """The line that a batch system shows has the bundle and its figures."""
    row = {"model": "m", "variant": "fp32", "verdict": "FAIL", "reason": "mean_kld 1 wanted", "cause": "norm is zero"}
    frame = pd.DataFrame([row | {"required": True}], columns=COLUMNS)
    write_table(frame, Path("summary.csv"))
    code, _, err = run("gates", "summary.csv", "--out", "gates.txt")
    assert (code, err.count("\n"), "m/fp32: mean_kld 1 wanted (cause: norm is zero)" in err) == (1, 1, True)
    assert not Path("gates.txt").exists()
    write_table(frame.assign(required=False), Path("summary.csv"))
    assert run("gates", "summary.csv", "--out", "gates.txt") == (0, "", "")
    assert Path("gates.txt").read_text() == "0 required variants pass their gates\n"


def test_compare_shows_the_chosen_variants(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf2mnn.report.page.render_page", lambda *_: "")
    folder = write_results(Path("results/m"), make_variant("fp16"), make_variant("int4", ("norm is zero",)))
    make_report("m", folder, [VariantSpec("fp16", True, {}), VariantSpec("int4", True, {})])
    code, out, err = run("compare", folder, "--variant", "int3")
    assert (code, out, err) == (1, "", "error: results/m has no int3; it has fp16, int4; did you mean 'int4'?\n")
    code, out, _ = run("compare", folder, folder, "--layers", "--variant", "int4")
    assert code == 0
    assert "int4, cause: norm is zero" in out and "int4: all operators are within tolerance" in out
    assert "Changes beyond uncertainty, results/m to results/m: none" in out
    assert "fp16" not in out


def test_schema_is_printed_as_yaml(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert yaml.safe_load(out) == Config.model_json_schema()


def test_help_loads_nothing_heavy() -> None:
    """Help and a mistyped option must not take the seconds that torch needs to load."""
    program = (
        "import sys, json, runpy\n"
        "sys.argv = ['hf2mnn', '--help']\n"
        "try:\n    from hf2mnn.cli import main; main()\n"
        "except SystemExit:\n    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "onnx", "onnxruntime", "MNN", "pandas", "numpy", "huggingface_hub"}


FREEING = """
import signal, sys, time
from hf2mnn import cli

class Slow:
    def __del__(self):
        print("freeing", flush=True)
        for _ in range(200):
            time.sleep(0.005)

def work(**_):
    Slow()
    time.sleep(60)

cli.app = work
cli.main()
"""


def test_a_signal_stops_a_stage_even_while_an_object_is_freed() -> None:
    """Python ignores an exception that is raised there, which happened in one of fifty kills of the export stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", FREEING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "freeing\n"
    process.terminate()
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert printed.startswith("error: stopped by SIGTERM; ")
    assert printed.count("\n") == 1


def test_paths_of_a_home_directory_are_expanded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ~ after "=" and in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    record = {"id": "a", "messages": [{"role": "user", "content": "~/x"}]}
    (tmp_path / "set" / "examples.jsonl").write_text(json.dumps(record))
    assert run("examples", "--path=~/set", "--out", "~/made")[0] == 0
    assert "~/x" in (tmp_path / "made" / "examples.jsonl").read_text()
    assert run("verify", "~/made", "~/made")[0] == 0
    code, _, message = run("benchmark", "--bundle", "a=~/nowhere", "--baseline", "a", "--out", "x")
    assert code == 1 and f"there is no bundle {tmp_path}/nowhere" in message


def test_a_missing_package_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, message = run("examples", "--dataset", "docvqa", "--out", "x")
    assert (code, message.count("\n")) == (1, 1)
    assert (
        message.startswith("error: the environment ") and "has no Python module datasets: run 'make setup'" in message
    )
