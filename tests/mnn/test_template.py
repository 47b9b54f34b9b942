"""Constructs of chat templates that `unsupported` names are those that the engine renders differently."""

from __future__ import annotations

import json

import pytest

from hf2mnn.checkpoint.facts import chat_template
from hf2mnn.core.errors import BundleError
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.template import unsupported
from hf2mnn.mnn.tokenizer import write_tokenizer
from support import SHAPES_VL

CHAT = [
    {"role": "system", "content": "You are."},
    {"role": "user", "content": "Hi there you"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "  Bye x "},
]
LOOP = "{{% for m in messages %}}{}{{% endfor %}}"
DIFFERENT = {
    "{% for m in [] %}x{% else %}none{% endfor %}": "{% for %} with {% else %}",
    LOOP.format("{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}"): "{% break %}",
    LOOP.format("{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"): "{% continue %}",
    LOOP.format("{{ loop.revindex }}"): "loop.revindex",
    LOOP.format("{% if loop.index0 % 2 == 0 %}{{ m.role }}{% endif %}"): "the operator %",
    "{{ 2 * 3 }}": "the operator *",
    "{{ 7 // 2 }}": "the operator //",
    "{{ 2 ** 3 }}": "the operator **",
    "{{ 6 / 4 }}": "the operator /",
    "{{ messages|map(attribute='role')|join(',') }}": "the filter join",
    "{{ messages|map('upper')|list|tojson }}": "the filter map with another filter",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "the filter selectattr",
    "{{ nothing|default('q') }}": "the filter default",
    "{{ '  ab'|trim(' a') }}": "an argument of the filter trim",
    "{{ (messages|first).role }}": "the filter first",
    "{{ (' a ' + 'b').strip() }}": "what follows a literal",
    "{{ messages[1].content.upper() }}": "the method .upper()",
    "{% for k, v in messages[0].items() %}{{ k }}{% endfor %}": "the method .items()",
    "{{ messages[1].content.split(' ', 1)|length }}": "more arguments of the method .split()",
    "{{ dict(a=1)|tojson }}": "the function dict()",
    "{{ 'a' if nothing }}b": "an 'if' expression without 'else'",
    "{{ nothing or 'b' }}": "the value of 'or'",
    "{{ 'x' and 'b' }}": "the value of 'and'",
    "{% if 3 % 2 == 0 %}{{ raise_exception('no') }}{% else %}y{% endif %}": "the operator %",
    "{% set a, b = 1, 2 %}{{ a }}": "a tuple",
    "{% set x %}abc{% endset %}": "{% set %} with a block",
    "{% macro f(a, b='z') %}{{ a }}{{ b }}{% endmacro %}{{ f('q') }}": "defaults of a macro's arguments",
    "{% filter upper %}abc{% endfilter %}": "{% filter %}",
    "{% with a = 1 %}{{ a }}{% endwith %}": "{% with %}",
    "{% raw %}{{ a }}{% endraw %}": "{% raw %}",
    "{{ '\\x41' }}": "an escape in a string",
    "{{ 'a' 'b' }}": "strings side by side",
    "{% if 3 is odd %}y{% endif %}": "the test 'odd'",
    "{% if messages[0]['tools'] is defined %}y{% endif %}n": "before 'is defined'",
    "{% if x is undefined and x == True %}a{% else %}b{% endif %}": "True with a capital letter",
    "{{ 1.5 }}": "a number with a fraction",
    "{% if 1 < 2 < 2 %}y{% else %}n{% endif %}": "a chain of comparisons",
    "  {%+ if true %}x{% endif %}": "{%+ that keeps white space",
    "{# c #}\nx": "the line of a comment",
}
EQUAL = (
    "{{ messages|length }}",
    "{{ messages|map(attribute='role')|list|tojson }}",
    "{{ messages[-1].content.strip() }}{{ messages[1].content.split(' ')[0] }}",
    "{% if messages[0].content.endswith('.') %}y{% endif %}",
    "{{ 'a' if add_generation_prompt else 'c' }}{{ 'a' ~ 1 ~ 'b' }}{{ -1 }}{{ 7 - 2 }}",
    "{% if nothing or 'b' %}y{% endif %}{% if not nothing and messages %}z{% endif %}",
    "{% set ns = namespace(x=1) %}" + LOOP.format("{% set ns.x = ns.x + 1 %}") + "{{ ns.x }}",
    "{% if messages[0].role not in ['user', 'x'] %}y{% else %}n{% endif %}",
    "{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f('q') }}{{ f(a='r') }}",
    "  {{- 'x' -}}  y{#- c -#}\nz{# c #}\n{%- if true %}x{% endif %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "{% for k, v in messages[0]|items %}{{ k }}={{ v }};{% endfor %}",
    "{{ messages[1:]|length }}{{ messages[::-1][0].content }}",
    "{% if messages[0].role is string and messages is iterable and messages is not mapping %}y{% endif %}",
    "{% if messages[0].tools is defined %}y{% endif %}{% if x is none %}z{% endif %}n",
    "{{ {'a': [1, true, none]}|tojson(indent=2) }}{{ 'a b'|capitalize }}{{ nothing|default('') }}",
    "{% generation %}x{% endgeneration %}{{ eos_token }}{% for i in range(3) %}{{ i }}{% endfor %}",
    "{% if 3 % 2 == 0 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].role }}",
    "{{ 'a\\nb\\'c' }}{% if true %}x{% endif %}\n",
)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Renderings of CHAT by the engine and by Jinja, by template."""
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(SHAPES_VL, folder / "tokenizer.mtok")
    (folder / "config.json").write_text('{"tokenizer_file": "tokenizer.mtok"}')
    (folder / "llm_config.json").write_text('{"hidden_size": 8, "layer_nums": 1}')
    for name in ("llm.mnn", "llm.mnn.weight"):
        (folder / name).touch()
    templates = [*DIFFERENT, *EQUAL]
    job = {"config": str(folder / "config.json"), "chat": CHAT, "templates": templates}
    run_worker("render", job | {"result": str(folder / "rendered.json")}, 60)
    return dict(zip(templates, json.loads((folder / "rendered.json").read_text()), strict=True))


def test_a_newline_at_the_end_is_named() -> None:
    """Jinja drops it; `render` takes templates without it, as `chat_template` returns them."""
    assert unsupported("{{ 'x' }}\n") == ["a newline at the end, which stays (line 1)"]


@pytest.mark.parametrize(("template", "named"), DIFFERENT.items(), ids=DIFFERENT.values())
def test_constructs_that_the_engine_renders_differently_are_named(
    template: str, named: str, rendered: dict[str, list[str]]
) -> None:
    engine, jinja = rendered[template]
    assert jinja is not None
    assert engine != jinja
    assert any(named in construct for construct in unsupported(template))


@pytest.mark.parametrize("template", EQUAL)
def test_constructs_that_the_engine_renders_equally_are_not_named(
    template: str, rendered: dict[str, list[str]]
) -> None:
    engine, jinja = rendered[template]
    assert engine == jinja
    assert unsupported(template) == []


def test_lines_are_named_and_the_demo_template_is_supported() -> None:
    assert unsupported("\n{{ 'a' }}\n{% break %}{{ 2 * 3 }}{{ 2 * 4 }}") == [
        "the operator * (line 3)",
        "{% break %} (line 3)",
    ]
    assert unsupported(chat_template(SHAPES_VL)) == []


@pytest.mark.parametrize("template", ["{% if %}", "{{ a", "{% endfor %}", "{{ " + "(" * 5000, "{{ 'a' | }}"])
def test_invalid_templates_are_rejected(template: str) -> None:
    with pytest.raises(BundleError, match="the chat template is"):
        unsupported(template)
