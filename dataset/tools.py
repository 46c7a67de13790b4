"""A few real tools that run on this machine; a model may call them in the sample data, in GRPO and in the tool check.

Nothing evaluates code: the calculator walks the syntax tree of an arithmetic expression. A tool takes its arguments as
a dict and returns text; a call that cannot be answered returns a line that says why, for the model to read.
"""

import ast
import datetime
import operator
import re
from collections.abc import Callable, Collection
from fractions import Fraction

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
LARGEST = 10**30  # results beyond it are refused
LONGEST = 200  # characters of an expression

# one unit of each, in the base unit of its kind: metres, kilograms, seconds, litres
UNITS = {
    "length": {"mm": "0.001", "cm": "0.01", "m": "1", "km": "1000", "inch": "0.0254", "mile": "1609.344"},
    "mass": {"g": "0.001", "kg": "1", "t": "1000", "ounce": "0.028349523125", "pound": "0.45359237"},
    "time": {"s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "volume": {"ml": "0.001", "l": "1", "m3": "1000"},
}  # fmt: skip


class ToolError(ValueError):
    """A call cannot be answered; the model reads the reason as the tool's result."""


def calculator(expression: str) -> str:
    """Return the exact value of an expression with + - * / // % and brackets; fractions get six decimals."""
    expression = str(expression).replace("×", "*").replace("÷", "/").replace("−", "-")
    if len(expression) > LONGEST:
        raise ToolError(f"the expression is longer than {LONGEST} characters")
    expression = expression.strip()
    try:
        value = _value(ast.parse(expression, mode="eval").body, expression)
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ToolError(f"{expression!r} is not an arithmetic expression") from error
    return number_text(value)


def _value(node: ast.AST, source: str) -> Fraction:
    number = node.value if isinstance(node, ast.Constant) else None
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= LARGEST:
        # a float has lost digits that its source text holds
        value = Fraction(number) if isinstance(number, int) else _exact(ast.get_source_segment(source, node))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = Fraction(OPERATORS[type(node.op)](_value(node.left, source), _value(node.right, source)))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand, source))
    else:
        raise ToolError("only numbers up to 1e30, + - * / // % and brackets are understood")
    if abs(value) > LARGEST:
        raise ToolError(f"a value beyond {LARGEST:.0e} came up")
    return value


def _exact(text: str) -> Fraction:
    """Return the number that a text is. Raises ValueError, before an exponent like e10000000 takes hours."""
    if len(text) > LONGEST or re.search(r"[eE][-+]?[\d_]{4}", text):
        raise ToolError(f"{text[:40]!r} is too long a number")
    return Fraction(text)


def number_text(value: Fraction) -> str:
    """Return a whole number in full, any other with up to six decimals."""
    whole, decimals = divmod(round(abs(value) * 10**6), 10**6)
    sign = "-" if value < 0 and (whole or decimals) else ""
    return f"{sign}{whole}.{decimals:06}".rstrip("0").rstrip(".")


def convert_units(value: float | str, source: str, target: str) -> str:
    """Return a quantity in another unit of the same kind."""
    try:
        amount = _exact(str(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ToolError(f"{value!r} is not a number, or too long a one") from error
    for units in UNITS.values():
        if source in units and target in units:
            return number_text(amount * Fraction(units[source]) / Fraction(units[target]))
    known = ", ".join(name for units in UNITS.values() for name in units)
    raise ToolError(f"cannot convert {source!r} to {target!r}; units: {known}")


def clock(timezone_hours: float = 0) -> str:
    """Return date and time at this offset from UTC in hours."""
    if not -24 < float(timezone_hours) < 24:
        raise ToolError("timezone_hours must lie between -24 and 24")
    zone = datetime.timezone(datetime.timedelta(hours=float(timezone_hours)))
    return datetime.datetime.now(zone).strftime("%Y-%m-%d %H:%M")


def text_length(text: str) -> str:
    """Return the number of characters in a text."""
    return str(len(str(text)))


FUNCTIONS: dict[str, Callable[..., str]] = {
    "calculator": calculator,
    "convert_units": convert_units,
    "clock": clock,
    "text_length": text_length,
}


def offered_tools(turns: list[dict]) -> dict[str, dict]:
    """name -> tool, of those that a conversation offers."""
    tools = (tool for turn in turns for tool in turn.get("tools", ()))
    return {str(tool.get("function", tool).get("name")): tool for tool in tools}


def unknown_tools(turns: list[dict]) -> str:
    """Say which of the tools that a conversation offers does not run here; "" if all do."""
    unknown = sorted(offered_tools(turns).keys() - FUNCTIONS.keys())
    return f"no tool {unknown[0]!r} runs here; known are {', '.join(FUNCTIONS)}" if unknown else ""


def call_tool(name: str, arguments: dict, offered: Collection[str] = FUNCTIONS) -> str:
    """Return the result of a call as text; after a mistake in the call, a text that begins with "error:"."""
    function = FUNCTIONS.get(name) if name in offered else None
    if function is None:
        return f"error: there is no tool {name!r}; tools: {', '.join(offered)}"
    try:
        return function(**arguments)
    except (TypeError, ValueError, OverflowError) as error:  # ToolError is a ValueError
        return f"error: {error}"
