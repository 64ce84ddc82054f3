"""Arithmetic for the model: an expression is parsed and evaluated operator by operator, never by Python.

Numbers are bounded, so that no expression takes long.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from .base import ToolError

MAX_CHARACTERS = 1000
MAX_BITS = 14_000  # of a whole number; Python writes no more than 4,300 digits
MAX_FACTORIAL = 1000

Number = int | float
CONSTANTS: Mapping[str, Number] = {"pi": math.pi, "e": math.e, "tau": math.tau}


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) * base.bit_length() > MAX_BITS:
        raise ToolError("the result has too many digits")
    result = base**exponent
    if isinstance(result, complex):
        raise ToolError("the result is not a real number")
    return result


def _factorial(number: Number) -> int:
    if not isinstance(number, int) or not 0 <= number <= MAX_FACTORIAL:
        raise ToolError(f"factorial takes a whole number from 0 to {MAX_FACTORIAL}")
    return math.factorial(number)


OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "floor", "ceil", "gcd")},
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "hypot")},
    **{name: getattr(math, name) for name in ("sinh", "cosh", "tanh", "degrees", "radians")},
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
    "factorial": _factorial,
}


def evaluate(expression: str) -> Number:
    """Return the value of an expression. Raises ToolError."""
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"the expression has more than {MAX_CHARACTERS:,} characters")
    try:
        return _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    except ZeroDivisionError:
        raise ToolError("it divides by zero") from None
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise ToolError(f"the expression has no value: {error}") from None


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            return _bounded(OPERATORS[type(sign)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](*map(_value, arguments)))
    known = ", ".join([*FUNCTIONS, *CONSTANTS])
    raise ToolError(f"only numbers, + - * / // % **, parentheses and these are understood: {known}")


def _bounded(value: Any) -> Number:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError("the result has too many digits")
    return value
