"""Renders untrusted templates in Jinja's own sandbox, limited by a budget of work instead of a clock.

Every loop body and macro pays for its nodes and every computed value for its size, before Python does the
work. The compiler never computes constants. So a template ends within a few seconds and some hundred MB, in
any thread and on any system. Refuses include, import, autoescape, and filters whose cost is unknown.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Set, ValuesView
from datetime import datetime
from threading import Lock
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import TemplateError

BASE_WORK = 4 << 20  # in units of about one stored character or 50 ns of Python
WORK_PER_INPUT = 32  # added for each unit of the conversation's own weight
VALUE_WORK = 64
NODE_WORK = 4
MAX_NESTING = 64
MAX_TOKENS = 20_000  # compiling takes up to 2 s for so many; published ones have under 2,000
MAX_INT_BITS = 4096

FREE_FILTERS = "count d default first last length"
SHALLOW_FILTERS = "items list map reject rejectattr reverse select selectattr"
DEEP_FILTERS = (
    "abs capitalize dictsort e escape float format groupby int join lower max min replace safe sort string "
    "title tojson trim unique upper wordcount"
)
DEEP_TESTS = "== != < <= > >= eq equalto ge greaterthan gt in le lessthan lower lt ne upper"
NUMBER_TESTS = "divisibleby even odd"  # computed with %, which would format a string
STR_METHODS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal "
    "isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(STR_METHODS.split())),
    (dict, frozenset(("copy", "get", "items", "keys", "values"))),
    (list, frozenset(("copy", "count", "index"))),
    (tuple, frozenset(("count", "index"))),
    (int, frozenset()),
    (float, frozenset()),
    (bytes, frozenset()),
    (range, frozenset()),
    (type, frozenset()),
)
FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError)
FAILURES = (*FAILURES, AssertionError, SyntaxError, TypeError, ValueError)


class Program:
    """A compiled template; `origin` names it in errors. Threads may share it and take turns."""

    def __init__(self, source: str, origin: str):
        """Compile `source`. Raises TemplateError, with the line for bad syntax or a refused feature."""
        self.origin = origin
        self._lock = Lock()
        self._meter = Meter()
        self._meter.left = BASE_WORK
        try:
            self._template = _compile(_Environment(self._meter), source)
        except jinja2.TemplateSyntaxError as problem:
            raise TemplateError(f"{origin}, line {problem.lineno}: {_one_line(problem)}") from problem
        except FAILURES as problem:
            raise TemplateError(f"{origin} cannot be compiled: {_one_line(problem)}") from problem

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render with `variables`, plain JSON values. Raises TemplateError with the template's own words."""
        with self._lock:
            try:
                self._meter.allow(dict(variables))
                return self._template.render(variables)
            except FAILURES as problem:
                raise TemplateError(f"{self.origin}: {_one_line(problem)}") from problem


class Meter:
    """The work that is left. A value's shared parts count each time they occur, as they would in print."""

    left = 0

    def allow(self, inputs: Mapping[str, Any]) -> None:
        self.left = limit = 1 << 40
        self.weigh(inputs)
        self.left = BASE_WORK + WORK_PER_INPUT * (limit - self.left)

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise SecurityError("stopped, it does far more work than a conversation of this size needs")

    def weigh(self, value: Any, depth: int = 0) -> Any:
        """Pay for all of `value`, for an operation that walks through it. Returns it."""
        self.spend(VALUE_WORK)
        if depth > MAX_NESTING:
            raise SecurityError(f"stopped, it works on values nested more than {MAX_NESTING} deep")
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, int):
            self.spend(value.bit_length() // 8)
        elif isinstance(value, Mapping):
            for pair in value.items():
                self.weigh(pair[0], depth + 1)
                self.weigh(pair[1], depth + 1)
        elif isinstance(value, list | tuple | Set | ValuesView):
            for item in value:
                self.weigh(item, depth + 1)
        return value

    def weigh_outside(self, value: Any) -> Any:
        """Pay for the length of a new value whose parts existed before. Returns it."""
        if isinstance(value, str):
            self.spend(VALUE_WORK + len(value))
        elif isinstance(value, list | tuple | dict | Set | ValuesView):
            self.spend(VALUE_WORK + 16 * len(value))
        return value

    def pay(self, value: Any, units: int) -> Any:
        self.spend(units)
        return value

    def check_format(self, text: str, values: Any) -> None:
        """Pay for `text` filled with `values`; refuses widths over 99 and fields that look inside values."""
        if re.search(r"%[^a-zA-Z%]*(\d{3}|\*)|\{[^{}:]*[.\[]|\{[^{}]+\{|:[^{}]*\d{3}", text):
            raise SecurityError(f"the format {text[:40]!r} is not allowed: plain fields up to 99 wide are")
        before = self.left
        self.weigh(values)
        self.spend(len(text) + (text.count("%") + text.count("{")) * (before - self.left + 99))


class _Values(list[Any]):
    """The evaluated result of a lazy filter; true even if empty, as the generator would be."""

    def __bool__(self) -> bool:
        return True


class _Namespace(Namespace):
    """A namespace that prints as a word, as it may contain itself; refuses names that reach into Jinja."""

    def __init__(*args: Any, **kwargs: Any):
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the underscored name {name[:40]!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}`, which marks text for training; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Hugging Face's settings and helpers; every costly operation asks the meter first."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, meter: Meter):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
        )
        self.meter = meter
        # A function of the context keeps the compiler from computing constant output itself.
        self.finalize = jinja2.pass_context(lambda _, value: meter.weigh(value))
        self._price_functions()
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }

    def _price_functions(self) -> None:
        given = {**self.filters, "tojson": self._tojson, "join": self._join, "replace": self._replace}
        given |= {"format": self._format, "items": _item_pairs, "trim": self._trim}
        deep, outside = self.meter.weigh, self.meter.weigh_outside
        self.filters = {name: given[name] for name in FREE_FILTERS.split()}
        self.filters |= {name: self._with_price(given[name], outside) for name in SHALLOW_FILTERS.split()}
        self.filters |= {name: self._with_price(given[name], deep) for name in DEEP_FILTERS.split()}
        self.filters |= {_DEEP: deep, _OUTSIDE: outside, _PAY: self.meter.pay}
        self.tests |= {name: self._with_price(self.tests[name], deep) for name in DEEP_TESTS.split()}
        self.tests |= {
            name: self._with_price(self.tests[name], _require_number) for name in NUMBER_TESTS.split()
        }

    def _with_price(self, function: Callable[..., Any], price: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                price(value)
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                result = _Values(map(self.meter.weigh_outside, result))
            return self.meter.weigh_outside(result)

        return run

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        if operator == "%" and isinstance(left, str):
            meter.check_format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = (left.bit_length() + 1) * (abs(right) + 1) if operator == "**" else 0
            if max(bits, left.bit_length() + right.bit_length()) > MAX_INT_BITS:
                raise SecurityError(
                    f"stopped, it computes with whole numbers of more than {MAX_INT_BITS} bits"
                )
        elif operator == "*":
            times, sequence = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(sequence, str | list | tuple):
                meter.spend(max(times, 0) * len(sequence) * (1 if isinstance(sequence, str) else 16))
        result = super().call_binop(context, operator, left, right)
        return meter.weigh(result) if isinstance(result, tuple) else meter.weigh_outside(result)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(__obj, Macro):
            args = __self._pay_call(__obj, args, kwargs)
        return __self.meter.weigh_outside(super().call(__context, __obj, *args, **kwargs))

    def _pay_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Pay for a call before it runs. Returns the arguments, with iterators as lists."""
        args = tuple(_Values(value) if isinstance(value, Iterator) else value for value in args)
        self.meter.weigh((args, kwargs))
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self.meter.spend(len(owner) + _method_work(owner, function.__name__, *args))
        elif isinstance(owner, list | tuple):
            self.meter.weigh(owner)
        elif isinstance(owner, dict):
            self.meter.weigh_outside(owner)
        return args

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Pay for the key, which is hashed, and printed if there is no such item."""
        if not isinstance(argument, str | int):
            self.meter.weigh(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_ = super().wrap_str_format(value)
        if format_ is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            self.meter.check_format(value.__self__, (args, kwargs))
            return format_(*args, **kwargs)

        return run

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as in Hugging Face's filter, without escapes for HTML."""
        if indent is not None and (not isinstance(indent, int) or indent > 8):
            raise SecurityError("tojson: indent must be a number up to 8")
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = _Values(value)
        if attribute is not None:
            items = _Values(self.getitem(item, attribute) for item in items)
        self.meter.spend(len(str(d)) * len(items))
        self.meter.weigh(items)
        return str(d).join(map(str, items))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self.meter.spend(_replaced_size(text, old, new))
        return text.replace(old, new, -1 if count is None else count)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise jinja2.TemplateError("format: positional and named values cannot be mixed")
        self.meter.check_format(str(value), args or kwargs)
        return str(value) % (args or kwargs)

    def _trim(self, value: Any, chars: str | None = None) -> str:
        text = str(value)
        self.meter.spend(_strip_work(text, chars))
        return text.strip(chars)

    def _strftime_now(self, format: str) -> str:
        self.meter.spend(100 * len(format))
        return datetime.now().strftime(format)


# Filters by names that no template can spell.
_DEEP, _OUTSIDE, _PAY = "<deep>", "<outside>", "<pay>"


class _Pricing(NodeTransformer):
    """Adds a price to what Jinja compiles to bare Python: loops, macros, `~`, comparisons, slices, tuples."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_apply_filter(child, _DEEP) for child in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _apply_filter(node.expr, _DEEP)
        for operand in node.ops:
            operand.expr = _apply_filter(operand.expr, _DEEP)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _apply_filter(node, _OUTSIDE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Pay for every tuple when it is made, because hashing walks through it."""
        self.generic_visit(node)
        return _apply_filter(node, _DEEP) if node.ctx == "load" else node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> NoReturn:
        raise jinja2.TemplateSyntaxError("autoescape is not offered to chat templates", node.lineno)

    def visit_Include(self, node: nodes.Node) -> NoReturn:
        raise jinja2.TemplateSyntaxError("a chat template cannot read other templates", node.lineno)

    visit_Extends = visit_Import = visit_FromImport = visit_Include

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Pay for the key, which is hashed."""
        self.generic_visit(node)
        node.key = _apply_filter(node.key, _DEEP)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._pay_for_body(node)
        if isinstance(node.test, nodes.Expr):
            node.test = _apply_filter(node.test, _PAY, VALUE_WORK + _static_size(node.test))
        return node

    def _pay_for_body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        start = nodes.Const(None, lineno=node.lineno, environment=node.environment)
        tick = _apply_filter(start, _PAY, VALUE_WORK + _static_size(node))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno, environment=node.environment))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _pay_for_body


def _apply_filter(node: nodes.Expr, name: str, *constants: int) -> nodes.Filter:
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Filter(node, name, [nodes.Const(n, **place) for n in constants], [], None, None, **place)


def _static_size(node: nodes.Node) -> int:
    """The price of running everything inside `node` once: its nodes and its literal text."""
    text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return text + NODE_WORK * sum(1 for _ in node.find_all((nodes.Expr, nodes.Stmt)))


def _compile(environment: _Environment, source: str) -> jinja2.Template:
    for number, (line, *_) in enumerate(environment.lex(source)):
        if number > MAX_TOKENS:
            raise jinja2.TemplateSyntaxError(f"a template has at most {MAX_TOKENS:,} tokens", line)
    tree = _Pricing().visit(environment.parse(source))
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


def _item_pairs(value: Any) -> Any:
    """The pairs of a mapping; empty for an undefined variable."""
    if isinstance(value, jinja2.Undefined):
        return []
    if not isinstance(value, Mapping):
        raise TypeError("Can only get item pairs from a mapping.")
    return list(value.items())


def _method_work(text: str, name: str, *args: Any) -> int:
    """The cost of a method of `text` beyond its length and its arguments."""
    if name == "replace":
        return _replaced_size(text, *args[:2])
    if name == "join":
        return len(text) * len(args[0])
    if name in ("split", "rsplit"):
        return 64 * (text.count(args[0]) if args and args[0] else len(text) // 8)
    if name in ("strip", "lstrip", "rstrip"):
        return _strip_work(text, args[0] if args else None)
    return 0


def _replaced_size(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * len(new)


def _strip_work(text: str, chars: str | None) -> int:
    """The cost of looking for each character at the ends among `chars`."""
    return len(text) * len(chars or "") // 8


def _require_number(value: Any) -> None:
    if not isinstance(value, int | float):
        raise jinja2.TemplateError(f"expected a number, found {type(value).__name__}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _one_line(problem: BaseException) -> str:
    """The words of the problem on one line."""
    words = problem.message if isinstance(problem, jinja2.TemplateError) else str(problem)
    line = " ".join(str(words)[:2000].split())
    return line if len(line) <= 300 else line[:297] + "..."
