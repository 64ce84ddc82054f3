"""The template language compared with Hugging Face's, and templates made to hang, fill memory or escape."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import TemplateError
from qchat.core.machine.memory import resident_nbytes
from qchat.core.text import jinja_renderer, jinja_sandbox, limited_process
from qchat.core.text.jinja_sandbox import Program
from tests.golden.make_templates import (
    QUESTION,
    TEMPLATES,
    THOUGHTFUL,
    cases,
    needs_transformers,
    transformers_rendering,
)


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
    "{{ 'a\nb' | indent(2) }} {{ data.b | sum }} {{ 2.567 | round(1) }} {{ data.b | batch(2) | list }}",
    "{{ 'x' | center(5) }}|{{ data.b | slice(2) | list }} {{ 'a b' | wordwrap(1) }} {{ data | xmlattr }}",
    "{{ data | tojson(separators=(',', ':')) }} {{ data.b | max }} {{ '%(a)03d' % {'a': 7} }}",
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


@pytest.mark.parametrize("source", SNIPPETS)
def test_a_template_means_the_same_in_both_processes(source: str):
    variables = {"messages": [QUESTION, THOUGHTFUL], "data": {"b": [3, 1, 3], "a": "<é & 'ü'>"}}
    ours, apart = (shown(source, **variables) for _ in range(2))
    assert ours == apart == jinja_renderer.render(source, variables)


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason=f"the templates are not at {TEMPLATES}")
@pytest.mark.parametrize("name", ["qwen3.5-small", "qwen3.5", "qwen3.6", "qwen3.8"])
def test_published_templates_are_trusted_and_render_alike_in_both_processes(name: str):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    here, apart = Program(source, "t"), Program(source + "{# changed #}", "t")
    assert here.trusted and not apart.trusted
    for case, messages, switches in list(cases())[::11]:
        texts = [rendering(program, {"messages": messages, **switches}) for program in (here, apart)]
        assert texts[0] == texts[1], case


def rendering(program: Program, variables: dict[str, Any]) -> str:
    try:
        return program.render(variables)
    except TemplateError as error:
        return f"error {error}"


LANGUAGE = {
    "{{ 'a\nb\n' | indent(2, first=true) }}": "  a\n  b\n",
    "{{ [{'n': 1}, {'n': 2}] | sum(attribute='n') }}": "3",
    "{{ 2.5 | round }} {{ 2.567 | round(2, 'floor') }}": "2.0 2.56",
    "{% for row in range(5) | batch(2, '-') %}{{ row }}{% endfor %}": "[0, 1][2, 3][4, '-']",
    "{{ {'b': 1, 'a': [none]} | tojson(indent=1, sort_keys=true) }}": '{\n "a": [\n  null\n ],\n "b": 1\n}',
    "{{ [1, 2] | tojson(separators=(',', ':')) }}": "[1,2]",
    "{% set n = namespace() %}{% set n.b = [n] %}{{ n }}": "<Namespace {'b': [<Namespace {...}>]}>",
}


@pytest.mark.parametrize("source", LANGUAGE)
def test_all_of_jinjas_language_is_offered(source: str):
    assert shown(source) == LANGUAGE[source]


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
PATH = "{% set a = '0.' * 200000 ~ '0' %}{% set l = ['x'] * 40000 %}"
RIGHT = "{% set t = 'a' * 600000 %}{% set n = 'ab' ~ 'a' * 300000 %}"
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
    "underscored names": "{% set n = namespace({'__call__': 1}) %}{{ n() }}",
    "a width behind a key": "{{ '%(a)999999999d' % {'a': 1} }}",
    "a precision behind a key by filter": "{{ '%(a).600000000f' | format(a=1.5) }}",
    "long separators of JSON": "{% set s = 'A' * 200000 %}{{ ([1] * 20000) | tojson(separators=(s, ':')) }}",
    "a dotted path in map": PATH + "{{ l | map(attribute=a) | list | length }}",
    "a dotted path in selectattr": PATH + "{{ l | selectattr(a) | list | length }}",
    "a dotted path in groupby": PATH + "{{ l | groupby(a) | length }}",
    "a list of paths in sort": PATH.replace(".", ",") + "{{ l | sort(attribute=a) | length }}",
    "a search from the right": RIGHT + "{{ t.rfind(n) }}",
    "an index from the right": RIGHT + "{{ t.rindex(n) }}",
    "a partition from the right": RIGHT + "{{ t.rpartition(n) | length }}",
    "a split from the right": RIGHT + "{{ t.rsplit(n) | length }}",
    "an item of a letter": "{{ messages.0.content.0.0.0 }}{{ messages.0.nothing.0 }}",
    "a wrong separator": "{{ messages | tojson(separators='x') }}",
    "a sum of texts": "{{ ['a', 'b'] | sum }}",
    "an endless text": MANY + "{{ 'x' * 9999 }}" + END,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch):
    before = peak_nbytes(resource.RUSAGE_CHILDREN)
    monkeypatch.setattr(limited_process, "BASE_SECONDS", 0.2)
    began, memory = time.thread_time(), peak_nbytes(resource.RUSAGE_SELF)
    with pytest.raises(TemplateError) as caught:
        shown(HOSTILE[name], messages=[QUESTION])
    assert str(caught.value).startswith("chat_template.jinja")
    assert len(str(caught.value)) > len("chat_template.jinja: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.thread_time() - began < 8
    assert peak_nbytes(resource.RUSAGE_SELF) - memory < 500 << 20
    # the peak of all children so far, of which others may have been larger
    assert peak_nbytes(resource.RUSAGE_CHILDREN) <= max(before, 700 << 20)


def peak_nbytes(who: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def renderer() -> "subprocess.Popen[bytes]":
    """The process that rendered last."""
    shown("warm")
    process = jinja_sandbox.process.running
    assert process is not None
    return process


@pytest.mark.slow
def test_a_template_at_its_limit_of_time_is_stopped_within_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(TemplateError, match="more time or memory"):
        shown(HOSTILE["endless loops"])
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5


def test_the_process_stays_for_the_next_template_and_is_replaced_after_a_breach():
    first = renderer()
    with pytest.raises(TemplateError, match="no"):
        shown("{{ raise_exception('no') }}")
    assert renderer() is first
    with pytest.raises(TemplateError, match="more time or memory"):
        shown(HOSTILE["a huge string"])
    assert first.poll() is not None and renderer() is not first


def test_a_process_that_was_killed_meanwhile_is_replaced_unnoticed():
    first = renderer()
    first.kill()
    first.wait()
    assert shown("{{ 1 + 1 }}") == "2"


def test_memory_is_watched_where_the_system_sets_no_limit(monkeypatch: pytest.MonkeyPatch):
    """As on macOS: the process is given twice what it may take, and ended for what it occupies."""
    monkeypatch.setattr(limited_process, "BASE_NBYTES", 64 << 20)
    process = renderer()
    assert 1 << 20 < resident_nbytes(process.pid) < 64 << 20
    monkeypatch.setattr(limited_process, "HEADROOM", 64)
    with pytest.raises(TemplateError, match="more time or memory"):
        shown(BIG + "{% set n.l = [n.l, s ~ i] %}{% endfor %}")
    assert process.returncode == -signal.SIGKILL


def wait_until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def test_the_process_ends_with_a_parent_that_is_killed():
    script = (
        "import time\n"
        "from qchat.core.text.jinja_sandbox import Program, process\n"
        "Program('x', 't')\n"
        "print(process.running.pid, flush=True)\n"
        "time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not exists(child))


def exists(pid: int) -> bool:
    """Whether `pid` runs; a zombie that nobody has waited for has ended."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_process_knows_no_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    jinja_sandbox.process.close()
    names = Path(f"/proc/{renderer().pid}/environ")
    if names.exists():
        assert b"secret" not in names.read_bytes() and b"TZ=Asia/Tokyo" in names.read_bytes()
    jinja_sandbox.process.close()


def test_values_that_are_not_json_are_refused_in_a_sentence():
    with pytest.raises(TemplateError, match="cannot be written as JSON: found a object"):
        shown("{{ x }}", x=object())


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
