"""The template sandbox: what templates rely on works, what would reach outside does not."""

import pytest
from jinja2 import TemplateError

from halfbyte.data.jinja import MARK_BEGIN, MARK_END, TemplateRefusal, compile_template, plain

TODAY = "2024-07-26"


def render(source: str, **values: object) -> str:
    return compile_template(source, TODAY).render(**values)


def test_what_templates_rely_on() -> None:
    assert render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"
    assert render("{{ x | tojson }}", x={"a": "<é'"}) == '{"a": "<é\'"}'
    assert render("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert render("{% set ns = namespace(a=1) %}{% for i in [1] %}{% set ns.a = 2 %}{% endfor %}{{ ns.a }}") == "2"
    assert render("{{ dict(a=1).a }}") == "1"
    assert render("  {% if true %}\na\n{% endif %}\n") == "a\n"


def test_generation_blocks_become_marks() -> None:
    found = render("a{%- generation -%} {{ 'b' }} {%- endgeneration -%}\nc")
    assert found == f"a{MARK_BEGIN}b{MARK_END}c"


def test_raise_exception_is_the_templates_refusal() -> None:
    with pytest.raises(TemplateRefusal, match="no tools"):
        render("{{ raise_exception('no tools') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ '%s' | format(''.__class__) | attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_reaches_outside(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    try:
        found = render(source, messages=messages)
    except (TemplateError, TypeError, OverflowError):
        pass
    else:
        assert found == "", found  # an undefined value prints nothing
    assert messages == [{"role": "user", "content": "x"}]


def test_templates_see_plain_values_only() -> None:
    class Text(str):
        secret = "reachable"

    found = plain({"a": Text("x"), 1: (Text("y"), 2.5, None, True), "o": object})
    assert type(found["a"]) is str
    assert found["1"] == ["y", 2.5, None, True]
    assert type(found["o"]) is str
