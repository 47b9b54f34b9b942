"""Command line: one command for each stage, and the tools around them."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hf2mnn import __version__
from hf2mnn.cli import tools
from hf2mnn.core.errors import Hf2mnnError, suggest
from hf2mnn.core.files import user_path
from hf2mnn.core.machine_errors import machine_message
from hf2mnn.core.stage import set_command
from hf2mnn.stages import ORDER

FORMER_COMMANDS = {  # present names of the commands of earlier versions
    "source": "fetch",
    "evaluation": "examples",
    "onnx": "export",
    "mnn": "convert",
    "activations": "calibrate",
    "speed": "benchmark",
    "stages": "resources",
}

app = typer.Typer(
    name="hf2mnn",
    help="Turn a Hugging Face vision-language model into MNN bundles, and prove each one against PyTorch.\n\n"
    "'snakemake --cores N' runs all stages for the models and variants of config.yaml. Each stage is a command"
    f" too: {', '.join(ORDER)}.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Command(TyperCommand):
    """Command that expands ~ and ~user at the beginning of paths, which a shell leaves in quotes and after "="."""

    def invoke(self, context: typer.Context) -> Any:
        """Run the command with the expanded paths."""
        context.params = {name: _expanded(value) for name, value in context.params.items()}
        return super().invoke(context)


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    return user_path(value) if isinstance(value, Path) else value


def _add_stage(name: str) -> None:
    """Add `run` of a stage: the paragraphs of its docstring before the examples are the help, these the epilog."""
    run = import_module(f"hf2mnn.stages.{name}").run
    paragraphs = [" ".join(paragraph.split()) for paragraph in inspect.getdoc(run).split("\n\n")]
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("Example: ")]
    summary = paragraphs[: paragraphs.index(examples[0])]
    app.command(name, help="\n\n".join(summary), epilog="\n\n".join(examples))(run)


for stage in ORDER:
    _add_stage(stage)
app.registered_commands += tools.app.registered_commands
for registered in app.registered_commands:
    registered.cls = Command


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hf2mnn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


class _Stopped(SystemExit):
    """Exit by a signal; the code is 128 plus its number."""


def _stop(number: int, _: object) -> None:
    """Exit as by an exception, so that children are stopped and partial folders are removed."""
    name = signal.Signals(number).name
    os.write(2, f"error: stopped by {name}; the same command runs this stage again from its start\n".encode())
    raise _Stopped(128 + number)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    """Raise `_Stopped` once more where Python ignored it.

    Python prints and ignores exceptions that are raised while it frees an object, and a trace in torch frees many.
    """
    if not isinstance(lost.exc_value, _Stopped):
        sys.__unraisablehook__(lost)
        return
    code = lost.exc_value.code

    def stop_silently(*_: object) -> None:
        raise _Stopped(code)

    signal.signal(code - 128, stop_silently)
    threading.Timer(0.01, signal.pthread_kill, [threading.main_thread().ident, code - 128]).start()


def _usage_message(error: typer.TyperException) -> str:
    """Return one line with the nearest valid name for wrong usage; "" if it only prints the help."""
    message, context = error.format_message().strip().rstrip("."), error.ctx
    if message.startswith("Usage:") or not context:
        return ""
    message = message[0].lower() + message[1:].replace("Value error, ", "")
    option = getattr(error, "option_name", None)
    if match := re.match(r"no such command '(.*)'", message, re.DOTALL):
        hint = suggest(match[1], list(context.command.commands), FORMER_COMMANDS)
        message = f"there is no command '{match[1]}'{hint}"
    elif option and message.startswith("no such option"):
        options = [name for parameter in context.command.params for name in parameter.opts]
        message = f"there is no option {option}{suggest(option, options)}"
    elif match := re.search(r"(.*)'([^']*)' is not one of (.*)", message, re.DOTALL):
        message += suggest(match[2], re.findall("'([^']*)'", match[3]), listed=True)
    return f"{message} (see {context.command_path} --help)"


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {Hf2mnnError(message)}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command line; expected failures print one line on stderr and exit with code 1, wrong usage with 2."""
    sys.unraisablehook = _stop_again
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, _stop)
    # Waiting OpenMP threads that spin make torch 17 times slower when another job shares the cores (143 ms a token
    # in place of 8); the OpenMP library reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # Bars of transformers and others would fill a log with overwritten lines.
        os.environ.setdefault("TQDM_DISABLE", "1")
    set_command(["hf2mnn", *sys.argv[1:]])
    try:
        returned = app(prog_name="hf2mnn", standalone_mode=False)  # an exit code, or what a stage returns to Python
        sys.exit(returned if isinstance(returned, int) else 0)
    except typer.TyperException as error:
        if message := _usage_message(error):
            _fail(message, 2)
        error.show()  # the help, if no command is given
        sys.exit(2)
    except Hf2mnnError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = machine_message(error, Path.cwd())
        if message is None and isinstance(error, OSError):  # a file is missing, a folder, or not a folder
            path = error.filename2 or error.filename
            message = f"{path}: {error.strerror}" if path else str(error)
        if message is None:
            raise
        _fail(message)
