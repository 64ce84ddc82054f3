"""The template language compared with Hugging Face's, and templates made to hang, fill memory or escape."""

import resource
import sys
import threading
import time
import warnings
from typing import Any

import pytest

from qchat.core.errors import TemplateError
from qchat.core.text.jinja_sandbox import Program
from tests.golden.make_templates import QUESTION, THOUGHTFUL, needs_transformers, transformers_rendering


def shown(source: str, **variables: Any) -> str:
    return Program(source, "chat_template.jinja").render(variables)


SNIPPETS = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }} {{ m['role'] }}\n{% endfor %}",
    "  {% if true %}\n  kept\n  {% endif %}\n after",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{% generation %}{% set x = 1 %}learn {{ x }}{% endgeneration %} {{ x is defined }}",
    "{% set ns = namespace(n=0, found=false) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.n = ns.n + 1 %}{% else %}none{% endfor %}{{ ns.n * 2 ~ '|' ~ ns.found }}",
    "{% macro m(a, b=2) %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1) }}"
    "{{ m(1, 3, 4, z=5) }}",
    "{% macro wrap() %}<{{ caller('x') }}>{% endmacro %}{% call(v) wrap() %}in {{ v }}{% endcall %}",
    "{{ messages | map(attribute='role') | join('~') }}{{ messages | selectattr('role', 'eq', 'x') | list }}",
    "{{ messages | rejectattr('role', '==', 'user') | map(attribute='content') | first }}",
    "{% if messages | selectattr('role', 'eq', 'robot') %}a generator is true{% endif %}",
    "{{ data | tojson }} {{ data | tojson(indent=2) }} {{ data | tojson(sort_keys=true) }}",
    "{{ data | dictsort }} {{ data.b | sort }} {{ data.b | unique | list }} {{ (data | items | list)[0] }}",
    "{{ ' x y '.strip().split(' ') }} {{ 'a-b'.replace('-', '<') | upper }} {{ 'abc'[::-1] }}{{ 'abc'[1:] }}",
    "{{ '%s is %05.1f' % ('pi', 3.14159) }} {{ '{} {b!r:>9}'.format(1, b='x') }} {{ '%d%%' | format(5) }}",
    "{{ 'xxaxx' | trim('x') }} {{ '  a ' | trim }} {{ 'aXa' | replace('a', 'b', 1) }} {{ 'q' in 'qwen' }}",
    "{{ none is none }} {{ missing is undefined }} {{ missing | default('d') }} {{ 7 is odd }} {{ 2 ** 10 }}",
    "{{ (1, 2) + (3,) }} {{ [1] * 3 }}{{ 7 // 2 % 2 }} {{ -3 | abs }} {{ '7' | int + 1 }}{{ 1 < 2 < 3 }}",
    "{{ {'a': {'b': [1, 2]}}['a'].b[-1] }} {{ data.get('zzz', 'fallback') }} {{ data.items() | list }}",
    "{{ '<&>' | safe + '<' }} {{ '<&>' | e }} {{ [1, 'a', none, 1.5, true] }} {{ 'a' ~ 1 ~ none }}",
    "{% set text %}block {{ 1 }}{% endset %}{{ text }}{% filter upper %}low{% endfilter %}"
    "{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ raw }}{% endraw %}{# gone #}",
    "{% for row in [[1, [2]], [3]] recursive %}{{ row if row is number else loop(row) }},{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ loop.previtem }}{{ a + b }}{{ loop.cycle('x', 'y') }}{% endfor %}",
    "{% for m in messages | reverse %}{{ loop.changed(m.role) }}{% endfor %}{{ messages[-1].role }}",
    "{{ raise_exception('no') if false else 'yes' }} {{ dict(a=1, b=2) }} {{ strftime_now('%%') }}",
]


@needs_transformers
@pytest.mark.parametrize("source", SNIPPETS)
def test_the_language_means_what_it_means_to_hugging_face(source: str):
    data = {"b": [3, 1, 3], "a": "<é & 'ü'>"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = transformers_rendering(source, [QUESTION, THOUGHTFUL], {"data": data})
    assert expected != "error"
    assert shown(source, messages=[QUESTION, THOUGHTFUL], data=data) == expected


DOUBLE = "{% set n = namespace(s='ab', l=[1], t=(1,)) %}{% for i in range(60) %}"
LAUGHS = DOUBLE + "{% set n.l = [n.l, n.l] %}{% endfor %}"
VARARGS = (
    "{% macro grow(n) %}{% set n.t = varargs %}{% endmacro %}"
    + DOUBLE
    + "{% set _ = grow(n, n.t, n.t) %}{% endfor %}"
)
MANY = "{% for a in range(99999) %}{% for b in range(99999) %}"
END = "{% endfor %}{% endfor %}"
BIG = "{% set s = 'ab ' * 300000 %}{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
HOSTILE = {
    "endless loops": MANY + END,
    "loops that keep nothing": MANY[:-2] + "if a == -1 %}" + END,
    "attributes in a loop": MANY + "{% set x = [" + "a.foo," * 4000 + "] %}" + END,
    "text in a loop": "{% for a in range(99999) %}" + "x" * 90_000 + "{% endfor %}",
    "text in a macro": "{% macro m() %}"
    + "x" * 90_000
    + "{% endmacro %}{% for a in range(99999) %}{{ m() }}{% endfor %}",
    "text in a caller": "{% macro m() %}{% for a in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}" + "x" * 90_000 + "{% endcall %}",
    "text in a block": "{% block b %}"
    + "x" * 90_000
    + "{% endblock %}{% for a in range(99999) %}{{ self.b() }}{% endfor %}",
    "a huge range": "{% for a in range(10**9) %}{% endfor %}",
    "a huge string": "{{ 'x' * 10**10 }}",
    "a huge constant": "{% set a = 'x' * 10000000000 %}",
    "a huge list": "{{ 10**9 * [1] }}",
    "a huge power": "{{ 2 ** (2 ** 40) }}",
    "repeated squaring": DOUBLE.replace("'ab'", "3") + "{% set n.s = n.s * n.s %}{% endfor %}",
    "doubling with +": DOUBLE + "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling with ~": DOUBLE + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling with %": DOUBLE + "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "doubling with format": DOUBLE + "{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
    "doubling with the join method": DOUBLE + "{% set n.s = n.s.join([n.s, n.s]) %}{% endfor %}",
    "doubling with the join filter": DOUBLE + "{% set n.s = [n.s, n.s] | join(n.s) %}{% endfor %}",
    "doubling with the replace method": DOUBLE + "{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
    "doubling with the replace filter": DOUBLE + "{% set n.s = n.s | replace('a', n.s) %}{% endfor %}",
    "doubling with set": DOUBLE + "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    "doubling a list": DOUBLE + "{% set n.l = n.l + n.l %}{% endfor %}",
    "a shared list printed": LAUGHS + "{{ n.l }}",
    "a shared list as JSON": LAUGHS + "{% set x = n.l | tojson %}",
    "a shared list trimmed": LAUGHS + "{% set x = n.l | trim %}",
    "shared lists compared": LAUGHS + LAUGHS.replace("n.l", "m.l").replace("n =", "m =") + "{{ n.l == m.l }}",
    "a shared list raised": LAUGHS + "{{ raise_exception(n.l) }}",
    "a shared list as a missing key": LAUGHS + "{{ messages[n.l].x }}",
    "a shared list searched for": LAUGHS + "{{ [].index(n.l) }}",
    "a shared tuple as a key": VARARGS + "{{ {n.t: 1} }}",
    "a shared tuple looked up": VARARGS + "{{ {}[n.t] }}",
    "a shared tuple got": VARARGS + "{{ {}.get(n.t) }}",
    "a shared tuple made unique": VARARGS + "{{ [n.t, n.t] | unique | list }}",
    "a shared string joined": "{{ range(99999) | map(attribute='x', default='y' * 99999) | join }}",
    "a padded string": "{{ 'x' | center(10**9) }}",
    "a padded string by method": "{{ 'x'.ljust(10**9) }}",
    "a padded number": "{{ '%1000000000d' % 1 }}",
    "a padded number by argument": "{{ '%*d' % (10**9, 1) }}",
    "a padded number by filter": "{{ '%1000000000d' | format(1) }}",
    "a padded number by format": "{{ '{:1000000000}'.format(1) }}",
    "a padded number by nested format": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "a padded number by format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "a padded number by a test": "{{ '%1000000000d' is odd }}",
    "a padded number by a selection": "{{ ['%1000000000d'] | select('divisibleby', 3) | list }}",
    "wide indentation": "{{ 'x\n' | indent(10**9) }}",
    "wide JSON": "{{ [1] | tojson(indent=10**9) }}",
    "a filled batch": "{{ [1] | batch(10**9, 0) | list }}",
    "lorem ipsum": "{{ lipsum(n=10**6) }}",
    "wide bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro twice in itself": "{% macro m(n) %}{{ m(n-1) ~ m(n-1) if n }}{% endmacro %}{{ m(60) }}",
    "a loop in itself": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a slow strip": "{% set s = 'a' * 999999 %}{{ s.strip('b' * 999999 + 'a') }}",
    "a slow trim": "{% set s = 'a' * 999999 %}{{ s | trim('b' * 999999 + 'a') }}",
    "searching in a loop": BIG + "{{ s.find('x') }}{{ 'x' in s }}{% endfor %}",
    "slices kept": BIG + "{% set n.l = [n.l, s[1:]] %}{% endfor %}",
    "words kept": BIG + "{% set n.l = [n.l, s.split()] %}{% endfor %}",
    "macros kept": MANY + "{% macro m() %}{% endmacro %}" + END,
    "chained lazy filters": DOUBLE.replace("60", "99999") + "{% set n.l = n.l | map('string') %}{% endfor %}",
    "selecting among many": "{% set l = range(99999) | list %}{{ l | select('in', l) | list }}",
    "a huge hexadecimal": "{{ ('f' * 999999) | int(0, 16) * 5 }}",
    "deep parentheses": "{{" + "(" * 9000 + "}}",
    "deep conditions": "{% if a %}" * 3000,
    "deep loops": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "deep sums": "{{ " + "+".join("a" * 9000) + " }}",
    "too many statements": "{{ a }}" * 100_000,
    "other files": "{% include '/etc/passwd' %}",
    "other templates": "{% extends 'x' %}",
    "autoescape by a constant": "{% autoescape 'x' * 10**9 %}{% endautoescape %}",
    "Python's classes": "{{ ''.__class__.__mro__ }}",
    "functions' globals": "{{ raise_exception.__globals__.x }}",
    "changing the messages": "{{ messages.append(1) }}",
    "underscored names": "{% set n = namespace({'__call__': 1}) %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_sentence(name: str):
    began, memory = time.thread_time(), peak_nbytes()
    with pytest.raises(TemplateError) as caught:
        shown(HOSTILE[name], messages=[QUESTION])
    assert str(caught.value).startswith("chat_template.jinja")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.thread_time() - began < 8
    assert peak_nbytes() - memory < 500 << 20


def peak_nbytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_a_namespace_that_holds_itself_can_be_printed():
    assert shown("{% set n = namespace() %}{% set n.a = [n, n] %}{{ n }}{{ n.a }}").count("<namespace>") == 3


def test_one_program_serves_several_threads():
    program = Program("{% for m in messages %}{{ m }}{% endfor %}", "chat_template.jinja")
    found: list[bool] = []

    def work(word: str) -> None:
        variables = {"messages": [word] * 200}
        found.extend(program.render(variables) == word * 200 for _ in range(5))

    threads = [threading.Thread(target=work, args=(word,)) for word in ("first", "second", "third")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 15
