"""The local tools: exact arithmetic without evaluating code, and errors that a model can read."""

import re

import pytest
from conftest import TOOLS

from dataset.sample.make_sample import CALCULATOR
from dataset.tools import FUNCTIONS, call_tool


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(3+4)", "84"),
        ("1/3", "0.333333"),
        ("0.1+0.2", "0.3"),
        ("7//2 - 5%3", "1"),
        ("-(2 − 5) × 10 ÷ 4", "7.5"),
        ("123456789123456789 * 10", "1234567891234567890"),
        ("987654321987654321/2", "493827160993827160.5"),
        ("123456789012345678/7", "17636684144620811.142857"),
        ("1234567890123456789.5+1", "1234567890123456790.5"),
        ("-1/10000000", "0"),
    ],
)
def test_calculator(expression, value):
    assert call_tool("calculator", {"expression": expression}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "2**9",
        "__import__('os')",
        "1/0",
        "1e400",
        "1e-99999",
        "10**20*10**20",
        "(1+2",
        "a",
        "",
        "True",
        "9" * 300,
        "(" * 150 + "1",
    ],
)
def test_calculator_refuses_what_is_not_arithmetic(expression):
    assert call_tool("calculator", {"expression": expression}).startswith("error: ")


def test_units_clock_and_length():
    assert call_tool("convert_units", {"value": 3, "source": "km", "target": "m"}) == "3000"
    assert call_tool("convert_units", {"value": "2.5", "source": "h", "target": "min"}) == "150"
    assert "cannot convert 'km' to 'kg'" in call_tool("convert_units", {"value": 3, "source": "km", "target": "kg"})
    for long in ("1e10000000", "1e-1_000_000_000", "9" * 300):  # which would take hours to multiply
        assert "too long" in call_tool("convert_units", {"value": long, "source": "km", "target": "m"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", call_tool("clock", {"timezone_hours": 8}))
    assert call_tool("text_length", {"text": "床前明月光"}) == "5"


def test_a_wrong_call_is_told_to_the_model():
    assert "there is no tool 'shell'" in call_tool("shell", {})
    assert call_tool("calculator", {"sum": 1}).startswith("error: ")
    assert call_tool("clock", {"timezone_hours": "noon"}).startswith("error: ")


def test_every_tool_has_a_schema_of_its_parameters():
    assert TOOLS.keys() == FUNCTIONS.keys() and TOOLS["calculator"] == CALCULATOR
    for name, tool in TOOLS.items():
        parameters = tool["function"]["parameters"]
        names = FUNCTIONS[name].__code__.co_varnames[: FUNCTIONS[name].__code__.co_argcount]
        assert tuple(parameters["properties"]) == names and set(parameters["required"]) <= set(names)
