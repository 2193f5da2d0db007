"""Decides what an arithmetic expression comes to: exactly, without `eval`, within bounds on its size and numbers."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

MAX_CHARS = 500
MAX_BITS = 4_096
"""The largest numerator or denominator on the way: 1,233 digits. A larger one is refused before it is computed."""
MAX_EXPONENT = 4_096
DIGITS = 15
"""Significant digits of a result that is not whole."""


class CalculationError(ValueError):
    """The expression is no arithmetic, or too large; the message says which."""


def calculate(expression: str) -> str:
    """Returns the value of an expression: whole numbers in full, others to 15 significant digits.

    It may have numbers, parentheses, `+ - * / // % **`, `pi`, `e` and the functions of `FUNCTIONS`. Numbers are
    fractions, so 0.1 + 0.2 is 0.3; functions are computed in floating point.

    Raises:
        CalculationError: It cannot be computed.
    """
    if len(expression) > MAX_CHARS:
        raise CalculationError(f"the expression has {len(expression)} characters; at most {MAX_CHARS}")
    try:
        parsed = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculationError("it is not an arithmetic expression") from None
    try:
        return _text(_value(parsed))
    except CalculationError:
        raise
    except ZeroDivisionError:
        raise CalculationError("it divides by zero") from None
    except OverflowError:
        raise CalculationError("a number is too large") from None
    except RecursionError:
        raise CalculationError("it is nested too deeply") from None
    except TypeError:
        raise CalculationError("a function has too few or too many arguments") from None
    except ValueError:
        raise CalculationError("it has no value among the real numbers") from None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return _checked(_fraction(value))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _checked(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _checked(_fraction(FUNCTIONS[name](*(_value(argument) for argument in arguments))))
        case _:
            raise CalculationError(f"{ast.unparse(node)[:40]!r} is not allowed in an arithmetic expression")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _checked(_fraction(math.pow(base, exponent)))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MAX_EXPONENT or size * abs(exponent) > MAX_BITS:
        raise CalculationError("a power is too large")
    return Fraction(base ** int(exponent))


def _fraction(value: Any) -> Fraction:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CalculationError("a number is too large")
        return Fraction(repr(value))  # the decimal that was written, not the binary number nearest to it
    return Fraction(value)


def _checked(value: Fraction) -> Fraction:
    """Refuses a number that has grown too large. One operation at most doubles the length, so this is in time."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculationError("a number is too large")
    return value


def _text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = DIGITS
        quotient = Decimal(value.numerator) / Decimal(value.denominator)
    return format(quotient.normalize(), "f" if -7 < quotient.adjusted() < 30 else "e")


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CONSTANTS = {"pi": Fraction(repr(math.pi)), "e": Fraction(repr(math.e))}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "round": lambda value, digits=0: round(value, max(-MAX_CHARS, min(MAX_CHARS, int(digits)))),
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
