"""Messages for wrong usage of the command line, with the nearest valid command, option or value."""

from __future__ import annotations

import re

import typer

from hf2mnn.core.errors import suggest

FORMER_COMMANDS = {
    "source": "fetch",
    "evaluation": "examples",
    "onnx": "export",
    "mnn": "convert",
    "activations": "calibrate",
    "speed": "benchmark",
    "stages": "resources",
}
"""Commands of earlier versions, and their present names."""
COMMAND = re.compile(r"no such command '(.*)'", re.DOTALL)
CHOICE = re.compile(r"(.*)'([^']*)' is not one of (.*)", re.DOTALL)


def usage_message(error: typer.TyperException) -> str:
    """Return one line for an error of the parser of the command line; "" if it only prints the help."""
    message, context = error.format_message().strip().rstrip("."), error.ctx
    if message.startswith("Usage:") or not context:
        return ""
    message = message[0].lower() + message[1:].replace("Value error, ", "")
    option = getattr(error, "option_name", None)
    if match := COMMAND.match(message):
        message = (
            f"there is no command '{match[1]}'{suggest(match[1], list(context.command.commands), FORMER_COMMANDS)}"
        )
    elif option and message.startswith("no such option"):
        options = [name for parameter in context.command.params for name in parameter.opts]
        message = f"there is no option {option}{suggest(option, options)}"
    elif match := CHOICE.search(message):
        message += suggest(match[2], re.findall("'([^']*)'", match[3]), listed=True)
    return f"{message} (see {context.command_path} --help)"
