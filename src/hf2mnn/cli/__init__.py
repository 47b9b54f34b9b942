"""Command line: one command for each stage, and the tools around them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from hf2mnn import __version__
from hf2mnn.cli import stages, tools
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.shortage import sentence
from hf2mnn.core.stage import set_command
from hf2mnn.stages import ORDER

app = typer.Typer(
    name="hf2mnn",
    help=(
        "Turn a Hugging Face vision-language model into MNN bundles, and prove each one against PyTorch.\n\n"
        "'snakemake --cores N' runs all stages for the models and variants of config.yaml. Each stage is a command"
        f" too: {', '.join(ORDER)}."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.registered_commands = [*stages.app.registered_commands, *tools.app.registered_commands]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf2mnn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _of_file(error: Exception) -> str | None:
    """A file that is missing, a folder, no folder..., by its name; None for an error that is no file's."""
    if not isinstance(error, OSError):
        return None
    name = error.filename2 or error.filename
    return f"{name}: {error.strerror}" if name else str(error)


class _Stopped(SystemExit):
    """By a signal; the code is 128 and its number."""


def _stop(number: int, _: object) -> None:
    """End as by an exception: children are stopped, and what is half-made is removed."""
    name = signal.Signals(number).name
    os.write(2, f"hf2mnn: stopped ({name}); the same command again starts this stage from its beginning\n".encode())
    raise _Stopped(128 + number)


def _again(number: int, _: object) -> None:
    raise _Stopped(128 + number)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    """Python prints and forgets what is raised while it frees an object. A signal that comes just then (a tracing torch
    frees a great many) must end the stage all the same.
    """
    if not isinstance(lost.exc_value, _Stopped):
        sys.__unraisablehook__(lost)
        return
    number = lost.exc_value.code - 128
    signal.signal(number, _again)  # which says nothing: it has been said
    threading.Timer(0.01, signal.pthread_kill, [threading.main_thread().ident, number]).start()


def main() -> None:
    """Expected failures end with one line on stderr and exit code 1."""
    sys.unraisablehook = _stop_again
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _stop)
    # OpenMP threads that spin while they wait make torch 17 times slower as soon as another job shares the cores
    # (measured: 143 ms a token against 8); its library reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # Bars of transformers and others would fill a log with lines that are drawn over themselves.
        os.environ.setdefault("TQDM_DISABLE", "1")
    set_command(["hf2mnn", *sys.argv[1:]])
    try:
        app()
    except Hf2mnnError as error:
        print(f"hf2mnn: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        said = sentence(error, Path.cwd()) or _of_file(error)
        if said is None:
            raise
        print(f"hf2mnn: {said}", file=sys.stderr)
        sys.exit(1)
