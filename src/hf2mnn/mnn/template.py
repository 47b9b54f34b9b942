"""Chat templates: rendering as in transformers, and constructs that the Jinja of MNN's engine renders differently.

The engine's own interpreter (`tokenizer/jinja.hpp` of MNN 3.6.1) ignores constructs that it does not know, so a
template renders without an error to another text. tests/mnn/test_template.py renders each construct with both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from hf2mnn.core.errors import BundleError
from hf2mnn.core.untrusted import TEMPLATE_SECONDS, time_limited
from hf2mnn.mnn.engine_facts import Jinja

UNSUPPORTED = {
    nodes.AssignBlock: "{% set %} with a block",
    nodes.Break: "{% break %}",
    nodes.CallBlock: "{% call %}",
    nodes.Continue: "{% continue %}",
    nodes.FilterBlock: "{% filter %}",
    nodes.With: "{% with %}",
    nodes.Block: "{% block %}",
    nodes.Extends: "{% extends %}",
    nodes.Include: "{% include %}",
    nodes.Import: "{% import %}",
    nodes.FromImport: "{% from %}",
    nodes.ScopedEvalContextModifier: "{% autoescape %}",
    nodes.Tuple: "a tuple",
    nodes.Mul: "the operator *",
    nodes.Div: "the operator /",
    nodes.FloorDiv: "the operator //",
    nodes.Mod: "the operator %",
    nodes.Pow: "the operator **",
}
"""Names of nodes that the engine does not run."""
CHAIN = (nodes.Getattr, nodes.Getitem, nodes.Call)


class Generation(Extension):
    """{% generation %} of transformers, around answers of the model; the engine ignores the tags."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements inside the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> Environment:
    """Return a Jinja environment that parses chat templates as that of transformers does."""
    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation])


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without the keys whose value is None, as transformers' `apply_chat_template` renders them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def render(
    template: str, chat: list[dict[str, Any]], tokens: dict[str, str], tools: list[dict[str, Any]] | None = None
) -> str | None:
    """Render a chat as transformers does, with `tokens` (eos_token and bos_token); None if the template rejects it.

    Jinja drops the newline at a template's end, which `chat_template` has dropped already. The template is untrusted:
    transformers runs it in a sandbox, and here for at most TEMPLATE_SECONDS.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes most of a second

    try:
        with time_limited(TEMPLATE_SECONDS):
            chats = [without_nulls(chat)]
            (text,), _ = render_jinja_template(
                chats, tools, chat_template=template + "\n", add_generation_prompt=True, **tokens
            )
            return text
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError, TimeoutError):
        return None


def _call(node: nodes.Call, macros: set[str]) -> str | None:
    if node.dyn_args or node.dyn_kwargs:
        return "a call with * or **"
    if isinstance(node.node, nodes.Name):
        known = node.node.name in Jinja.FUNCTIONS | Jinja.IGNORED_FUNCTIONS | macros
        return None if known else f"the function {node.node.name}()"
    if isinstance(node.node, nodes.Getattr):
        name = node.node.attr
        if name not in Jinja.METHODS:
            return f"the method .{name}()"
        if node.kwargs or len(node.args) > Jinja.METHODS[name]:
            return f"more arguments of the method .{name}()"
    return None


def _filter(node: nodes.Filter) -> str | None:
    if node.name in ("default", "d"):
        # The engine prints undefined values as nothing and takes them as false, like an empty default.
        empty = not node.args or (isinstance(node.args[0], nodes.Const) and not node.args[0].value)
        return None if empty else "the filter default"
    if node.name not in Jinja.FILTERS | Jinja.IDENTITY_FILTERS:
        return f"the filter {node.name}"
    if node.name == "map" and [argument.key for argument in node.kwargs] != ["attribute"]:
        return "the filter map with another filter"
    return "an argument of the filter trim" if node.name == "trim" and node.args else None


def _construct(node: nodes.Node, condition: bool, macros: set[str]) -> str | None:
    """Return the name of a construct that the engine renders differently; with `condition` only its truth matters."""
    match node:
        case nodes.Call():
            name = _call(node, macros)
        case nodes.Filter():
            name = _filter(node)
        case nodes.Test():
            name = f"the test '{node.name}'" if node.name not in Jinja.TESTS or node.args else None
            if node.name in ("defined", "undefined") and isinstance(node.node, nodes.Getitem):
                # A missing key gives the empty string, which is defined; a missing attribute is undefined.
                name = f"['...'] before 'is {node.name}', where it runs .name"
        case nodes.For():
            name = "{% for %} with {% else %}" if node.else_ else "a recursive {% for %}" if node.recursive else None
        case nodes.Macro():
            name = "defaults of a macro's arguments" if node.defaults else None
        case nodes.CondExpr():
            name = None if node.expr2 else "an 'if' expression without 'else'"
        case nodes.And() | nodes.Or():
            # The engine returns true or false, Jinja one of the two operands.
            name = None if condition else f"the value of '{type(node).__name__.lower()}'"
        case nodes.Const():
            name = "a number with a fraction" if isinstance(node.value, float) else None
        case nodes.Compare():
            name = "a chain of comparisons" if len(node.ops) > 1 else None
        case nodes.Getattr(node=nodes.Name(name="loop")) if node.attr not in Jinja.LOOP:
            name = f"loop.{node.attr}"
        case _:
            name = UNSUPPORTED.get(type(node))
    if name is None and isinstance(node, CHAIN) and not isinstance(node.node, (nodes.Name, *CHAIN)):
        return "what follows a literal, parentheses or a filter (an attribute, an index or a method)"
    return name


def _only_raises(node: nodes.Node) -> bool:
    """Return whether a node is an {% if %} around raise_exception alone, which no valid conversation enters."""
    if not isinstance(node, nodes.If) or node.elif_ or node.else_:
        return False
    parts = [part for output in node.body for part in getattr(output, "nodes", [output])]
    printed = [part for part in parts if not (isinstance(part, nodes.TemplateData) and not part.data.strip())]
    calls = [part.node for part in printed if isinstance(part, nodes.Call)]
    return bool(printed) and [getattr(call, "name", "") for call in calls] == ["raise_exception"] * len(printed)


def _in_tree(node: nodes.Node, condition: bool, macros: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of constructs in the syntax tree."""
    if _only_raises(node):
        return
    if name := _construct(node, condition, macros):
        yield node.lineno, name
    # The targets of a loop are a tuple that the engine does read.
    for child in node.iter_child_nodes(exclude=["target"] if isinstance(node, nodes.For) else []):
        tested = isinstance(node, (nodes.And, nodes.Or, nodes.Not)) or child is getattr(node, "test", None)
        yield from _in_tree(child, tested, macros)


def _in_tokens(template: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of constructs that the syntax tree does not show."""
    tokens = [token for token in environment().lex(template) if token[1] != "whitespace"]
    for (line, kind, value), (_, next_kind, next_value) in pairwise([*tokens, (0, "", "")]):
        if kind == "raw_begin":
            yield line, "{% raw %}"
        elif kind == "string" and re.search(rf"\\[^{re.escape(Jinja.ESCAPES)}]", value.replace("\\\\", "")):
            yield line, "an escape in a string"
        elif kind == next_kind == "string":
            yield line, "strings side by side"
        elif kind in ("block_begin", "variable_begin") and value.endswith("+"):
            yield line, f"{value} that keeps white space"
        elif kind == "name" and value in ("True", "False", "None"):
            yield line, f"{value} with a capital letter"
        elif kind == "comment_end" and value.startswith("#") and value.endswith("\n") and not next_value.endswith("-"):
            yield line, "the line of a comment, which stays as an empty line"
    if template.endswith("\n") and not template.endswith(("%}\n", "-}}\n", "#}\n")):
        yield template.count("\n"), "a newline at the end, which stays"


def unsupported(template: str) -> list[str]:
    """Return constructs that the engine renders differently, with first lines; raise BundleError if it is no Jinja."""
    try:
        tree = environment().parse(template)
        macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        constructs = [*_in_tree(tree, False, macros), *_in_tokens(template)]
    except TemplateSyntaxError as error:
        raise BundleError(
            f"the chat template is not valid Jinja ({error.message}, line {error.lineno}); use that of the checkpoint"
        ) from None
    except RecursionError:
        raise BundleError("the chat template is nested too deeply; use that of the checkpoint") from None
    first: dict[str, int] = {}
    for line, name in sorted(constructs):
        first.setdefault(name, line)
    return [f"{name} (line {line})" for name, line in first.items()]


def engine_messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return messages in a form in which the engine's binding, which passes on texts alone, keeps them.

    The engine replaces a message of the role `json` by the message in its content.
    """
    contents = [json.dumps(message, ensure_ascii=False) for message in without_nulls(messages)]
    return [{"role": "json", "content": content} for content in contents]
