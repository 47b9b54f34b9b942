"""Chat templates, and what the Jinja of MNN's engine makes of them.

The engine has an interpreter of its own (`tokenizer/jinja.hpp` of MNN 3.6.1, of github.com/wangzhaode/jinja.cpp). What
it does not know it passes over without a word, so a template renders, and renders something else. Each construct named
here was rendered by both (tests/mnn/test_template.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hf2mnn.core.errors import BundleError
from hf2mnn.core.untrusted import TEMPLATE_SECONDS, at_most

FUNCTIONS = {"range", "namespace", "strftime_now"}
PASSED_OVER = {"raise_exception"}
"""Functions that the engine does not run and that a right conversation never reaches."""
METHODS = {"startswith": 1, "endswith": 1, "split": 1, "lstrip": 1, "rstrip": 1, "strip": 1, "replace": 2}
"""Of strings, and how many arguments are read."""
FILTERS = {"tojson", "string", "capitalize", "length", "trim", "items", "lower", "upper", "map"}
NOTHING_LOST = {"safe", "list"}
"""Filters that the engine does not know, and whose value passed on is what they would give in a chat template."""
TESTS = {"defined", "undefined", "none", "boolean", "string", "number", "sequence", "iterable", "mapping", "true"}
TESTS |= {"false"}
LOOP = {"index", "index0", "first", "last", "length"}
ESCAPES = "nrt\\\"'bf"
STATEMENTS = {
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
}
OPERATORS = {nodes.Mul: "*", nodes.Div: "/", nodes.FloorDiv: "//", nodes.Mod: "%", nodes.Pow: "**"}
CHAIN = (nodes.Getattr, nodes.Getitem, nodes.Call)


class Generation(Extension):
    """transformers' mark around what the model has said. The engine passes over the tags and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def environment(kind: type[Environment] = Environment) -> Environment:
    """Jinja as transformers sets it up for chat templates."""
    made = kind(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return made


def render(template: str, chat: list[dict[str, Any]], tokens: dict[str, str]) -> str | None:
    """A chat as transformers renders it; None where the template refuses it. A stranger's template runs no code, and no
    longer than TEMPLATE_SECONDS.

    `tokens` are eos_token and bos_token, those that there are.
    """
    sandbox = environment(ImmutableSandboxedEnvironment)
    try:
        with at_most(TEMPLATE_SECONDS):
            return sandbox.from_string(template).render(messages=chat, add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError, TimeoutError):
        return None


def _called(node: nodes.Call, macros: set[str]) -> str | None:
    if node.dyn_args or node.dyn_kwargs:
        return "a call with * or **"
    if isinstance(node.node, nodes.Name):
        known = node.node.name in FUNCTIONS | PASSED_OVER | macros
        return None if known else f"the function {node.node.name}()"
    if isinstance(node.node, nodes.Getattr):
        name = node.node.attr
        if name not in METHODS:
            return f"the method .{name}()"
        if node.kwargs or len(node.args) > METHODS[name]:
            return f"more arguments of the method .{name}()"
    return None


def _filtered(node: nodes.Filter) -> str | None:
    if node.name in ("default", "d"):
        # What is undefined prints as nothing and is no truth, so that a default of this kind is not missed.
        empty = not node.args or (isinstance(node.args[0], nodes.Const) and not node.args[0].value)
        return None if empty else "the filter default"
    if node.name not in FILTERS | NOTHING_LOST:
        return f"the filter {node.name}"
    if node.name == "map" and [argument.key for argument in node.kwargs] != ["attribute"]:
        return "the filter map with another filter"
    return "an argument of the filter trim" if node.name == "trim" and node.args else None


def _construct(node: nodes.Node, tested: bool, macros: set[str]) -> str | None:
    """Its name, where the engine does not run it. `tested`: only whether it is true counts."""
    match node:
        case nodes.Call():
            found = _called(node, macros)
        case nodes.Filter():
            found = _filtered(node)
        case nodes.Test():
            found = f"the test '{node.name}'" if node.name not in TESTS or node.args else None
            if node.name in ("defined", "undefined") and isinstance(node.node, nodes.Getitem):
                # A key that is not there gives the empty string, which is defined; an attribute gives what is not.
                found = f"['...'] before 'is {node.name}', where it runs .name"
        case nodes.For():
            found = "{% for %} with {% else %}" if node.else_ else "a recursive {% for %}" if node.recursive else None
        case nodes.Macro():
            found = "defaults of a macro's arguments" if node.defaults else None
        case nodes.CondExpr():
            found = None if node.expr2 else "an 'if' expression without 'else'"
        case nodes.And() | nodes.Or():
            # It gives true or false, where Jinja gives one of the two sides.
            found = None if tested else f"the value of '{type(node).__name__.lower()}'"
        case nodes.Tuple():
            found = "a tuple"
        case nodes.Const():
            found = "a number with a fraction" if isinstance(node.value, float) else None
        case nodes.Compare():
            found = "a chain of comparisons" if len(node.ops) > 1 else None
        case nodes.Getattr(node=nodes.Name(name="loop")) if node.attr not in LOOP:
            found = f"loop.{node.attr}"
        case _:
            found = STATEMENTS.get(type(node))
            if type(node) in OPERATORS:
                found = f"the operator {OPERATORS[type(node)]}"
    if found is None and isinstance(node, CHAIN) and not isinstance(node.node, (nodes.Name, *CHAIN)):
        return "what follows a literal, parentheses or a filter (an attribute, an index or a method)"
    return found


def _children(node: nodes.Node, tested: bool) -> Iterator[tuple[nodes.Node, bool]]:
    """What is inside, and whether only its truth counts."""
    for field, value in node.iter_fields():
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, nodes.Node):
                continue
            # The targets of a loop are a tuple that the engine does read.
            if isinstance(node, nodes.For) and field == "target":
                continue
            inside = isinstance(node, (nodes.And, nodes.Or, nodes.Not))
            yield child, inside or (field == "test" and isinstance(node, (nodes.If, nodes.CondExpr, nodes.For)))


def _only_refuses(node: nodes.Node) -> bool:
    """An {% if %} around nothing but raise_exception, which a right conversation passes by, whatever its condition."""
    if not isinstance(node, nodes.If) or node.elif_ or node.else_:
        return False
    parts = [part for output in node.body for part in getattr(output, "nodes", [output])]
    shown = [part for part in parts if not (isinstance(part, nodes.TemplateData) and not part.data.strip())]
    calls = [part.node for part in shown if isinstance(part, nodes.Call)]
    return bool(shown) and [getattr(call, "name", "") for call in calls] == ["raise_exception"] * len(shown)


def _in_tree(node: nodes.Node, tested: bool, macros: set[str]) -> Iterator[tuple[int, str]]:
    if _only_refuses(node):
        return
    found = _construct(node, tested, macros)
    if found:
        yield node.lineno, found
    for child, truth in _children(node, tested):
        yield from _in_tree(child, truth, macros)


def _in_text(template: str) -> Iterator[tuple[int, str]]:
    """What the tree no longer shows."""
    tokens = [token for token in environment().lex(template) if token[1] != "whitespace"]
    for at, (line, kind, value) in enumerate(tokens):
        _, next_kind, following = tokens[at + 1] if at + 1 < len(tokens) else (0, "", "")
        if kind == "raw_begin":
            yield line, "{% raw %}"
        elif kind == "string" and re.search(rf"\\[^{re.escape(ESCAPES)}]", value.replace("\\\\", "")):
            yield line, "an escape in a string"
        elif kind == next_kind == "string":
            yield line, "strings side by side"
        elif kind in ("block_begin", "variable_begin") and value.endswith("+"):
            yield line, f"{value} that keeps white space"
        elif kind == "name" and value in ("True", "False", "None"):
            yield line, f"{value} with a capital letter"
        elif kind == "comment_end" and value.startswith("#") and value.endswith("\n") and not following.endswith("-"):
            yield line, "the line of a comment, which stays as an empty line"
    if template.endswith("\n") and not template.endswith(("%}\n", "-}}\n", "#}\n")):
        yield template.count("\n"), "a newline at the end, which stays"


def unsupported(template: str) -> list[str]:
    """Constructs that the engine renders otherwise than transformers, each with the line where it comes first.

    Raises:
        BundleError: it is no Jinja template.
    """
    try:
        tree = environment().parse(template)
        macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        found = [*_in_tree(tree, False, macros), *_in_text(template)]
    except TemplateSyntaxError as error:
        raise BundleError(
            f"the chat template is no Jinja ({error.message}, line {error.lineno}); take the checkpoint's"
        ) from None
    except RecursionError:
        raise BundleError("the chat template is nested too deep to be one; take the checkpoint's") from None
    first: dict[str, int] = {}
    for line, what in sorted(found):
        first.setdefault(what, line)
    return [f"{what} (line {line})" for what, line in first.items()]


def engine_messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Messages as the engine's binding takes them whole: it passes on nothing but texts under `role` and `content`, and
    the engine puts what a message of the role `json` holds in its place.
    """
    return [{"role": "json", "content": json.dumps(message, ensure_ascii=False)} for message in messages]
